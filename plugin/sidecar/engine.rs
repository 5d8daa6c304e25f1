//! Takes a snapshot on this host: asks the cut protocol what to do, and does
//! it.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::journal;
use super::journal::{Journal, JournalDomain, Record, Register};
use super::workers::{Heard, Program, Worker};
use crate::clock::now_ns;
use crate::cut::{Action, Coordinator, Input, Limits, OnDivergence, Phase};
use crate::domain::messages::{Command, CutTimes, Event};
use crate::domain::policy::{PolicyConfig, Round};
use crate::domain::DomainFacts;
use crate::image::{self, Manifest, MemberImage, Store};
use crate::net::{self, Hold, HoldRecord, Nft, Rtnl};
use crate::sentence::sentence;

/// A worker that was told to give up does so within this, or is killed.
const WORKER_END_MAX: Duration = Duration::from_secs(2);
/// Bringing domains back takes 3 s at most (`domain::recover`).
const RECOVER_MAX: Duration = Duration::from_secs(10);

/// What to take and how.
#[derive(Debug, Clone)]
pub struct TakeRequest {
    /// The VNE's name.
    pub vne: String,
    /// Its members, by domain name.
    pub members: Vec<String>,
    /// A word of the user's about this snapshot.
    pub label: Option<String>,
    /// The root of the image store.
    pub store: PathBuf,
    /// Xen's folder for what is gone after a reboot.
    pub run_dir: PathBuf,
    /// How workers are started.
    pub program: Program,
    /// The phases' deadlines.
    pub limits: Limits,
    /// What to do about members that don't converge.
    pub on_divergence: OnDivergence,
    /// When a member has converged.
    pub policy: PolicyConfig,
    /// Size of each vif's hold queue in bytes.
    pub hold_bytes: u32,
    /// How much of a member's last pages to keep in memory, in bytes.
    pub final_buffer_bytes: usize,
    /// Whether members may have disks that they write to: those aren't
    /// captured.
    pub memory_only: bool,
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Refused or failed; the guests run.
    #[error("{0}")]
    Failed(String),
    /// The same member was named more than once.
    #[error("member '{0}' is named twice")]
    Twice(String),
    /// There is nothing to capture.
    #[error("VNE '{0}' has no members")]
    NoMembers(String),
    /// The journal can't be used, or a member is in another take.
    #[error(transparent)]
    Journal(#[from] journal::Error),
    /// The image store can't be used.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// A process or thread can't be started.
    #[error("cannot {what}")]
    Start {
        /// What, as a verb phrase.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What there is to see of a take while it works.
pub trait Progress {
    /// All members have been looked at: what will be captured.
    fn planned(&mut self, members: &[DomainFacts]);
    /// Another phase begins.
    fn phase(&mut self, phase: Phase);
    /// A member has sent a pre-copy round.
    fn round(&mut self, member: usize, round: Round, converged: bool);
    /// A member was cut and runs again.
    fn cut(&mut self, member: usize, times: &CutTimes);
    /// A member's part is stored.
    fn stored(&mut self, member: usize);
}

/// How a take ended well.
#[derive(Debug)]
pub enum Taken {
    /// The snapshot exists.
    Snapshot(Box<Manifest>),
    /// Only the plan was asked for.
    Planned(Vec<DomainFacts>),
}

/// Takes a snapshot, or with `dry_run` finds out whether it could.
pub fn take(
    request: &TakeRequest,
    dry_run: bool,
    progress: &mut dyn Progress,
) -> Result<Taken, Error> {
    check_members(request)?;
    let register = Register::open(&request.run_dir)?;
    sweep(&request.program, &register)?;
    let store = Store::open(&request.store)?;
    let (said, heard) = mpsc::channel();
    watch_signals(said.clone())?;
    let mut run = Run {
        request,
        dry_run,
        register,
        store,
        members: Vec::new(),
        xen_version: String::new(),
        rtnl: None,
        nft: None,
        holds: Vec::new(),
        journal: None,
        snapshot: None,
        blocked_ns: 0,
        held_ns: 0,
        manifest: None,
    };
    let result = run
        .start_workers(&said)
        .and_then(|()| run.lead(&heard, progress));
    // Also after a success or a dry run: whatever is still there goes.
    run.undo();
    result
}

/// Cleans up after takes that were killed together with their guards.
pub fn sweep(program: &Program, register: &Register) -> Result<(), Error> {
    if register.is_empty()? {
        return Ok(());
    }
    let run = program
        .command(&["sweep"])
        .stderr(Stdio::inherit())
        .status();
    match run {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Error::Failed(format!(
            "cleaning up after a killed take: {status}"
        ))),
        Err(source) => Err(Error::Start {
            what: "start the clean-up",
            source,
        }),
    }
}

fn check_members(request: &TakeRequest) -> Result<(), Error> {
    if request.members.is_empty() {
        return Err(Error::NoMembers(request.vne.clone()));
    }
    for (at, name) in request.members.iter().enumerate() {
        if request.members[..at].contains(name) {
            return Err(Error::Twice(name.clone()));
        }
    }
    Ok(())
}

/// From here on Ctrl-C is something that the engine hears of.
fn watch_signals(said: Sender<Heard>) -> Result<(), Error> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(|source| {
            Error::Start {
                what: "watch for signals",
                source,
            }
        })?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            if said.send(Heard::Interrupted).is_err() {
                return;
            }
        }
    });
    Ok(())
}

