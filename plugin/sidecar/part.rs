//! This host's part of a take: starts workers, owns the holds, keeps the
//! journal, and carries out what the protocol's host machine asks for.

use std::ops::Range;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::acting::{Heard, Which};
use super::disks::{self, Capture};
use super::error::Error;
use super::journal::{Journal, JournalCap, JournalDomain, Record, Register};
use super::manifest::{timeline, Marks};
use super::vote::Vote;
use super::wire::{Attached, PartMember, Plan};
use super::workers::{Program, Rendezvous, Worker};
use crate::clock::now_ns;
use crate::cut::{HostAction, HostInput};
use crate::disk::Piece;
use crate::domain::messages::{Command, CutTimes, Event};
use crate::domain::policy::Round;
use crate::domain::DomainFacts;
use crate::image::{
    self, Manifest, Member as Entry, MemberImage, MemoryShare, Name, Recorded, Store,
};
use crate::net::{self, Frame, Hold, HoldRecord, Nft, Rtnl, Stopped, Watched};
use crate::sentence::sentence;

/// A worker that was told to give up does so within this, or is killed.
const WORKER_END_MAX: Duration = Duration::from_secs(2);
/// Bringing domains back takes 3 s at most (`domain::recover`).
const RECOVER_MAX: Duration = Duration::from_secs(10);

/// How long to wait for the members' networks to become quiet, once all that
/// members send is held. What outsiders send never ends.
const QUIET_MAX: Duration = Duration::from_millis(25);
/// How long a member may take to read what has come for it: a busy guest on a busy
/// host has to wait for a processor.
const READ_MAX: Duration = Duration::from_millis(300);
/// How long frames that had left a hold before it was blocked may take to be on
/// their way.
const HANDED_ON_MAX: Duration = Duration::from_millis(50);
/// What was let go has come through its ifb within this.
const RECORD_MAX: Duration = Duration::from_secs(2);

/// The first limit of a member that doesn't converge, in percent of a physical
/// CPU for each virtual one.
const CAP_FIRST: u32 = 50;
/// And the last: below that a guest's own time-outs begin to run out.
const CAP_LAST: u32 = 5;
/// How long a limit is tried before it's halved.
const CAP_INTERVAL: Duration = Duration::from_secs(4);

struct Member {
    worker: Worker,
    converged: bool,
    /// It has converged at some time: a guest that is just busier at the cut is
    /// no news.
    ever_converged: bool,
    /// What it's limited to, and since when.
    cap: Option<(u32, Instant)>,
    facts: Option<DomainFacts>,
    rounds: Vec<Round>,
    times: Option<CutTimes>,
    /// Its holds, by their place among the part's.
    holds: Range<usize>,
    /// What is made of its disks.
    disks: Vec<Piece>,
    /// That this is being done.
    capture: Option<Capture>,
    /// Its network at its cut.
    stopped: Option<Stopped>,
    watched: Option<Watched>,
    /// How many frames came for it after its cut, before all had been cut.
    late: u64,
    /// What it had sent before its cut.
    frames: Vec<Frame>,
    recorded: Option<Recorded>,
    stored: Option<MemberImage>,
    marks: Marks,
    ended: bool,
}

/// How much of a member's last pages to keep in memory, unless a command says
/// otherwise, in bytes.
pub const FINAL_BUFFER_BYTES: usize = 256 << 20;

/// Where a part is carried out.
#[derive(Debug, Clone)]
pub struct Place {
    /// This host's name among those of the VNE.
    pub host: Name,
    /// The root of the image store.
    pub store: PathBuf,
    /// Xen's folder for what is gone after a reboot.
    pub run_dir: PathBuf,
    /// How workers are started.
    pub program: Program,
    /// How much of a member's last pages to keep in memory, in bytes.
    pub final_buffer_bytes: usize,
    /// Bytes that this host's members may take together, if there is a limit.
    pub memory_bytes: Option<u64>,
}

/// One host's part of one take.
pub(super) struct Part {
    place: Place,
    plan: Plan,
    which: Which,
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
    /// What is said to be stored, once it is.
    stored: Vec<PartMember>,
    /// What the leader has decided on.
    outcome: Option<Manifest>,
    blocked_ns: u64,
    held_ns: u64,
    finalise_ns: u64,
}

