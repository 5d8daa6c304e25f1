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

use super::journal::{start_ticks, JournalProcess};
use crate::domain::messages::{self, Event};

/// What is shown of a worker's stderr to explain a failure.
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

/// What the engine hears.
#[derive(Debug)]
pub enum Heard {
    /// A worker said something.
    Event(usize, Event),
    /// A worker's end of the socket is closed: it has ended.
    Gone(usize),
    /// A signal asks to stop.
    Interrupted,
}

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    child: Child,
    socket: UnixStream,
    words: File,
    /// Who it is, for the journal.
    pub process: JournalProcess,
}

impl Worker {
    /// Starts the worker for a domain; what it says goes to `heard` as from
    /// member `index`.
    pub fn start(
        program: &Program,
        index: usize,
        domain: &str,
        heard: Sender<Heard>,
    ) -> std::io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let words = words_file()?;
        let stderr = if program.verbosity > 1 {
            Stdio::inherit()
        } else {
            Stdio::from(words.try_clone()?)
        };
        let child = program
            .command(&["capture", "--", domain])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stderr(stderr)
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
        let pid = child.id();
        Ok(Self {
            child,
            socket: ours,
            words,
            process: JournalProcess {
                pid,
                start_ticks: start_ticks(pid).unwrap_or_default(),
            },
        })
    }

    /// Gives an order.
    pub fn tell(&self, order: &messages::Command) -> std::io::Result<()> {
        messages::send(&self.socket, order)
    }

    /// The last lines that it wrote to stderr.
    pub fn last_words(&self) -> Vec<String> {
        let length = self.words.metadata().map_or(0, |facts| facts.len());
        let mut tail = vec![0; LAST_WORDS_BYTES_MAX];
        let from = length.saturating_sub(LAST_WORDS_BYTES_MAX as u64);
        let read = self.words.read_at(&mut tail, from).unwrap_or(0);
        tail.truncate(read);
        let text = String::from_utf8_lossy(&tail);
        let lines: Vec<&str> = text.lines().collect();
        let last = lines.len().saturating_sub(LAST_WORDS_LINES_MAX);
        lines[last..]
            .iter()
            .map(|line| (*line).to_owned())
            .collect()
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

/// A file in memory for what a worker writes to stderr. Not a pipe: libxl's
/// save helper would be ended by SIGPIPE, in the middle of a cut, if this
/// process were killed.
fn words_file() -> std::io::Result<File> {
    let file = rustix::fs::memfd_create(c"vne-worker", rustix::fs::MemfdFlags::CLOEXEC)?;
    Ok(File::from(file))
}
