//! Where built artefacts live: outside the checkout, each in a folder named
//! after a hash of all that went into it, so that nothing is built twice and
//! nothing stale is ever used.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{bail, Context, Result};
use sha2::{Digest, Sha256};

/// Length of a key as text.
const KEY_DIGITS: usize = 16;
/// How long an artefact is kept without being used.
const UNUSED_MAX: Duration = Duration::from_secs(14 * 24 * 3600);

/// What went into an artefact.
pub struct Key {
    hash: Sha256,
}

impl Key {
    /// Starts a key; `kind` keeps different sorts of artefacts apart.
    pub fn new(kind: &str) -> Self {
        Key {
            hash: Sha256::new(),
        }
        .with("kind", kind)
    }

    /// Adds one named ingredient. Lengths go in as well, so that no two lists
    /// of ingredients run into one another.
    pub fn with(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        let value = value.as_ref();
        self.hash.update((name.len() as u64).to_le_bytes());
        self.hash.update(name.as_bytes());
        self.hash.update((value.len() as u64).to_le_bytes());
        self.hash.update(value);
        self
    }

    /// The key as 16 hex digits.
    pub fn finish(self) -> String {
        self.hash
            .finalize()
            .iter()
            .take(KEY_DIGITS / 2)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// The cache folder.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens `$XL_VNE_CACHE`, else `$XDG_CACHE_HOME/xl-vne`, else
    /// `~/.cache/xl-vne`.
    pub fn open() -> Result<Self> {
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
        let root = if let Some(dir) = variable("XL_VNE_CACHE") {
            PathBuf::from(dir)
        } else if let Some(dir) = variable("XDG_CACHE_HOME") {
            PathBuf::from(dir).join("xl-vne")
        } else if let Some(home) = variable("HOME") {
            PathBuf::from(home).join(".cache/xl-vne")
        } else {
            bail!("no place for the cache: set XL_VNE_CACHE to a folder");
        };
        Self::at(root)
    }

    /// Opens a cache in a given folder.
    pub fn at(root: PathBuf) -> Result<Self> {
        fs::create_dir_all(&root)
            .with_context(|| format!("cannot create the cache folder {}", root.display()))?;
        let root = root
            .canonicalize()
            .with_context(|| format!("cannot resolve the cache folder {}", root.display()))?;
        Ok(Cache { root })
    }

    /// A folder of the cache that isn't an artefact, such as the running
    /// lab's state; created when missing.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.root.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(dir)
    }

    /// The folder that `artefact` would return, if it's there already.
    pub fn existing(&self, kind: &str, key: &str) -> Option<PathBuf> {
        let done = self.root.join(format!("{kind}-{key}"));
        done.is_dir().then_some(done)
    }

    /// Returns the artefact's folder; `build` fills it when there is none yet.
    ///
    /// `build` works in a folder aside that's renamed when it has succeeded,
    /// so a broken build is never taken for a finished one. Two processes that
    /// want the same artefact wait for one another.
    pub fn artefact(
        &self,
        kind: &str,
        key: &str,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        if let Some(done) = self.existing(kind, key) {
            touch(&done);
            return Ok(done);
        }
        let _lock = Lock::take(&self.root.join(format!("{kind}.lock")))?;
        if let Some(done) = self.existing(kind, key) {
            return Ok(done);
        }
        let done = self.root.join(format!("{kind}-{key}"));
        let aside = self.root.join(format!("{kind}-{key}.building"));
        if aside.exists() {
            fs::remove_dir_all(&aside)
                .with_context(|| format!("cannot clear {}", aside.display()))?;
        }
        fs::create_dir_all(&aside).with_context(|| format!("cannot create {}", aside.display()))?;
        let started = Instant::now();
        eprintln!("lab: building {kind} ({key})");
        build(&aside).with_context(|| {
            format!(
                "cannot build {kind}; what there is lies in {}",
                aside.display()
            )
        })?;
        fs::rename(&aside, &done)
            .with_context(|| format!("cannot move {} into place", aside.display()))?;
        self.prune(kind, &done);
        eprintln!(
            "lab: built {kind} in {} s",
            started.elapsed().as_secs_f32().round()
        );
        Ok(done)
    }
}

