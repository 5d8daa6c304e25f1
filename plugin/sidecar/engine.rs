//! Takes a snapshot on this host: leads the take and, in the same process,
//! carries out this host's part of it.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use super::journal::{self, Register};
use super::part::Part;
use super::signals;
use super::workers::{Heard, Program};
use crate::clock::now_ns;
use crate::cut::{
    Action, Coordinator, Host, HostAction, HostInput, HostLimits, Input, Limits, OnDivergence,
    Phase, Session, TakeId,
};
use crate::domain::messages::CutTimes;
use crate::domain::policy::{PolicyConfig, Round};
use crate::domain::DomainFacts;
use crate::image::{self, Manifest, Store};
use crate::sentence::sentence;

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
    /// This host's own.
    pub host_limits: HostLimits,
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
    let interrupted = said.clone();
    signals::watch(move || interrupted.send(Heard::Interrupted).is_ok())?;
    let mut part = Part::new(request, register, store);
    let result = part
        .start_workers(&said)
        .and_then(|()| lead(&mut part, request, dry_run, &heard, progress));
    // Also after a success or a dry run: whatever is still there goes.
    part.undo();
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
            "cleaning up after a killed take or restore: {status}"
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

/// This host among those of the take: all members are here.
const HERE: usize = 0;

/// Something that is to be done next.
enum Todo {
    Tell(Input),
    TellHost(HostInput),
    Lead(Action),
    Do(HostAction),
}

/// Both sides of the protocol, in one process.
struct Cut {
    coordinator: Coordinator,
    host: Host,
    todo: VecDeque<Todo>,
}

impl Cut {
    fn begin(request: &TakeRequest) -> Result<Self, Error> {
        let random = || {
            crate::random::number().map_err(|source| Error::Start {
                what: "get a random number",
                source,
            })
        };
        let take = TakeId(random()?);
        let now = now_ns();
        let (coordinator, orders) =
            Coordinator::begin(take, 1, request.limits, request.on_divergence, now);
        let session = Session(random()?);
        let members = request.members.len();
        let (host, actions) = Host::begin(take, session, members, request.host_limits, now);
        let actions = actions.into_iter().map(Todo::Do);
        Ok(Self {
            coordinator,
            host,
            todo: orders.into_iter().map(Todo::Lead).chain(actions).collect(),
        })
    }

    fn tell(&mut self, input: Input) {
        let actions = self.coordinator.handle(now_ns(), input);
        self.todo.extend(actions.into_iter().map(Todo::Lead));
    }

    fn tell_host(&mut self, input: HostInput) {
        let actions = self.host.handle(now_ns(), input);
        self.todo.extend(actions.into_iter().map(Todo::Do));
    }

    fn deadline_ns(&self) -> Option<u64> {
        let host = self.host.deadline_ns();
        host.into_iter().chain(self.coordinator.deadline_ns()).min()
    }
}

/// Leads the take and carries out this host's part of it, until it's over.
fn lead(
    part: &mut Part<'_>,
    request: &TakeRequest,
    dry_run: bool,
    heard: &Receiver<Heard>,
    progress: &mut dyn Progress,
) -> Result<Taken, Error> {
    let mut cut = Cut::begin(request)?;
    let mut manifest = None;
    let mut armed = false;
    progress.phase(cut.coordinator.phase());
    loop {
        while let Some(next) = cut.todo.pop_front() {
            let before = cut.coordinator.phase();
            match next {
                Todo::Tell(input) => cut.tell(input),
                Todo::TellHost(input) => cut.tell_host(input),
                Todo::Lead(Action::Send(_, message)) => {
                    cut.tell_host(HostInput::Heard(message));
                }
                Todo::Lead(Action::Decide) => {
                    cut.tell(match part.commit(cut.coordinator.diverged()) {
                        Ok(decided) => {
                            manifest = Some(decided);
                            Input::Decided
                        }
                        Err(error) => Input::Failed(sentence(&error)),
                    });
                }
                Todo::Do(HostAction::Say(message)) => cut.tell(Input::Heard(HERE, message)),
                Todo::Do(action) => match part.act(&action) {
                    Ok(Some(input)) => cut.tell_host(input),
                    Ok(None) => {}
                    Err(error) => cut.tell_host(HostInput::Failed(sentence(&error))),
                },
            }
            if cut.coordinator.phase() != before {
                progress.phase(cut.coordinator.phase());
            }
        }
        if !armed && cut.host.phase() == Phase::Prepare {
            if let Some(facts) = part.looked_at() {
                let facts = facts?;
                armed = true;
                progress.planned(&facts);
                if dry_run {
                    return Ok(Taken::Planned(facts));
                }
                cut.tell_host(match part.arm() {
                    Ok(()) => HostInput::Armed,
                    Err(error) => HostInput::Failed(sentence(&error)),
                });
                continue;
            }
        }
        match cut.coordinator.phase() {
            Phase::Done => {
                let missing = || Error::Failed(String::from("committed without a manifest"));
                let manifest = manifest.ok_or_else(missing)?;
                return Ok(Taken::Snapshot(Box::new(manifest)));
            }
            Phase::Failed => {
                let why = cut.coordinator.why().unwrap_or("aborted");
                return Err(Error::Failed(why.to_owned()));
            }
            _ => {}
        }
        let next = next_input(part, heard, cut.deadline_ns(), progress);
        cut.todo.extend(next);
    }
}

/// Waits for the next thing that happens, or for the deadline.
fn next_input(
    part: &mut Part<'_>,
    heard: &Receiver<Heard>,
    deadline_ns: Option<u64>,
    progress: &mut dyn Progress,
) -> Vec<Todo> {
    let wait = match deadline_ns {
        Some(deadline) => Duration::from_nanos(deadline.saturating_sub(now_ns())),
        None => Duration::from_secs(3600),
    };
    match heard.recv_timeout(wait) {
        Ok(Heard::Event(index, event)) => {
            let input = part.hear(index, event, progress);
            input.map(Todo::TellHost).into_iter().collect()
        }
        Ok(Heard::Gone(index)) => part.gone(index).map(Todo::TellHost).into_iter().collect(),
        Err(RecvTimeoutError::Timeout) => {
            vec![Todo::TellHost(HostInput::Tick), Todo::Tell(Input::Tick)]
        }
        // That all senders are gone cannot be: the signal watcher keeps one.
        Ok(Heard::Interrupted) | Err(RecvTimeoutError::Disconnected) => {
            vec![Todo::Tell(Input::Interrupted)]
        }
    }
}
