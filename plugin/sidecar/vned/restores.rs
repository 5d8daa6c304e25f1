//! Restores over several hosts. The leader has every host build its members
//! paused; when all are built it decides, on disk, and has them released. What
//! they send waits until all of them are connected on all hosts, or for
//! [`HOLD_MAX`]. A host that hears nothing for a while gives up, but for one that
//! has built all: that asks how it was decided.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jsonrpsee::core::client::Client;

use super::super::copy;
use super::super::error::Error;
use super::super::journal::{self, Joint, Register};
use super::super::peers::Remote;
use super::super::restore::{self, build, Built, RestoreRequest};
use super::super::rpc::{
    JobDone, JobId, JobTold, PeerClient, RestoreFrames, RestoreOutcome, RestoreStage, RestoreState,
    SnapshotRef, Ticket,
};
use super::jobs::Job;
use super::{lock, Daemon};
use crate::image::{Manifest, Name, Snapshot, Store};
use crate::sentence::sentence;

/// How long a host builds on without being asked how far it is, and a leader
/// waits for one that doesn't answer.
const LEASE: Duration = Duration::from_secs(20);
/// How often the leader asks.
const POLL: Duration = Duration::from_millis(150);
/// How long the leader tries to reach a host that has yet to let its members
/// run; that host asks by itself after this.
const RELEASE_MAX: Duration = Duration::from_secs(20);
/// How long the leader waits for all members to be connected, since all run: a bit
/// longer than hosts do by themselves. And as long for a host that doesn't say
/// that its members run, before those on other hosts go on.
const CONNECTED_MAX: Duration = Duration::from_secs(12);
/// How often it asks for that. Frames wait.
const CONNECTED_POLL: Duration = Duration::from_millis(30);
/// How long it tries to tell hosts to let frames go; they do so by themselves
/// after [`HOLD_MAX`].
const FLOW_MAX: Duration = Duration::from_secs(5);
/// How long a host waits to be told, since its members run.
const HOLD_MAX: Duration = Duration::from_secs(20);
/// How long what became of it is remembered.
const REMEMBERED: Duration = Duration::from_secs(120);
/// Restores that this host may be building at a time.
const SIDES_MAX: usize = 16;

/// What a host's side is told.
enum SideOrder {
    Release { paused: bool },
    Flow,
    Discard,
}

/// This host's side of a restore.
struct Side {
    leader: Name,
    state: Mutex<RestoreState>,
    /// When the leader was last heard.
    heard: Mutex<Instant>,
    interrupt: Mutex<Sender<restore::Heard>>,
    orders: Mutex<Sender<SideOrder>>,
}

impl Side {
    fn stage(&self) -> RestoreStage {
        lock(&self.state).stage.clone()
    }

    /// Where it stands from now on.
    fn set(&self, stage: RestoreStage) {
        lock(&self.state).stage = stage;
    }

    fn is_over(&self) -> bool {
        matches!(self.stage(), RestoreStage::Released | RestoreStage::Gone(_))
    }

    /// Whether members run and their frames wait.
    fn holds_frames(&self) -> bool {
        let state = lock(&self.state);
        state.stage == RestoreStage::Released && state.frames != RestoreFrames::Flow
    }

    fn order(&self, order: SideOrder) {
        // One that has ended says so when it's asked.
        let _ = lock(&self.orders).send(order);
    }

    fn heard(&self) {
        *lock(&self.heard) = Instant::now();
    }

    fn discard(&self) {
        // One that has ended needn't be told.
        let _ = lock(&self.interrupt).send(restore::Heard::Interrupted);
        let _ = lock(&self.orders).send(SideOrder::Discard);
    }
}

impl restore::Progress for Arc<Side> {
    fn building(&mut self, _members: &[&str]) {}

    fn built(&mut self, member: &str) {
        if let Ok(member) = Name::new(member) {
            lock(&self.state).built.push(member);
        }
    }

    fn released(&mut self, _played: u64) {}
}

/// A side, and what it's told.
type Entered = (Arc<Side>, mpsc::Receiver<SideOrder>);

