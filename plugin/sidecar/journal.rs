//! What a running take would leave behind, written down before it is built,
//! so that somebody else can undo it: the guard when this process is killed,
//! or whoever starts the next take.
//!
//! ```text
//! RUN/vne/            0700
//!   register          flock: held while a take is entered or looked up
//!   PID-N/            one take
//!     lock            flock: held by the take while it lives, then by whoever cleans up;
//!                     made with the folder, and never again
//!     journal.json    replaced as a whole; gone when there is nothing to undo
//! ```

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::net::HoldRecord;

/// A journal is a few hundred bytes per member.
const JOURNAL_BYTES_MAX: u64 = 4 << 20;
/// A dead take is cleaned up within 5 s, a restore within 15 s; then it's
/// somebody stuck.
const CLEAN_UP_WAIT_MAX: Duration = Duration::from_secs(30);

/// What can go wrong with the journal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of it can't be used.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A member is in another take already.
    #[error("domain '{domain}' is in use by a {what} of VNE '{vne}' ({who})")]
    Busy {
        /// The domain.
        domain: String,
        /// Take or restore.
        what: &'static str,
        /// The VNE of the other take.
        vne: String,
        /// Who runs it: the process, and the host that leads, if there are
        /// several.
        who: String,
    },
}

/// A domain that a take touches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalDomain {
    /// Its name, for messages.
    pub name: String,
    /// Its number.
    pub domid: u32,
    /// Its UUID, so that a reused number isn't mistaken for it.
    pub uuid: String,
}

/// A domain that a take may have slowed down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalCap {
    /// Its number.
    pub domid: u32,
    /// Its UUID.
    pub uuid: String,
    /// Its limit before, in percent of one physical CPU; 0 for none.
    pub cap: u32,
}

/// A process that a take has started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalProcess {
    /// Its number.
    pub pid: u32,
    /// When it was started, in clock ticks since boot (proc(5), field 22), so
    /// that a reused number isn't mistaken for it.
    pub start_ticks: u64,
}

/// Everything that a take would leave behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The VNE.
    pub vne: String,
    /// The host that leads the take, if that was said.
    #[serde(default)]
    pub leader: Option<String>,
    /// The process of the take.
    pub pid: u32,
    /// The store that it writes into.
    pub store: PathBuf,
    /// The domains that it captures or builds.
    pub domains: Vec<JournalDomain>,
    /// Whether it may have asked them to suspend.
    #[serde(default)]
    pub asked: bool,
    /// Its workers; those of a restore are xl's.
    pub workers: Vec<JournalProcess>,
    /// The holds that it may have built.
    pub holds: Vec<HoldRecord>,
    /// What the domains' processors were limited to, of those that it may have
    /// slowed down.
    #[serde(default)]
    pub caps: Vec<JournalCap>,
    /// For a restore: how far it is. `domains` then have no number yet.
    pub restore: Option<RestoreStage>,
    /// For a restore over several hosts.
    #[serde(default)]
    pub joint: Option<Joint>,
    /// For a restore with disks: the folder that says what becomes of them
    /// (`disk::exchange`).
    #[serde(default)]
    pub exchange: Option<PathBuf>,
}

/// A restore over several hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joint {
    /// What it's called on all of them.
    pub ticket: String,
    /// Whether this host leads it, and so decides.
    pub led_here: bool,
}

impl Record {
    /// A restore's of no members, for tests.
    #[cfg(test)]
    pub(super) fn of_restore(stage: RestoreStage) -> Self {
        Self {
            vne: String::from("lab"),
            leader: None,
            pid: std::process::id(),
            store: PathBuf::new(),
            domains: Vec::new(),
            asked: false,
            workers: Vec::new(),
            holds: Vec::new(),
            caps: Vec::new(),
            restore: Some(stage),
            joint: None,
            exchange: None,
        }
    }

    /// Take or restore.
    pub fn what(&self) -> &'static str {
        match self.restore {
            None => "take",
            Some(_) => "restore",
        }
    }
}

/// How far a restore is, and so what to do with its domains when it's killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreStage {
    /// The domains are being built, paused: half a VNE is destroyed again.
    Building,
    /// All are built here, and how it was decided only the leader knows.
    Built,
    /// All are built, and some may run already: the others follow.
    Releasing,
}

/// The folder of all journals of this host.
#[derive(Debug, Clone)]
pub struct Register {
    root: PathBuf,
}

/// The journal of a take that lives.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    record: Record,
    /// Kept for its lock.
    _lock: File,
}

