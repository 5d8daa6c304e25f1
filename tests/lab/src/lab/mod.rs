//! The lab: real Xen hosts under QEMU's software emulation, on one machine
//! without any rights but a normal user's once its image is built.
//!
//! ```text
//!  cargo xtask ── Lab ──unix socket──► supervisor ── QEMU 0: Xen, dom0, guests
//!                  │                       │  └───── QEMU 1: …
//!                  │                       └ hub: the wire between their eth1
//!                  └──ssh over a local port of each QEMU──► dom0
//! ```

pub(crate) mod apt;
mod booted;
pub(crate) mod cache;
mod cpio;
mod emulator;
mod guest;
mod hub;
mod image;
pub(crate) mod process;
mod qemu;
mod shape;
mod ssh;
mod supervisor;
mod xen;

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};

pub use apt::install;
use booted::Booted;
pub use booted::DOM0_WEIGHT;
use cache::{Cache, Lock};
use guest::Initrd;
pub use guest::{workspace, Guest};
use image::Image;
use qemu::{shell_quote, Platform};
pub use shape::{Flavour, Shape};
use ssh::{Side, Ssh};
use supervisor::Request;
pub use supervisor::{supervise, Job, Phase, Status};

use crate::suite::Suite;

const UP_LIMIT: Duration = Duration::from_secs(400);
/// More than the host itself gives a guest.
const GUEST_LIMIT: Duration = Duration::from_secs(400);
const DOWN_LIMIT: Duration = Duration::from_secs(60);

/// What the lab runs: program or file that proves it's there, and package.
const TOOLS: &[(&str, &str)] = &[
    ("debootstrap", "debootstrap"),
    ("qemu-system-x86", "qemu-system-x86_64"),
    ("qemu-utils", "qemu-img"),
    ("openssh-client", "ssh"),
    ("openssh-client", "ssh-keygen"),
    ("e2fsprogs", "mke2fs"),
    ("dpkg-dev", "dpkg-source"),
    ("build-essential", "make"),
    ("build-essential", "gcc"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("xz-utils", "xz"),
    ("python3", "/usr/bin/python3"),
];

/// Whether a lab lives on when the process that started it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Until `lab down`.
    Own,
    /// Until this process ends, or drops the [`Lab`].
    Tied,
}

/// A running lab.
pub struct Lab {
    cache: Cache,
    run: PathBuf,
    status: Status,
    supervisor: Option<Child>,
    /// The guests' common initrd, once it's been asked for.
    initrd: Mutex<Option<Initrd>>,
}

/// All that has to be built before a lab can start.
struct Artefacts {
    image: Image,
    platform: Platform,
    booted: Booted,
    ssh_key: PathBuf,
}

impl Artefacts {
    fn get(cache: &Cache, shape: &Shape, refresh: bool) -> Result<Self> {
        apt::install(TOOLS)?;
        let apt = apt::Apt::open(cache, shape.suite, refresh)?;
        let image = Image::get(cache, &apt, shape.suite)?;
        let platform = Platform {
            emulator: emulator::emulator(cache, shape.flavour, refresh)?,
            xen: xen::hypervisor(cache, &apt, &image, shape.flavour)?,
            kernel: image.boot("vmlinuz"),
            initrd: image.boot("initrd.img"),
            flavour: shape.flavour,
            cpus: shape.cpus(),
        };
        let ssh_key = image::ssh_key(cache)?;
        let booted = Booted::get(cache, &image, &platform, &ssh_key)?;
        Ok(Artefacts {
            image,
            platform,
            booted,
            ssh_key,
        })
    }
}

/// Installs and builds all that labs of a shape need.
pub fn prepare(shape: &Shape, refresh: bool) -> Result<()> {
    shape.check()?;
    let cache = Cache::open()?;
    let artefacts = Artefacts::get(&cache, shape, refresh)?;
    guest::initrd(&cache, &artefacts.image).map(drop)
}

