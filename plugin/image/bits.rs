//! Sets of page numbers.

/// A bit a page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bits {
    bytes: Vec<u8>,
    length: usize,
}

impl Bits {
    /// None of `length` pages.
    pub(crate) fn none(length: usize) -> Self {
        Bits {
            bytes: vec![0; Self::bytes_for(length)],
            length,
        }
    }

    /// All of `length` pages.
    pub(crate) fn all(length: usize) -> Self {
        let mut bits = Self::none(length);
        (0..length).for_each(|at| bits.set(at));
        bits
    }

    /// Bytes of so many bits.
    pub(crate) fn bytes_for(length: usize) -> usize {
        length.div_ceil(8)
    }

    /// As they stand in a file, the lowest bit of a byte first; none if bits
    /// beyond the length are set.
    pub(crate) fn from_bytes(bytes: &[u8], length: usize) -> Option<Self> {
        if bytes.len() != Self::bytes_for(length) {
            return None;
        }
        let beyond = match length % 8 {
            0 => 0,
            used => bytes.last().map_or(0, |last| last >> used),
        };
        (beyond == 0).then(|| Bits {
            bytes: bytes.to_vec(),
            length,
        })
    }

    /// As they stand in a file.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether the page is in the set.
    pub(crate) fn get(&self, at: usize) -> bool {
        let byte = self.bytes.get(at / 8);
        byte.is_some_and(|byte| byte >> (at % 8) & 1 == 1)
    }

    /// Puts a page in; one beyond the length is none.
    pub(crate) fn set(&mut self, at: usize) {
        if at < self.length {
            if let Some(byte) = self.bytes.get_mut(at / 8) {
                *byte |= 1 << (at % 8);
            }
        }
    }

    /// How many pages are in it.
    pub(crate) fn count(&self) -> usize {
        self.bytes
            .iter()
            .map(|byte| byte.count_ones() as usize)
            .sum()
    }

    /// How many pages from `from` on and below `to` are in it.
    pub(crate) fn count_between(&self, from: usize, to: usize) -> usize {
        let mut count = 0;
        let mut at = from;
        while at < to {
            if at % 8 == 0 && at + 8 <= to {
                count += self
                    .bytes
                    .get(at / 8)
                    .map_or(0, |b| b.count_ones() as usize);
                at += 8;
            } else {
                count += usize::from(self.get(at));
                at += 1;
            }
        }
        count
    }

    /// The pages in both sets.
    pub(crate) fn and(&self, other: &Bits) -> Bits {
        let mut both = self.clone();
        for (at, byte) in both.bytes.iter_mut().enumerate() {
            *byte &= other.bytes.get(at).copied().unwrap_or(0);
        }
        both
    }

    /// Adds the other set's pages, as far as there is room for them.
    pub(crate) fn add(&mut self, other: &Bits) {
        for (byte, more) in self.bytes.iter_mut().zip(&other.bytes) {
            *byte |= more;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counting_and_finding_agree() {
        let mut bits = Bits::none(1003);
        for at in (0..1100).step_by(7) {
            bits.set(at);
        }
        assert_eq!(bits.count(), 144);
        for (from, to) in [(0, 1003), (3, 999), (8, 16), (7, 8), (5, 5), (14, 15)] {
            let slow = (from..to).filter(|&at| bits.get(at)).count();
            assert_eq!(bits.count_between(from, to), slow, "{from}..{to}");
        }
        assert_eq!(Bits::from_bytes(bits.bytes(), 1003), Some(bits.clone()));
        assert_eq!(Bits::all(1003).and(&bits), bits);
        let mut beyond = bits.bytes().to_vec();
        beyond[125] |= 0x80;
        assert_eq!(Bits::from_bytes(&beyond, 1003), None);
    }
}
