//! A host under test: the real vned, and an xl that is a shell script.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{kill_process, Pid, Signal};
use tempfile::TempDir;
use xl_vne::domain::HostFacts;
use xl_vne::image::{Name, Store};
use xl_vne::sidecar::admin::Daemon;
use xl_vne::sidecar::conf::{Conf, Peer};
use xl_vne::sidecar::lead::MemberName;
use xl_vne::sidecar::tls::{Identity, CERTIFICATE_FILE, KEY_FILE};
use xl_vne::sidecar::vned::{Described, VneDescription, SOCKET};
use xl_vne::sidecar::{files, rpc::PeerTest};

pub type Fallible<T> = Result<T, Box<dyn Error>>;

/// How long anything may take, on whatever machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until something is there.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Fallible<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if start.elapsed() > PATIENCE {
            return Err(format!("waited in vain for {what}").into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// An address that nobody else has: the port can't be taken by another test
/// before it's used.
pub fn free_address() -> Fallible<String> {
    static LAST: AtomicU8 = AtomicU8::new(0);
    let [.., high, low] = std::process::id().to_be_bytes();
    let last = LAST.fetch_add(1, Ordering::Relaxed) + 1;
    let ip = Ipv4Addr::new(127, high.max(1), low, last);
    let port = TcpListener::bind((ip, 0))?.local_addr()?.port();
    Ok(format!("{ip}:{port}"))
}

pub fn name(text: &str) -> Fallible<Name> {
    Ok(Name::new(text)?)
}

/// A host of which no daemon runs yet.
pub struct Host {
    pub name: Name,
    pub address: String,
    pub identity: Identity,
    dir: TempDir,
    peers: Vec<Peer>,
    accepts: Vec<Name>,
    vnes: BTreeMap<Name, Vec<MemberName>>,
    vned: Option<Child>,
}

impl Host {
    pub fn new(called: &str) -> Fallible<Self> {
        let dir = tempfile::tempdir()?;
        for below in ["etc", "run"] {
            fs::create_dir(dir.path().join(below))?;
        }
        let host = Self {
            name: name(called)?,
            address: free_address()?,
            identity: Identity::create(&dir.path().join("etc"), &name(called)?)?,
            dir,
            peers: Vec::new(),
            accepts: Vec::new(),
            vnes: BTreeMap::new(),
            vned: None,
        };
        host.describe()?;
        Ok(host)
    }

    /// Another identity, in place of the one that it has.
    pub fn renew_identity(&mut self) -> Fallible<()> {
        let etc = self.path("etc");
        for file in [KEY_FILE, CERTIFICATE_FILE] {
            fs::remove_file(etc.join(file))?;
        }
        self.identity = Identity::create(&etc, &self.name)?;
        Ok(())
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("run").join(SOCKET)
    }

    pub fn certificate(&self) -> PathBuf {
        self.path("etc").join(CERTIFICATE_FILE)
    }

    pub fn store(&self) -> Fallible<Store> {
        Ok(Store::open(&self.path("store"))?)
    }

    /// How other hosts list it.
    pub fn listed_for(&self, vnes: &[&str]) -> Fallible<Peer> {
        Ok(Peer {
            name: self.name.clone(),
            address: self.address.clone(),
            fingerprint: self.identity.fingerprint(),
            vnes: vnes.iter().map(|vne| name(vne)).collect::<Fallible<_>>()?,
        })
    }

    /// Its peers from now on; a daemon that runs hears of it by a reload.
    pub fn trusts(&mut self, peers: &[Peer]) -> Fallible<()> {
        self.peers = peers.to_vec();
        self.describe()
    }

    /// Has it believe a peer about members and their configurations.
    pub fn accepts(&mut self, peer: &Name) -> Fallible<()> {
        self.accepts.push(peer.clone());
        self.describe()
    }

    /// Describes a VNE with members on this host.
    pub fn knows(&mut self, vne: &str, members: &[&str]) -> Fallible<()> {
        let here = self.name.to_string();
        let members: Vec<_> = members.iter().map(|member| (&*here, *member)).collect();
        self.knows_all(vne, &members)
    }

    /// Describes a VNE with members on these hosts.
    pub fn knows_all(&mut self, vne: &str, members: &[(&str, &str)]) -> Fallible<()> {
        let member = |(host, member): &(&str, &str)| {
            Ok(MemberName {
                host: name(host)?,
                name: name(member)?,
            })
        };
        let members = members.iter().map(member).collect::<Fallible<_>>()?;
        self.vnes.insert(name(vne)?, members);
        self.describe()
    }

    /// What it has for domains.
    pub fn has(&self, facts: &HostFacts) -> Fallible<()> {
        Ok(files::replace(
            &self.path("host"),
            &serde_json::to_vec(facts)?,
        )?)
    }

    /// The save files of which domains were built here.
    pub fn restored(&self) -> Fallible<Vec<Vec<u8>>> {
        let mut restored = Vec::new();
        for entry in fs::read_dir(self.dir.path())? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("restored-") {
                restored.push(fs::read(entry.path())?);
            }
        }
        Ok(restored)
    }

    fn describe(&self) -> Fallible<()> {
        let store = self.path("store");
        let described = |vne| Described {
            config_dir: self.path("etc"),
            run_dir: self.path("run"),
            conf: Conf {
                name: self.name.clone(),
                listen: Some(self.address.clone()),
                peers: self.peers.clone(),
                store_key: None,
                store_memory_mib: None,
                accept_members: self.accepts.clone(),
            },
            vne,
            stores: vec![store.clone()],
        };
        let write = |file: &str, vne| -> Fallible<()> {
            let text = serde_json::to_vec(&described(vne))?;
            Ok(files::replace(&self.path(file), &text)?)
        };
        write("described", None)?;
        for (vne, members) in &self.vnes {
            let description = VneDescription {
                members: members.clone(),
                store: store.clone(),
            };
            write(&format!("described-{vne}"), Some(description))?;
        }
        Ok(())
    }

    /// A daemon that isn't waited for.
    pub fn spawn(&self) -> Fallible<Child> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))?;
        let xl = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vned/xl");
        Ok(Command::new(env!("CARGO_BIN_EXE_vned"))
            .arg("--xl")
            .arg(xl)
            .env("VNED_TEST", self.dir.path())
            .env_remove("JOURNAL_STREAM")
            .stderr(log)
            .spawn()?)
    }

    /// Starts the daemon, and waits until it takes commands and peers.
    pub fn start(&mut self) -> Fallible<()> {
        let listening = format!("listening for peers at {}", self.address);
        let times = |log: &str| log.matches(&listening).count();
        let before = times(&self.log());
        self.vned = Some(self.spawn()?);
        wait_for("vned to listen", || {
            (times(&self.log()) > before).then_some(())
        })
        .map_err(|error| format!("{error}: {}", self.log()))?;
        self.admin()?.status()?;
        Ok(())
    }

    pub fn pid(&self) -> Fallible<Pid> {
        let vned = self.vned.as_ref().ok_or("no vned runs")?;
        Ok(Pid::from_child(vned))
    }

    /// Open descriptors of the daemon.
    pub fn descriptors(&self) -> Fallible<usize> {
        let folder = format!("/proc/{}/fd", self.pid()?.as_raw_nonzero());
        Ok(fs::read_dir(folder)?.count())
    }

    pub fn end(&mut self, signal: Signal) -> Fallible<ExitStatus> {
        kill_process(self.pid()?, signal)?;
        let mut vned = self.vned.take().ok_or("no vned runs")?;
        let ended = wait_for("vned to end", || vned.try_wait().transpose());
        if ended.is_err() {
            vned.kill()?;
        }
        Ok(ended??)
    }

    /// Waits for a daemon that was killed.
    pub fn buried(&mut self) -> Fallible<ExitStatus> {
        let mut vned = self.vned.take().ok_or("no vned runs")?;
        wait_for("vned to end", || vned.try_wait().transpose())?.map_err(Into::into)
    }

    pub fn admin(&self) -> Fallible<Daemon> {
        Ok(Daemon::find(&self.path("run"))?.ok_or("vned takes no commands")?)
    }

    pub fn reload(&self) -> Fallible<()> {
        Ok(self.admin()?.reload()?)
    }

    /// Has the daemon try a peer.
    pub fn tries(&self, peer: &Host) -> Fallible<Result<String, String>> {
        let tests: Vec<PeerTest> = self.admin()?.test_peers(Some(&peer.name))?;
        let test = tests.into_iter().next();
        let test = test.ok_or("there is no such peer")?;
        Ok(match (test.version, test.error) {
            (Some(version), None) => Ok(version),
            (_, why) => Err(why.unwrap_or_default()),
        })
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Waits for a line with all these words, and returns it.
    pub fn logged(&self, words: &[&str]) -> Fallible<String> {
        let look = || {
            let log = self.log();
            let mut lines = log.lines();
            let found = lines.find(|line| words.iter().all(|word| line.contains(word)));
            found.map(str::to_owned)
        };
        wait_for(&format!("{words:?} in the log"), look)
            .map_err(|error| format!("{error}:\n{}", self.log()).into())
    }

    /// What xl was asked for, one a line.
    pub fn asked_of_xl(&self) -> Fallible<String> {
        Ok(fs::read_to_string(self.path("asked"))?)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(vned) = &mut self.vned {
            // It has ended by itself, if it can't be ended.
            let _ = vned.kill();
            let _ = vned.wait();
        }
    }
}
