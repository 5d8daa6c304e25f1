//! Processor features: those that a host has, and those that a guest was shown.
//!
//! Xen knows them as words of 32 bits, each a register of a CPUID leaf, in the order
//! that `xl info` prints as `hw_caps` (`xen/arch-x86/cpufeatureset.h`).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How many words `xl info` prints.
const WORDS: usize = 8;

/// Leaf, subleaf and register (`a`, `b`, `c`, `d` from 0) of each word, and what Xen
/// calls that.
const PLACES: [(u32, u32, usize, &str); WORDS] = [
    (0x1, 0, 3, "1d"),
    (0x1, 0, 2, "1c"),
    (0x8000_0001, 0, 3, "e1d"),
    (0x8000_0001, 0, 2, "e1c"),
    (0xd, 1, 0, "Da1"),
    (0x7, 0, 1, "7b0"),
    (0x7, 0, 2, "7c0"),
    (0x8000_0007, 0, 3, "e7d"),
];

/// Those that decide most often whether a guest can move, by the names of `xen-cpuid`.
const NAMES: &[(usize, u32, &str)] = &[
    (0, 25, "sse"),
    (0, 26, "sse2"),
    (1, 0, "sse3"),
    (1, 1, "pclmul"),
    (1, 9, "ssse3"),
    (1, 12, "fma"),
    (1, 13, "cx16"),
    (1, 17, "pcid"),
    (1, 19, "sse41"),
    (1, 20, "sse42"),
    (1, 22, "movbe"),
    (1, 23, "popcnt"),
    (1, 25, "aesni"),
    (1, 26, "xsave"),
    (1, 28, "avx"),
    (1, 29, "f16c"),
    (1, 30, "rdrnd"),
    (2, 20, "nx"),
    (2, 26, "page1gb"),
    (2, 27, "rdtscp"),
    (2, 29, "lm"),
    (3, 5, "lzcnt"),
    (3, 6, "sse4a"),
    (3, 11, "xop"),
    (3, 16, "fma4"),
    (4, 0, "xsaveopt"),
    (4, 1, "xsavec"),
    (4, 3, "xsaves"),
    (5, 0, "fsgsbase"),
    (5, 3, "bmi1"),
    (5, 4, "hle"),
    (5, 5, "avx2"),
    (5, 7, "smep"),
    (5, 8, "bmi2"),
    (5, 9, "erms"),
    (5, 10, "invpcid"),
    (5, 11, "rtm"),
    (5, 14, "mpx"),
    (5, 16, "avx512f"),
    (5, 17, "avx512dq"),
    (5, 18, "rdseed"),
    (5, 19, "adx"),
    (5, 20, "smap"),
    (5, 23, "clflushopt"),
    (5, 24, "clwb"),
    (5, 28, "avx512cd"),
    (5, 29, "sha"),
    (5, 30, "avx512bw"),
    (5, 31, "avx512vl"),
    (6, 1, "avx512_vbmi"),
    (6, 3, "pku"),
    (6, 8, "gfni"),
    (6, 9, "vaes"),
    (6, 10, "vpclmulqdq"),
    (6, 11, "avx512_vnni"),
    (7, 8, "itsc"),
];

/// Bytes of a leaf in a CPUID policy: leaf, subleaf, and four registers.
const LEAF_BYTES: usize = 24;

/// A set of features. Words that a Xen doesn't tell are 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct CpuFeatures([u32; WORDS]);

impl CpuFeatures {
    /// From words in their order, as libxl gives them for a host.
    pub fn of_host(words: &[u32]) -> Self {
        let mut all = [0; WORDS];
        for (into, word) in all.iter_mut().zip(words) {
            *into = *word;
        }
        Self(all)
    }

