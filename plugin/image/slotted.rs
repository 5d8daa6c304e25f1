//! Pages of a snapshot of format 1: each member has them in a file of its own.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::error::Error;
use super::index::{hash_page, Index, PageHash, RunContent};
use super::manifest::FileFacts;
use super::name::Name;
use super::reader::ReplayError;
use super::slots::offset;
use super::Result;
use crate::stream::{Page, PageType, PAGE_SIZE};

/// Pages read with one system call: 1 MiB.
const READ_PAGES: usize = 256;

const ZERO: Page = [0; PAGE_SIZE];

/// A member's pages in their slots.
#[derive(Debug)]
pub(super) struct SlottedPages {
    name: Name,
    index: Index,
    pages: File,
    pages_path: PathBuf,
}

impl SlottedPages {
    /// Reads the index and opens the pages.
    pub(super) fn open(
        (index_path, index): (&Path, &[u8]),
        pages_path: &Path,
        facts: &FileFacts,
        name: &Name,
    ) -> Result<Self> {
        let index = Index::decode(index).map_err(|e| Error::damaged(index_path, e))?;
        Ok(SlottedPages {
            name: name.clone(),
            pages: open_pages(pages_path, facts, &index)?,
            index,
            pages_path: pages_path.to_owned(),
        })
    }

    pub(super) fn for_each<E: std::error::Error + 'static>(
        &self,
        mut page: impl FnMut(u64, PageType, Option<&Page>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), ReplayError<E>> {
        let mut buffer = vec![0; READ_PAGES * PAGE_SIZE];
        for run in &self.index.runs {
            let pfns = u64::from(run.pfn)..u64::from(run.pfn) + u64::from(run.count);
            let RunContent::Slots(slot) = run.content else {
                let data = (run.content == RunContent::Zero).then_some(&ZERO);
                for pfn in pfns {
                    page(pfn, run.page_type, data)?;
                }
                continue;
            };
            let slot = slot as usize;
            for done in (0..run.count as usize).step_by(READ_PAGES) {
                let count = READ_PAGES.min(run.count as usize - done);
                let bytes = buffer.get_mut(..count * PAGE_SIZE).unwrap_or_default();
                let first = pfns.start + done as u64;
                self.read_pages(first, slot + done, bytes)
                    .map_err(ReplayError::Store)?;
                for (pfn, data) in (first..).zip(bytes.chunks_exact(PAGE_SIZE)) {
                    page(pfn, run.page_type, data.first_chunk())?;
                }
            }
        }
        Ok(())
    }

    /// Fills `bytes` with the pages from `slot` on, which are those of the
    /// frames from `pfn` on, and checks them.
    fn read_pages(&self, pfn: u64, slot: usize, bytes: &mut [u8]) -> Result<()> {
        let count = (bytes.len() / PAGE_SIZE) as u64;
        let damaged = |first_pfn, last_pfn, problem: &str| Error::DamagedPages {
            member: self.name.clone(),
            path: self.pages_path.clone(),
            first_pfn,
            last_pfn,
            problem: problem.to_owned(),
        };
        match self.pages.read_exact_at(bytes, offset(slot)) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Err(damaged(pfn, pfn + count - 1, "the file ends before"));
            }
            // A disk that can't read its own sector says EIO: name the pages.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                return Err(damaged(pfn, pfn + count - 1, "the disk cannot read it"));
            }
            result => result.map_err(Error::io("read", &self.pages_path))?,
        }
        let hashes = self.index.hashes.get(slot..).unwrap_or_default();
        let is_bad = |(page, hash): (&[u8], &PageHash)| hash_page(page) != *hash;
        let mut checks = bytes.chunks_exact(PAGE_SIZE).zip(hashes).map(is_bad);
        let Some(good) = checks.position(|bad| bad) else {
            return Ok(());
        };
        let more = checks.take_while(|&bad| bad).count();
        let first = pfn + good as u64;
        let problem = "its contents are not what was written";
        Err(damaged(first, first + more as u64, problem))
    }
}

/// Opens the `pages` file, which must be as long as manifest and index say.
fn open_pages(path: &Path, facts: &FileFacts, index: &Index) -> Result<File> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let found = file.metadata().map_err(Error::io("look at", path))?;
    let expected = offset(index.hashes.len());
    if found.len() != expected || facts.length != expected {
        let problem = format!("it has {} bytes instead of {expected}", found.len());
        return Err(Error::damaged(path, problem));
    }
    Ok(file)
}