struct Member {
    worker: Worker,
    facts: Option<DomainFacts>,
    rounds: Vec<Round>,
    times: Option<CutTimes>,
    stored: Option<MemberImage>,
    ended: bool,
}

struct Run<'a> {
    request: &'a TakeRequest,
    dry_run: bool,
    register: Register,
    store: Store,
    members: Vec<Member>,
    xen_version: String,
    rtnl: Option<Rtnl>,
    /// Owns the redirects into the holds.
    nft: Option<Nft>,
    holds: Vec<Hold>,
    journal: Option<Journal>,
    snapshot: Option<image::Take>,
    blocked_ns: u64,
    held_ns: u64,
    manifest: Option<Manifest>,
}

impl Run<'_> {
    fn start_workers(&mut self, said: &Sender<Heard>) -> Result<(), Error> {
        for (index, name) in self.request.members.iter().enumerate() {
            let worker = Worker::start(&self.request.program, index, name, said.clone()).map_err(
                |source| Error::Start {
                    what: "start a worker",
                    source,
                },
            )?;
            self.members.push(Member {
                worker,
                facts: None,
                rounds: Vec::new(),
                times: None,
                stored: None,
                ended: false,
            });
        }
        Ok(())
    }

    fn lead(
        &mut self,
        heard: &Receiver<Heard>,
        progress: &mut dyn Progress,
    ) -> Result<Taken, Error> {
        let mut coordinator = Coordinator::new(
            self.members.len(),
            self.request.limits,
            self.request.on_divergence,
            now_ns(),
        );
        progress.phase(coordinator.phase());
        loop {
            let input = self.next_input(heard, coordinator.deadline_ns(), progress);
            let mut inputs = VecDeque::from([input]);
            while let Some(input) = inputs.pop_front() {
                let before = coordinator.phase();
                let actions = coordinator.handle(now_ns(), input);
                if coordinator.phase() != before {
                    progress.phase(coordinator.phase());
                }
                for action in actions {
                    if action == Action::Arm {
                        let facts = self.facts();
                        if !self.request.memory_only {
                            refuse_writable_disks(&facts)?;
                        }
                        progress.planned(&facts);
                        if self.dry_run {
                            return Ok(Taken::Planned(facts));
                        }
                    }
                    if let Action::Abort(why) = action {
                        return Err(Error::Failed(why));
                    }
                    match self.act(&action, &coordinator) {
                        Ok(input) => inputs.extend(input),
                        Err(error) => inputs.push_back(Input::Failed(sentence(&error))),
                    }
                }
            }
            if coordinator.phase() == Phase::Done {
                let missing = || Error::Failed(String::from("committed without a manifest"));
                let manifest = self.manifest.take().ok_or_else(missing)?;
                return Ok(Taken::Snapshot(Box::new(manifest)));
            }
        }
    }

    /// Waits for the next thing that happens, or for the deadline.
    fn next_input(
        &mut self,
        heard: &Receiver<Heard>,
        deadline_ns: Option<u64>,
        progress: &mut dyn Progress,
    ) -> Input {
        let wait = match deadline_ns {
            Some(deadline) => Duration::from_nanos(deadline.saturating_sub(now_ns())),
            None => Duration::from_secs(3600),
        };
        match heard.recv_timeout(wait) {
            Ok(Heard::Event(index, event)) => self.hear(index, event, progress),
            Ok(Heard::Gone(index)) => self.gone(index),
            Ok(Heard::Interrupted) => Input::Interrupted,
            Err(RecvTimeoutError::Timeout) => Input::Tick,
            // Cannot be: the signal watcher keeps a sender.
            Err(RecvTimeoutError::Disconnected) => Input::Interrupted,
        }
    }

    fn hear(&mut self, index: usize, event: Event, progress: &mut dyn Progress) -> Input {
        let Some(member) = self.members.get_mut(index) else {
            return Input::Prepared(index);
        };
        match event {
            Event::Prepared { facts, xen_version } => {
                member.facts = Some(*facts);
                self.xen_version = xen_version;
                Input::Prepared(index)
            }
            Event::Round { round, converged } => {
                progress.round(index, round, converged);
                member.rounds.push(round);
                Input::Round {
                    member: index,
                    converged,
                }
            }
            Event::Cut(times) => {
                progress.cut(index, &times);
                member.times = Some(times);
                Input::Cut(index)
            }
            Event::Stored(image) => {
                progress.stored(index);
                member.stored = Some(*image);
                Input::Stored(index)
            }
            Event::Failed { why } => {
                member.ended = true;
                Input::Failed(why)
            }
        }
    }

    /// A worker's socket was closed: fine once it has done its work.
    fn gone(&mut self, index: usize) -> Input {
        let Some(member) = self.members.get_mut(index) else {
            return Input::Tick;
        };
        if member.stored.is_some() || member.ended {
            return Input::Tick;
        }
        let status = member.worker.end(Instant::now() + WORKER_END_MAX);
        let name = &self.request.members[index];
        let mut why = match status {
            Some(status) => format!("the worker of '{name}' ended early ({status})"),
            None => format!("the worker of '{name}' is lost"),
        };
        for line in member.worker.last_words() {
            why.push_str("\n  ");
            why.push_str(&line);
        }
        Input::Failed(why)
    }

    fn act(&mut self, action: &Action, coordinator: &Coordinator) -> Result<Option<Input>, Error> {
        match action {
            Action::Arm => {
                self.arm()?;
                Ok(Some(Input::Armed))
            }
            Action::StartPrecopy => {
                self.start_precopy()?;
                Ok(None)
            }
            Action::Block => {
                // Out of the way of the cut itself.
                if let Some(journal) = &mut self.journal {
                    journal.update(|record| record.asked = true)?;
                }
                self.blocked_ns = now_ns();
                self.on_holds(Hold::block)?;
                Ok(Some(Input::Blocked))
            }
            Action::Cut => {
                self.tell_all(&Command::Cut);
                Ok(None)
            }
            Action::Release => {
                self.on_holds(Hold::release)?;
                self.held_ns = now_ns().saturating_sub(self.blocked_ns);
                Ok(Some(Input::Released))
            }
            Action::Finalise => {
                self.take_holds_down()?;
                self.tell_all(&Command::Finalise);
                Ok(None)
            }
            Action::Commit => {
                self.commit(coordinator.diverged())?;
                Ok(Some(Input::Committed))
            }
            Action::Abort(why) => Ok(Some(Input::Failed(why.clone()))),
        }
    }

    /// Builds everything that the cut needs, each thing after the journal
    /// knows of it.
    fn arm(&mut self) -> Result<(), Error> {
        let facts = self.facts();
        check_space(&self.request.store, &facts)?;
        let planned: Vec<HoldRecord> = facts
            .iter()
            .flat_map(|member| {
                let holds = |vif: &crate::domain::Vif| {
                    let (domid, devid, name) = (member.domid, vif.devid, &vif.ifname);
                    let emulated = HoldRecord::of_emulated(domid, devid, name);
                    std::iter::once(HoldRecord::new(domid, devid, name)).chain(emulated)
                };
                member.vifs.iter().flat_map(holds).collect::<Vec<_>>()
            })
            .collect();
        let record = Record {
            vne: self.request.vne.clone(),
            pid: std::process::id(),
            store: self.request.store.clone(),
            domains: facts.iter().map(JournalDomain::from).collect(),
            asked: false,
            workers: self
                .members
                .iter()
                .map(|m| m.worker.process.clone())
                .collect(),
            holds: planned.clone(),
            restore: None,
        };
        let journal = self.register.enter(record)?;
        start_guard(&self.request.program, &journal)?;
        self.journal = Some(journal);

        let vne = image::Name::new(&self.request.vne)?;
        self.snapshot = Some(self.store.begin(&vne)?);
        let rtnl = self.rtnl.insert(Rtnl::open()?);
        let nft = self.nft.insert(Nft::open()?);
        for hold in &planned {
            let hold = Hold::prepare(rtnl, nft, hold, self.request.hold_bytes)?;
            self.holds.push(hold);
        }
        Ok(())
    }

    fn start_precopy(&mut self) -> Result<(), Error> {
        let snapshot = self.snapshot.as_ref();
        for member in &self.members {
            let (Some(facts), Some(snapshot)) = (&member.facts, snapshot) else {
                continue;
            };
            let order = Command::Precopy {
                directory: snapshot.dir().to_owned(),
                policy: self.request.policy,
                final_buffer_bytes: self.request.final_buffer_bytes,
            };
            member.worker.tell(&order).map_err(|source| {
                Error::Failed(format!(
                    "the worker of '{}' doesn't listen: {source}",
                    facts.name
                ))
            })?;
        }
        Ok(())
    }

    /// A worker that can't be told has ended, and is heard of as gone.
    fn tell_all(&self, order: &Command) {
        for member in &self.members {
            if let Err(error) = member.worker.tell(order) {
                log::debug!("worker {}: {error}", member.worker.process.pid);
            }
        }
    }

    fn on_holds(
        &mut self,
        what: impl Fn(&Hold, &mut Rtnl) -> Result<(), net::Error>,
    ) -> Result<(), Error> {
        if let Some(rtnl) = &mut self.rtnl {
            for hold in &self.holds {
                what(hold, rtnl)?;
            }
        }
        Ok(())
    }

    /// After the release. An overflow fails the snapshot: frames were lost.
    fn take_holds_down(&mut self) -> Result<(), Error> {
        let Some(rtnl) = &mut self.rtnl else {
            return Ok(());
        };
        for hold in &self.holds {
            hold.check_overflow(hold.counters(rtnl)?)?;
        }
        if let Some(nft) = self.nft.take() {
            net::hold::remove_redirects(&self.holds, rtnl, nft);
        }
        for hold in self.holds.drain(..) {
            hold.remove(rtnl)?;
        }
        if let Some(journal) = &mut self.journal {
            journal.update(|record| record.holds.clear())?;
        }
        Ok(())
    }

    fn commit(&mut self, diverged: bool) -> Result<(), Error> {
        let gone = || Error::Failed(String::from("the snapshot in the making is gone"));
        let snapshot = self.snapshot.take().ok_or_else(gone)?;
        let mut manifest = snapshot.manifest();
        manifest.tool_version = env!("CARGO_PKG_VERSION").to_owned();
        manifest.xen_version.clone_from(&self.xen_version);
        manifest.host = rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned();
        manifest.label.clone_from(&self.request.label);
        manifest.cut = super::manifest::cut(&self.times(), self.held_ns);
        if diverged {
            log::warn!("cut although not all members had converged");
        }
        for member in &mut self.members {
            let (Some(facts), Some(times), Some(image)) =
                (&member.facts, &member.times, member.stored.take())
            else {
                return Err(gone());
            };
            let entry = super::manifest::member(facts, &member.rounds, times, image)?;
            manifest.members.push(entry);
            member.ended = true;
        }
        snapshot.commit(&manifest)?;
        self.manifest = Some(manifest);
        Ok(())
    }

    fn times(&self) -> Vec<CutTimes> {
        self.members
            .iter()
            .filter_map(|member| member.times)
            .collect()
    }

    fn facts(&self) -> Vec<DomainFacts> {
        self.members
            .iter()
            .filter_map(|member| member.facts.clone())
            .collect()
    }

    /// Brings everything back to how it was, as far as something is left to
    /// bring back. What can't be is left to the guard, with the journal.
    fn undo(&mut self) {
        let mut undone = self.let_frames_go();
        self.tell_all(&Command::Abort);
        let deadline = Instant::now() + WORKER_END_MAX;
        let mut harmed = Vec::new();
        for member in &mut self.members {
            let status = member.worker.end(deadline);
            let ended_well = status.is_some_and(|status| status.code().is_some());
            if let (false, Some(facts)) = (ended_well, &member.facts) {
                harmed.push(JournalDomain::from(facts));
            }
        }
        if self.journal.is_some() && !harmed.is_empty() {
            let asked = self.journal.as_ref().is_some_and(|j| j.record().asked);
            undone &= recover(&self.request.program, &harmed, asked);
        }
        // An uncommitted snapshot is removed with its handle.
        self.snapshot = None;
        if undone {
            if let Some(Err(error)) = self.journal.take().map(Journal::close) {
                log::error!("{}", sentence(&error));
            }
        }
    }

    fn let_frames_go(&mut self) -> bool {
        // A fresh socket: the old one may be what failed.
        let mut rtnl = Rtnl::open();
        if let Ok(rtnl) = &mut rtnl {
            // Before the redirects go: later frames must not overtake.
            for hold in &self.holds {
                if let Err(error) = hold.release(rtnl) {
                    log::debug!("{}: {error}", hold.vif());
                }
            }
            if let Some(nft) = self.nft.take() {
                net::hold::remove_redirects(&self.holds, rtnl, nft);
            }
        }
        self.nft = None;
        let mut gone = true;
        let mut note = |vif: &str, result: Result<(), net::Error>| {
            if let Err(error) = result {
                log::error!("{vif}: {}", sentence(&error));
                gone = false;
            }
        };
        match rtnl {
            Ok(mut rtnl) => {
                for hold in self.holds.drain(..) {
                    let vif = hold.vif().to_owned();
                    note(&vif, hold.remove(&mut rtnl));
                }
            }
            Err(error) => note("holds", Err(error)),
        }
        gone
    }
}

