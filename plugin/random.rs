//! Numbers that nobody else has.

use rustix::rand::{getrandom, GetRandomFlags};

/// A random number, for names that must differ from all others.
pub fn number() -> std::io::Result<u64> {
    Ok(u64::from_ne_bytes(bytes()?))
}

/// Random bytes.
pub fn bytes<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        filled += getrandom(rest, GetRandomFlags::empty())?;
    }
    Ok(bytes)
}