impl Cache {
    /// Removes artefacts of a kind that nobody has used for long.
    fn prune(&self, kind: &str, keep: &Path) {
        let prefix = format!("{kind}-");
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let ours = name
                .to_str()
                .and_then(|name| name.strip_prefix(&prefix))
                .is_some_and(|key| key.len() == KEY_DIGITS);
            let unused = entry
                .metadata()
                .and_then(|data| data.modified())
                .ok()
                .and_then(|time| time.elapsed().ok())
                .is_some_and(|age| age > UNUSED_MAX);
            if ours && unused && entry.path() != keep {
                eprintln!("lab: removing {}, long unused", entry.path().display());
                // What's left of it is removed next time.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// Notes that an artefact is in use. Somebody else's can't be noted, and
/// needn't be.
fn touch(dir: &Path) {
    if let Ok(file) = File::open(dir) {
        let _ = file.set_modified(SystemTime::now());
    }
}

/// An exclusive lock on a file, held until dropped.
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for the lock; says so when somebody else has it.
    pub fn take(path: &Path) -> Result<Self> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .with_context(|| format!("cannot open the lock file {}", path.display()))?;
        if !flock(&file, libc::LOCK_EX | libc::LOCK_NB)? {
            eprintln!(
                "lab: waiting for another process that holds {}",
                path.display()
            );
            flock(&file, libc::LOCK_EX)?;
        }
        Ok(Lock { _file: file })
    }
}

/// Whether the lock was got.
fn flock(file: &File, operation: i32) -> Result<bool> {
    loop {
        // SAFETY: the descriptor is open as long as `file` lives.
        if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 {
            return Ok(true);
        }
        let error = std::io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EWOULDBLOCK) => return Ok(false),
            Some(libc::EINTR) => {}
            _ => return Err(error).context("cannot lock a file of the cache"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_depends_on_every_ingredient() {
        let base = || Key::new("k").with("a", "1");
        assert_eq!(base().finish(), base().finish());
        assert_ne!(base().finish(), Key::new("l").with("a", "1").finish());
        assert_ne!(base().finish(), Key::new("k").with("a", "2").finish());
        assert_ne!(base().finish(), base().with("b", "").finish());
    }

    #[test]
    fn key_ingredients_do_not_run_into_one_another() {
        assert_ne!(
            Key::new("k").with("a", "bc").finish(),
            Key::new("k").with("ab", "c").finish()
        );
    }

    #[test]
    fn artefact_is_built_once_and_never_taken_half_done() -> Result<()> {
        let root = std::env::temp_dir().join(format!("xl-vne-cache-test-{}", std::process::id()));
        let cache = Cache::at(root.clone())?;
        assert!(cache
            .artefact("thing", "k", |dir| {
                fs::write(dir.join("half"), "x")?;
                bail!("no luck")
            })
            .is_err());
        assert!(cache.existing("thing", "k").is_none());
        let dir = cache.artefact("thing", "k", |dir| Ok(fs::write(dir.join("whole"), "x")?))?;
        assert!(dir.join("whole").exists() && !dir.join("half").exists());
        let again = cache.artefact("thing", "k", |_| bail!("built twice"))?;
        assert_eq!(dir, again);
        fs::remove_dir_all(root)?;
        Ok(())
    }

    #[test]
    fn only_artefacts_long_unused_are_removed() -> Result<()> {
        let root = std::env::temp_dir().join(format!("xl-vne-prune-test-{}", std::process::id()));
        let cache = Cache::at(root.clone())?;
        let key = |letter: &str| letter.repeat(KEY_DIGITS);
        let old = cache.artefact("thing", &key("a"), |_| Ok(()))?;
        let used = cache.artefact("thing", &key("b"), |_| Ok(()))?;
        let other = cache.artefact("thing-src", &key("c"), |_| Ok(()))?;
        let long_ago = SystemTime::now() - UNUSED_MAX * 2;
        for dir in [&old, &used, &other] {
            File::open(dir)?.set_modified(long_ago)?;
        }
        cache.artefact("thing", &key("b"), |_| bail!("built twice"))?;
        cache.artefact("thing", &key("d"), |_| Ok(()))?;
        assert!(!old.exists() && used.exists() && other.exists());
        fs::remove_dir_all(root)?;
        Ok(())
    }
}
