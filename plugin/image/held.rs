//! Pages kept in memory: those that change all the time, and while their guest is
//! suspended all that come.

use crate::stream::{Page, PAGE_SIZE};

/// Pages in one allocation: 4 MiB, so that growing never copies what is there.
const BLOCK_PAGES: usize = 1024;

/// A bounded set of pages in memory, each under a number and with the slot that
/// an older version of it has in the file.
///
/// Memory that the kernel has yet to find costs more than what is copied into it, so
/// it's made ready while the guest runs.
#[derive(Debug)]
pub(crate) struct HeldPages {
    blocks: Vec<Vec<u8>>,
    slots: Vec<Option<u32>>,
    free: Vec<u32>,
    pages_max: usize,
    /// The most that were ever held at once.
    peak: usize,
}

impl HeldPages {
    /// For up to `bytes_max` bytes of pages; nothing is allocated yet.
    pub(crate) fn new(bytes_max: usize) -> Self {
        HeldPages {
            blocks: Vec::new(),
            slots: Vec::new(),
            free: Vec::new(),
            pages_max: (bytes_max / PAGE_SIZE).min(u32::MAX as usize),
            peak: 0,
        }
    }

    /// Gets a bit nearer to having memory for so many pages, if that is within the
    /// bound and there is any.
    pub(crate) fn make_ready(&mut self, pages: usize) {
        let first = self.blocks.len() * BLOCK_PAGES;
        if first >= pages.min(self.pages_max) {
            return;
        }
        if let Some(mut block) = new_block() {
            let count = (self.pages_max - first).min(BLOCK_PAGES);
            // Written, so that it's there.
            block.resize(count * PAGE_SIZE, 0);
            self.blocks.push(block);
        }
    }

    /// How many pages are held.
    pub(crate) fn count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The most pages that were ever held at once.
    pub(crate) fn peak(&self) -> usize {
        self.peak
    }

    /// Keeps a copy of `page`; returns its number. `None` when the bound is
    /// reached or memory is out.
    pub(crate) fn hold(&mut self, page: &Page, slot: Option<u32>) -> Option<u32> {
        let number = match self.free.pop() {
            Some(number) => {
                *self.slots.get_mut(number as usize)? = slot;
                self.replace(number, page);
                number
            }
            None => self.append(page, slot)?,
        };
        self.peak = self.peak.max(self.count());
        Some(number)
    }

    fn append(&mut self, page: &Page, slot: Option<u32>) -> Option<u32> {
        let count = self.slots.len();
        if count >= self.pages_max {
            return None;
        }
        let number = count as u32; // below pages_max
        let (block, at) = place(number);
        if block == self.blocks.len() {
            self.blocks.push(new_block()?);
        }
        let block = self.blocks.get_mut(block)?;
        if at < block.len() {
            self.replace(number, page);
        } else {
            block.extend_from_slice(page);
        }
        self.slots.push(slot);
        Some(number)
    }

    /// A newer version of a page that is held.
    pub(crate) fn replace(&mut self, number: u32, page: &Page) {
        let (block, at) = place(number);
        let place = self
            .blocks
            .get_mut(block)
            .and_then(|block| block.get_mut(at..)?.first_chunk_mut());
        if let Some(place) = place {
            *place = *page;
        }
    }

    /// A page that is held, and its slot.
    pub(crate) fn get(&self, number: u32) -> Option<(&Page, Option<u32>)> {
        let (block, at) = place(number);
        let page = self.blocks.get(block)?.get(at..)?.first_chunk()?;
        Some((page, *self.slots.get(number as usize)?))
    }

    /// Forgets a page; returns its slot.
    pub(crate) fn release(&mut self, number: u32) -> Option<u32> {
        let slot = self.slots.get_mut(number as usize)?.take();
        self.free.push(number);
        slot
    }
}

fn new_block() -> Option<Vec<u8>> {
    let mut block = Vec::new();
    block
        .try_reserve_exact(BLOCK_PAGES * PAGE_SIZE)
        .ok()
        .map(|()| block)
}

fn place(number: u32) -> (usize, usize) {
    let number = number as usize;
    (number / BLOCK_PAGES, number % BLOCK_PAGES * PAGE_SIZE)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_holds_and_freed_places_are_used_again() {
        let mut held = HeldPages::new(2 * PAGE_SIZE + 4095);
        let first = held.hold(&[1; PAGE_SIZE], Some(9)).unwrap();
        let second = held.hold(&[2; PAGE_SIZE], None).unwrap();
        assert_eq!(held.hold(&[3; PAGE_SIZE], None), None);
        assert_eq!(held.release(first), Some(9));
        let third = held.hold(&[3; PAGE_SIZE], Some(4)).unwrap();
        held.replace(second, &[5; PAGE_SIZE]);
        assert_eq!(held.get(third).unwrap(), (&[3; PAGE_SIZE], Some(4)));
        assert_eq!(held.get(second).unwrap(), (&[5; PAGE_SIZE], None));
        assert_eq!((held.count(), held.peak()), (2, 2));
        held.release(third);
        assert_eq!((held.count(), held.peak()), (1, 2));
    }

    #[test]
    fn no_more_is_made_ready_than_the_bound() {
        let mut held = HeldPages::new((BLOCK_PAGES + 2) * PAGE_SIZE);
        for blocks in [1, 2, 2] {
            held.make_ready(usize::MAX);
            assert_eq!(held.blocks.len(), blocks);
        }
        for number in 0..BLOCK_PAGES as u32 + 2 {
            assert_eq!(held.hold(&[7; PAGE_SIZE], None), Some(number));
        }
        assert_eq!(held.hold(&[7; PAGE_SIZE], None), None);
        assert!(held.blocks.iter().flatten().all(|byte| *byte == 7));
    }

    #[test]
    fn pages_of_later_blocks_are_found() {
        let mut held = HeldPages::new(1 << 30);
        // The first of them are there already.
        held.make_ready(1);
        for number in 0..2 * BLOCK_PAGES as u32 + 1 {
            let page = [(number % 251) as u8; PAGE_SIZE];
            assert_eq!(held.hold(&page, Some(number)), Some(number));
        }
        for number in [0, 1023, 1024, 2047, 2048] {
            let (page, slot) = held.get(number).unwrap();
            assert_eq!(page[4095], (number % 251) as u8);
            assert_eq!(slot, Some(number));
        }
        assert_eq!(held.get(2049), None);
    }
}
