//! The leader's side of a restore over several hosts: where which member goes, and
//! what is said to whom.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jsonrpsee::core::client::Client;

use super::super::super::copy;
use super::super::super::error::Error;
use super::super::super::fit::Needs;
use super::super::super::journal;
use super::super::super::peers::Remote;
use super::super::super::restore;
use super::super::super::rpc::{
    JobDone, JobId, JobTold, PeerClient, RestoreFrames, RestoreOrder, RestoreStage, RestoreState,
    SnapshotRef, Ticket,
};
use super::super::jobs::Job;
use super::super::{lock, Daemon};
use super::{lacking, Building, HOLD_MAX, LEASE};
use crate::image::{Manifest, Member, Name, Snapshot, Store};
use crate::sentence::sentence;

/// How often the leader asks.
const POLL: Duration = Duration::from_millis(150);
/// How long the leader tries to reach a host that has yet to let its members
/// run; that host asks by itself after this.
const RELEASE_MAX: Duration = Duration::from_secs(20);
/// How long members that run wait for a host that doesn't say that its own do, before
/// they go on.
const RUNNING_MAX: Duration = Duration::from_secs(12);
/// How long the leader waits for all members to be connected, since all run: a bit
/// longer than hosts do by themselves.
const CONNECTED_MAX: Duration = Duration::from_secs(22);
/// How often it asks for that. Frames wait.
const CONNECTED_POLL: Duration = Duration::from_millis(30);
/// How long it tries to tell hosts to let frames go; they do so by themselves
/// after [`HOLD_MAX`].
const FLOW_MAX: Duration = Duration::from_secs(5);

impl Daemon {
    /// Starts a restore as a job.
    pub(in super::super) fn start_restore(
        self: &Arc<Self>,
        order: RestoreOrder,
    ) -> Result<JobId, Error> {
        let interrupted = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&interrupted);
        let interrupt = move || flag.store(true, Ordering::Relaxed);
        let daemon = Arc::clone(self);
        let work = move |job: &Arc<Job>| {
            let lead = LeadRestore {
                daemon: &daemon,
                order: &order,
                interrupted: &interrupted,
                job,
            };
            match lead.run() {
                Ok(()) => JobDone::Restore,
                Err(error) => JobDone::Failed(sentence(&error)),
            }
        };
        self.jobs
            .start(interrupt, work)
            .map_err(Error::start("start a thread"))
    }
}

struct LeadRestore<'a> {
    daemon: &'a Arc<Daemon>,
    order: &'a RestoreOrder,
    interrupted: &'a AtomicBool,
    job: &'a Arc<Job>,
}

/// A host whose members are being built.
struct Party {
    name: Name,
    /// None for this host.
    remote: Option<Arc<Remote>>,
    /// The members that it builds.
    members: Vec<Name>,
    told: usize,
    heard: Instant,
    state: Option<RestoreState>,
}

