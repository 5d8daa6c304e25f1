//! The content of a TCP stream: each byte follows from its position, so the
//! receiver needs nothing else to know whether it's right.

/// The byte at a position.
pub fn byte(position: u64) -> u8 {
    let mut value = (position >> 3).wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (value >> ((position & 7) * 8)) as u8
}

/// Fills a buffer with the content from a position on.
pub fn fill(buffer: &mut [u8], position: u64) {
    for (at, slot) in (position..).zip(buffer.iter_mut()) {
        *slot = byte(at);
    }
}

/// The first place in a buffer that isn't as it should be.
pub fn mismatch(buffer: &[u8], position: u64) -> Option<u64> {
    (position..)
        .zip(buffer)
        .find_map(|(at, found)| (byte(at) != *found).then_some(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_or_shifted_byte_shows() {
        let mut buffer = [0u8; 100];
        fill(&mut buffer, 12);
        assert_eq!(mismatch(&buffer, 12), None);
        assert_eq!(mismatch(&buffer, 13), Some(13));
        buffer[50] ^= 1;
        assert_eq!(mismatch(&buffer, 12), Some(62));
    }
}
