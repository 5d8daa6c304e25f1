//! What a packer does in the pages' order: finds those that are stored already, and
//! numbers the others.

use super::known::{Fingerprints, Known, Location};
use super::pack::{Hash, FRAME_PAGES};
use super::Result;
use crate::stream::PAGE_SIZE;

/// What is done in the order of the batches.
pub(super) struct InTurn {
    pub turn: u64,
    pub known: Known,
    /// Whether it has looked for what the store has.
    pub learnt: bool,
    pub prints: Fingerprints,
    /// Of the pages in the pack.
    pub hashes: Vec<Hash>,
    /// Where each page that was handed in is.
    pub locations: Vec<Location>,
    /// Pages of the frame that isn't full yet.
    pub open: Vec<u8>,
}

/// A frame's pages.
pub(super) struct Full {
    pub first: u32,
    pub pages: Vec<u8>,
}

impl InTurn {
    /// Once, and not before there is a page: it takes a while.
    pub(super) fn learn(&mut self) -> Result<()> {
        if !self.learnt {
            self.known.learn()?;
            self.learnt = true;
        }
        Ok(())
    }

    /// Finds or numbers the pages of a batch.
    pub(super) fn place(&mut self, pages: &[u8], hashes: &[Hash], full: &mut Vec<Full>) {
        for (page, hash) in pages.chunks_exact(PAGE_SIZE).zip(hashes) {
            let location = match self.find(hash) {
                Some(location) => location,
                None => self.append(page, hash, full),
            };
            self.locations.push(location);
        }
    }

    fn find(&mut self, hash: &Hash) -> Option<Location> {
        let own = self.prints.candidates(hash);
        let is_same = |&page: &u32| self.hashes.get(page as usize) == Some(hash);
        let page = own.into_iter().find(is_same);
        match page {
            Some(page) => Some(Location { pack: 0, page }),
            None => self.known.find(hash),
        }
    }

    fn append(&mut self, page: &[u8], hash: &Hash, full: &mut Vec<Full>) -> Location {
        let number = self.hashes.len() as u32; // a member's pages are fewer
        self.hashes.push(*hash);
        self.prints.insert(hash, number);
        self.open.extend_from_slice(page);
        if self.open.len() >= FRAME_PAGES * PAGE_SIZE {
            self.close_frame(full);
        }
        Location {
            pack: 0,
            page: number,
        }
    }

    pub(super) fn close_frame(&mut self, full: &mut Vec<Full>) {
        if self.open.is_empty() {
            return;
        }
        let pages = std::mem::take(&mut self.open);
        full.push(Full {
            first: (self.hashes.len() - pages.len() / PAGE_SIZE) as u32,
            pages,
        });
    }
}