impl From<&DomainFacts> for JournalDomain {
    fn from(facts: &DomainFacts) -> Self {
        Self {
            name: facts.name.clone(),
            domid: facts.domid,
            uuid: facts.uuid.clone(),
        }
    }
}

impl From<net::Error> for Error {
    fn from(error: net::Error) -> Self {
        Self::Failed(sentence(&error))
    }
}

/// Starts the guard of a journal and waits until it's there.
pub fn start_guard(program: &Program, journal: &Journal) -> Result<(), Error> {
    use std::io::Read;
    let start = |source| Error::Start {
        what: "start the guard",
        source,
    };
    let folder = journal.folder().to_string_lossy().into_owned();
    let mut child = program
        .command(&["guard", "--", &folder])
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(start)?;
    let mut ready = [0; 1];
    if let Some(mut pipe) = child.stdout.take() {
        pipe.read_exact(&mut ready).map_err(start)?;
    }
    // It outlives this process or ends right after it: nobody waits for it.
    Ok(())
}

/// Brings domains back whose worker was killed, in a process that has libxl.
fn recover(program: &Program, domains: &[JournalDomain], asked: bool) -> bool {
    let mut arguments = vec![String::from("recover")];
    if asked {
        arguments.push(String::from("--asked"));
    }
    arguments.push(String::from("--"));
    for domain in domains {
        arguments.push(format!("{}={}", domain.domid, domain.uuid));
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let child = program.command(&arguments).stderr(Stdio::inherit()).spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            log::error!("cannot start the recovery: {error}");
            return false;
        }
    };
    let deadline = Instant::now() + RECOVER_MAX;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.success(),
            Ok(None) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            _ => return false,
        }
    }
}

