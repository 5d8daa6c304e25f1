//! The process that owns a running lab: its emulators, the hub between them
//! and the shared ssh connections. All of them end with it, however it ends.
//!
//! It's asked over a Unix socket, one JSON line each way.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::booted;
use super::cache::Lock;
use super::hub::{Hub, Links, Plug};
use super::image::Image;
use super::process;
use super::qemu::{self, Control, Files, Machine, Platform};
use super::shape::Shape;
use super::ssh::Ssh;

const RESUME_LIMIT: Duration = Duration::from_secs(180);
const TICK: Duration = Duration::from_millis(100);

/// What a supervisor has to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// The lab's folder.
    pub run: PathBuf,
    /// The lab's shape.
    pub shape: Shape,
    /// What hosts are made from.
    pub image: Image,
    /// How hosts start.
    pub platform: Platform,
    /// The disk that every host's disk is an overlay of.
    pub disk: PathBuf,
    /// The state that every host starts from.
    pub state: PathBuf,
    /// The key of the hosts.
    pub ssh_key: PathBuf,
    /// Whether the lab ends when standard input does.
    pub tied: bool,
}

/// What a supervisor says about its lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Its process.
    pub pid: u32,
    /// The lab's shape.
    pub shape: Shape,
    /// What its hosts are made from.
    pub image: Image,
    /// Whether it's up yet.
    pub phase: Phase,
    /// Whether it ends with the process that started it.
    pub tied: bool,
    /// The way into each host that has come up; it stays the same when the
    /// host is switched off and on.
    pub hosts: Vec<Ssh>,
    /// The hosts that are switched off, or not up again yet.
    #[serde(default)]
    pub off: Vec<usize>,
}

/// How far a lab is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Hosts are coming up.
    Starting,
    /// All hosts are usable.
    Ready,
    /// It didn't come up, or a host died.
    Failed(String),
}

/// What can be asked of a supervisor.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Request {
    /// Say how the lab is.
    Status,
    /// End the lab.
    Down,
    /// Cut or mend the way from one host to another.
    Link {
        /// Where frames come from.
        from: usize,
        /// Where they'd go to.
        to: usize,
        /// Whether they pass.
        up: bool,
    },
    /// Pull a host's plug, or have it boot from its disk; [`Status::off`] tells
    /// when that's done.
    Power {
        /// Which one.
        host: usize,
        /// Whether it's to run.
        on: bool,
    },
}

/// The socket of the lab in a folder.
pub fn socket(run: &Path) -> PathBuf {
    run.join("lab.sock")
}

/// Asks the supervisor; `None` when there is none.
pub fn ask(run: &Path, request: &Request) -> Result<Option<Status>> {
    ask_for_line(run, request)?
        .map(|line| {
            serde_json::from_str(&line).with_context(|| {
                format!(
                    "the lab was started by another version of this program: \
                     end it with `cargo xtask lab down`; it said {line}"
                )
            })
        })
        .transpose()
}

/// Asks the supervisor to end, whatever version of it; its process.
pub fn ask_to_end(run: &Path) -> Result<Option<u64>> {
    let Some(line) = ask_for_line(run, &Request::Down)? else {
        return Ok(None);
    };
    serde_json::from_str::<serde_json::Value>(&line)
        .ok()
        .and_then(|answer| answer.get("pid")?.as_u64())
        .map(Some)
        .with_context(|| format!("the lab's supervisor said {line:?}"))
}

fn ask_for_line(run: &Path, request: &Request) -> Result<Option<String>> {
    let Ok(mut stream) = UnixStream::connect(socket(run)) else {
        return Ok(None);
    };
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .context("cannot bound the wait for the lab's answer")?;
    let text = serde_json::to_string(request).context("cannot word a request")?;
    if writeln!(stream, "{text}").is_err() {
        return Ok(None);
    }
    let mut line = String::new();
    BufReader::new(stream)
        .read_line(&mut line)
        .context("no answer from the lab's supervisor")?;
    Ok(Some(line).filter(|line| !line.is_empty()))
}

#[derive(Clone)]
struct Shared {
    status: Arc<Mutex<Status>>,
    stop: Arc<AtomicBool>,
    links: Links,
    /// The hosts that are to be off.
    unplugged: Arc<Mutex<BTreeSet<usize>>>,
}