impl LeadRestore<'_> {
    fn run(&self) -> Result<(), Error> {
        let manifest = self.open()?.manifest().clone();
        self.check_places(&manifest)?;
        let mut parties = self.parties(&manifest)?;
        let lacks = self.check_fit(&parties, &manifest)?;
        self.check_left_behind(&manifest)?;
        self.fetch(&manifest, &parties, lacks)?;
        let number = crate::random::number().map_err(Error::start("get a random number"))?;
        let ticket = Ticket(Name::new(&format!("{number:016x}"))?);
        lock(&self.daemon.restores.leading).insert(ticket.clone());
        let result = self.build(&mut parties, &ticket, &manifest);
        let result = match result {
            Ok(()) => self.release(&mut parties, &ticket),
            Err(error) => {
                self.give_up(&parties, &ticket);
                Err(error)
            }
        };
        lock(&self.daemon.restores.leading).remove(&ticket);
        if result.is_ok() {
            self.tell_of_places(&manifest);
        }
        result
    }

    fn snapshot(&self) -> &SnapshotRef {
        &self.order.snapshot
    }

    fn copy(&self) -> Option<&Name> {
        self.order.copy.as_ref()
    }

    fn open(&self) -> Result<Snapshot, Error> {
        let wanted = self.snapshot();
        let catalogue = Store::open(&self.order.store)?.catalogue();
        Ok(catalogue.get(&wanted.vne, &wanted.id)?)
    }

    /// The host that a member is restored on.
    fn place<'m>(&'m self, member: &'m Member) -> &'m Name {
        let mut places = self.order.on.iter();
        let placed = places.find(|place| place.member == member.name);
        placed.map_or(&member.host, |place| &place.host)
    }

    /// Whether that isn't the one that it ran on.
    fn moves(&self, member: &Member) -> bool {
        *self.place(member) != member.host
    }

    fn check_places(&self, manifest: &Manifest) -> Result<(), Error> {
        let members = &manifest.members;
        for (at, place) in self.order.on.iter().enumerate() {
            let Some(member) = members.iter().find(|member| member.name == place.member) else {
                let names: Vec<_> = members.iter().map(|member| member.name.as_str()).collect();
                return Err(Error::Failed(format!(
                    "{} has no member '{}': its members are {}",
                    self.snapshot(),
                    place.member,
                    names.join(", ")
                )));
            };
            let mut earlier = self.order.on.iter().take(at);
            if earlier.any(|earlier| earlier.member == place.member) {
                return Err(Error::Failed(format!("'{}' is placed twice", place.member)));
            }
            if self.moves(member) && !member.disks.is_empty() {
                return Err(Error::Failed(format!(
                    "'{}' can't be restored on host '{}': its disks in the snapshot are on host \
                     '{}', and aren't copied",
                    member.name, place.host, member.host
                )));
            }
        }
        if let Some(copy) = self.copy() {
            let places: Vec<_> = members
                .iter()
                .map(|member| (self.place(member), &member.name))
                .collect();
            self.daemon.check_copy(copy, &places, &self.daemon.here())?;
        }
        Ok(())
    }

    fn parties(&self, manifest: &Manifest) -> Result<Vec<Party>, Error> {
        let mut parties: Vec<Party> = Vec::new();
        for member in &manifest.members {
            let host = self.place(member);
            if let Some(party) = parties.iter_mut().find(|party| party.name == *host) {
                party.members.push(member.name.clone());
                continue;
            }
            parties.push(Party {
                name: host.clone(),
                remote: self.way_to(host)?,
                members: vec![member.name.clone()],
                told: 0,
                heard: Instant::now(),
                state: None,
            });
        }
        Ok(parties)
    }

    /// None for this host.
    fn way_to(&self, host: &Name) -> Result<Option<Arc<Remote>>, Error> {
        if *host == self.daemon.here() {
            return Ok(None);
        }
        let remote = self.daemon.peer_for(host, &self.snapshot().vne)?;
        Ok(Some(remote))
    }

    /// Asks each host whether its members can run there, before anything is touched.
    /// Which parts of the snapshot they lack, by the order of `parties`.
    fn check_fit(&self, parties: &[Party], manifest: &Manifest) -> Result<Vec<Vec<Name>>, Error> {
        let mut problems = Vec::new();
        let mut lacks = Vec::new();
        for party in parties {
            let chosen = |member: &&Member| party.members.contains(&member.name);
            let members = manifest.members.iter().filter(chosen);
            let needs = Needs::of(manifest, members, self.copy())?;
            let found = match &party.remote {
                None => {
                    let opened = self.open()?;
                    let here = lacking(Some(opened.manifest()), &party.members);
                    lacks.push(here);
                    needs.problems_here(&self.daemon.program)?
                }
                Some(remote) => {
                    let (snapshot, copy) = (self.snapshot().clone(), self.copy().cloned());
                    let names = party.members.clone();
                    let call = |client: Arc<Client>| async move {
                        client.fit(snapshot, names, copy, needs).await
                    };
                    let fit = self.call(remote, call);
                    let fit = fit.map_err(|why| refused(&party.name, remote, &why))?;
                    lacks.push(fit.lacks);
                    fit.problems
                }
            };
            for problem in found {
                problems.push(format!("{}: {problem}", party.name));
            }
        }
        match problems.is_empty() {
            true => Ok(lacks),
            false => Err(Error::Failed(format!(
                "{}; nothing was touched",
                problems.join("; ")
            ))),
        }
    }

    /// A member that moves must not run any more where it ran.
    fn check_left_behind(&self, manifest: &Manifest) -> Result<(), Error> {
        if self.copy().is_some() {
            return Ok(());
        }
        let moving: Vec<&Member> = manifest.members.iter().filter(|m| self.moves(m)).collect();
        let mut hosts: Vec<&Name> = moving.iter().map(|member| &member.host).collect();
        hosts.sort_unstable();
        hosts.dedup();
        for host in hosts {
            let left = moving.iter().filter(|member| member.host == *host);
            let names: Vec<Name> = left.map(|member| member.name.clone()).collect();
            let absent = Needs {
                absent: names.clone(),
                ..Needs::default()
            };
            let problems = match self.way_to(host) {
                Ok(None) => Ok(absent.problems_here(&self.daemon.program)?),
                Ok(Some(remote)) => {
                    let snapshot = self.snapshot().clone();
                    let call = |client: Arc<Client>| async move {
                        client.fit(snapshot, Vec::new(), None, absent).await
                    };
                    self.call(&remote, call).map(|fit| fit.problems)
                }
                Err(error) => Err(sentence(&error)),
            };
            match problems {
                Ok(problems) if problems.is_empty() => {}
                Ok(problems) => {
                    return Err(Error::Failed(format!(
                        "{host}: {}; nothing was touched",
                        problems.join("; ")
                    )));
                }
                // It may be gone for good, which may be why they move.
                Err(why) => {
                    let names: Vec<_> = names.iter().map(Name::as_str).collect();
                    self.job.tell(JobTold::Warning(format!(
                        "{host}: {why}: make sure that {} doesn't run there",
                        names.join(", ")
                    )));
                }
            }
        }
        Ok(())
    }

    /// Has the parts that hosts lack copied to them, from where they are.
    fn fetch(
        &self,
        manifest: &Manifest,
        parties: &[Party],
        lacks: Vec<Vec<Name>>,
    ) -> Result<(), Error> {
        let opened = self.open()?;
        for (party, lacks) in parties.iter().zip(lacks) {
            let mut sources: Vec<Name> = Vec::new();
            for member in manifest.members.iter().filter(|m| lacks.contains(&m.name)) {
                let mut here = opened.manifest().members_here();
                let source = match here.any(|stored| stored.name == member.name) {
                    true => self.daemon.here(),
                    false => member.host.clone(),
                };
                if source == party.name {
                    return Err(Error::Failed(format!(
                        "{source}: '{}' isn't in the snapshot there any more; nothing was touched",
                        member.name
                    )));
                }
                if !sources.contains(&source) {
                    sources.push(source);
                }
            }
            for source in sources {
                log::info!(
                    "{}: to be copied from '{source}' to '{}'",
                    self.snapshot(),
                    party.name
                );
                self.fetch_from(&source, &party.name)?;
            }
        }
        Ok(())
    }

    fn fetch_from(&self, source: &Name, to: &Name) -> Result<(), Error> {
        let snapshot = self.snapshot();
        let Some(remote) = self.way_to(source)? else {
            let (store, flag) = (&self.order.store, self.interrupted);
            self.daemon.copy(snapshot, store, to, flag, self.job)?;
            return Ok(());
        };
        let failed = |why: &str| Error::Failed(format!("{source}: {why}; nothing was touched"));
        let (of, host) = (snapshot.clone(), to.clone());
        let begun = self.call(&remote, |client| async move { client.send(of, host).await });
        let job = begun.map_err(|why| failed(&why))?;
        loop {
            if self.interrupted.load(Ordering::Relaxed) {
                // It ends by itself when nobody asks for it.
                return Err(Error::Failed(String::from("interrupted")));
            }
            let sent = self.call(&remote, |client| async move { client.sent(job).await });
            let sent = sent.map_err(|why| failed(&why))?;
            for told in sent.told {
                if matches!(told, JobTold::Copying(_)) {
                    self.job.tell(told);
                }
            }
            match sent.done {
                None => {}
                Some(JobDone::Copied(_)) => return Ok(()),
                Some(JobDone::Failed(why)) => return Err(failed(&why)),
                Some(_) => return Err(failed("it did something else")),
            }
        }
    }

    /// What the admin has to do for the next take.
    fn tell_of_places(&self, manifest: &Manifest) {
        if self.copy().is_some() || !manifest.members.iter().any(|member| self.moves(member)) {
            return;
        }
        let places = manifest.members.iter();
        let places: Vec<_> = places
            .map(|member| format!("\"{}:{}\"", self.place(member), member.name))
            .collect();
        self.job.tell(JobTold::Warning(format!(
            "for what comes next, /etc/xen/vne/{}.cfg has to say on each host: members = [ {} ]",
            self.snapshot().vne,
            places.join(", ")
        )));
    }

    fn build(
        &self,
        parties: &mut [Party],
        ticket: &Ticket,
        manifest: &Manifest,
    ) -> Result<(), Error> {
        let mut names = Vec::new();
        for member in &manifest.members {
            let name = match self.copy() {
                None => member.name.clone(),
                Some(copy) => copy::name_in(copy, &member.name)?,
            };
            names.push(format!("{}:{name}", self.place(member)));
        }
        self.job.tell(JobTold::Building(names));
        let failed = |name: &Name, why: &str| Error::Failed(format!("{name}: {why}"));
        for party in parties.iter() {
            let (ticket, snapshot) = (ticket.clone(), self.snapshot().clone());
            let (copy, paused) = (self.order.copy.clone(), self.order.paused);
            // Without a word about places each host builds what ran there.
            let members = Some(party.members.clone()).filter(|_| !self.order.on.is_empty());
            match &party.remote {
                None => {
                    let what = Building {
                        members,
                        copy,
                        paused,
                    };
                    let place = (self.open()?, self.order.store.clone());
                    let here = self.daemon.here();
                    self.daemon.build_from(&here, ticket, place, what)?;
                }
                Some(remote) => self
                    .call(remote, |client| async move {
                        match (members, copy) {
                            (Some(members), copy) => {
                                let call =
                                    client.build_members(ticket, snapshot, members, copy, paused);
                                call.await
                            }
                            (None, None) => client.build(ticket, snapshot, Some(paused)).await,
                            (None, Some(copy)) => {
                                client.build_copy(ticket, snapshot, copy, paused).await
                            }
                        }
                    })
                    .map_err(|why| failed(&party.name, &why))?,
            }
        }
        loop {
            if self.interrupted.load(Ordering::Relaxed) {
                return Err(Error::Failed(String::from("interrupted")));
            }
            for party in parties.iter_mut() {
                self.look(party, ticket)
                    .map_err(|why| failed(&party.name, &why))?;
                if let Some(RestoreStage::Gone(why)) = party.stage() {
                    let why = why.as_deref().unwrap_or("it gave up");
                    return Err(failed(&party.name, why));
                }
            }
            if parties
                .iter()
                .all(|party| party.stage() == Some(&RestoreStage::Built))
            {
                return Ok(());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Asks a host how far it is.
    fn look(&self, party: &mut Party, ticket: &Ticket) -> Result<(), String> {
        let state = match &party.remote {
            None => self
                .daemon
                .restore_state(&self.daemon.here(), ticket)
                .ok_or_else(|| String::from("its part is gone")),
            Some(remote) => {
                let ticket = ticket.clone();
                self.call(remote, |client| async move { client.built(ticket).await })
            }
        };
        match state {
            Ok(state) => {
                party.heard = Instant::now();
                for name in state.built.iter().skip(party.told) {
                    self.job
                        .tell(JobTold::Built(format!("{}:{name}", party.name)));
                }
                party.told = state.built.len();
                party.state = Some(state);
                Ok(())
            }
            Err(why) if party.heard.elapsed() > LEASE => Err(why),
            Err(_) => Ok(()),
        }
    }

    /// All members run from here on, on each host as soon as it hears so.
    fn release(&self, parties: &mut [Party], ticket: &Ticket) -> Result<(), Error> {
        // There from the decision on, until all hosts have heard of it. After a
        // restart of this host nothing is left that it could be about.
        let decision = journal::decision(&self.daemon.run_dir.join("vne"), ticket.0.as_str());
        if let Err(error) = write_decision(&decision, self.order.paused) {
            self.give_up(parties, ticket);
            return Err(Error::Failed(format!("{}: {error}", decision.display())));
        }
        let start = Instant::now();
        self.order_release(parties, ticket);
        let mut flowing = false;
        loop {
            self.look_at_all(parties, ticket);
            if parties.iter().all(Party::is_over) || start.elapsed() > RELEASE_MAX {
                break;
            }
            // Those that run don't wait for one that isn't heard of.
            if !flowing && start.elapsed() > RUNNING_MAX {
                self.let_frames_go(parties, ticket);
                flowing = true;
            }
            std::thread::sleep(CONNECTED_POLL);
            self.order_release(parties, ticket);
        }
        let late = parties.iter().filter(|party| !party.is_over());
        let late: Vec<&str> = late.map(|party| party.name.as_str()).collect();
        if !late.is_empty() {
            return Err(Error::Failed(format!(
                "{}: not heard of since all was built; the members there run as soon as it \
                 can be reached",
                late.join(", ")
            )));
        }
        // Nobody will ask any more.
        let _ = std::fs::remove_file(&decision);
        let running = Instant::now();
        while parties
            .iter()
            .any(|party| party.frames_are(RestoreFrames::Held))
            && running.elapsed() < CONNECTED_MAX
            && !self.interrupted.load(Ordering::Relaxed)
        {
            std::thread::sleep(CONNECTED_POLL);
            self.look_at_all(parties, ticket);
        }
        self.let_frames_go(parties, ticket);
        self.tell_released(parties)
    }

    fn look_at_all(&self, parties: &mut [Party], ticket: &Ticket) {
        for party in parties {
            // What isn't heard of is asked again.
            let _ = self.look(party, ticket);
        }
    }

    fn tell_released(&self, parties: &[Party]) -> Result<(), Error> {
        for party in parties {
            if let Some(RestoreStage::Gone(why)) = party.stage() {
                let why = why.as_deref().unwrap_or("it gave up");
                return Err(Error::Failed(format!("{}: {why}", party.name)));
            }
        }
        let states = parties.iter().filter_map(|party| party.state.as_ref());
        let recorded = states.map(|state| state.recorded).sum();
        for party in parties {
            for warning in party.state.iter().flat_map(|state| &state.warnings) {
                let told = format!("{}: {warning}", party.name);
                self.job.tell(JobTold::Warning(told));
            }
            if !party.flows() {
                let told = format!(
                    "{}: not heard of since its members run: their frames may wait for {} s",
                    party.name,
                    HOLD_MAX.as_secs()
                );
                self.job.tell(JobTold::Warning(told));
            }
        }
        if self.order.paused {
            if let Some(told) = restore::not_played_back(recorded) {
                self.job.tell(JobTold::Warning(told));
            }
        } else {
            self.job.tell(JobTold::Released { played: recorded });
        }
        Ok(())
    }

    fn order_release(&self, parties: &[Party], ticket: &Ticket) {
        let paused = self.order.paused;
        let waiting = |party: &Party| party.stage() == Some(&RestoreStage::Built);
        self.order(
            parties.iter().filter(|party| waiting(party)),
            |remote| {
                let (remote, ticket) = (Arc::clone(remote), ticket.clone());
                async move {
                    let call =
                        |client: Arc<Client>| async move { client.release(ticket, paused).await };
                    remote.call(call).await
                }
            },
            |here| self.daemon.restore_release(here, ticket, paused),
        );
    }

    /// Has all hosts let frames go that hold some.
    fn let_frames_go(&self, parties: &mut [Party], ticket: &Ticket) {
        let start = Instant::now();
        loop {
            self.order(
                parties.iter().filter(|party| !party.flows()),
                |remote| {
                    let (remote, ticket) = (Arc::clone(remote), ticket.clone());
                    async move {
                        let call = |client: Arc<Client>| async move { client.flow(ticket).await };
                        remote.call(call).await
                    }
                },
                |here| self.daemon.restore_flow(here, ticket),
            );
            self.look_at_all(parties, ticket);
            if parties.iter().all(Party::flows) || start.elapsed() > FLOW_MAX {
                return;
            }
            std::thread::sleep(CONNECTED_POLL);
        }
    }

    /// Orders something of these hosts: far ones first, and all at once.
    fn order<'p, F>(
        &self,
        parties: impl Iterator<Item = &'p Party>,
        far: impl Fn(&Arc<Remote>) -> F,
        near: impl FnOnce(&Name) -> Option<()>,
    ) where
        F: std::future::Future<Output = Result<(), String>> + Send + 'static,
    {
        let mut calls = Vec::new();
        let mut here = false;
        for party in parties {
            match &party.remote {
                Some(remote) => calls.push(self.daemon.runtime.spawn(far(remote))),
                None => here = true,
            }
        }
        if here {
            near(&self.daemon.here());
        }
        for call in calls {
            // Answers come with the next look.
            let _ = self.daemon.runtime.block_on(call);
        }
    }

    fn give_up(&self, parties: &[Party], ticket: &Ticket) {
        for party in parties {
            match &party.remote {
                None => self.daemon.restore_discard(&self.daemon.here(), ticket),
                Some(remote) => {
                    let ticket = ticket.clone();
                    let told =
                        self.call(remote, |client| async move { client.discard(ticket).await });
                    if let Err(why) = told {
                        log::warn!("{}: {why}; it gives up by itself", party.name);
                    }
                }
            }
        }
        // The command is told when nothing is left here.
        let side = self.daemon.restores.get(&self.daemon.here(), ticket);
        while side.as_ref().is_some_and(|side| !side.is_over()) {
            std::thread::sleep(POLL);
        }
    }

    fn call<T, F>(
        &self,
        remote: &Arc<Remote>,
        call: impl FnOnce(Arc<Client>) -> F,
    ) -> Result<T, String>
    where
        F: std::future::Future<Output = Result<T, jsonrpsee::core::client::Error>>,
    {
        self.daemon.runtime.block_on(remote.call(call))
    }
}

/// Why a host doesn't say whether it can run its members.
fn refused(host: &Name, remote: &Remote, why: &str) -> Error {
    let way_out = match remote.trouble() {
        Some(_) => {
            " (members can be restored on other hosts, from copies of the snapshot: --on \
             MEMBER=HOST)"
        }
        None => "",
    };
    Error::Failed(format!("{host}: {why}; nothing was touched{way_out}"))
}

/// In one step: half of it must not be found.
fn write_decision(path: &Path, paused: bool) -> std::io::Result<()> {
    let aside = path.with_extension("new");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&aside)?;
    file.write_all(if paused { b"paused\n" } else { b"running\n" })?;
    std::fs::rename(&aside, path)
}