/// The journal of a take whose process is gone, locked by us.
#[derive(Debug)]
pub struct Orphan {
    folder: PathBuf,
    /// What is to be undone.
    pub record: Record,
    _lock: File,
}

impl Register {
    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The register below `run_dir`, which is gone after a reboot, as all that
    /// it speaks of is.
    pub fn open(run_dir: &Path) -> Result<Self, Error> {
        let root = run_dir.join("vne");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&root)
            .map_err(in_file(&root))?;
        Ok(Self { root })
    }

    /// Enters a take, unless one of its domains is in another one. A dead
    /// take that has one of them is waited for: somebody is cleaning up.
    pub fn enter(&self, record: Record) -> Result<Journal, Error> {
        let start = Instant::now();
        loop {
            let _register = self.lock()?;
            match self.conflict(&record)? {
                None => return self.create(record),
                // Its guard is at work.
                Some((_, other))
                    if !process_exists(other.pid) && start.elapsed() < CLEAN_UP_WAIT_MAX => {}
                Some((domain, other)) => {
                    return Err(Error::Busy {
                        domain,
                        what: other.what(),
                        who: match &other.leader {
                            Some(leader) => {
                                format!("led by host '{leader}', here process {}", other.pid)
                            }
                            None => format!("process {}", other.pid),
                        },
                        vne: other.vne,
                    })
                }
            }
            drop(_register);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Whether there is any journal: of a take that lives, or of a dead one.
    pub fn is_empty(&self) -> Result<bool, Error> {
        Ok(self.folders()?.is_empty())
    }

    /// What goes on, and what is still to be undone.
    pub fn records(&self) -> Result<Vec<Record>, Error> {
        let mut records = Vec::new();
        for folder in self.folders()? {
            records.extend(read(&folder)?);
        }
        Ok(records)
    }

    /// Hands all takes whose process is gone to `orphaned`, to clean up.
    pub fn sweep(&self, mut orphaned: impl FnMut(Orphan)) -> Result<(), Error> {
        let _register = self.lock()?;
        for folder in self.folders()? {
            if let Some(orphan) = Orphan::adopt(&folder, FlockOperation::NonBlockingLockExclusive)?
            {
                orphaned(orphan);
            } else if !folder.join("lock").exists() {
                // Being made it has one, as the register is locked: its owner
                // died between two steps of making or removing it.
                remove(&folder)?;
            }
        }
        Ok(())
    }

    fn lock(&self) -> Result<File, Error> {
        let path = self.root.join("register");
        make_file(&path)?;
        lock(&path, FlockOperation::LockExclusive)
    }

    fn conflict(&self, record: &Record) -> Result<Option<(String, Record)>, Error> {
        for folder in self.folders()? {
            let Some(other) = read(&folder)? else {
                continue;
            };
            let shared = record
                .domains
                .iter()
                .find(|domain| other.domains.iter().any(|d| d.uuid == domain.uuid));
            if let Some(domain) = shared {
                return Ok(Some((domain.name.clone(), other)));
            }
        }
        Ok(None)
    }

    fn create(&self, record: Record) -> Result<Journal, Error> {
        for number in 0u32.. {
            let folder = self.root.join(format!("{}-{number}", record.pid));
            match fs::DirBuilder::new().mode(0o700).create(&folder) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(in_file(&folder)(error)),
                Ok(()) => {
                    let path = folder.join("lock");
                    make_file(&path)?;
                    let lock = lock(&path, FlockOperation::LockExclusive)?;
                    write(&folder, &record)?;
                    return Ok(Journal {
                        folder,
                        record,
                        _lock: lock,
                    });
                }
            }
        }
        Err(in_file(&self.root)(io::ErrorKind::AlreadyExists.into()))
    }

    fn folders(&self) -> Result<Vec<PathBuf>, Error> {
        let mut folders = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(in_file(&self.root))? {
            let path = entry.map_err(in_file(&self.root))?.path();
            if path.is_dir() {
                folders.push(path);
            }
        }
        folders.sort();
        Ok(folders)
    }
}

impl Journal {
    /// Its folder, which the guard is told.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What it says.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Changes what it says, durably against this process's death.
    pub fn update(&mut self, change: impl FnOnce(&mut Record)) -> Result<(), Error> {
        change(&mut self.record);
        write(&self.folder, &self.record)
    }

    /// There is nothing left to undo.
    pub fn close(self) -> Result<(), Error> {
        remove(&self.folder)
    }
}

