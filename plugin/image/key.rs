//! The key of stores that show nothing to whoever steals them.
//!
//! 256 bits, out of a file or a command that `vne.conf` names. It's never used
//! itself: each file and pack has a key of its own, derived from it and a random
//! salt (see [`super::seal`]).

use std::fmt;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::error::Error;
use super::Result;

/// What it's written as: 64 hex digits, and white space around them.
const TEXT_BYTES_MAX: u64 = 4096;

/// Contexts of BLAKE3's key derivation: nothing else may use the same.
const ID_CONTEXT: &str = "xl-vne 2026-11-21 id of a store's key";
const FILE_CONTEXT: &str = "xl-vne 2026-11-21 key of a file in a store";

/// Where the key comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeySource {
    /// A file that only root may read.
    File(PathBuf),
    /// What this command line prints, run by `/bin/sh`.
    Command(String),
}

#[derive(Zeroize, ZeroizeOnDrop)]
struct Secret([u8; 32]);

/// A store's key.
#[derive(Clone)]
pub struct Key {
    secret: Arc<Secret>,
    id: KeyId,
}

/// Tells keys apart, and nothing else.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct KeyId(pub [u8; 8]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key {}", self.id)
    }
}

impl Key {
    /// The key with these bits.
    pub fn new(mut secret: [u8; 32]) -> Self {
        let hash = blake3::derive_key(ID_CONTEXT, &secret);
        let mut id = KeyId([0; 8]);
        id.0.iter_mut().zip(hash).for_each(|(to, from)| *to = from);
        let key = Key {
            secret: Arc::new(Secret(secret)),
            id,
        };
        secret.zeroize();
        key
    }

    /// Out of its text; `Err` says what is wrong with that.
    fn parse(text: &[u8]) -> std::result::Result<Self, &'static str> {
        const WRONG: &str = "it isn't 64 hex digits (make one: openssl rand -hex 32)";
        let text = std::str::from_utf8(text).map_err(|_| WRONG)?.trim();
        let is_hex = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_hex {
            return Err(WRONG);
        }
        let mut secret = [0; 32];
        for (nth, byte) in secret.iter_mut().enumerate() {
            let digits = text.get(2 * nth..2 * nth + 2).unwrap_or_default();
            *byte = u8::from_str_radix(digits, 16).map_err(|_| WRONG)?;
        }
        let key = Key::new(secret);
        secret.zeroize();
        Ok(key)
    }

    /// Gets the key.
    ///
    /// # Errors
    ///
    /// [`Error::BadKey`], also if others than root may read the file.
    pub fn load(source: &KeySource) -> Result<Self> {
        let (what, loaded) = match source {
            KeySource::File(path) => (path.display().to_string(), read(path)),
            KeySource::Command(line) => (format!("'{line}'"), ask(line)),
        };
        let key = loaded.and_then(|mut text| {
            let key = Key::parse(&text).map_err(str::to_owned);
            text.zeroize();
            key
        });
        key.map_err(|problem| Error::BadKey { what, problem })
    }

    pub(crate) fn id(&self) -> KeyId {
        self.id
    }

    /// The key of the file with this salt.
    pub(crate) fn derive(&self, salt: &[u8; 16]) -> [u8; 32] {
        let mut material = [0; 48];
        let (secret, rest) = material.split_at_mut(32);
        secret.copy_from_slice(&self.secret.0);
        rest.copy_from_slice(salt);
        let key = blake3::derive_key(FILE_CONTEXT, &material);
        material.zeroize();
        key
    }
}

fn read(path: &Path) -> std::result::Result<Vec<u8>, String> {
    let said = |error: std::io::Error| error.to_string();
    let file = std::fs::File::open(path).map_err(said)?;
    let facts = file.metadata().map_err(said)?;
    let me = rustix::process::geteuid().as_raw();
    if !facts.is_file() {
        return Err(String::from("it is no file"));
    }
    if facts.uid() != 0 && facts.uid() != me {
        return Err(format!("it belongs to user {} (chown root)", facts.uid()));
    }
    let mode = facts.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(format!("others may read it (mode {mode:o}; chmod 600)"));
    }
    let mut text = Vec::new();
    file.take(TEXT_BYTES_MAX)
        .read_to_end(&mut text)
        .map_err(said)?;
    Ok(text)
}