impl Party {
    fn stage(&self) -> Option<&RestoreStage> {
        self.state.as_ref().map(|state| &state.stage)
    }

    fn is_over(&self) -> bool {
        let over = |stage| matches!(stage, &RestoreStage::Released | &RestoreStage::Gone(_));
        self.stage().is_some_and(over)
    }

    /// Whether its members run, and what becomes of their frames.
    fn frames_are(&self, frames: RestoreFrames) -> bool {
        let state = self.state.as_ref();
        state.is_some_and(|s| s.stage == RestoreStage::Released && s.frames == frames)
    }

    /// Whether no frame waits there for a word.
    fn flows(&self) -> bool {
        !self.frames_are(RestoreFrames::Held) && !self.frames_are(RestoreFrames::Connected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

    #[test]
    fn a_host_that_says_nothing_of_frames_holds_none() -> TestResult {
        let state: RestoreState = serde_json::from_str(r#"{"built":["b"],"stage":"released"}"#)?;
        assert_eq!(state.frames, RestoreFrames::Flow);
        let party = Party {
            name: Name::new("beta")?,
            remote: None,
            members: Vec::new(),
            told: 0,
            heard: Instant::now(),
            state: Some(state),
        };
        assert!(party.is_over() && party.flows());
        Ok(())
    }
}