impl Orphan {
    /// Takes over the journal in this folder, if its owner is gone and there
    /// is something left to undo.
    pub fn adopt(folder: &Path, how: FlockOperation) -> Result<Option<Self>, Error> {
        let path = folder.join("lock");
        let held = match lock(&path, how) {
            Ok(held) => held,
            Err(Error::File { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::NotFound
                ) =>
            {
                return Ok(None)
            }
            Err(error) => return Err(error),
        };
        match read(folder)? {
            Some(record) => Ok(Some(Self {
                folder: folder.to_owned(),
                record,
                _lock: held,
            })),
            None => {
                // Its owner died before it was written, or while closing it.
                remove(folder)?;
                Ok(None)
            }
        }
    }

    /// All has been undone.
    pub fn close(self) -> Result<(), Error> {
        remove(&self.folder)
    }

    /// The folder of all journals.
    pub fn root(&self) -> &Path {
        self.folder.parent().unwrap_or(&self.folder)
    }

    /// Goes on with it instead of undoing it.
    pub fn resume(self) -> Journal {
        Journal {
            folder: self.folder,
            record: self.record,
            _lock: self._lock,
        }
    }
}

/// Where the leader of a restore notes that it's decided.
pub fn decision(root: &Path, ticket: &str) -> PathBuf {
    root.join(format!("released-{ticket}"))
}

/// What a decision says: whether the members are to be left paused; `None` if
/// there is none.
pub fn decided_paused(root: &Path, ticket: &str) -> Option<bool> {
    let text = fs::read(decision(root, ticket)).ok()?;
    Some(text.starts_with(b"paused"))
}

/// When a process was started, in clock ticks since boot; `None` if there is
/// no such process.
pub fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may contain anything: count from its end.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn process_exists(pid: u32) -> bool {
    start_ticks(pid).is_some()
}

fn in_file(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    |source| Error::File {
        path: path.to_owned(),
        source,
    }
}

fn make_file(path: &Path) -> Result<(), Error> {
    File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map(|_| ())
        .map_err(in_file(path))
}

/// Locks a file that exists. If it was removed meanwhile, or another one is in
/// its place, that counts as not found.
fn lock(path: &Path, how: FlockOperation) -> Result<File, Error> {
    let file = File::open(path).map_err(in_file(path))?;
    loop {
        match rustix::fs::flock(&file, how) {
            Ok(()) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(in_file(path)(errno.into())),
        }
    }
    let locked = file.metadata().map_err(in_file(path))?;
    let named = fs::metadata(path).map_err(in_file(path))?;
    if (locked.dev(), locked.ino()) == (named.dev(), named.ino()) {
        Ok(file)
    } else {
        Err(in_file(path)(io::ErrorKind::NotFound.into()))
    }
}

fn read(folder: &Path) -> Result<Option<Record>, Error> {
    let path = folder.join("journal.json");
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(in_file(&path)(error)),
    };
    let mut text = Vec::new();
    file.take(JOURNAL_BYTES_MAX)
        .read_to_end(&mut text)
        .map_err(in_file(&path))?;
    let record = serde_json::from_slice(&text).map_err(|error| in_file(&path)(error.into()))?;
    Ok(Some(record))
}

fn write(folder: &Path, record: &Record) -> Result<(), Error> {
    let path = folder.join("journal.json");
    let aside = folder.join("journal.new");
    let text = serde_json::to_vec(record).map_err(|error| in_file(&path)(error.into()))?;
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&aside)
        .map_err(in_file(&aside))?;
    file.write_all(&text).map_err(in_file(&aside))?;
    fs::rename(&aside, &path).map_err(in_file(&path))
}

