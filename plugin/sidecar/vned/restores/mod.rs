//! Restores over several hosts. The leader has every host build its members
//! paused; when all are built it decides, on disk, and has them released. What
//! they send waits until all of them are connected on all hosts, or for
//! [`HOLD_MAX`]. A host that hears nothing for a while gives up, but for one that
//! has built all: that asks how it was decided.

mod lead;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::super::copy;
use super::super::error::Error;
use super::super::fit::Needs;
use super::super::journal::{self, Joint, Register};
use super::super::restore::{self, build, Built, RestoreRequest};
use super::super::rpc::{
    CopyProgress, Fit, PeerClient, RestoreFrames, RestoreOutcome, RestoreStage, RestoreState,
    SnapshotRef, Ticket,
};
use super::{lock, Daemon};
use crate::image::{self, Manifest, Name, Snapshot, Store};
use crate::sentence::sentence;

/// How long a host builds on without being asked how far it is, and a leader
/// waits for one that doesn't answer.
const LEASE: Duration = Duration::from_secs(20);
/// How long a host waits to be told, since its members run.
const HOLD_MAX: Duration = Duration::from_secs(30);
/// How long what became of it is remembered.
const REMEMBERED: Duration = Duration::from_secs(120);
/// Restores that this host may be building at a time.
const SIDES_MAX: usize = 16;

/// What a host builds.
pub(super) struct Building {
    /// Which members; none for those that ran there.
    pub members: Option<Vec<Name>>,
    /// What they're called together, if they're copies.
    pub copy: Option<Name>,
    /// Whether they're left paused.
    pub paused: bool,
}