impl Shared {
    fn power(&self, host: usize, on: bool) {
        let mut unplugged = self
            .unplugged
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if on {
            unplugged.remove(&host);
        } else {
            unplugged.insert(host);
        }
    }

    /// Whether a host is to run.
    fn powered(&self, host: usize) -> bool {
        let unplugged = self
            .unplugged
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        !unplugged.contains(&host)
    }

    fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn answer(&self, request: &Request) -> Status {
        match request {
            Request::Status => {}
            Request::Down => self.stop.store(true, Ordering::Relaxed),
            Request::Link { from, to, up } => self.links.set(*from, *to, *up),
            Request::Power { host, on } => self.power(*host, *on),
        }
        self.status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Runs a lab to its end.
pub fn supervise(job: &Job) -> Result<()> {
    let path = socket(&job.run);
    qemu::check_socket_path(&path)?;
    // Held to this process's end: one lab at a time.
    let _lock = Lock::take(&job.run.join("lab.lock"))?;
    // So a socket that's there is a dead supervisor's.
    let _ = std::fs::remove_file(&path);
    let listener =
        UnixListener::bind(&path).with_context(|| format!("cannot bind {}", path.display()))?;
    let shared = Shared {
        status: Arc::new(Mutex::new(Status {
            pid: std::process::id(),
            shape: job.shape.clone(),
            image: job.image.clone(),
            phase: Phase::Starting,
            tied: job.tied,
            hosts: Vec::new(),
            off: Vec::new(),
        })),
        stop: Arc::new(AtomicBool::new(false)),
        links: Links::default(),
        unplugged: Arc::default(),
    };
    let server = shared.clone();
    std::thread::spawn(move || serve(&listener, &server));
    if job.tied {
        let stop = shared.stop.clone();
        std::thread::spawn(move || {
            let mut rest = Vec::new();
            // End of file or an error: either way nobody's there any more.
            let _ = std::io::stdin().read_to_end(&mut rest);
            stop.store(true, Ordering::Relaxed);
        });
    }
    let result = run(job, &shared);
    if let Err(error) = &result {
        eprintln!("{error:#}");
        shared.update(|status| {
            status.phase = Phase::Failed(format!("{error:#}"));
            status.hosts.clear();
        });
        // Long enough for whoever waits for the lab to read why it failed.
        std::thread::sleep(Duration::from_secs(2));
    }
    // It may have been taken away from outside.
    let _ = std::fs::remove_file(&path);
    result
}

fn serve(listener: &UnixListener, shared: &Shared) {
    for stream in listener.incoming().flatten() {
        let shared = shared.clone();
        std::thread::spawn(move || {
            // A client that goes away in the middle is its own business.
            let _ = serve_one(stream, &shared);
        });
    }
}

fn serve_one(mut stream: UnixStream, shared: &Shared) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut line = String::new();
    BufReader::new(stream.try_clone()?)
        .take(4096)
        .read_line(&mut line)?;
    let request: Request = serde_json::from_str(&line)?;
    let answer = serde_json::to_string(&shared.answer(&request))?;
    writeln!(stream, "{answer}")?;
    Ok(())
}

fn run(job: &Job, shared: &Shared) -> Result<()> {
    let files: Vec<Files> = (0..job.shape.hosts)
        .map(|host| Files::new(&job.run, host))
        .collect();
    let hub = Hub::bind(
        files
            .iter()
            .map(|files| Plug {
                port: files.port(),
                nic: files.nic(),
            })
            .collect(),
        shared.links.clone(),
    )?;
    let stop = shared.stop.clone();
    std::thread::spawn(move || hub.run(&stop));

    let mut machines = Vec::new();
    let _disks = Disks(files.iter().map(Files::disk).collect());
    for files in &files {
        // Of an earlier lab; it's fine when there was none.
        let _ = std::fs::remove_file(files.console());
        qemu::overlay(&job.disk, "qcow2", &files.disk())?;
        machines.push(Machine::start(
            &job.platform,
            files,
            Some(&job.state),
            None,
        )?);
    }
    let mut hosts = Vec::new();
    for (host, machine) in machines.into_iter().enumerate() {
        let running = Running::come_up(job, shared, host, machine)?;
        shared.update(|status| status.hosts.push(running.ssh.clone()));
        hosts.push((running.ssh.port, Some(running)));
        if shared.stop.load(Ordering::Relaxed) {
            return Ok(());
        }
    }
    shared.update(|status| status.phase = Phase::Ready);
    while !shared.stop.load(Ordering::Relaxed) {
        for (host, (port, running)) in hosts.iter_mut().enumerate() {
            match (running.as_mut(), shared.powered(host)) {
                (Some(running), true) => running.machine.check()?,
                (Some(_), false) => {
                    if let Some(running) = running.take() {
                        running.lose_power()?;
                    }
                    shared.update(|status| status.off.push(host));
                }
                (None, true) => {
                    // Whoever knows the way in keeps it: so the same port.
                    let files = Files::new(&job.run, host);
                    let machine = Machine::start(&job.platform, &files, None, Some(*port))?;
                    let up = Running::come_up(job, shared, host, machine)?;
                    process::capture(&mut up.ssh.command(&booted::settle()))
                        .with_context(|| format!("host {host} doesn't settle"))?;
                    *running = Some(up);
                    shared.update(|status| status.off.retain(|other| *other != host));
                }
                (None, false) => {}
            }
        }
        std::thread::sleep(TICK);
    }
    Ok(())
}

/// A host that is up.
struct Running {
    ssh: Ssh,
    machine: Machine,
    _master: Master,
}

impl Running {
    /// Waits until a host can be used, and tells it who it is.
    fn come_up(job: &Job, shared: &Shared, host: usize, mut machine: Machine) -> Result<Self> {
        await_running(&mut machine, shared)?;
        let ssh = Ssh {
            host,
            port: machine.ssh_port,
            key: job.ssh_key.clone(),
            socket: Files::new(&job.run, host).ssh(),
        };
        let child = ssh
            .start_master()
            .with_context(|| format!("host {host} doesn't answer; {}", machine.last_words()))?;
        let master = Master {
            child,
            socket: ssh.socket.clone(),
        };
        process::capture(&mut ssh.command(&identity(host)?))
            .with_context(|| format!("cannot tell host {host} who it is"))?;
        Ok(Running {
            ssh,
            machine,
            _master: master,
        })
    }

