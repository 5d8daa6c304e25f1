//! vned, the daemon: one in each dom0 of a VNE that spans several. It leads
//! takes and restores for this host's users, and carries out this host's part
//! of those that others lead.
//!
//! ```text
//!  xl vne-snapshot ─ unix socket, root ─► admin ─► jobs ─► leads ──┐
//!                                                                  ├─► acting (this host)
//!  other vneds ─ TCP, mutual TLS ───────► service ─────────────────┘
//!               ◄──────────────────────── peers: orders, news
//! ```
//!
//! It calls libxl in no place: that, and reading xl's syntax, is done by `xl` in
//! processes of their own.

mod admin;
mod copies;
mod jobs;
mod listen;
mod receiving;
mod restores;
mod service;
mod takes;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::conf::Conf;
use super::error::Error;
use super::journal::Register;
use super::lead::MemberName;
use super::part::{Place, FINAL_BUFFER_BYTES};
use super::peers::{Remote, Remotes};
use super::rpc::DaemonStatus;
use super::take::sweep;
use super::tls::Identity;
use super::workers::Program;
use crate::image::{find_host_key, Name};
use crate::net::{overlay, Rtnl};
use crate::sentence::sentence;

/// The daemon's socket, below Xen's run directory.
pub const SOCKET: &str = "vne/vned.sock";
const LOCK: &str = "vned.lock";
/// What `xl` may say about the configuration, in bytes.
const DESCRIPTION_BYTES_MAX: u64 = 64 << 20;
/// How long a VNE's description is believed.
const DESCRIPTION_AGE_MAX: Duration = Duration::from_secs(1);
/// Between two looks for what others have to decide.
const RESUME_INTERVAL: Duration = Duration::from_secs(60);
/// How long takes and restores may need to end when the daemon is stopped.
const STOP_MAX: Duration = Duration::from_secs(40);

/// How the daemon is started.
#[derive(Debug, Clone)]
pub struct Options {
    /// The patched xl.
    pub xl: PathBuf,
}

/// What xl says about this host and a VNE; see [`describe`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Described {
    /// Xen's folder of configuration files.
    pub config_dir: PathBuf,
    /// Xen's folder for what is gone after a reboot.
    pub run_dir: PathBuf,
    /// `vne.conf`.
    pub conf: Conf,
    /// The VNE that was asked for, if it's described here.
    pub vne: Option<VneDescription>,
    /// All stores that some VNE's description names, and the usual one.
    pub stores: Vec<PathBuf>,
}

/// A VNE as this host knows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VneDescription {
    /// Its members on all hosts.
    pub members: Vec<MemberName>,
    /// Where its snapshots are kept.
    pub store: PathBuf,
}

