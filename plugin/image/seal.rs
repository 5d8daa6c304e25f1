//! Files of a store as they are on disk: plain, or encrypted with the host's key.
//!
//! XChaCha20-Poly1305. Each file has a key of its own, derived from the store's and
//! a random salt of 128 bits, and each message in it a random nonce of 192 bits: so
//! no nonce comes twice with a key, also where a file is rewritten, or goes on
//! after a crash with other contents in the same place. Layout in
//! `plugin/docs/snapshot-format.md`, "Encryption".

use std::fmt;
use std::path::Path;

use chacha20poly1305::{AeadInOut, KeyInit, XChaCha20Poly1305};

use super::error::Error;
use super::files;
use super::key::{Key, KeyId};
use super::manifest::FileFacts;
use super::Result;
use crate::random;

const MAGIC: [u8; 8] = *b"xlvneENC";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 40;
const NONCE_BYTES: usize = 24;

/// Bytes that a sealed message is longer than what is in it.
pub(crate) const SEALED_BYTES: usize = NONCE_BYTES + 16;
/// The same of a file.
pub(crate) const FILE_BYTES: u64 = (HEAD_BYTES + SEALED_BYTES) as u64;

/// Seals and opens what is in one file.
#[derive(Clone)]
pub(crate) struct Sealer {
    cipher: XChaCha20Poly1305,
    pub key_id: KeyId,
    pub salt: [u8; 16],
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealer with key {}", self.key_id)
    }
}

impl Sealer {
    fn new(key: &Key, salt: [u8; 16]) -> Self {
        let cipher = XChaCha20Poly1305::new(&key.derive(&salt).into());
        Sealer {
            cipher,
            key_id: key.id(),
            salt,
        }
    }

    /// Encrypts a message in place: its nonce, what it says, and a tag. `role` is what
    /// stands for what in a file, so that one can't take the place of another.
    pub(crate) fn seal(&self, bytes: &mut Vec<u8>, role: &[u8], path: &Path) -> Result<()> {
        let nonce: [u8; NONCE_BYTES] = random::bytes().map_err(Error::io("seal", path))?;
        let sealed = self.cipher.encrypt_in_place(&nonce.into(), role, bytes);
        sealed.map_err(|_| Error::unstorable(path.display().to_string(), "it can't be sealed"))?;
        bytes.splice(0..0, nonce);
        Ok(())
    }

    /// Decrypts a message in place; `Err` if it isn't what was sealed.
    pub(crate) fn open(
        &self,
        bytes: &mut Vec<u8>,
        role: &[u8],
    ) -> std::result::Result<(), &'static str> {
        const WRONG: &str = "it isn't what was encrypted";
        let nonce = *bytes.first_chunk::<NONCE_BYTES>().ok_or(WRONG)?;
        bytes.drain(..NONCE_BYTES);
        let opened = self.cipher.decrypt_in_place(&nonce.into(), role, bytes);
        opened.map_err(|_| WRONG)
    }
}

/// How a store's files are kept.
#[derive(Clone, Debug, Default)]
pub(crate) struct Vault(Option<Key>);

impl Vault {
    /// With this key, or plain.
    pub(crate) fn new(key: Option<Key>) -> Self {
        Vault(key)
    }

    /// Whether what is written is encrypted.
    pub(crate) fn seals(&self) -> bool {
        self.0.is_some()
    }

    /// For a new file, with a salt of its own; none if it's kept plain.
    pub(crate) fn new_sealer(&self, path: &Path) -> Result<Option<Sealer>> {
        let Some(key) = &self.0 else { return Ok(None) };
        let salt = random::bytes().map_err(Error::io("seal", path))?;
        Ok(Some(Sealer::new(key, salt)))
    }

    /// For a file that was sealed; `id` is the beginning of its key's.
    pub(crate) fn sealer(&self, id: &[u8], salt: [u8; 16], path: &Path) -> Result<Sealer> {
        let locked = |problem: String| Error::Locked {
            path: path.to_owned(),
            problem,
        };
        match &self.0 {
            Some(key) if key.id().0.starts_with(id) => Ok(Sealer::new(key, salt)),
            Some(key) => Err(locked(format!(
                "encrypted with another key than this host's, {}",
                key.id()
            ))),
            None => Err(locked(String::from(
                "encrypted, and this host has no key (store_key in vne.conf)",
            ))),
        }
    }