/// All restores that go on.
#[derive(Default)]
pub(super) struct Restores {
    sides: Mutex<HashMap<Ticket, Arc<Side>>>,
    leading: Mutex<HashSet<Ticket>>,
}

impl Restores {
    /// Whether nothing goes on.
    pub fn is_empty(&self) -> bool {
        let ended =
            |side: &Arc<Side>| side.stage() != RestoreStage::Building && !side.holds_frames();
        lock(&self.leading).is_empty() && lock(&self.sides).values().all(ended)
    }

    /// Gives up what isn't built. What is may have been decided: that's for the
    /// next daemon, or the guard.
    pub fn stop_all(&self) {
        for side in lock(&self.sides).values() {
            if side.stage() == RestoreStage::Building {
                side.discard();
            } else if side.holds_frames() {
                side.order(SideOrder::Flow);
            }
        }
    }

    fn get(&self, leader: &Name, ticket: &Ticket) -> Option<Arc<Side>> {
        let side = lock(&self.sides).get(ticket).cloned();
        side.filter(|side| side.leader == *leader)
    }
}

/// Looks after what has lost its leader, or its command.
pub(super) async fn leases(daemon: Arc<Daemon>) {
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        daemon.jobs.interrupt_unwatched();
        let sides: Vec<_> = {
            let mut sides = lock(&daemon.restores.sides);
            sides.retain(|_, side| !(side.is_over() && lock(&side.heard).elapsed() > REMEMBERED));
            let listed = sides.iter();
            listed
                .map(|(ticket, side)| (ticket.clone(), Arc::clone(side)))
                .collect()
        };
        for (ticket, side) in sides {
            if lock(&side.heard).elapsed() < LEASE {
                continue;
            }
            match side.stage() {
                RestoreStage::Building => side.discard(),
                RestoreStage::Built => daemon.ask_outcome(&ticket, &side).await,
                RestoreStage::Released | RestoreStage::Gone(_) => {}
            }
        }
    }
}

impl Daemon {
    async fn ask_outcome(self: &Arc<Self>, ticket: &Ticket, side: &Arc<Side>) {
        let outcome = if side.leader == self.here() {
            Ok(self.restore_outcome(ticket))
        } else {
            let Some(remote) = self.remote(&side.leader) else {
                return;
            };
            let ticket = ticket.clone();
            let outcome = remote.call(|client| async move { client.outcome(ticket).await });
            outcome.await
        };
        match outcome {
            Ok(RestoreOutcome::Open) => side.heard(),
            Ok(RestoreOutcome::Released { paused }) => {
                side.order(SideOrder::Release { paused });
            }
            Ok(RestoreOutcome::Unknown) => side.discard(),
            // Paused domains harm nobody: asked again soon.
            Err(why) => log::info!("{}: {why}", side.leader),
        }
    }

    // This host's side.

    /// Starts building this host's members for a leader.
    pub(super) fn build_for(
        self: &Arc<Self>,
        leader: &Name,
        ticket: Ticket,
        snapshot: &SnapshotRef,
        copy: Option<Name>,
        paused: bool,
    ) -> Result<(), Error> {
        let not_for = || Error::Failed(self.not_for(leader, &snapshot.vne));
        let described = self.vne(&snapshot.vne)?.ok_or_else(not_for)?;
        let opened = Store::open(&described.store)?
            .catalogue()
            .get(&snapshot.vne, &snapshot.id)?;
        let manifest = opened.manifest();
        if !manifest.hosts.contains(leader) {
            return Err(Error::Failed(format!(
                "'{leader}' has no part of {snapshot}"
            )));
        }
        let here = self.here();
        let known = |name: &Name| {
            let mut members = described.members.iter();
            members.any(|member| member.host == here && member.name == *name)
        };
        if let Some(member) = manifest.members_here().find(|member| !known(&member.name)) {
            return Err(Error::Failed(format!(
                "'{}' is no member of VNE '{}' on host '{here}' by the description there any more",
                member.name, snapshot.vne
            )));
        }
        if let Some(copy) = &copy {
            self.check_copy(copy, manifest, leader)?;
        }
        self.build_from(leader, ticket, (opened, described.store), copy, paused)
    }