impl Part {
    /// A part of which nothing exists yet.
    pub fn new(place: Place, plan: Plan, which: Which) -> Result<Self, Error> {
        Ok(Self {
            register: Register::open(&place.run_dir)?,
            store: Store::open(&place.store)?,
            place,
            plan,
            which,
            members: Vec::new(),
            xen_version: String::new(),
            rtnl: None,
            nft: None,
            holds: Vec::new(),
            journal: None,
            snapshot: None,
            stored: Vec::new(),
            outcome: None,
            blocked_ns: 0,
            held_ns: 0,
            finalise_ns: 0,
        })
    }

    /// What it's about.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Takes in what the leader says that was decided.
    pub fn outcome(&mut self, manifest: Manifest) {
        self.outcome = Some(manifest);
    }

    /// Starts a worker for each member, to look at it.
    pub fn start_workers(&mut self, said: &Sender<Heard>) -> Result<(), Error> {
        let others = Rendezvous::of(self.plan.members.len());
        let others = others.map_err(Error::start("make a pipe"))?;
        for (index, name) in self.plan.members.iter().enumerate() {
            let worker = Worker::start(
                &self.place.program,
                index,
                name.as_str(),
                others.as_ref(),
                said.clone(),
            )
            .map_err(Error::start("start a worker"))?;
            self.members.push(Member {
                worker,
                converged: false,
                ever_converged: false,
                cap: None,
                facts: None,
                rounds: Vec::new(),
                times: None,
                holds: 0..0,
                disks: Vec::new(),
                capture: None,
                stopped: None,
                watched: None,
                late: 0,
                frames: Vec::new(),
                recorded: None,
                stored: None,
                marks: Marks::default(),
                ended: false,
            });
        }
        Ok(())
    }

    /// Whether all members have been looked at, and can be captured.
    pub fn looked_at(&mut self) -> Option<Result<(), Error>> {
        if self.members.iter().any(|member| member.facts.is_none()) {
            return None;
        }
        if self.plan.memory_only {
            return Some(Ok(()));
        }
        let planned = disks::plan(&self.facts(), self.which.take.0);
        Some(planned.map(|planned| {
            for (member, pieces) in self.members.iter_mut().zip(planned) {
                member.disks = pieces;
            }
        }))
    }

    /// What was seen of the members. Another host needn't know what else their
    /// configurations say: consoles' passwords, for one.
    pub fn looked(&self) -> Attached {
        let mut facts = self.facts();
        if self.plan.leader != self.place.host {
            for facts in &mut facts {
                facts.config_json.clear();
            }
        }
        Attached::Looked {
            facts,
            xen_version: self.xen_version.clone(),
        }
    }

    /// How long frames were held.
    pub fn held(&self) -> Attached {
        Attached::Held {
            hold_ns: self.held_ns,
        }
    }

    /// What is stored.
    pub fn stored(&self) -> Attached {
        Attached::Part {
            vne: self.plan.vne.clone(),
            id: self.plan.id.clone(),
            members: self.stored.clone(),
            store: self.plan.store.clone(),
        }
    }

    /// Takes in what a worker said.
    pub fn hear(&mut self, index: usize, event: Event) -> Option<HostInput> {
        let member = self.members.get_mut(index)?;
        match event {
            Event::Prepared { facts, xen_version } => {
                member.facts = Some(*facts);
                self.xen_version = xen_version;
                None
            }
            Event::Round { round, converged } => {
                let hovers_since = member.marks.hover_ns.unwrap_or_else(now_ns);
                member.marks.hover_ns = converged.then_some(hovers_since);
                member.converged = converged;
                member.ever_converged |= converged;
                member.rounds.push(round);
                Some(HostInput::Round {
                    member: index,
                    converged,
                })
            }
            Event::Near => Some(HostInput::Near(index)),
            Event::Stopped(stopped) => {
                member.stopped = Some(stopped);
                match self.capture_disks(index) {
                    Ok(()) => Some(HostInput::Cut(index)),
                    Err(error) => Some(HostInput::Failed(sentence(&error))),
                }
            }
            Event::Cut(times) => {
                member.times = Some(times);
                Some(HostInput::Runs(index))
            }
            Event::Stored(image) => {
                member.stored = Some(*image);
                member.marks.stored_ns = now_ns();
                Some(HostInput::Stored(index))
            }
            Event::Failed { why } => {
                member.ended = true;
                Some(HostInput::Failed(why))
            }
        }
    }