/// Removes a journal. Without `journal.json` the rest means nothing, and what
/// can't be removed of it is left to the next sweep.
fn remove(folder: &Path) -> Result<(), Error> {
    let gone = |result: io::Result<()>| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    let path = folder.join("journal.json");
    gone(fs::remove_file(&path)).map_err(in_file(&path))?;
    let rest = ["journal.new", "lock"].map(|name| gone(fs::remove_file(folder.join(name))));
    let rest = rest.into_iter().chain([gone(fs::remove_dir(folder))]);
    for error in rest.filter_map(Result::err) {
        log::debug!("{}: {error}", folder.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(vne: &str, uuids: &[&str]) -> Record {
        let domain = |uuid: &&str| JournalDomain {
            name: format!("dom-{uuid}"),
            domid: 1,
            uuid: (*uuid).to_owned(),
        };
        Record {
            leader: None,
            caps: Vec::new(),
            vne: vne.to_owned(),
            pid: std::process::id(),
            store: PathBuf::from("/nowhere"),
            domains: uuids.iter().map(domain).collect(),
            asked: false,
            workers: Vec::new(),
            holds: vec![HoldRecord::new(1, 0, "vif1.0")],
            restore: None,
            joint: None,
            exchange: None,
        }
    }

    type TestResult = Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn a_domain_is_never_in_two_takes() -> TestResult {
        let run = tempfile::tempdir()?;
        let register = Register::open(run.path())?;
        let first = register.enter(record("a", &["1", "2"]))?;
        let second = register.enter(record("b", &["3", "2"]));
        let told = second.unwrap_err().to_string();
        assert!(told.contains("dom-2") && told.contains("VNE 'a'"), "{told}");
        first.close()?;
        register.enter(record("b", &["3", "2"]))?.close()?;
        assert_eq!(fs::read_dir(run.path().join("vne"))?.count(), 1);
        Ok(())
    }

    #[test]
    fn what_a_dead_take_left_is_found_by_the_next() -> TestResult {
        let run = tempfile::tempdir()?;
        let register = Register::open(run.path())?;
        // Dropped without closing, as when its process is killed.
        drop(register.enter(record("a", &["1"]))?);
        let mut found = Vec::new();
        register.sweep(|orphan| {
            found.push(orphan.record.holds.clone());
            assert!(orphan.close().is_ok());
        })?;
        let next = register.enter(record("a", &["1"]))?;
        assert_eq!(found, [vec![HoldRecord::new(1, 0, "vif1.0")]]);
        next.close()?;
        Ok(())
    }

    #[test]
    fn a_take_that_ended_well_leaves_nothing_to_its_guard() -> TestResult {
        let run = tempfile::tempdir()?;
        let register = Register::open(run.path())?;
        let journal = register.enter(record("a", &["1"]))?;
        let folder = journal.folder().to_owned();
        journal.close()?;
        assert!(Orphan::adopt(&folder, FlockOperation::LockExclusive)?.is_none());
        assert!(!folder.exists());
        Ok(())
    }

    #[test]
    fn who_comes_late_to_a_closed_journal_does_not_build_it_up_again() -> TestResult {
        let run = tempfile::tempdir()?;
        let register = Register::open(run.path())?;
        let journal = register.enter(record("a", &["1"]))?;
        let folder = journal.folder().to_owned();
        // Where close is when it has all but the folder removed.
        fs::remove_file(folder.join("journal.json"))?;
        fs::remove_file(folder.join("lock"))?;
        assert!(Orphan::adopt(&folder, FlockOperation::LockExclusive)?.is_none());
        assert_eq!(fs::read_dir(&folder)?.count(), 0);
        journal.close()?;
        assert!(!folder.exists());
        Ok(())
    }

    #[test]
    fn a_journal_is_closed_even_if_something_else_is_in_its_folder() -> TestResult {
        let run = tempfile::tempdir()?;
        let register = Register::open(run.path())?;
        let journal = register.enter(record("a", &["1"]))?;
        let foreign = journal.folder().join("foreign");
        fs::write(&foreign, "")?;
        journal.close()?;
        register.sweep(|orphan| panic!("{orphan:?}"))?;
        fs::remove_file(&foreign)?;
        register.sweep(|orphan| panic!("{orphan:?}"))?;
        assert!(register.is_empty()?);
        Ok(())
    }

    #[test]
    fn a_guard_that_waited_for_a_closed_journal_leaves_its_successor_alone() -> TestResult {
        let run = tempfile::tempdir()?;
        let register = Register::open(run.path())?;
        let first = register.enter(record("a", &["1"]))?;
        let folder = first.folder().to_owned();
        let path = folder.clone();
        let guard = std::thread::spawn(move || Orphan::adopt(&path, FlockOperation::LockExclusive));
        std::thread::sleep(Duration::from_millis(50));
        first.close()?;
        // The same folder again, as when a process number is used again.
        let second = register.enter(record("a", &["1"]))?;
        assert_eq!(second.folder(), folder);
        let adopted = guard.join().map_err(|_| "the guard panicked")??;
        assert!(adopted.is_none() && folder.join("journal.json").exists());
        second.close()?;
        Ok(())
    }

    #[test]
    fn own_start_time_is_found() {
        assert!(start_ticks(std::process::id()).is_some_and(|ticks| ticks > 0));
        assert_eq!(start_ticks(u32::MAX), None);
    }
}
