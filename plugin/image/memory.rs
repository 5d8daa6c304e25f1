//! How much memory a member may take while it's stored or read back.
//!
//! What grows with the guest itself isn't in it: some 60 bytes for each of its pages,
//! a seventieth of its memory, say which page is where.

use super::error::Error;
use super::replay::SEGMENT_PAGES_MIN;
use super::writer::WriterOptions;
use super::Result;
use crate::stream::PAGE_SIZE;

/// With less nothing works well.
const SHARE_BYTES_MIN: u64 = 24 << 20;

/// What a thread takes that packs or unpacks: zstd's tables, and a frame or two.
pub(super) const THREAD_BYTES: u64 = 2 << 20;

/// One member's part of what a host's members may take together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryShare {
    bytes: u64,
}

impl MemoryShare {
    /// Of `limit` bytes, among so many members.
    ///
    /// # Errors
    ///
    /// [`Error::TooLittleMemory`].
    pub fn of(limit: u64, members: usize) -> Result<Self> {
        let members = members.max(1) as u64;
        let bytes = limit / members;
        if bytes < SHARE_BYTES_MIN {
            return Err(Error::TooLittleMemory {
                limit_mib: limit >> 20,
                members,
                needed_mib: (members * SHARE_BYTES_MIN) >> 20,
            });
        }
        Ok(MemoryShare { bytes })
    }

    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A share of so many bytes, which was checked already.
    pub fn from_bytes(bytes: u64) -> Self {
        let bytes = bytes.max(SHARE_BYTES_MIN);
        MemoryShare { bytes }
    }

    /// Half for the last pages, a quarter for what the store has, the rest for packing.
    pub fn writer(&self) -> WriterOptions {
        let usual = WriterOptions::default();
        let part = |of: u64| usize::try_from(self.bytes / of).unwrap_or(usize::MAX);
        WriterOptions {
            held_bytes_max: usual.held_bytes_max.min(part(2)),
            known_bytes_max: usual.known_bytes_max.min(part(4)),
            threads_max: usual
                .threads_max
                .min(part(8) / THREAD_BYTES as usize)
                .max(1),
            queue_bytes_max: usual.queue_bytes_max.min(part(8)),
            key: None,
        }
    }

    /// Threads, and pages of a segment, for reading a member back. There are two more
    /// segments than threads.
    pub(super) fn reader(&self, threads: usize, segment_pages: usize) -> (usize, usize) {
        // What is on its way into the stream takes 5 MiB: a record, and a buffer.
        let left = self.bytes.saturating_sub(5 << 20);
        for threads in (1..=threads).rev() {
            let segments = left.saturating_sub(threads as u64 * THREAD_BYTES);
            let pages = segments / (threads as u64 + 2) / PAGE_SIZE as u64;
            let pages = usize::try_from(pages).unwrap_or(usize::MAX);
            if pages >= SEGMENT_PAGES_MIN {
                return (threads, pages.min(segment_pages));
            }
        }
        (1, SEGMENT_PAGES_MIN)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_to_less_than_the_limit() {
        for (limit_mib, members) in [(24, 1), (100, 4), (1 << 10, 8), (1 << 20, 3)] {
            let share = MemoryShare::of(limit_mib << 20, members).unwrap();
            let options = share.writer();
            let threads = options.threads_max as u64 * THREAD_BYTES;
            let parts = options.held_bytes_max + options.known_bytes_max + options.queue_bytes_max;
            let all = (parts as u64 + threads) * members as u64;
            assert!(all <= limit_mib << 20, "{options:?}");
            let (threads, pages) = share.reader(4, 2048);
            let segments = ((threads + 2) * pages * PAGE_SIZE) as u64;
            let all = segments + (5 << 20) + threads as u64 * THREAD_BYTES;
            assert!(all <= share.bytes(), "{threads} {pages}");
        }
        let refused = MemoryShare::of(100 << 20, 5).unwrap_err().to_string();
        assert!(refused.contains("120"), "{refused}");
    }
}
