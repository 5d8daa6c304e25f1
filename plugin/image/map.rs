//! The index file of format 2: which guest frame is where in which pack.
//!
//! Layout in `plugin/docs/snapshot-format.md`, "index". A BLAKE3 of it is in the
//! manifest; the packs' names in it vouch for their pages' hashes, and those for
//! the pages.

use super::pack::{PackId, PACK_PAGES_MAX};
use super::table::PFN_COUNT_MAX;
use crate::stream::{PageType, PAGE_SIZE};

const MAGIC: [u8; 8] = *b"xlvneIDX";
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 32;
const PACK_BYTES: usize = 40;
const RUN_BYTES: usize = 16;
/// Packs that an index names, at most.
pub(crate) const PACKS_MAX: usize = 1 << 16;

/// What a run's frames contain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    /// Nothing: a type without contents.
    Nothing,
    /// Zeroes.
    Zero,
    /// Pages of a pack, counting up from this one. The pack is its place in the
    /// list.
    Pack { pack: u16, page: u32 },
}

/// Consecutive frames of the same type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// First frame; below 2^28.
    pub pfn: u32,
    /// How many; at least 1.
    pub count: u32,
    pub page_type: PageType,
    pub content: Where,
}

/// The whole index.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct PageMap {
    /// The packs, and how many pages each has.
    pub packs: Vec<(PackId, u32)>,
    /// By frame, upwards.
    pub runs: Vec<Run>,
}

impl PageMap {
    /// Adds a frame, which must be above all others.
    pub(crate) fn push(&mut self, pfn: u64, page_type: PageType, content: Where) {
        let run = Run {
            pfn: pfn as u32, // below PFN_COUNT_MAX
            count: 1,
            page_type,
            content,
        };
        match self.runs.last_mut() {
            Some(last) if last.goes_on_with(&run) => last.count += 1,
            _ => self.runs.push(run),
        }
    }

    /// The bytes of the file.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let length = HEADER_BYTES + self.packs.len() * PACK_BYTES + self.runs.len() * RUN_BYTES;
        let mut bytes = Vec::with_capacity(length);
        bytes.extend_from_slice(&MAGIC);
        for number in [
            VERSION,
            PAGE_SIZE as u32,
            self.runs.len() as u32,
            self.packs.len() as u32,
            0,
            0,
        ] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for (id, pages) in &self.packs {
            bytes.extend_from_slice(&id.0);
            bytes.extend_from_slice(&pages.to_le_bytes());
            bytes.extend_from_slice(&[0; 4]);
        }
        for run in &self.runs {
            let (kind, pack, page) = match run.content {
                Where::Nothing => (0, 0, 0),
                Where::Zero => (1, 0, 0),
                Where::Pack { pack, page } => (2, pack, page),
            };
            for number in [run.pfn, run.count, page] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
            bytes.extend_from_slice(&pack.to_le_bytes());
            bytes.extend_from_slice(&[run.page_type.bits(), kind]);
        }
        bytes
    }

    /// Reads and checks the bytes of a file; `Err` says what is wrong.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let (header, rest) = bytes
            .split_first_chunk::<HEADER_BYTES>()
            .ok_or("it is too short")?;
        let (magic, numbers) = header.split_at(MAGIC.len());
        let [version, page_bytes, runs, packs, reserved, reserved_too] = words(numbers);
        if magic != MAGIC || version != VERSION || reserved != 0 || reserved_too != 0 {
            return Err("it is no index of version 2".to_owned());
        }
        if page_bytes as usize != PAGE_SIZE || packs as usize > PACKS_MAX {
            return Err("its page size or its packs are impossible".to_owned());
        }
        let packs_bytes = packs as usize * PACK_BYTES;
        let length = packs_bytes as u64 + u64::from(runs) * RUN_BYTES as u64;
        if rest.len() as u64 != length {
            return Err("its length is not what its header says".to_owned());
        }
        let (packs, runs) = rest.split_at_checked(packs_bytes).unwrap_or_default();
        let map = PageMap {
            packs: packs
                .chunks_exact(PACK_BYTES)
                .map(decode_pack)
                .collect::<Result<_, _>>()?,
            runs: runs
                .chunks_exact(RUN_BYTES)
                .map(decode_run)
                .collect::<Result<_, _>>()?,
        };
        map.check()?;
        Ok(map)
    }

    /// Frames go upwards without overlap, and pages are those of packs that are
    /// named once.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut names: Vec<_> = self.packs.iter().map(|(id, _)| id).collect();
        names.sort();
        if names.windows(2).any(|pair| pair.first() == pair.last()) {
            return Err("it names a pack twice".to_owned());
        }
        let mut next_pfn = 0;
        for run in &self.runs {
            let end = u64::from(run.pfn) + u64::from(run.count);
            if u64::from(run.pfn) < next_pfn || run.count == 0 || end > PFN_COUNT_MAX {
                return Err(format!("its run at pfn {:#x} is out of order", run.pfn));
            }
            next_pfn = end;
            let Where::Pack { pack, page } = run.content else {
                continue;
            };
            let pages = self.packs.get(usize::from(pack)).map_or(0, |pack| pack.1);
            if u64::from(page) + u64::from(run.count) > u64::from(pages) {
                return Err(format!(
                    "its run at pfn {:#x} has impossible pages",
                    run.pfn
                ));
            }
        }
        Ok(())
    }
}