/// Has xl read the configuration, and a VNE's description.
pub fn describe(program: &Program, vne: Option<&Name>) -> Result<Described, Error> {
    use std::io::Read;
    let mut arguments = vec!["describe"];
    arguments.extend(vne.map(Name::as_str));
    let mut child = program
        .command(&arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(Error::start("start xl"))?;
    let mut text = Vec::new();
    if let Some(out) = child.stdout.take() {
        out.take(DESCRIPTION_BYTES_MAX)
            .read_to_end(&mut text)
            .map_err(Error::start("read what xl says"))?;
    }
    let status = child.wait().map_err(Error::start("wait for xl"))?;
    if !status.success() {
        let xl = program.xl.display();
        return Err(Error::Failed(format!(
            "{xl} can't read the configuration ({status}): is it the patched one?"
        )));
    }
    serde_json::from_slice(&text)
        .map_err(|error| Error::Failed(format!("what xl says of the configuration: {error}")))
}

/// What may change while it runs.
struct Setup {
    conf: Conf,
    identity: Option<Identity>,
    remotes: Remotes,
}

/// The daemon's state.
pub(super) struct Daemon {
    program: Program,
    run_dir: PathBuf,
    config_dir: PathBuf,
    runtime: Handle,
    setup: RwLock<Setup>,
    described: Mutex<HashMap<Name, (Instant, Option<VneDescription>)>>,
    takes: takes::Takes,
    restores: restores::Restores,
    jobs: jobs::Jobs,
    /// Told when `listen` in the configuration may have changed.
    reloaded: tokio::sync::Notify,
    /// One reload at a time.
    reloading: Mutex<()>,
}

/// A lock whose owner died in the middle of something is as good as any here:
/// nothing is left half done under one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Daemon {
    fn setup<T>(&self, look: impl FnOnce(&Setup) -> T) -> T {
        look(&self.setup.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// This host's name.
    fn here(&self) -> Name {
        self.setup(|setup| setup.conf.name.clone())
    }

    /// The way to a peer.
    fn remote(&self, name: &Name) -> Option<Arc<Remote>> {
        self.setup(|setup| setup.remotes.get(name).cloned())
    }

    /// Whether a peer is listed for a VNE.
    fn may(&self, peer: &Name, vne: &Name) -> bool {
        self.setup(|setup| setup.conf.peer(peer).is_some_and(|peer| peer.may(vne)))
    }

    /// Whether a host says which members run here, and how they're configured.
    fn accepts(&self, host: &Name) -> bool {
        *host == self.here() || self.setup(|setup| setup.conf.accept_members.contains(host))
    }

    /// A VNE as this host knows it. Takes a moment: not for async code.
    fn vne(&self, vne: &Name) -> Result<Option<VneDescription>, Error> {
        let known = lock(&self.described).get(vne).cloned();
        if let Some((at, described)) = known {
            if at.elapsed() < DESCRIPTION_AGE_MAX {
                return Ok(described);
            }
        }
        let described = describe(&self.program, Some(vne))?.vne;
        let mut all = lock(&self.described);
        all.retain(|_, (at, _)| at.elapsed() < DESCRIPTION_AGE_MAX);
        all.insert(vne.clone(), (Instant::now(), described.clone()));
        Ok(described)
    }

    /// Where this host's part of a VNE's snapshots is kept.
    fn store(&self, vne: &Name) -> Result<PathBuf, Error> {
        Ok(self.vne(vne)?.map_or_else(
            || PathBuf::from(crate::image::DEFAULT_ROOT),
            |described| described.store,
        ))
    }

    /// Bytes that members may take together here, if there is a limit.
    fn memory_bytes(&self) -> Option<u64> {
        self.setup(|setup| setup.conf.store_memory_bytes())
    }

    fn place(&self, store: PathBuf) -> Place {
        Place {
            host: self.here(),
            store,
            run_dir: self.run_dir.clone(),
            program: self.program.clone(),
            final_buffer_bytes: FINAL_BUFFER_BYTES,
            memory_bytes: self.memory_bytes(),
        }
    }

    /// Reads the configuration again. Peers that are in it no more are cut off.
    fn reload(&self) -> Result<(), Error> {
        let _one = lock(&self.reloading);
        let described = describe(&self.program, None)?;
        let setup = self.make_setup(described.conf)?;
        *self.setup.write().unwrap_or_else(PoisonError::into_inner) = setup;
        lock(&self.described).clear();
        self.reloaded.notify_waiters();
        if let Err(error) = self.networks_follow() {
            log::error!("{}", sentence(&error));
        }
        Ok(())
    }

    /// Has VNEs' networks on this host follow what is configured. It's xl that does
    /// so, as it can read that; without a network it isn't started.
    fn networks_follow(&self) -> Result<(), Error> {
        if overlay::vnes(&mut Rtnl::open()?)?.is_empty() {
            return Ok(());
        }
        let status = self
            .program
            .command(&["net-follow"])
            .stderr(Stdio::inherit())
            .status()
            .map_err(Error::start("start xl"))?;
        match status.success() {
            true => Ok(()),
            false => Err(Error::Failed(format!(
                "VNEs' networks don't follow the configuration ({status})"
            ))),
        }
    }

    fn make_setup(&self, conf: Conf) -> Result<Setup, Error> {
        let source = conf.store_key.clone();
        find_host_key(Box::new(move || Ok(source.clone())));
        let identity = Identity::load(&self.config_dir);
        let identity = identity.map_err(|error| Error::Failed(sentence(&error)))?;
        let mut remotes = Remotes::new();
        if let Some(identity) = &identity {
            for peer in &conf.peers {
                let known = self.remote(&peer.name);
                let known = known.filter(|remote| remote.is(peer, &conf.name, identity));
                let remote = known.unwrap_or_else(|| {
                    let (here, identity) = (conf.name.clone(), identity.clone());
                    Remote::new(peer.clone(), here, identity, self.runtime.clone())
                });
                remotes.insert(peer.name.clone(), remote);
            }
        }
        Ok(Setup {
            conf,
            identity,
            remotes,
        })
    }

    fn status(&self) -> DaemonStatus {
        self.setup(|setup| DaemonStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host: setup.conf.name.clone(),
            listen: setup.conf.listen.clone(),
            fingerprint: setup.identity.as_ref().map(Identity::fingerprint),
            in_doubt: self.takes.in_doubt(),
        })
    }
}

/// Runs the daemon until a signal ends it.
pub fn run(options: &Options) -> Result<(), Error> {
    let program = Program {
        xl: options.xl.clone(),
        verbosity: 0,
    };
    let described = describe(&program, None)?;
    let register = Register::open(&described.run_dir)?;
    let _lock = only_one(&described.run_dir.join("vne").join(LOCK))?;
    if let Err(error) = sweep(&program, &register) {
        // What can't be undone now, the next take tries again.
        log::error!("{}", sentence(&error));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Error::start("start the runtime"))?;
    let conf = described.conf.clone();
    let daemon = Arc::new(Daemon {
        program,
        run_dir: described.run_dir.clone(),
        config_dir: described.config_dir.clone(),
        runtime: runtime.handle().clone(),
        setup: RwLock::new(Setup {
            conf: conf.clone(),
            identity: None,
            remotes: Remotes::new(),
        }),
        described: Mutex::default(),
        takes: takes::Takes::default(),
        restores: restores::Restores::default(),
        jobs: jobs::Jobs::default(),
        reloaded: tokio::sync::Notify::new(),
        reloading: Mutex::default(),
    });
    let setup = daemon.make_setup(conf)?;
    *daemon.setup.write().unwrap_or_else(PoisonError::into_inner) = setup;
    let result = runtime.block_on(serve(&daemon));
    daemon.stop();
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn serve(daemon: &Arc<Daemon>) -> Result<(), Error> {
    use tokio::signal::unix::{signal, SignalKind};
    let signal = |kind| signal(kind).map_err(Error::start("watch for signals"));
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let socket = daemon.run_dir.join(SOCKET);
    let commands = listen::commands(&socket)?;
    let _admin = tokio::spawn(admin::serve(Arc::clone(daemon), commands));
    let _peers = tokio::spawn(listen::peers(Arc::clone(daemon)));
    let _leases = tokio::spawn(restores::leases(Arc::clone(daemon)));
    let _resuming = tokio::spawn(resume(Arc::clone(daemon)));
    log::info!("ready");
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = hangup.recv() => {
                let daemon = Arc::clone(daemon);
                tokio::task::spawn_blocking(move || {
                    if let Err(error) = daemon.reload() {
                        log::error!("{}", sentence(&error));
                    }
                });
            }
        }
    }
    log::info!("stopping");
    // Best effort: the next one replaces it.
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

/// Goes on with what daemons before this one have left to be decided by others;
/// and again after a while, since a store may be mounted later, and a guard may
/// still have been at work. Networks follow what is configured as well: names of
/// hosts may be resolved to other addresses by now.
async fn resume(daemon: Arc<Daemon>) {
    loop {
        let resuming = Arc::clone(&daemon);
        let resumed = tokio::task::spawn_blocking(move || {
            let described = describe(&resuming.program, None)?;
            if let Err(error) = resuming.networks_follow() {
                log::error!("{}", sentence(&error));
            }
            resuming.resume_in_doubt(&described.stores);
            resuming.resume_built(&Register::open(&resuming.run_dir)?)
        });
        if let Ok(Err(error)) = resumed.await {
            log::error!("{}", sentence(&error));
        }
        tokio::time::sleep(RESUME_INTERVAL).await;
    }
}

impl Daemon {
    /// Gives up all that isn't over.
    fn stop(&self) {
        self.jobs.interrupt_all();
        self.takes.stop_all();
        self.restores.stop_all();
        let start = Instant::now();
        while !(self.takes.is_empty() && self.restores.is_empty()) && start.elapsed() < STOP_MAX {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Two daemons would answer for one host.
fn only_one(path: &Path) -> Result<File, Error> {
    let cannot = |error: std::io::Error| Error::Failed(format!("{}: {error}", path.display()));
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(cannot)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(Error::Failed(String::from("another vned is running")))
        }
        Err(errno) => Err(cannot(errno.into())),
    }
}