    /// A file's bytes as they are to be on disk.
    pub(crate) fn close(&self, bytes: &[u8], path: &Path) -> Result<Vec<u8>> {
        let Some(sealer) = self.new_sealer(path)? else {
            return Ok(bytes.to_vec());
        };
        let mut head = Vec::with_capacity(HEAD_BYTES);
        head.extend_from_slice(&MAGIC);
        head.extend_from_slice(&VERSION.to_le_bytes());
        head.extend_from_slice(&[0; 4]);
        head.extend_from_slice(&sealer.key_id.0);
        head.extend_from_slice(&sealer.salt);
        let mut body = bytes.to_vec();
        sealer.seal(&mut body, &head, path)?;
        head.append(&mut body);
        Ok(head)
    }

    /// What is in a file with these bytes, plain or not.
    pub(crate) fn open(&self, mut bytes: Vec<u8>, path: &Path) -> Result<Vec<u8>> {
        if !bytes.starts_with(&MAGIC) {
            return Ok(bytes);
        }
        let damaged = |problem: &str| Error::damaged(path, problem);
        let Some(head) = bytes.first_chunk::<HEAD_BYTES>().copied() else {
            return Err(damaged("it is cut short"));
        };
        let (version, rest) = head.split_at(16);
        if version.get(8..) != Some(&[1, 0, 0, 0, 0, 0, 0, 0]) {
            return Err(damaged("it is encrypted in a way that isn't known here"));
        }
        let (id, salt) = rest.split_at(8);
        let salt = *salt
            .first_chunk()
            .ok_or_else(|| damaged("it is cut short"))?;
        let sealer = self.sealer(id, salt, path)?;
        bytes.drain(..HEAD_BYTES);
        sealer.open(&mut bytes, &head).map_err(damaged)?;
        Ok(bytes)
    }

    /// [`files::write_file`]; what it says is of the bytes on disk.
    pub(crate) fn write_file(&self, path: &Path, name: &str, bytes: &[u8]) -> Result<FileFacts> {
        match self.seals() {
            true => files::write_file(path, name, &self.close(bytes, path)?),
            false => files::write_file(path, name, bytes),
        }
    }

    /// [`files::read_file`].
    pub(crate) fn read_file(&self, path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
        let bytes = files::read_file(path, bytes_max.saturating_add(FILE_BYTES))?;
        self.open(bytes, path)
    }

    /// [`files::read_checked`].
    pub(crate) fn read_checked(&self, path: &Path, facts: &FileFacts) -> Result<Vec<u8>> {
        self.open(files::read_checked(path, facts)?, path)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn vault(bits: u8) -> Vault {
        Vault::new(Some(Key::new([bits; 32])))
    }

    #[test]
    fn what_is_closed_opens_with_the_same_key_only() {
        let path = Path::new("file");
        for text in [&b""[..], b"x", &[7; 100_000]] {
            let closed = vault(1).close(text, path).unwrap();
            assert_eq!(closed.len(), text.len() + FILE_BYTES as usize);
            assert_eq!(vault(1).open(closed.clone(), path).unwrap(), text);
            let other = vault(2).open(closed.clone(), path).unwrap_err();
            assert!(other.to_string().contains("another key"), "{other}");
            let none = Vault::default().open(closed.clone(), path).unwrap_err();
            assert!(none.to_string().contains("has no key"), "{none}");
            assert!(!none.is_damage());
            // A second time it's different from the first byte of the salt on.
            let again = vault(1).close(text, path).unwrap();
            assert_ne!(again[24..64], closed[24..64]);
        }
        let plain = Vault::default().close(b"text", path).unwrap();
        assert_eq!(plain, b"text");
        assert_eq!(vault(1).open(plain, path).unwrap(), b"text");
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let path = Path::new("file");
        let good = vault(1).close(b"the members' memory", path).unwrap();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                // Without the first bytes it's no such file, and what reads it says so.
                let opened = vault(1).open(bad, path);
                assert!(opened.is_err() || at < 8, "byte {at}");
            }
            assert!(at < 8 || vault(1).open(good[..at].to_vec(), path).is_err());
        }
    }

    #[test]
    fn what_stands_for_one_thing_cannot_stand_for_another() {
        let path = Path::new("pack");
        let sealer = vault(1).new_sealer(path).unwrap().unwrap();
        let mut frame = b"pages".to_vec();
        sealer.seal(&mut frame, b"frame", path).unwrap();
        assert_eq!(frame.len(), 5 + SEALED_BYTES);
        assert!(sealer.open(&mut frame.clone(), b"table").is_err());
        let other = vault(1).new_sealer(path).unwrap().unwrap();
        assert!(other.open(&mut frame.clone(), b"frame").is_err());
        sealer.open(&mut frame, b"frame").unwrap();
        assert_eq!(frame, b"pages");
        assert!(sealer.open(&mut Vec::new(), b"frame").is_err());
    }
}
