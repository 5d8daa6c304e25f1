//! The index file of format 1: which guest frame is in which slot, and each slot's
//! hash. It's only read: [`super::map`] has the one that is written.
//!
//! Layout in `plugin/docs/snapshot-format.md`, "Format 1". The index is itself
//! covered by a BLAKE3 hash in the manifest, so that the manifest vouches for
//! the index and the index for every page, which a restore can then check one
//! by one as it reads them.

use twox_hash::XxHash3_128;

use super::table::PFN_COUNT_MAX;
use crate::stream::{PageType, PAGE_SIZE};

const INDEX_MAGIC: [u8; 8] = *b"xlvneIDX";
const VERSION: u32 = 1;
/// The hash of a slot is XXH3, 128 bits.
const HASH_XXH3_128: u32 = 1;
const HEADER_BYTES: usize = 32;
const RUN_BYTES: usize = 16;
const HASH_BYTES: usize = 16;

/// The hash of a page.
///
/// XXH3 with 128 bits and not BLAKE3: it finds every accident as surely, and
/// nobody has to be kept from forging a page whose manifest he could forge as
/// well. It costs a tenth: under the lab's emulator 1,100 MB/s against 110
/// (native 25 GB/s against 2.8), where 20 snapshots of three guests of 256 MiB
/// are 15 GiB to hash.
pub(crate) type PageHash = [u8; HASH_BYTES];

/// Computes a page's hash.
pub(crate) fn hash_page(page: &[u8]) -> PageHash {
    XxHash3_128::oneshot(page).to_le_bytes()
}

/// What a run's frames contain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RunContent {
    /// Nothing: a type without contents.
    Nothing,
    /// Zeroes.
    Zero,
    /// Slots, counting up from this one.
    Slots(u32),
}

/// Consecutive frames of the same type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// First frame; below 2^28.
    pub pfn: u32,
    /// How many; at least 1.
    pub count: u32,
    pub page_type: PageType,
    pub content: RunContent,
}

/// The whole index.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Index {
    /// By frame, upwards.
    pub runs: Vec<Run>,
    /// By slot.
    pub hashes: Vec<PageHash>,
}

impl Index {
    /// Reads and checks the bytes of a file; `Err` says what is wrong.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let (header, rest) = bytes
            .split_first_chunk::<HEADER_BYTES>()
            .ok_or("it is too short")?;
        let (magic, numbers) = header.split_at(INDEX_MAGIC.len());
        let [version, page_bytes, runs, hashes, hash, _reserved] = words(numbers);
        if magic != INDEX_MAGIC || version != VERSION {
            return Err("it is no index of version 1".to_owned());
        }
        if page_bytes as usize != PAGE_SIZE || hash != HASH_XXH3_128 {
            return Err("its page size or hash is unknown".to_owned());
        }
        let runs_bytes = u64::from(runs) * RUN_BYTES as u64;
        let length = runs_bytes + u64::from(hashes) * HASH_BYTES as u64;
        if rest.len() as u64 != length {
            return Err("its length is not what its header says".to_owned());
        }
        let (runs, hashes) = rest
            .split_at_checked(runs_bytes as usize)
            .unwrap_or_default();
        let index = Index {
            runs: runs
                .chunks_exact(RUN_BYTES)
                .map(decode_run)
                .collect::<Result<_, _>>()?,
            hashes: hashes
                .chunks_exact(HASH_BYTES)
                .filter_map(|hash| hash.first_chunk().copied())
                .collect(),
        };
        index.check()?;
        Ok(index)
    }

    /// Frames go upwards without overlap, and each slot belongs to exactly one
    /// frame: no byte of `pages` is unaccounted for.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut next_pfn = 0;
        let mut used = vec![false; self.hashes.len()];
        for run in &self.runs {
            let end = u64::from(run.pfn) + u64::from(run.count);
            if u64::from(run.pfn) < next_pfn || run.count == 0 || end > PFN_COUNT_MAX {
                return Err(format!("its run at pfn {:#x} is out of order", run.pfn));
            }
            next_pfn = end;
            let RunContent::Slots(first) = run.content else {
                continue;
            };
            let first = first as usize;
            let slots = used
                .get_mut(first..first + run.count as usize)
                .filter(|slots| !slots.contains(&true))
                .ok_or_else(|| format!("its run at pfn {:#x} has impossible slots", run.pfn))?;
            slots.fill(true);
        }
        if used.contains(&false) {
            return Err("it has slots that belong to no page".to_owned());
        }
        Ok(())
    }
}

fn decode_run(bytes: &[u8]) -> Result<Run, String> {
    let (numbers, tail) = bytes.split_at_checked(12).unwrap_or_default();
    let [pfn, count, slot] = words(numbers);
    let &[page_type, kind, 0, 0] = tail else {
        return Err(format!("its run at pfn {pfn:#x} has reserved bytes set"));
    };
    let page_type = PageType::from_bits(page_type)
        .ok_or_else(|| format!("its run at pfn {pfn:#x} has no page type"))?;
    let content = match (kind, slot, page_type.has_data()) {
        (0, 0, false) => RunContent::Nothing,
        (1, 0, true) => RunContent::Zero,
        (2, slot, true) => RunContent::Slots(slot),
        _ => return Err(format!("its run at pfn {pfn:#x} contradicts itself")),
    };
    Ok(Run {
        pfn,
        count,
        page_type,
        content,
    })
}

