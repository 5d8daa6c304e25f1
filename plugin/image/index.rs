//! The index file: which guest frame is in which slot, and each slot's hash.
//!
//! Layout in `plugin/docs/snapshot-format.md`, "index". The index is itself
//! covered by a BLAKE3 hash in the manifest, so that the manifest vouches for
//! the index and the index for every page, which a restore can then check one
//! by one as it reads them.

use twox_hash::XxHash3_128;

use super::table::{Content, PageTable, PFN_COUNT_MAX};
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
    /// The index of a finished table. Pages that are still held in memory have
    /// no place in it: `Err` names the first.
    pub(crate) fn of(table: &PageTable, hashes: Vec<PageHash>) -> Result<Self, u64> {
        let mut runs: Vec<Run> = Vec::new();
        for (pfn, page_type, content) in table.iter() {
            let content = match content {
                Content::Nothing => RunContent::Nothing,
                Content::Zero => RunContent::Zero,
                Content::Slot(slot) => RunContent::Slots(slot),
                Content::Held(_) => return Err(pfn),
            };
            let run = Run {
                pfn: pfn as u32, // below PFN_COUNT_MAX
                count: 1,
                page_type,
                content,
            };
            match runs.last_mut() {
                Some(last) if last.goes_on_with(&run) => last.count += 1,
                _ => runs.push(run),
            }
        }
        Ok(Index { runs, hashes })
    }

    /// The bytes of the file.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let length = HEADER_BYTES + self.runs.len() * RUN_BYTES + self.hashes.len() * HASH_BYTES;
        let mut bytes = Vec::with_capacity(length);
        bytes.extend_from_slice(&INDEX_MAGIC);
        for number in [
            VERSION,
            PAGE_SIZE as u32,
            self.runs.len() as u32,
            self.hashes.len() as u32,
            HASH_XXH3_128,
            0,
        ] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for run in &self.runs {
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
        bytes.extend(self.hashes.iter().flatten());
        bytes
    }

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

impl Run {
    /// Whether `next` can be added to this run. It stands alone.
    fn goes_on_with(&self, next: &Run) -> bool {
        let content_goes_on = match (self.content, next.content) {
            (RunContent::Slots(first), RunContent::Slots(slot)) => {
                u64::from(first) + u64::from(self.count) == u64::from(slot)
            }
            (mine, other) => mine == other,
        };
        content_goes_on
            && self.page_type == next.page_type
            && u64::from(self.pfn) + u64::from(self.count) == u64::from(next.pfn)
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
        let mut table = PageTable::default();
        for (pfn, page_type, content) in [
            (0, PageType::Normal, Content::Slot(0)),
            (1, PageType::Normal, Content::Slot(1)),
            (2, PageType::L1, Content::Slot(2)),
            (3, PageType::L1, Content::Slot(4)),
            (4, PageType::Normal, Content::Zero),
            (5, PageType::Normal, Content::Zero),
            (7, PageType::Normal, Content::Slot(3)),
            (4096, PageType::Invalid, Content::Nothing),
            (4097, PageType::Invalid, Content::Nothing),
        ] {
            table.set(pfn, page_type, content);
        }
        Index::of(&table, vec![[7; 16]; 5]).unwrap()
    }

    /// XXH3-128 of 4096 bytes of 1.
    const PAGE_OF_ONES: PageHash = [
        0xd8, 0xfc, 0x4d, 0x31, 0xa9, 0xd8, 0xd4, 0x40, 0x55, 0x6a, 0x64, 0x9e, 0xc7, 0x3d, 0x6d,
        0x78,
    ];

    #[test]
    fn what_is_encoded_comes_back() {
        let index = sample();
        assert_eq!(index.runs.len(), 6);
        assert_eq!(Index::decode(&index.encode()).unwrap(), index);
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let mut table = PageTable::default();
        table.set(0x0102_0304, PageType::L4Pinned, Content::Slot(0));
        table.set(0x0102_0305, PageType::Normal, Content::Zero);
        table.set(0x0102_0306, PageType::Invalid, Content::Nothing);
        let index = Index::of(&table, vec![hash_page(&[1; PAGE_SIZE])]).unwrap();
        let expected = [
            &b"xlvneIDX\x01\0\0\0\0\x10\0\0\x03\0\0\0\x01\0\0\0\x01\0\0\0\0\0\0\0"[..],
            b"\x04\x03\x02\x01\x01\0\0\0\0\0\0\0\x0c\x02\0\0",
            b"\x05\x03\x02\x01\x01\0\0\0\0\0\0\0\x00\x01\0\0",
            b"\x06\x03\x02\x01\x01\0\0\0\0\0\0\0\x0f\x00\0\0",
            // Computed with another implementation (Python's xxhash).
            &PAGE_OF_ONES,
        ];
        assert_eq!(index.encode(), expected.concat());
    }

    #[test]
    fn a_page_left_in_memory_is_not_forgotten() {
        let mut table = PageTable::default();
        table.set(3, PageType::Normal, Content::Held(0));
        assert_eq!(Index::of(&table, vec![]), Err(3));
    }

    #[test]
    fn no_mutilated_index_is_a_panic_and_none_claims_more_than_it_has() {
        let good = sample().encode();
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
            Index::decode(&index.encode())
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