/// Which of these members aren't stored beside this manifest.
fn lacking(manifest: Option<&Manifest>, members: &[Name]) -> Vec<Name> {
    let has = |name: &&Name| {
        let here = manifest.into_iter().flat_map(Manifest::members_here);
        here.into_iter().any(|member| member.name == **name)
    };
    members.iter().filter(|name| !has(name)).cloned().collect()
}

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
    fn copying(&mut self, _how_far: CopyProgress) {}

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

    /// Starts building members for a leader: those that ran on this host, or these, if
    /// it says which.
    pub(super) fn build_for(
        self: &Arc<Self>,
        leader: &Name,
        ticket: Ticket,
        snapshot: &SnapshotRef,
        what: Building,
    ) -> Result<(), Error> {
        let not_for = || Error::Failed(self.not_for(leader, &snapshot.vne));
        let described = self.vne(&snapshot.vne)?.ok_or_else(not_for)?;
        let opened = Store::open(&described.store)?
            .catalogue()
            .get(&snapshot.vne, &snapshot.id)?;
        let manifest = opened.manifest();
        let here = self.here();
        let chosen: Vec<Name> = match &what.members {
            Some(members) => {
                if let Some(lacking) = lacking(Some(manifest), members).first() {
                    return Err(Error::Failed(format!(
                        "host '{here}' doesn't have '{lacking}' of {snapshot}"
                    )));
                }
                self.check_accepted(leader, Some(manifest), members)?;
                members.clone()
            }
            None if manifest.hosts.contains(leader) => {
                let members = manifest.members_of_host();
                members.map(|member| member.name.clone()).collect()
            }
            None => {
                return Err(Error::Failed(format!(
                    "'{leader}' has no part of {snapshot}"
                )));
            }
        };
        // Where the leader says what runs here, that needn't be what the description
        // says; but it has to be the VNE's.
        let anywhere = what.members.is_some();
        let known = |name: &Name| {
            let mut members = described.members.iter();
            members.any(|member| (anywhere || member.host == here) && member.name == *name)
        };
        if let Some(member) = chosen.iter().find(|member| !known(member)) {
            return Err(Error::Failed(format!(
                "'{member}' is no member of VNE '{}' on host '{here}' by the description there any \
                 more",
                snapshot.vne
            )));
        }
        if let Some(copy) = &what.copy {
            let members = manifest.members.iter();
            let places: Vec<_> = match anywhere {
                true => chosen.iter().map(|name| (&here, name)).collect(),
                false => members.map(|member| (&member.host, &member.name)).collect(),
            };
            self.check_copy(copy, &places, leader)?;
        }
        self.build_from(leader, ticket, (opened, described.store), what)
    }

    /// What keeps this host from running members for a leader, and what it lacks.
    pub(super) fn fit_for(
        &self,
        leader: &Name,
        snapshot: &SnapshotRef,
        (members, copy): (&[Name], Option<&Name>),
        needs: &Needs,
    ) -> Result<Fit, Error> {
        let not_for = || Error::Failed(self.not_for(leader, &snapshot.vne));
        let described = self.vne(&snapshot.vne)?.ok_or_else(not_for)?;
        // Which other domains there are is nothing for a peer to know.
        let mut names = Vec::new();
        for member in &described.members {
            names.push(match copy {
                None => member.name.clone(),
                Some(copy) => copy::name_in(copy, &member.name)?,
            });
        }
        let mut asked = needs.names();
        if let Some(other) = asked.find(|name| !names.contains(name)) {
            return Err(Error::Failed(format!(
                "'{other}' is no member of VNE '{}' by the description on host '{}'",
                snapshot.vne,
                self.here()
            )));
        }
        let found = Store::open(&described.store)?
            .catalogue()
            .get(&snapshot.vne, &snapshot.id);
        let manifest = match &found {
            Ok(opened) => Some(opened.manifest()),
            Err(image::Error::NoSnapshot { .. }) => None,
            Err(error) => return Err(Error::Failed(sentence(error))),
        };
        self.check_accepted(leader, manifest, members)?;
        let lacks = lacking(manifest, members);
        // The leader's word counts for what isn't here yet, and only if it's trusted: else
        // it could ask for any file of this host.
        let own = match manifest {
            Some(manifest) => {
                let chosen = manifest.members.iter();
                let chosen = chosen.filter(|member| members.contains(&member.name));
                Needs::of(manifest, chosen, copy)?
            }
            None => Needs::default(),
        };
        let own = Needs {
            absent: needs.absent.clone(),
            ..own
        };
        let believed = !lacks.is_empty() && self.accepts(leader);
        let needs = if believed { needs } else { &own };
        Ok(Fit {
            problems: needs.problems_here(&self.program)?,
            lacks,
        })
    }

    /// What ran elsewhere comes with a configuration from there, and that can name any
    /// device, file and program of this host.
    fn check_accepted(
        &self,
        leader: &Name,
        manifest: Option<&Manifest>,
        members: &[Name],
    ) -> Result<(), Error> {
        let here = self.here();
        let ran_here = |name: &Name| {
            let mut stored = manifest.into_iter().flat_map(Manifest::members_of_host);
            stored.any(|member| member.name == *name && member.host == here)
        };
        let accepted = self.accepts(leader);
        match members.iter().find(|name| !accepted && !ran_here(name)) {
            None => Ok(()),
            Some(name) => Err(Error::Failed(format!(
                "host '{here}' builds '{name}', which didn't run there, for nobody but its own \
                 root: give the command there, or say accept_members = [ \"{leader}\" ] in its \
                 vne.conf, which trusts that host as root"
            ))),
        }
    }

    /// A copy over several hosts is a VNE that each of them describes: its network is
    /// joined by that. `places`: the hosts of the originals' copies.
    fn check_copy(
        &self,
        copy: &Name,
        places: &[(&Name, &Name)],
        leader: &Name,
    ) -> Result<(), Error> {
        let described = self.vne(copy)?;
        let described = described.map_or_else(Vec::new, |described| described.members);
        let mut list = Vec::new();
        let mut fits = described.iter().any(|member| member.host == *leader);
        for (host, member) in places {
            let name = copy::name_in(copy, member)?;
            let mut members = described.iter();
            fits &= members.any(|member| member.host == **host && member.name == name);
            list.push(format!("\"{host}:{name}\""));
        }
        if fits {
            return Ok(());
        }
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
        what: Building,
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
            members: what.members,
            copy: what.copy,
            paused: what.paused,
            memory_bytes: self.memory_bytes(),
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
        let record = Record::of_restore(JournalStage::Built);
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
}
