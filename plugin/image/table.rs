//! What is known of each guest frame while a stream comes in.

use crate::stream::PageType;

/// Guest frames that the store can hold, at most: 2^28, a guest of 1 TiB.
///
/// The table below then takes up to 1.3 GiB of memory, in proportion to the
/// frames that the stream names; a larger bound would let a damaged stream ask
/// for more than a dom0 has. Slot numbers (32 bits) reach 16 times as far.
pub const PFN_COUNT_MAX: u64 = 1 << 28;

/// Frames whose entries are allocated together. 5 KiB each.
const CHUNK_PFNS: usize = 1024;

/// Where the contents of a frame are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Its type has none.
    Nothing,
    /// All zero; stored nowhere.
    Zero,
    /// In this slot of the file of staged pages.
    Slot(u32),
    /// Handed to the packer under this number.
    Packed(u32),
    /// In memory, under this number.
    Held(u32),
}

const PRESENT: u8 = 0x80;

/// One frame's entry: a tag (present, kind of content, page type) and the
/// content's number. Kept apart, they pack into 5 bytes.
struct Chunk {
    tags: [u8; CHUNK_PFNS],
    numbers: [u32; CHUNK_PFNS],
}

/// The table: chunks found by the upper bits of the frame number.
#[derive(Default)]
pub(crate) struct PageTable {
    chunks: Vec<Option<Box<Chunk>>>,
}

impl PageTable {
    /// The frame's type and content, if it was ever named.
    pub(crate) fn get(&self, pfn: u64) -> Option<(PageType, Content)> {
        let (chunk, at) = split(pfn)?;
        self.chunks.get(chunk)?.as_ref()?.get(at)
    }

    /// Notes the frame's type and content. `false` if the frame is beyond
    /// [`PFN_COUNT_MAX`].
    pub(crate) fn set(&mut self, pfn: u64, page_type: PageType, content: Content) -> bool {
        let Some((chunk, at)) = split(pfn) else {
            return false;
        };
        if self.chunks.len() <= chunk {
            self.chunks.resize_with(chunk + 1, || None);
        }
        let Some(place) = self.chunks.get_mut(chunk) else {
            return false;
        };
        place
            .get_or_insert_with(Chunk::empty)
            .set(at, page_type, content);
        true
    }

    /// All frames that were named, upwards.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, PageType, Content)> + '_ {
        self.chunks.iter().enumerate().flat_map(|(number, chunk)| {
            let first = (number * CHUNK_PFNS) as u64;
            chunk.iter().flat_map(move |chunk| {
                (0..CHUNK_PFNS).filter_map(move |at| {
                    let (page_type, content) = chunk.get(at)?;
                    Some((first + at as u64, page_type, content))
                })
            })
        })
    }
}

impl std::fmt::Debug for PageTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageTable of {} chunks", self.chunks.len())
    }
}

/// The chunk and the place in it; `None` beyond the limit.
fn split(pfn: u64) -> Option<(usize, usize)> {
    if pfn >= PFN_COUNT_MAX {
        return None;
    }
    let pfn = pfn as usize; // below 2^28
    Some((pfn / CHUNK_PFNS, pfn % CHUNK_PFNS))
}

impl Chunk {
    fn empty() -> Box<Self> {
        Box::new(Chunk {
            tags: [0; CHUNK_PFNS],
            numbers: [0; CHUNK_PFNS],
        })
    }

    fn get(&self, at: usize) -> Option<(PageType, Content)> {
        let tag = *self.tags.get(at)?;
        let number = *self.numbers.get(at)?;
        if tag & PRESENT == 0 {
            return None;
        }
        let content = match tag >> 4 & 7 {
            0 => Content::Nothing,
            1 => Content::Zero,
            2 => Content::Slot(number),
            3 => Content::Held(number),
            _ => Content::Packed(number),
        };
        Some((PageType::from_bits(tag & 0xf)?, content))
    }

    fn set(&mut self, at: usize, page_type: PageType, content: Content) {
        let (kind, value) = match content {
            Content::Nothing => (0, 0),
            Content::Zero => (1, 0),
            Content::Slot(slot) => (2, slot),
            Content::Held(number) => (3, number),
            Content::Packed(number) => (4, number),
        };
        if let (Some(tag), Some(number)) = (self.tags.get_mut(at), self.numbers.get_mut(at)) {
            *tag = PRESENT | kind << 4 | page_type.bits();
            *number = value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_and_content_is_kept_apart() {
        let mut table = PageTable::default();
        let contents = [
            Content::Nothing,
            Content::Zero,
            Content::Slot(u32::MAX),
            Content::Held(0),
            Content::Packed(5),
        ];
        let mut expected = Vec::new();
        let mut pfn = 0;
        for bits in 0..16 {
            let Some(page_type) = PageType::from_bits(bits) else {
                continue;
            };
            for content in contents {
                assert!(table.set(pfn, page_type, Content::Slot(7)));
                assert!(table.set(pfn, page_type, content));
                assert_eq!(table.get(pfn), Some((page_type, content)));
                expected.push((pfn, page_type, content));
                pfn += 1021; // across chunk borders
            }
        }
        assert_eq!(table.iter().collect::<Vec<_>>(), expected);
        assert_eq!(table.get(1), None);
    }

    #[test]
    fn a_frame_beyond_the_limit_is_refused_and_costs_nothing() {
        let mut table = PageTable::default();
        assert!(!table.set(PFN_COUNT_MAX, PageType::Normal, Content::Zero));
        assert!(!table.set(u64::MAX, PageType::Normal, Content::Zero));
        assert!(table.chunks.is_empty());
        assert!(table.set(PFN_COUNT_MAX - 1, PageType::Normal, Content::Zero));
        assert_eq!(table.iter().count(), 1);
    }
}