    /// A copy over several hosts is a VNE that each of them describes: its network is
    /// joined by that.
    fn check_copy(&self, copy: &Name, manifest: &Manifest, leader: &Name) -> Result<(), Error> {
        let mut wanted = Vec::new();
        for member in &manifest.members {
            wanted.push((member.host.clone(), copy::name_in(copy, &member.name)?));
        }
        let described = self.vne(copy)?;
        let described = described.map_or_else(Vec::new, |described| described.members);
        let has = |(host, name): &(Name, Name)| {
            described
                .iter()
                .any(|member| member.host == *host && member.name == *name)
        };
        if wanted.iter().all(has) && wanted.iter().any(|(host, _)| host == leader) {
            return Ok(());
        }
        let list: Vec<_> = wanted
            .iter()
            .map(|(host, name)| format!("\"{host}:{name}\""))
            .collect();
        Err(Error::Failed(format!(
            "a copy over several hosts is a VNE that all of them know: on each of them, \
             /etc/xen/vne/{copy}.cfg has to say members = [ {} ], and each has to be a peer of \
             the others for '{copy}'",
            list.join(", ")
        )))
    }

    fn build_from(
        self: &Arc<Self>,
        leader: &Name,
        ticket: Ticket,
        (opened, store): (Snapshot, PathBuf),
        copy: Option<Name>,
        paused: bool,
    ) -> Result<(), Error> {
        self.not_stopping()?;
        let (said, heard) = mpsc::channel();
        let Some((side, orders)) =
            self.enter_restore(leader, &ticket, said.clone(), RestoreStage::Building)?
        else {
            return Ok(());
        };
        let joint = Joint {
            ticket: ticket.0.to_string(),
            led_here: *leader == self.here(),
        };
        let request = RestoreRequest {
            store,
            run_dir: self.run_dir.clone(),
            program: self.program.clone(),
            joint: Some((leader.clone(), joint)),
            copy,
            paused,
        };
        std::thread::spawn(move || {
            let built = build(&request, &opened, (said, heard), &mut Arc::clone(&side));
            match built {
                Err(error) => side.set(RestoreStage::Gone(Some(sentence(&error)))),
                Ok(built) => {
                    lock(&side.state).recorded = built.recorded();
                    side.set(RestoreStage::Built);
                    finish(&side, built, &orders);
                }
            }
        });
        Ok(())
    }

    /// A side that nobody has entered yet.
    fn enter_restore(
        &self,
        leader: &Name,
        ticket: &Ticket,
        interrupt: Sender<restore::Heard>,
        stage: RestoreStage,
    ) -> Result<Option<Entered>, Error> {
        let mut sides = lock(&self.restores.sides);
        if sides.contains_key(ticket) {
            return Ok(None);
        }
        if sides.values().filter(|side| !side.is_over()).count() >= SIDES_MAX {
            return Err(Error::Failed(String::from("too many restores at a time")));
        }
        let (to, orders) = mpsc::channel();
        let side = Arc::new(Side {
            leader: leader.clone(),
            state: Mutex::new(RestoreState {
                built: Vec::new(),
                stage,
                recorded: 0,
                frames: RestoreFrames::Flow,
                warnings: Vec::new(),
            }),
            heard: Mutex::new(Instant::now()),
            interrupt: Mutex::new(interrupt),
            orders: Mutex::new(to),
        });
        sides.insert(ticket.clone(), Arc::clone(&side));
        Ok(Some((side, orders)))
    }