/// Little-endian 32-bit numbers; missing ones read as 0.
fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let mut numbers = [0; N];
    for (number, chunk) in numbers.iter_mut().zip(bytes.chunks_exact(4)) {
        *number = chunk
            .first_chunk()
            .map_or(0, |word| u32::from_le_bytes(*word));
    }
    numbers
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample() -> Index {
        let run = |pfn, count, page_type, content| Run {
            pfn,
            count,
            page_type,
            content,
        };
        Index {
            runs: vec![
                run(0, 2, PageType::Normal, RunContent::Slots(0)),
                run(2, 1, PageType::L1, RunContent::Slots(2)),
                run(3, 1, PageType::L1, RunContent::Slots(4)),
                run(4, 2, PageType::Normal, RunContent::Zero),
                run(7, 1, PageType::Normal, RunContent::Slots(3)),
                run(4096, 2, PageType::Invalid, RunContent::Nothing),
            ],
            hashes: vec![[7; 16]; 5],
        }
    }

    /// As version 0.1.0 wrote it.
    fn encode(index: &Index) -> Vec<u8> {
        let mut bytes = INDEX_MAGIC.to_vec();
        for number in [
            VERSION,
            PAGE_SIZE as u32,
            index.runs.len() as u32,
            index.hashes.len() as u32,
            HASH_XXH3_128,
            0,
        ] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for run in &index.runs {
            let (kind, slot) = match run.content {
                RunContent::Nothing => (0, 0),
                RunContent::Zero => (1, 0),
                RunContent::Slots(slot) => (2, slot),
            };
            for number in [run.pfn, run.count, slot] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
            bytes.extend_from_slice(&[run.page_type.bits(), kind, 0, 0]);
        }
        bytes.extend(index.hashes.iter().flatten());
        bytes
    }

    /// XXH3-128 of 4096 bytes of 1, computed with another implementation
    /// (Python's xxhash).
    const PAGE_OF_ONES: PageHash = [
        0xd8, 0xfc, 0x4d, 0x31, 0xa9, 0xd8, 0xd4, 0x40, 0x55, 0x6a, 0x64, 0x9e, 0xc7, 0x3d, 0x6d,
        0x78,
    ];

    #[test]
    fn the_documented_layout_is_read() {
        let bytes = [
            &b"xlvneIDX\x01\0\0\0\0\x10\0\0\x03\0\0\0\x01\0\0\0\x01\0\0\0\0\0\0\0"[..],
            b"\x04\x03\x02\x01\x01\0\0\0\0\0\0\0\x0c\x02\0\0",
            b"\x05\x03\x02\x01\x01\0\0\0\0\0\0\0\x00\x01\0\0",
            b"\x06\x03\x02\x01\x01\0\0\0\0\0\0\0\x0f\x00\0\0",
            &PAGE_OF_ONES,
        ];
        let index = Index::decode(&bytes.concat()).unwrap();
        assert_eq!(index.hashes, [hash_page(&[1; PAGE_SIZE])]);
        let types: Vec<_> = index.runs.iter().map(|run| run.page_type).collect();
        assert_eq!(
            types,
            [PageType::L4Pinned, PageType::Normal, PageType::Invalid]
        );
        assert_eq!(index.runs[0].content, RunContent::Slots(0));
        assert_eq!(encode(&index), bytes.concat());
        assert_eq!(Index::decode(&encode(&sample())), Ok(sample()));
    }

    #[test]
    fn no_mutilated_index_is_a_panic_and_none_claims_more_than_it_has() {
        let good = encode(&sample());
        for length in 0..good.len() {
            assert!(Index::decode(&good[..length]).is_err());
        }
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                if let Ok(index) = Index::decode(&bad) {
                    assert!(index.check().is_ok());
                }
            }
        }
    }

    #[test]
    fn runs_that_overlap_or_share_slots_are_refused() {
        let with = |change: fn(&mut Index)| {
            let mut index = sample();
            change(&mut index);
            Index::decode(&encode(&index))
        };
        assert!(with(|_| ()).is_ok());
        assert!(with(|index| index.runs[1].pfn = 1).is_err());
        assert!(with(|index| index.runs[1].count = 0).is_err());
        assert!(with(|index| index.runs[5].count = u32::MAX).is_err());
        assert!(with(|index| index.runs[1].content = RunContent::Slots(1)).is_err());
        assert!(with(|index| index.runs[1].content = RunContent::Slots(u32::MAX)).is_err());
        assert!(with(|index| index.runs[0].count = 1).is_err());
        assert!(with(|index| index.runs[0].page_type = PageType::Broken).is_err());
        assert!(with(|index| index.hashes.push([0; 16])).is_err());
        assert!(with(|index| index.hashes.truncate(4)).is_err());
    }
}