    /// A worker's socket was closed: fine once it has done its work.
    pub fn gone(&mut self, index: usize) -> Option<HostInput> {
        let member = self.members.get_mut(index)?;
        if member.stored.is_some() || member.ended {
            return None;
        }
        member.ended = true;
        let status = member.worker.end(Instant::now() + WORKER_END_MAX);
        let name = self.plan.members.get(index)?;
        let mut why = match status {
            Some(status) => format!("the worker of '{name}' ended early ({status})"),
            None => format!("the worker of '{name}' is lost"),
        };
        for line in member.worker.last_words() {
            why.push_str("\n  ");
            why.push_str(&line);
        }
        Some(HostInput::Failed(why))
    }

    /// Carries out this host's part.
    pub fn act(&mut self, action: &HostAction) -> Result<Option<HostInput>, Error> {
        match action {
            // Not for here; armed when the workers have looked.
            HostAction::Say(_) | HostAction::Arm | HostAction::Throttle => Ok(None),
            HostAction::StartPrecopy => {
                self.start_precopy()?;
                Ok(None)
            }
            HostAction::Approach => {
                self.tell_all(&Command::Approach);
                Ok(None)
            }
            HostAction::Block => {
                // Out of the way of the cut itself.
                if let Some(journal) = &mut self.journal {
                    journal.update(|record| record.asked = true)?;
                }
                self.blocked_ns = now_ns();
                self.on_holds(Hold::block)?;
                if let Some(rtnl) = &mut self.rtnl {
                    // Frames on the way to another host leave before it's told.
                    let deadline = Instant::now() + HANDED_ON_MAX;
                    net::hold::wait_handed_on(&self.holds, rtnl, deadline)?;
                }
                Ok(Some(HostInput::Blocked))
            }
            HostAction::Cut => {
                self.drain()?;
                for hold in &self.holds {
                    hold.begin_record()?;
                }
                self.tell_all(&Command::Cut);
                Ok(None)
            }
            HostAction::Release => {
                self.count_late()?;
                self.on_holds(Hold::release)?;
                self.held_ns = now_ns().saturating_sub(self.blocked_ns);
                self.record()?;
                self.check_overflow()?;
                Ok(Some(HostInput::Released))
            }
            HostAction::Finalise => {
                self.keep_frames()?;
                self.take_holds_down()?;
                self.uncap()?;
                self.finalise_ns = now_ns();
                self.tell_all(&Command::Finalise);
                let captures = self.members.iter_mut().filter_map(|m| m.capture.as_mut());
                captures.for_each(Capture::settle);
                Ok(None)
            }
            HostAction::Vote => {
                self.vote()?;
                Ok(Some(HostInput::Voted))
            }
            HostAction::Commit => {
                self.commit()?;
                Ok(Some(HostInput::Committed))
            }
            HostAction::Undo => {
                self.bring_back();
                if let Some(Err(error)) = self.snapshot.take().map(image::Take::discard) {
                    // Half a snapshot is never listed; the next take tries again.
                    log::warn!("{}", sentence(&error));
                }
                Ok(Some(HostInput::Undone))
            }
        }
    }