    /// Goes on with what daemons before this one had built for other hosts.
    pub(super) fn resume_built(self: &Arc<Self>, register: &Register) -> Result<(), Error> {
        let mut waiting = Vec::new();
        register.sweep(|orphan| {
            if orphan.record.restore == Some(journal::RestoreStage::Built) {
                waiting.push(orphan.resume());
            }
        })?;
        for journal in waiting {
            let record = journal.record();
            let leader = record
                .leader
                .as_deref()
                .and_then(|name| Name::new(name).ok());
            let ticket = record.joint.as_ref();
            let ticket = ticket.and_then(|joint| Name::new(&joint.ticket).ok());
            let (Some(leader), Some(ticket)) = (leader, ticket) else {
                continue;
            };
            let (said, _) = mpsc::channel();
            let built = RestoreStage::Built;
            if let Some((side, orders)) =
                self.enter_restore(&leader, &Ticket(ticket), said, built)?
            {
                match Built::resume(&self.program, journal) {
                    Ok(built) => {
                        std::thread::spawn(move || finish(&side, built, &orders));
                    }
                    // Its journal is free again, for the next look.
                    Err(error) => {
                        lock(&self.restores.sides).retain(|_, other| !Arc::ptr_eq(other, &side));
                        log::error!("{}", sentence(&error));
                    }
                }
            }
        }
        Ok(())
    }

    /// How far this host is.
    pub(super) fn restore_state(&self, leader: &Name, ticket: &Ticket) -> Option<RestoreState> {
        let side = self.restores.get(leader, ticket)?;
        side.heard();
        let state = lock(&side.state).clone();
        Some(state)
    }

    /// Lets this host's members run.
    pub(super) fn restore_release(
        &self,
        leader: &Name,
        ticket: &Ticket,
        paused: bool,
    ) -> Option<()> {
        let side = self.restores.get(leader, ticket)?;
        side.heard();
        side.order(SideOrder::Release { paused });
        Some(())
    }

    /// Lets go of what this host's members have sent.
    pub(super) fn restore_flow(&self, leader: &Name, ticket: &Ticket) -> Option<()> {
        let side = self.restores.get(leader, ticket)?;
        side.heard();
        side.order(SideOrder::Flow);
        Some(())
    }

    /// Destroys what this host has built, unless it runs already.
    pub(super) fn restore_discard(&self, leader: &Name, ticket: &Ticket) {
        if let Some(side) = self.restores.get(leader, ticket) {
            side.discard();
        }
    }

    /// How a restore that this host leads was decided.
    pub(super) fn restore_outcome(&self, ticket: &Ticket) -> RestoreOutcome {
        let root = self.run_dir.join("vne");
        if let Some(paused) = journal::decided_paused(&root, ticket.0.as_str()) {
            RestoreOutcome::Released { paused }
        } else if lock(&self.restores.leading).contains(ticket) {
            RestoreOutcome::Open
        } else {
            RestoreOutcome::Unknown
        }
    }

    // Leading.

    /// Starts a restore as a job.
    pub(super) fn start_restore(
        self: &Arc<Self>,
        snapshot: SnapshotRef,
        store: PathBuf,
        copy: Option<Name>,
        paused: bool,
    ) -> Result<JobId, Error> {
        let interrupted = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&interrupted);
        let interrupt = move || flag.store(true, Ordering::Relaxed);
        let daemon = Arc::clone(self);
        let work = move |job: &Arc<Job>| {
            let lead = LeadRestore {
                daemon: &daemon,
                snapshot: &snapshot,
                copy: copy.as_ref(),
                paused,
                interrupted: &interrupted,
                job,
            };
            match lead.run(store) {
                Ok(()) => JobDone::Restore,
                Err(error) => JobDone::Failed(sentence(&error)),
            }
        };
        self.jobs
            .start(interrupt, work)
            .map_err(Error::start("start a thread"))
    }
}

