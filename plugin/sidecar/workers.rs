//! Starting workers, and hearing of them.

use std::fs::File;
use std::io::BufReader;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::acting::Heard;
use super::journal::{start_ticks, JournalProcess};
use crate::domain::messages;

/// What is shown of a child's stderr to explain a failure.
const LAST_WORDS_LINES_MAX: usize = 12;
const LAST_WORDS_BYTES_MAX: usize = 8 << 10;

/// The command that starts workers: xl itself, with the plugin in it.
#[derive(Debug, Clone)]
pub struct Program {
    /// The running xl.
    pub xl: PathBuf,
    /// How often `-v` was given.
    pub verbosity: u32,
}

impl Program {
    /// The worker's hidden command with its arguments. A process group of its
    /// own keeps a Ctrl-C at the terminal from it: the engine decides.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.xl_command(crate::WORKER_COMMAND);
        command.args(arguments);
        command
    }

    /// One of xl's own commands, in a process group of its own as well.
    pub fn xl_command(&self, name: &str) -> Command {
        let mut command = Command::new(&self.xl);
        for _ in 0..self.verbosity {
            command.arg("-v");
        }
        command
            .arg(name)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .process_group(0);
        command
    }
}

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    child: Child,
    socket: UnixStream,
    words: Words,
    /// Who it is, for the journal.
    pub process: JournalProcess,
}

impl Worker {
    /// Starts the worker for a domain; what it says goes to `heard` as from
    /// member `index`. With other members on this host it meets them at the cut.
    pub fn start(
        program: &Program,
        index: usize,
        domain: &str,
        others: Option<&Rendezvous>,
        heard: Sender<Heard>,
    ) -> std::io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let words = Words::new()?;
        let child = program
            .command(&["capture", "--", domain])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(others.map_or_else(|| Ok(Stdio::null()), Rendezvous::stdio)?)
            .stderr(words.stdio(program)?)
            .spawn()?;
        let mut reader = BufReader::new(ours.try_clone()?);
        std::thread::spawn(move || {
            // A receiver that is gone means that nobody wants to know.
            while let Ok(Some(event)) = messages::receive(&mut reader) {
                if heard.send(Heard::Event(index, event)).is_err() {
                    return;
                }
            }
            let _ = heard.send(Heard::Gone(index));
        });
        Ok(Self {
            process: journal_process(&child),
            child,
            socket: ours,
            words,
        })
    }

    /// Gives an order.
    pub fn tell(&self, order: &messages::Command) -> std::io::Result<()> {
        messages::send(&self.socket, order)
    }

    /// A way of its own to tell it something.
    pub fn socket(&self) -> std::io::Result<UnixStream> {
        self.socket.try_clone()
    }

    /// The last lines that it wrote to stderr.
    pub fn last_words(&self) -> Vec<String> {
        self.words.last()
    }

    /// Waits for it to end by itself until `deadline`, then kills it.
    pub fn end(&mut self, deadline: Instant) -> Option<ExitStatus> {
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(None) => {
                    log::warn!("worker {} doesn't end, killing it", self.process.pid);
                    if let Err(error) = self.child.kill() {
                        log::warn!("worker {}: {error}", self.process.pid);
                    }
                    return self.child.wait().ok();
                }
                Err(error) => {
                    log::warn!("worker {}: {error}", self.process.pid);
                    return None;
                }
            }
        }
    }
}

/// Where the save helpers of one host's members wait for each other, when their
/// guests have stopped (`c-shim/policy_wire.h`). It's kept until all workers are
/// started; then it must go, or nobody would ever be the last.
#[derive(Debug)]
pub struct Rendezvous(OwnedFd);

impl Rendezvous {
    /// For this many members; one alone waits for nobody.
    pub fn of(members: usize) -> std::io::Result<Option<Self>> {
        if members < 2 {
            return Ok(None);
        }
        let (_, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        Ok(Some(Self(write)))
    }

    fn stdio(&self) -> std::io::Result<Stdio> {
        Ok(Stdio::from(self.0.try_clone()?))
    }
}

/// A child that isn't waited for yet, as the journal knows it.
pub(super) fn journal_process(child: &Child) -> JournalProcess {
    let pid = child.id();
    JournalProcess {
        pid,
        start_ticks: start_ticks(pid).unwrap_or_default(),
    }
}

/// What a child writes to stderr, in a file in memory. Not a pipe: if this
/// process were killed, SIGPIPE would end libxl's save helper in the middle of
/// a cut, and 'xl restore' before it has destroyed what it has half built. Nor
/// does a child have to wait until somebody reads it.
#[derive(Debug)]
pub(super) struct Words(File);

impl Words {
    pub(super) fn new() -> std::io::Result<Self> {
        let file = rustix::fs::memfd_create(c"vne-words", rustix::fs::MemfdFlags::CLOEXEC)?;
        Ok(Self(File::from(file)))
    }

    /// The child's stderr. With 'xl -vv' all of it is shown at once instead.
    pub(super) fn stdio(&self, program: &Program) -> std::io::Result<Stdio> {
        if program.verbosity > 1 {
            Ok(Stdio::inherit())
        } else {
            Ok(Stdio::from(self.0.try_clone()?))
        }
    }

    /// The last lines.
    pub(super) fn last(&self) -> Vec<String> {
        let length = self.0.metadata().map_or(0, |facts| facts.len());
        let mut tail = vec![0; LAST_WORDS_BYTES_MAX];
        let from = length.saturating_sub(LAST_WORDS_BYTES_MAX as u64);
        let read = self.0.read_at(&mut tail, from).unwrap_or(0);
        tail.truncate(read);
        let text = String::from_utf8_lossy(&tail);
        let lines: Vec<&str> = text.lines().collect();
        let last = lines.len().saturating_sub(LAST_WORDS_LINES_MAX);
        lines[last..]
            .iter()
            .map(|line| (*line).to_owned())
            .collect()
    }
}