    /// From the body of a stream's `X86_CPUID_POLICY` record: what the guest is shown.
    pub fn of_policy(body: &[u8]) -> Self {
        let mut all = [0; WORDS];
        for leaf in body.chunks_exact(LEAF_BYTES) {
            let mut numbers = leaf.chunks_exact(4).map(|bytes| {
                let bytes = bytes.try_into().unwrap_or_default();
                u32::from_le_bytes(bytes)
            });
            let (Some(number), Some(subleaf)) = (numbers.next(), numbers.next()) else {
                continue;
            };
            // A leaf without subleaves has all bits set in their place.
            let subleaf = if subleaf == u32::MAX { 0 } else { subleaf };
            let registers: Vec<u32> = numbers.collect();
            for (into, place) in all.iter_mut().zip(PLACES) {
                if (place.0, place.1) == (number, subleaf) {
                    *into = registers.get(place.2).copied().unwrap_or_default();
                }
            }
        }
        Self(all)
    }

    /// Those that are in both.
    pub fn both(self, other: Self) -> Self {
        let mut all = self.0;
        for (mine, other) in all.iter_mut().zip(other.0) {
            *mine &= other;
        }
        Self(all)
    }

    /// The names of those that `other` lacks: `xen-cpuid`'s, or the word and the bit.
    pub fn missing_in(self, other: Self) -> Vec<String> {
        let mut missing = Vec::new();
        for (word, ((mine, other), place)) in self.0.iter().zip(other.0).zip(PLACES).enumerate() {
            for bit in (0..u32::BITS).filter(|bit| mine & !other & (1 << bit) != 0) {
                let known = NAMES.iter().find(|name| (name.0, name.1) == (word, bit));
                missing.push(
                    known.map_or_else(|| format!("{}:{bit}", place.3), |known| known.2.to_owned()),
                );
            }
        }
        missing
    }
}

impl fmt::Display for CpuFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, word) in self.0.iter().enumerate() {
            let colon = if at == 0 { "" } else { ":" };
            write!(f, "{colon}{word:08x}")?;
        }
        Ok(())
    }
}

impl From<CpuFeatures> for String {
    fn from(features: CpuFeatures) -> Self {
        features.to_string()
    }
}

impl TryFrom<String> for CpuFeatures {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for CpuFeatures {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no set of processor features, as hw_caps of 'xl info'");
        let mut all = [0; WORDS];
        let mut words = text.split(':');
        for into in &mut all {
            let word = words.next().filter(|word| word.len() == 8);
            *into = word
                .and_then(|word| u32::from_str_radix(word, 16).ok())
                .ok_or_else(wrong)?;
        }
        match words.next() {
            None => Ok(Self(all)),
            Some(_) => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_read_by_leaf_and_register() {
        let leaf = |numbers: [u32; 6]| numbers.into_iter().flat_map(u32::to_le_bytes);
        let mut body: Vec<u8> = leaf([1, u32::MAX, 9, 9, 1 << 28, 1 << 26]).collect();
        body.extend(leaf([7, 0, 0, 1 << 5, 1 << 3, 0]));
        body.extend(leaf([7, 1, 0, u32::MAX, 0, 0]));
        body.extend([1, 0, 0]);
        let shown = CpuFeatures::of_policy(&body);
        assert_eq!(
            shown.missing_in(CpuFeatures::default()),
            ["sse2", "avx", "avx2", "pku"]
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let (has, needs) = (
            CpuFeatures::of_host(&[1 << 26, 1 << 28]),
            CpuFeatures::of_host(&[1 << 26, 1 << 28 | 1 << 2, 0, 0, 0, 0, 0, 0]),
        );
        assert_eq!(needs.missing_in(has), ["1c:2"]);
        assert!(has.missing_in(needs).is_empty());
        assert!(needs.both(has).missing_in(has).is_empty());
    }

    #[test]
    fn it_is_written_as_xl_info_does() -> Result<(), String> {
        let text = "178bfbff:f6d83203:2e500800:244033f3:0000000f:219c01a9:0040060c:00000100";
        let features: CpuFeatures = text.parse()?;
        assert_eq!(features.to_string(), text);
        for wrong in [
            "",
            "178bfbff",
            &format!("{text}:0"),
            &text.replace('f', "x"),
        ] {
            assert!(wrong.parse::<CpuFeatures>().is_err(), "{wrong}");
        }
        Ok(())
    }
}