/// Waits for how it was decided, and carries that out.
fn finish(side: &Side, mut built: Built, orders: &mpsc::Receiver<SideOrder>) {
    let paused = loop {
        match orders.recv() {
            Ok(SideOrder::Release { paused }) => break paused,
            // Nothing flows before anything runs.
            Ok(SideOrder::Flow) => {}
            Ok(SideOrder::Discard) | Err(_) => {
                built.discard();
                return side.set(RestoreStage::Gone(None));
            }
        }
    };
    let start = Instant::now();
    if paused {
        return side.set(match built.leave_paused() {
            Ok(()) => RestoreStage::Released,
            Err(error) => RestoreStage::Gone(Some(sentence(&error))),
        });
    }
    if let Err(error) = built.run() {
        return side.set(RestoreStage::Gone(Some(sentence(&error))));
    }
    if built.holds_frames() {
        lock(&side.state).frames = RestoreFrames::Held;
    }
    side.set(RestoreStage::Released);
    let flow = |order| matches!(order, SideOrder::Flow);
    let mut told = false;
    let late = built.wait_connected(|| {
        told |= orders.try_iter().any(flow);
        told
    });
    {
        let mut state = lock(&side.state);
        state.warnings = late;
        if built.holds_frames() {
            state.frames = RestoreFrames::Connected;
        }
    }
    while built.holds_frames() && !told {
        let left = HOLD_MAX.saturating_sub(start.elapsed());
        match orders.recv_timeout(left) {
            Ok(order) => told = flow(order),
            Err(_) => {
                log::warn!("not told that all members are connected: their frames go all the same");
                told = true;
            }
        }
    }
    built.let_frames_go();
    lock(&side.state).frames = RestoreFrames::Flow;
}

struct LeadRestore<'a> {
    daemon: &'a Arc<Daemon>,
    snapshot: &'a SnapshotRef,
    /// What it's called, if it's a copy.
    copy: Option<&'a Name>,
    paused: bool,
    interrupted: &'a AtomicBool,
    job: &'a Arc<Job>,
}

/// A host whose members are being built.
struct Party {
    name: Name,
    /// None for this host.
    remote: Option<Arc<Remote>>,
    told: usize,
    heard: Instant,
    state: Option<RestoreState>,
}