    /// Builds everything that the cut needs, each thing after the journal
    /// knows of it.
    pub fn arm(&mut self) -> Result<(), Error> {
        let facts = self.facts();
        check_space(&self.place.store, &facts)?;
        self.memory()?;
        let mut planned = Vec::new();
        for (member, facts) in self.members.iter_mut().zip(&facts) {
            let first = planned.len();
            for vif in &facts.vifs {
                let (domid, name) = (facts.domid, &vif.ifname);
                planned.push(HoldRecord::new(domid, vif.devid, name));
                planned.extend(HoldRecord::of_emulated(domid, vif.devid, name));
            }
            member.holds = first..planned.len();
        }
        let record = Record {
            vne: self.plan.vne.to_string(),
            leader: Some(self.plan.leader.to_string()),
            pid: std::process::id(),
            store: self.place.store.clone(),
            domains: facts.iter().map(JournalDomain::from).collect(),
            asked: false,
            workers: self
                .members
                .iter()
                .map(|m| m.worker.process.clone())
                .collect(),
            holds: planned.clone(),
            caps: Vec::new(),
            restore: None,
            joint: None,
            exchange: None,
        };
        let journal = self.register.enter(record)?;
        start_guard(&self.place.program, &journal)?;
        self.journal = Some(journal);

        let snapshot = self.store.begin_as(&self.plan.vne, &self.plan.id)?;
        let pieces = self.members.iter().flat_map(|member| &member.disks);
        let pieces: Vec<Piece> = pieces.cloned().collect();
        let snapshot = self.snapshot.insert(snapshot);
        if !pieces.is_empty() {
            snapshot.add_disks(&pieces)?;
            disks::prepare(&pieces)?;
        }
        let rtnl = self.rtnl.insert(Rtnl::open()?);
        let nft = self.nft.insert(Nft::open()?);
        for hold in &planned {
            let hold = Hold::prepare(rtnl, nft, hold, self.plan.hold_bytes)?;
            self.holds.push(hold);
        }
        for member in &mut self.members {
            let planned = planned.get(member.holds.clone()).unwrap_or_default();
            member.watched = Some(Watched::open(planned)?);
        }
        Ok(())
    }

    /// Has a member's disks captured, which stands still.
    fn capture_disks(&mut self, index: usize) -> Result<(), Error> {
        let Some(member) = self.members.get_mut(index) else {
            return Ok(());
        };
        if member.disks.is_empty() {
            return Ok(());
        }
        let snapshot = self.snapshot.as_ref().ok_or_else(lost)?;
        let worker = member.worker.socket();
        let worker = worker.map_err(Error::start("capture disks"))?;
        let domid = member.facts.as_ref().ok_or_else(lost)?.domid;
        let capture = Capture::start(domid, member.disks.clone(), snapshot.lock()?, worker);
        member.capture = Some(capture.map_err(Error::start("capture disks"))?);
        Ok(())
    }

    /// Slows down the members that haven't converged, a bit more each time.
    /// Returns which, and what each is limited to now.
    pub fn throttle(&mut self) -> Result<Vec<(usize, u32)>, Error> {
        let mut slowed = Vec::new();
        let mut caps = Vec::new();
        for (index, member) in self.members.iter_mut().enumerate() {
            let Some(facts) = member.facts.as_ref().filter(|_| !member.converged) else {
                continue;
            };
            let Some(before) = facts.cap else {
                return Err(Error::Failed(format!(
                    "'{}' doesn't converge, and its scheduler can't limit its processors (credit \
                     and credit2 can)",
                    facts.name
                )));
            };
            let cap = match member.cap {
                Some((_, since)) if since.elapsed() < CAP_INTERVAL => continue,
                Some((cap, _)) => cap.min((cap / 2).max(CAP_LAST * facts.vcpus)),
                None if before > 0 => before.min(CAP_FIRST * facts.vcpus),
                None => CAP_FIRST * facts.vcpus,
            };
            member.cap = Some((cap, Instant::now()));
            slowed.push((index, cap));
            caps.push((facts.domid, facts.uuid.clone(), before, cap));
        }
        if caps.is_empty() {
            return Ok(slowed);
        }
        if let Some(journal) = &mut self.journal {
            journal.update(|record| {
                for (domid, uuid, before, _) in &caps {
                    if record.caps.iter().all(|known| known.domid != *domid) {
                        record.caps.push(JournalCap {
                            domid: *domid,
                            uuid: uuid.clone(),
                            cap: *before,
                        });
                    }
                }
            })?;
        }
        let caps = caps
            .iter()
            .map(|(domid, uuid, _, cap)| format!("{domid}={uuid}={cap}"));
        set_caps(&self.place.program, caps)?;
        Ok(slowed)
    }

    /// Gives members their processors back.
    fn uncap(&mut self) -> Result<(), Error> {
        let Some(journal) = &mut self.journal else {
            return Ok(());
        };
        let caps = &journal.record().caps;
        if caps.is_empty() {
            return Ok(());
        }
        let before = caps
            .iter()
            .map(|cap| format!("{}={}={}", cap.domid, cap.uuid, cap.cap));
        set_caps(&self.place.program, before)?;
        Ok(journal.update(|record| record.caps.clear())?)
    }

    /// What each member may take, if there is a limit.
    fn memory(&self) -> Result<Option<MemoryShare>, Error> {
        let share = |limit| MemoryShare::of(limit, self.members.len());
        Ok(self.place.memory_bytes.map(share).transpose()?)
    }