/// A restored memory finds its disks as the guest left them later: a file
/// system doesn't survive that. So it has to be asked for.
fn refuse_writable_disks(members: &[DomainFacts]) -> Result<(), Error> {
    for member in members {
        let disks = member.writable_disks();
        if !disks.is_empty() {
            return Err(Error::Failed(format!(
                "member '{}' can write to {}, and this version doesn't capture disks (if you put \
                 them back yourself as they were, take its memory alone with --memory-only)",
                member.name,
                disks.join(", ")
            )));
        }
    }
    Ok(())
}

/// The parts can't be larger than the members' memory; a few MiB are theirs.
fn check_space(store: &std::path::Path, members: &[DomainFacts]) -> Result<(), Error> {
    const OVERHEAD_KIB: u64 = 4 << 10;
    let needed_kib: u64 = members.iter().map(|m| m.memory_kib + OVERHEAD_KIB).sum();
    let free_kib = image::free_bytes(store)? >> 10;
    if free_kib >= needed_kib {
        return Ok(());
    }
    Err(Error::Failed(format!(
        "not enough space in {}: {} MiB are free, up to {} MiB may be needed (remove snapshots \
         with 'xl vne-snapshot remove', or set another 'store')",
        store.display(),
        free_kib >> 10,
        needed_kib >> 10
    )))
}