impl LeadRestore<'_> {
    fn run(&self, store: PathBuf) -> Result<(), Error> {
        let opened = Store::open(&store)?
            .catalogue()
            .get(&self.snapshot.vne, &self.snapshot.id)?;
        if let Some(copy) = self.copy {
            let here = self.daemon.here();
            self.daemon.check_copy(copy, opened.manifest(), &here)?;
        }
        let mut parties = self.parties(opened.manifest())?;
        let number = crate::random::number().map_err(Error::start("get a random number"))?;
        let ticket = Ticket(Name::new(&format!("{number:016x}"))?);
        lock(&self.daemon.restores.leading).insert(ticket.clone());
        let manifest = opened.manifest().clone();
        let result = self.build(&mut parties, &ticket, store, opened, &manifest);
        let result = match result {
            Ok(()) => self.release(&mut parties, &ticket),
            Err(error) => {
                self.give_up(&parties, &ticket);
                Err(error)
            }
        };
        lock(&self.daemon.restores.leading).remove(&ticket);
        result
    }

    fn parties(&self, manifest: &Manifest) -> Result<Vec<Party>, Error> {
        let here = self.daemon.here();
        let mut parties: Vec<Party> = Vec::new();
        for member in &manifest.members {
            if parties.iter().any(|party| party.name == member.host) {
                continue;
            }
            let remote = if member.host == here {
                None
            } else {
                Some(self.daemon.peer_for(&member.host, &self.snapshot.vne)?)
            };
            parties.push(Party {
                name: member.host.clone(),
                remote,
                told: 0,
                heard: Instant::now(),
                state: None,
            });
        }
        Ok(parties)
    }

    fn build(
        &self,
        parties: &mut [Party],
        ticket: &Ticket,
        store: PathBuf,
        opened: Snapshot,
        manifest: &Manifest,
    ) -> Result<(), Error> {
        let mut opened = Some(opened);
        let mut names = Vec::new();
        for member in &manifest.members {
            let name = match self.copy {
                None => member.name.clone(),
                Some(copy) => copy::name_in(copy, &member.name)?,
            };
            names.push(format!("{}:{name}", member.host));
        }
        self.job.tell(JobTold::Building(names));
        let failed = |name: &Name, why: &str| Error::Failed(format!("{name}: {why}"));
        for party in parties.iter() {
            let (ticket, snapshot) = (ticket.clone(), self.snapshot.clone());
            let (copy, paused) = (self.copy.cloned(), self.paused);
            match &party.remote {
                None => {
                    if let Some(opened) = opened.take() {
                        let here = self.daemon.here();
                        self.daemon.build_from(
                            &here,
                            ticket,
                            (opened, store.clone()),
                            copy,
                            paused,
                        )?;
                    }
                }
                Some(remote) => self
                    .call(remote, |client| async move {
                        match copy {
                            None => client.build(ticket, snapshot, Some(paused)).await,
                            Some(copy) => client.build_copy(ticket, snapshot, copy, paused).await,
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
        if let Err(error) = write_decision(&decision, self.paused) {
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
            if !flowing && start.elapsed() > CONNECTED_MAX {
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
        if self.paused {
            if let Some(told) = restore::not_played_back(recorded) {
                self.job.tell(JobTold::Warning(told));
            }
        } else {
            self.job.tell(JobTold::Released { played: recorded });
        }
        Ok(())
    }

    fn order_release(&self, parties: &[Party], ticket: &Ticket) {
        let paused = self.paused;
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
    use super::super::super::journal::{Record, RestoreStage as JournalStage};
    use super::super::super::workers::Program;
    use super::*;

    type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

    /// What becomes of members without interfaces when these orders come.
    fn finished(orders: Vec<SideOrder>) -> TestResult<(RestoreState, bool)> {
        let dir = tempfile::tempdir()?;
        let program = Program {
            xl: PathBuf::from("/bin/echo"),
            verbosity: 0,
        };
        let record = Record {
            vne: String::from("lab"),
            leader: None,
            pid: std::process::id(),
            store: PathBuf::new(),
            domains: Vec::new(),
            asked: false,
            workers: Vec::new(),
            holds: Vec::new(),
            caps: Vec::new(),
            restore: Some(JournalStage::Built),
            joint: None,
        };
        let register = Register::open(dir.path())?;
        let built = Built::resume(&program, register.enter(record)?)?;
        let (to, heard) = mpsc::channel();
        for order in orders {
            to.send(order)?;
        }
        let (interrupt, _) = mpsc::channel();
        let side = Side {
            leader: Name::new("alpha")?,
            state: Mutex::new(RestoreState {
                built: Vec::new(),
                stage: RestoreStage::Built,
                recorded: 0,
                frames: RestoreFrames::Flow,
                warnings: Vec::new(),
            }),
            heard: Mutex::new(Instant::now()),
            interrupt: Mutex::new(interrupt),
            orders: Mutex::new(to),
        };
        finish(&side, built, &heard);
        let state = lock(&side.state).clone();
        Ok((state, register.is_empty()?))
    }

    #[test]
    fn frames_do_not_flow_before_members_run() -> TestResult {
        let (state, clean) = finished(vec![SideOrder::Flow, SideOrder::Discard])?;
        assert_eq!(state.stage, RestoreStage::Gone(None));
        assert!(clean);
        Ok(())
    }

    #[test]
    fn members_that_send_nothing_wait_for_no_word() -> TestResult {
        for paused in [false, true] {
            let (state, clean) = finished(vec![SideOrder::Release { paused }])?;
            assert_eq!(state.stage, RestoreStage::Released);
            assert_eq!(state.frames, RestoreFrames::Flow);
            assert!(clean);
        }
        Ok(())
    }

    #[test]
    fn a_host_that_says_nothing_of_frames_holds_none() -> TestResult {
        let state: RestoreState = serde_json::from_str(r#"{"built":["b"],"stage":"released"}"#)?;
        assert_eq!(state.frames, RestoreFrames::Flow);
        let party = Party {
            name: Name::new("beta")?,
            remote: None,
            told: 0,
            heard: Instant::now(),
            state: Some(state),
        };
        assert!(party.is_over() && party.flows());
        Ok(())
    }
}