    /// Its processors stop where they are. What its disk had acknowledged stays.
    fn lose_power(mut self) -> Result<()> {
        let mut control = self.machine.control()?;
        control.execute("stop", json!({}))?;
        // A killed emulator would take along what it knows of the disk's layout.
        // It may be gone before its answer is.
        let _ = control.execute("quit", json!({}));
        self.machine.wait(Duration::from_secs(60))
    }
}

fn await_running(machine: &mut Machine, shared: &Shared) -> Result<()> {
    let deadline = Instant::now() + RESUME_LIMIT;
    let mut control: Control = machine.control()?;
    while !control.go_on()? {
        machine.check()?;
        if shared.stop.load(Ordering::Relaxed) {
            bail!("the lab was ended while it came up");
        }
        if Instant::now() > deadline {
            bail!("a host didn't load its state; {}", machine.last_words());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// The command that makes a copy of the booted state a host of its own: its
/// name and addresses, the time, and random numbers unlike its siblings'.
fn identity(host: usize) -> Result<String> {
    let mut seed = [0u8; 32];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut seed))
        .context("cannot read /dev/urandom")?;
    let seed: String = seed.iter().map(|byte| format!("{byte:02x}")).collect();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .context("this machine's clock is before 1970")?;
    Ok(format!(
        "lab-identity {host} {}.{:09} {seed}",
        now.as_secs(),
        now.subsec_nanos()
    ))
}

/// A shared ssh connection; ends when dropped.
struct Master {
    child: std::process::Child,
    socket: PathBuf,
}

impl Drop for Master {
    fn drop(&mut self) {
        // Either fails only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A killed one leaves it.
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Disks of hosts, of no use once the lab has ended.
struct Disks(Vec<PathBuf>);

impl Drop for Disks {
    fn drop(&mut self) {
        for disk in &self.0 {
            // It may never have been made.
            let _ = std::fs::remove_file(disk);
        }
    }
}