    fn start_precopy(&mut self) -> Result<(), Error> {
        let snapshot = self.snapshot.as_ref();
        let memory = self.memory()?;
        for member in &self.members {
            let (Some(facts), Some(snapshot)) = (&member.facts, snapshot) else {
                continue;
            };
            let order = Command::Precopy {
                directory: snapshot.dir().to_owned(),
                policy: self.plan.policy,
                final_buffer_bytes: self.place.final_buffer_bytes,
                memory_bytes: memory.map(|share| share.bytes()),
                holds: holds_of(&self.holds, member).map(Hold::record).collect(),
                disks: !member.disks.is_empty(),
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

    /// An overflow fails the snapshot: frames were lost.
    fn check_overflow(&mut self) -> Result<(), Error> {
        if let Some(rtnl) = &mut self.rtnl {
            for hold in &self.holds {
                hold.check_overflow(hold.counters(rtnl)?)?;
            }
        }
        Ok(())
    }

    /// Waits for what was on the way to the members to be theirs.
    fn drain(&mut self) -> Result<(), Error> {
        let watched = self.members.iter_mut();
        let mut watched: Vec<_> = watched.filter_map(|m| m.watched.as_mut()).collect();
        if !net::drain(&mut watched, QUIET_MAX, READ_MAX)? {
            // What they haven't read by their cuts is counted as late.
            log::info!(
                "some member hasn't read its frames {} ms after the hold",
                READ_MAX.as_millis()
            );
        }
        Ok(())
    }

    /// What has come for members since their cuts isn't in the snapshot: said so
    /// of what came before frames were let go.
    fn count_late(&mut self) -> Result<(), Error> {
        for member in &mut self.members {
            if let (Some(watched), Some(stopped)) = (&mut member.watched, &member.stopped) {
                member.late = watched.given()?.saturating_sub(stopped.given);
            }
        }
        Ok(())
    }

    /// Takes what members had sent before their cuts and nobody had seen: the
    /// frames that come out of the holds first.
    fn record(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + RECORD_MAX;
        for (member, name) in self.members.iter_mut().zip(&self.plan.members) {
            let holds = self.holds.get(member.holds.clone()).unwrap_or_default();
            let queued = member.stopped.as_ref().map(|stopped| &stopped.queued);
            let queued = queued.filter(|queued| queued.len() == holds.len());
            let Some(queued) = queued else {
                return Err(Error::Failed(format!(
                    "the worker of '{name}' hasn't counted the frames of all holds"
                )));
            };
            for (hold, count) in holds.iter().zip(queued) {
                let recorded = hold.recorded(*count, deadline);
                member.frames.extend(recorded.map_err(|error| {
                    Error::Failed(format!("{}: {}", hold.vif(), sentence(&error)))
                })?);
            }
        }
        Ok(())
    }

    /// Writes them down. They are durable when the worker has finished.
    fn keep_frames(&mut self) -> Result<(), Error> {
        let snapshot = self.snapshot.as_ref().ok_or_else(lost)?;
        for (member, name) in self.members.iter_mut().zip(&self.plan.members) {
            let frames = std::mem::take(&mut member.frames);
            if !frames.is_empty() {
                let file = net::frames::encode(&frames);
                member.recorded = Some(Recorded {
                    frames: frames.len() as u64,
                    file: snapshot.add_frames(name, &file)?,
                });
            }
        }
        Ok(())
    }

    /// After the release.
    fn take_holds_down(&mut self) -> Result<(), Error> {
        let Some(rtnl) = &mut self.rtnl else {
            return Ok(());
        };
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

    /// All is stored: what it is, and unless this host leads and so decides by
    /// itself, a vote that outlasts everything.
    fn vote(&mut self) -> Result<(), Error> {
        let mut stored = Vec::new();
        for member in &mut self.members {
            let (Some(facts), Some(times), Some(image)) =
                (&member.facts, &member.times, member.stored.take())
            else {
                return Err(lost());
            };
            let host = &self.place.host;
            let marks = Marks {
                held_ns: self.blocked_ns,
                released_ns: self.blocked_ns.saturating_add(self.held_ns),
                finalise_ns: self.finalise_ns,
                ..member.marks
            };
            stored.push(PartMember {
                entry: Entry {
                    diverged: !member.ever_converged,
                    throttled_to: member.cap.map(|(cap, _)| cap),
                    late_frames: member.late,
                    recorded: member.recorded.take(),
                    timeline: Some(timeline(&member.rounds, times, &marks)),
                    ..super::manifest::member(
                        host,
                        facts,
                        &member.rounds,
                        times,
                        (image, member.disks.clone()),
                    )?
                },
                suspended_ns: times.suspended_ns,
            });
            member.ended = true;
        }
        self.stored = stored;
        if self.plan.leader == self.place.host {
            return Ok(());
        }
        let vote = Vote {
            take: self.which.take,
            session: self.which.session,
            leader: self.plan.leader.clone(),
            members: self.stored.clone(),
            store: self.plan.store.clone(),
        };
        let snapshot = self.snapshot.as_mut().ok_or_else(lost)?;
        snapshot.vote(&vote.encode()?)?;
        // Nothing but the outcome is missing: for that, nobody has to be kept
        // from using the members.
        self.bring_back();
        Ok(())
    }

    /// Makes the snapshot exist, by the decision of this host.
    pub fn decide(&mut self, manifest: &Manifest) -> Result<(), Error> {
        self.snapshot.as_mut().ok_or_else(lost)?.commit(manifest)?;
        self.snapshot = None;
        Ok(())
    }

    /// Makes the snapshot visible here, as was decided elsewhere.
    fn commit(&mut self) -> Result<(), Error> {
        let Some(snapshot) = &mut self.snapshot else {
            // The decision itself has done it.
            return Ok(());
        };
        let manifest = self.outcome.as_ref().ok_or_else(lost)?;
        super::vote::commit(snapshot, &self.place.host, manifest, &self.stored)?;
        self.snapshot = None;
        Ok(())
    }

    fn facts(&self) -> Vec<DomainFacts> {
        self.members
            .iter()
            .filter_map(|member| member.facts.clone())
            .collect()
    }

    /// Brings guests and network back to how they were, as far as something is
    /// left to bring back. What can't be is left to the guard, with the journal.
    pub fn bring_back(&mut self) {
        // First, since letting frames go may wait for the interfaces.
        self.tell_all(&Command::Abort);
        let mut undone = self.let_frames_go();
        if let Err(error) = self.uncap() {
            log::error!("{}", sentence(&error));
            undone = false;
        }
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
            undone &= recover(&self.place.program, &harmed, asked);
        }
        if undone {
            if let Some(Err(error)) = self.journal.take().map(Journal::close) {
                log::error!("{}", sentence(&error));
            }
        }
        self.end_captures();
    }

    /// Waits until no disk is being captured any more, so that all that was made can be
    /// removed. Guests run, and don't wait for this.
    fn end_captures(&mut self) {
        let mut ended = true;
        for capture in self.members.iter_mut().filter_map(|m| m.capture.take()) {
            ended &= capture.end();
        }
        if ended {
            return;
        }
        if let Some(snapshot) = self.snapshot.take() {
            log::error!("a disk is still being captured: the next take removes what comes of it");
            snapshot.leave();
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

/// A member's holds, among all.
fn holds_of<'a>(holds: &'a [Hold], member: &Member) -> impl Iterator<Item = &'a Hold> {
    holds.get(member.holds.clone()).unwrap_or_default().iter()
}

fn lost() -> Error {
    Error::Failed(String::from("the snapshot in the making is gone"))
}

/// Starts the guard of a journal and waits until it's there.
pub fn start_guard(program: &Program, journal: &Journal) -> Result<(), Error> {
    use std::io::Read;
    let start = |source| Error::start("start the guard")(source);
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
    // It may outlive this process. A daemon lives on, and must not leave it
    // unburied.
    std::thread::spawn(move || child.wait());
    Ok(())
}

/// Limits domains' processors, in a process that has libxl.
fn set_caps(program: &Program, caps: impl Iterator<Item = String>) -> Result<(), Error> {
    let status = program
        .command(&["cap", "--"])
        .args(caps)
        .stderr(Stdio::inherit())
        .status()
        .map_err(Error::start("limit processors"))?;
    if status.success() {
        Ok(())
    } else {
        Err(Error::Failed(format!("limiting processors: {status}")))
    }
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