/// The unpacked source of the distribution's Xen; fetched when missing.
pub fn xen_source(suite: Suite) -> Result<PathBuf> {
    apt::install(&[("dpkg-dev", "dpkg-source")])?;
    let cache = Cache::open()?;
    let apt = apt::Apt::open(&cache, suite, false)?;
    Ok(apt.source(&cache, "xen")?.0)
}

/// Has this machine, which is of this suite, the same libraries of Xen as a lab's
/// hosts get: what is built with others is refused there.
pub fn upgrade_xen(suite: Suite) -> Result<()> {
    let apt = apt::Apt::open(&Cache::open()?, suite, false)?;
    apt.upgrade("libxen-dev")
}

/// Ends the lab that's up, in whatever condition; says whether there was one.
pub fn down() -> Result<bool> {
    end(&Cache::open()?.dir("run")?)
}

fn end(run: &Path) -> Result<bool> {
    let Some(pid) = supervisor::ask_to_end(run)? else {
        return Ok(false);
    };
    let deadline = Instant::now() + DOWN_LIMIT;
    while alive(pid) {
        if Instant::now() > deadline {
            bail!("the lab's supervisor, process {pid}, doesn't end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(true)
}

/// Whether a process is there and isn't only waiting to be reaped.
fn alive(pid: u64) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

impl Lab {
    /// Brings a lab up, or returns the one that's up when it has the shape.
    pub fn up(shape: &Shape, life: Life) -> Result<Self> {
        shape.check()?;
        let cache = Cache::open()?;
        let run = cache.dir("run")?;
        let _lock = Lock::take(&run.join("up.lock"))?;
        if let Some(status) = supervisor::ask(&run, &Request::Status)? {
            if status.shape != *shape {
                bail!(
                    "a lab of another shape is up ({}): end it with `cargo xtask lab down`",
                    status.shape
                );
            }
            let lab = Lab {
                cache,
                run,
                status,
                supervisor: None,
                initrd: Mutex::new(None),
            };
            return lab.await_ready();
        }
        let artefacts = Artefacts::get(&cache, shape, false)?;
        let job = Job {
            run: run.clone(),
            shape: shape.clone(),
            image: artefacts.image,
            disk: artefacts.booted.disk(),
            state: artefacts.booted.state(),
            platform: artefacts.platform,
            ssh_key: artefacts.ssh_key,
            tied: life == Life::Tied,
        };
        let supervisor = start_supervisor(&job)?;
        let lab = Lab {
            cache,
            run: run.clone(),
            status: Status {
                pid: supervisor.id(),
                shape: shape.clone(),
                image: job.image.clone(),
                phase: Phase::Starting,
                tied: job.tied,
                hosts: Vec::new(),
                off: Vec::new(),
            },
            supervisor: Some(supervisor),
            initrd: Mutex::new(None),
        };
        let lab = lab.await_ready().and_then(|lab| {
            for host in 0..shape.hosts {
                lab.install_tool(host)?;
            }
            Ok(lab)
        });
        if lab.is_err() {
            // The error at hand is the one to report.
            let _ = end(&run);
        }
        lab
    }

    /// The lab that's up.
    pub fn attach() -> Result<Self> {
        Self::find()?.context("no lab is up: start one with `cargo xtask lab up`")
    }

    /// The lab that's up, if there is one.
    pub fn find() -> Result<Option<Self>> {
        let cache = Cache::open()?;
        let run = cache.dir("run")?;
        match supervisor::ask(&run, &Request::Status)? {
            None => Ok(None),
            Some(status) => Lab {
                cache,
                run,
                status,
                supervisor: None,
                initrd: Mutex::new(None),
            }
            .await_ready()
            .map(Some),
        }
    }

    /// The suite of the hosts.
    pub fn suite(&self) -> Suite {
        self.status.shape.suite
    }

    /// How the lab is.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// Waits until all hosts are usable.
    fn await_ready(mut self) -> Result<Self> {
        let deadline = Instant::now() + UP_LIMIT;
        loop {
            match supervisor::ask(&self.run, &Request::Status)? {
                Some(status) => match &status.phase {
                    Phase::Ready => {
                        self.status = status;
                        return Ok(self);
                    }
                    Phase::Failed(why) => bail!("the lab failed: {why}"),
                    Phase::Starting => {}
                },
                None if self.supervisor.is_none() => bail!("the lab has gone"),
                // It's only just being started.
                None => {}
            }
            if let Some(child) = &mut self.supervisor {
                let ended = child
                    .try_wait()
                    .context("cannot look after the supervisor")?;
                if let Some(status) = ended {
                    bail!(
                        "the lab's supervisor has ended ({status}): {}",
                        process::tail(&self.run.join("supervisor.log"), 40)
                    );
                }
            }
            if Instant::now() > deadline {
                bail!("the lab isn't up after {} s", UP_LIMIT.as_secs());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn ssh(&self, host: usize) -> Result<&Ssh> {
        self.status.hosts.get(host).ok_or_else(|| {
            anyhow!(
                "there's no host {host}: the lab has {}",
                self.status.hosts.len()
            )
        })
    }

    /// Runs a shell line in a host's dom0, for a quarter of an hour at most;
    /// the status is whatever it is.
    pub fn sh(&self, host: usize, line: &str) -> Result<Output> {
        process::output(&mut self.ssh(host)?.command(line))
    }

    /// Runs a shell line in a host's dom0 and returns what it printed; fails
    /// when it fails.
    pub fn run(&self, host: usize, line: &str) -> Result<String> {
        let output = self.sh(host, line)?;
        if !output.status.success() {
            bail!(
                "host {host}: `{line}` failed ({}): {}{}",
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A command that runs a shell line in a host's dom0, for a caller that
    /// wants to start it and look after it by itself.
    pub fn command(&self, host: usize, line: &str) -> Result<Command> {
        Ok(self.ssh(host)?.command(line))
    }

    /// Runs a shell line in a host's dom0 with this process's own input and
    /// output.
    pub fn through(&self, host: usize, line: &str) -> Result<ExitStatus> {
        self.ssh(host)?
            .command(line)
            .status()
            .context("cannot run ssh")
    }

    /// Copies a file or folder into a host.
    pub fn put(&self, host: usize, from: &Path, to: &str) -> Result<()> {
        self.ssh(host)?.copy(Side::Here(from), Side::Host(to))
    }

    /// Copies a file or folder out of a host.
    pub fn get(&self, host: usize, from: &str, to: &Path) -> Result<()> {
        self.ssh(host)?.copy(Side::Host(from), Side::Here(to))
    }

    /// Starts a guest and waits until it's ready.
    pub fn guest(&self, host: usize, guest: &Guest) -> Result<()> {
        guest.check()?;
        let initrd = self.initrd()?;
        let overlay = guest.overlay(host)?;
        let script = guest.script(host, self.status.shape.flavour, &initrd.name);
        for _ in 0..2 {
            let output = process::output_within(
                &mut self.ssh(host)?.command(&script),
                &overlay,
                GUEST_LIMIT,
            )?;
            match output.status.code() {
                Some(0) => return Ok(()),
                Some(guest::INITRD_MISSING) => {
                    let path = format!("{}/{}", guest::FOLDER, initrd.name);
                    self.install(host, &initrd.path, &path)?;
                    self.install_tool(host)?;
                }
                _ => bail!(
                    "cannot start guest {} on host {host} ({}): {}",
                    guest.name,
                    output.status,
                    String::from_utf8_lossy(&output.stderr).trim_end()
                ),
            }
        }
        bail!("host {host} keeps losing its guests' initrd")
    }

    /// Starts several guests at once, and waits until all are ready.
    pub fn guests(&self, guests: &[(usize, Guest)]) -> Result<()> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = guests
                .iter()
                .map(|(host, guest)| scope.spawn(move || self.guest(*host, guest)))
                .collect();
            threads.into_iter().try_for_each(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| bail!("starting a guest has panicked"))
            })
        })
    }

    fn initrd(&self) -> Result<Initrd> {
        let mut initrd = self.initrd.lock().unwrap_or_else(PoisonError::into_inner);
        match &*initrd {
            Some(initrd) => Ok(initrd.clone()),
            None => {
                let built = guest::initrd(&self.cache, &self.status.image)?;
                Ok(initrd.insert(built).clone())
            }
        }
    }

    /// Puts the guests' program into dom0, where it serves as a tool.
    fn install_tool(&self, host: usize) -> Result<()> {
        let tool = guest::binary(&self.cache)?;
        self.install(host, &tool, "/usr/local/bin/vne-guest")
    }

    /// Puts a file into a host in one step, even where one is in use.
    fn install(&self, host: usize, from: &Path, to: &str) -> Result<()> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let aside = format!(
            "{to}.{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        self.put(host, from, &aside)?;
        self.run(host, &format!("mv {aside} {to}")).map(drop)
    }

    /// All that a guest's console ever said, whether or not it still runs.
    pub fn console(&self, host: usize, name: &str) -> Result<String> {
        let output = self.sh(host, &format!("cat -- {}", guest::console_log(name)))?;
        if !output.status.success() {
            bail!(
                "host {host} has no console log of a guest {}",
                shell_quote(name)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// All that Xen and dom0 of a host printed.
    pub fn host_console(&self, host: usize) -> Result<String> {
        let path = qemu::Files::new(&self.run, host).console();
        let bytes =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Cuts or mends the wire from one host to another.
    pub fn link(&self, from: usize, to: usize, up: bool) -> Result<()> {
        self.ssh(from)?;
        self.ssh(to)?;
        supervisor::ask(&self.run, &Request::Link { from, to, up })?
            .map(drop)
            .context("the lab has gone")
    }

    /// Pulls a host's plug: its dom0 and guests are gone at once, and what had
    /// been written and not synced.
    pub fn power_off(&self, host: usize) -> Result<()> {
        self.power(host, false)
    }

    /// Has a host boot again, with what its disk has.
    pub fn power_on(&self, host: usize) -> Result<()> {
        self.power(host, true)
    }

    fn power(&self, host: usize, on: bool) -> Result<()> {
        self.ssh(host)?;
        let deadline = Instant::now() + UP_LIMIT;
        let mut request = Request::Power { host, on };
        loop {
            let status = supervisor::ask(&self.run, &request)?.context("the lab has gone")?;
            if let Phase::Failed(why) = &status.phase {
                bail!("the lab failed: {why}");
            }
            // The answer to the request is from before it was acted on.
            if matches!(request, Request::Status) && status.off.contains(&host) != on {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!(
                    "host {host} isn't {} after {} s",
                    if on { "up" } else { "off" },
                    UP_LIMIT.as_secs()
                );
            }
            request = Request::Status;
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends the lab.
    pub fn down(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        end(&self.run)?;
        if let Some(mut child) = self.supervisor.take() {
            process::wait(&mut child, DOWN_LIMIT)?;
        }
        Ok(())
    }
}

/// One shell line that runs a program with exactly these arguments.
pub fn shell_line(words: &[String]) -> String {
    words
        .iter()
        .map(|word| shell_quote(word))
        .collect::<Vec<_>>()
        .join(" ")
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.status.tied && self.supervisor.is_some() {
            if let Err(error) = self.end() {
                eprintln!("lab: {error:#}");
            }
        }
    }
}

fn start_supervisor(job: &Job) -> Result<Child> {
    let log = File::create(job.run.join("supervisor.log"))
        .context("cannot create the supervisor's log")?;
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let job_text = serde_json::to_string(job).context("cannot word the supervisor's job")?;
    let mut command = Command::new(program);
    command
        .args(["lab", "supervise", &job_text])
        .stdin(if job.tied {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(log.try_clone().context("cannot share a log file")?)
        .stderr(log)
        .current_dir("/");
    // SAFETY: setsid is async-signal-safe.
    unsafe {
        // A session of its own: Ctrl-C at the terminal isn't for the emulators.
        command.pre_exec(|| {
            if libc::setsid() < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    command.spawn().context("cannot start the lab's supervisor")
}