fn ask(line: &str) -> std::result::Result<Vec<u8>, String> {
    let said = |error: std::io::Error| error.to_string();
    let mut child = Command::new("/bin/sh")
        .args(["-c", line])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(said)?;
    let mut text = Vec::new();
    let read = match child.stdout.take() {
        Some(out) => out.take(TEXT_BYTES_MAX).read_to_end(&mut text),
        None => Ok(0),
    };
    let status = child.wait().map_err(said)?;
    read.map_err(said)?;
    match status.success() {
        true => Ok(text),
        false => Err(format!("it failed ({status})")),
    }
}

/// How a process finds out where the host's key comes from; none if there is none.
pub type FindKey = dyn Fn() -> std::result::Result<Option<KeySource>, String> + Send + Sync;

/// The host's key, once it was asked for.
#[derive(Default)]
struct OfHost {
    find: Option<Box<FindKey>>,
    found: Option<Option<Key>>,
}

static OF_HOST: Mutex<OfHost> = Mutex::new(OfHost {
    find: None,
    found: None,
});

/// Says how this process finds the key of its host's stores. It's looked for with the
/// first store, and again after another call of this.
pub fn find_host_key(find: Box<FindKey>) {
    let mut of_host = OF_HOST.lock().unwrap_or_else(PoisonError::into_inner);
    of_host.find = Some(find);
    of_host.found = None;
}

/// The key of this host's stores; none if they are kept plain.
///
/// # Errors
///
/// [`Error::BadKey`].
pub fn host_key() -> Result<Option<Key>> {
    let mut of_host = OF_HOST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = &of_host.found {
        return Ok(found.clone());
    }
    let source = match &of_host.find {
        Some(find) => find().map_err(|problem| Error::BadKey {
            what: String::from("this host's key"),
            problem,
        })?,
        None => None,
    };
    let key = source.map(|source| Key::load(&source)).transpose()?;
    of_host.found = Some(key.clone());
    Ok(key)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn file(text: &str, mode: u32) -> (tempfile::TempDir, KeySource) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, KeySource::File(path))
    }

    #[test]
    fn a_key_is_64_hex_digits_out_of_a_private_file_or_a_command() {
        let digits = "00112233445566778899aabbccddeeff".repeat(2);
        let (_dir, source) = file(&format!("{digits}\n"), 0o600);
        let key = Key::load(&source).unwrap();
        let asked = Key::load(&KeySource::Command(format!("echo {digits}"))).unwrap();
        assert_eq!(key.id().0, asked.id().0);
        assert_eq!(key.derive(&[1; 16]), asked.derive(&[1; 16]));
        assert_ne!(key.derive(&[1; 16]), key.derive(&[2; 16]));
        let other = Key::new([7; 32]);
        assert_ne!(key.id().0, other.id().0);
        assert_ne!(key.derive(&[1; 16]), other.derive(&[1; 16]));
        assert!(!format!("{key:?}").contains("0011"));
    }

    #[test]
    fn what_others_may_read_or_is_no_key_is_refused() {
        let digits = "a".repeat(64);
        for (text, mode, why) in [
            (digits.as_str(), 0o640, "others may read it"),
            (digits.as_str(), 0o604, "others may read it"),
            ("secret", 0o600, "64 hex digits"),
            (&"g".repeat(64), 0o600, "64 hex digits"),
            (&"a".repeat(63), 0o600, "64 hex digits"),
            ("", 0o600, "64 hex digits"),
        ] {
            let (_dir, source) = file(text, mode);
            let refused = Key::load(&source).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
            assert!(!refused.contains(&digits));
        }
        let failed = KeySource::Command(format!("echo {digits}; false"));
        assert!(Key::load(&failed).is_err());
        let nowhere = KeySource::File(PathBuf::from("/nonexistent/key"));
        assert!(Key::load(&nowhere).is_err());
    }
}