impl Run {
    /// Whether `next` can be added to this run. It stands alone.
    fn goes_on_with(&self, next: &Run) -> bool {
        let content_goes_on = match (self.content, next.content) {
            (
                Where::Pack { pack, page },
                Where::Pack {
                    pack: other,
                    page: next,
                },
            ) => pack == other && u64::from(page) + u64::from(self.count) == u64::from(next),
            (mine, other) => mine == other,
        };
        content_goes_on
            && self.page_type == next.page_type
            && u64::from(self.pfn) + u64::from(self.count) == u64::from(next.pfn)
    }
}

fn decode_pack(bytes: &[u8]) -> Result<(PackId, u32), String> {
    let (id, numbers) = bytes.split_first_chunk::<32>().ok_or("it is cut short")?;
    let [pages, reserved] = words(numbers);
    if reserved != 0 || pages == 0 || u64::from(pages) > PACK_PAGES_MAX {
        return Err("it has an impossible pack".to_owned());
    }
    Ok((PackId(*id), pages))
}

fn decode_run(bytes: &[u8]) -> Result<Run, String> {
    let (numbers, tail) = bytes.split_at_checked(12).unwrap_or_default();
    let [pfn, count, page] = words(numbers);
    let &[low, high, page_type, kind] = tail else {
        return Err("it is cut short".to_owned());
    };
    let pack = u16::from_le_bytes([low, high]);
    let page_type = PageType::from_bits(page_type)
        .ok_or_else(|| format!("its run at pfn {pfn:#x} has no page type"))?;
    let content = match (kind, pack, page, page_type.has_data()) {
        (0, 0, 0, false) => Where::Nothing,
        (1, 0, 0, true) => Where::Zero,
        (2, pack, page, true) => Where::Pack { pack, page },
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

    fn sample() -> PageMap {
        let mut map = PageMap {
            packs: vec![(PackId([1; 32]), 4), (PackId([2; 32]), 9)],
            runs: Vec::new(),
        };
        let page = |pack, page| Where::Pack { pack, page };
        for (pfn, page_type, content) in [
            (0, PageType::Normal, page(0, 0)),
            (1, PageType::Normal, page(0, 1)),
            (2, PageType::Normal, page(1, 2)),
            (3, PageType::L1, page(1, 3)),
            (4, PageType::Normal, Where::Zero),
            (5, PageType::Normal, Where::Zero),
            (7, PageType::Normal, page(0, 1)),
            (4096, PageType::Invalid, Where::Nothing),
        ] {
            map.push(pfn, page_type, content);
        }
        map
    }

    #[test]
    fn what_is_encoded_comes_back() {
        assert_eq!(sample().runs.len(), 6);
        assert_eq!(PageMap::decode(&sample().encode()).unwrap(), sample());
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let mut map = PageMap {
            packs: vec![(PackId([0xab; 32]), 0x0304)],
            runs: Vec::new(),
        };
        let content = Where::Pack {
            pack: 0,
            page: 0x0201,
        };
        map.push(0x0102_0304, PageType::L4Pinned, content);
        map.push(0x0102_0305, PageType::Normal, Where::Zero);
        let expected = [
            &b"xlvneIDX\x02\0\0\0\0\x10\0\0\x02\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0"[..],
            &[0xab; 32],
            b"\x04\x03\0\0\0\0\0\0",
            b"\x04\x03\x02\x01\x01\0\0\0\x01\x02\0\0\0\0\x0c\x02",
            b"\x05\x03\x02\x01\x01\0\0\0\0\0\0\0\0\0\x00\x01",
        ];
        assert_eq!(map.encode(), expected.concat());
    }

    #[test]
    fn no_mutilated_index_is_a_panic_and_none_claims_more_than_it_has() {
        let good = sample().encode();
        for length in 0..good.len() {
            assert!(PageMap::decode(&good[..length]).is_err());
        }
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                if let Ok(map) = PageMap::decode(&bad) {
                    assert!(map.check().is_ok());
                }
            }
        }
    }

    #[test]
    fn runs_that_overlap_or_leave_their_pack_are_refused() {
        let with = |change: fn(&mut PageMap)| {
            let mut map = sample();
            change(&mut map);
            PageMap::decode(&map.encode())
        };
        assert!(with(|_| ()).is_ok());
        assert!(with(|map| map.runs[1].pfn = 1).is_err());
        assert!(with(|map| map.runs[1].count = 0).is_err());
        assert!(with(|map| map.runs[5].count = u32::MAX).is_err());
        assert!(with(|map| map.packs[1].1 = 3).is_err());
        assert!(with(|map| map.packs[1].0 = map.packs[0].0).is_err());
        assert!(with(|map| map.packs.truncate(1)).is_err());
        assert!(with(|map| map.runs[0].page_type = PageType::Broken).is_err());
    }
}
