//! Gets a member out of the store again.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::error::Error;
use super::files;
use super::index::{hash_page, Index, PageHash, RunContent};
use super::manifest::{FileFacts, Member};
use super::name::Name;
use super::records::Records;
use super::slots::offset;
use super::store::{self, CONFIG_NAME, INDEX_NAME, PAGES_NAME, RECORDS_NAME};
use super::Result;
use crate::stream::{self, Page, PageType, Place, SaveHeader, Sink, Writer, PAGE_SIZE};

/// Pages read with one system call: 1 MiB.
const READ_PAGES: usize = 256;

/// A member of a committed snapshot.
///
/// Opening checks the configuration, the records and the index against the
/// manifest's hashes; each page is checked against the index as it is read. So
/// nothing that isn't what was written ever leaves this type.
#[derive(Debug)]
pub struct MemberReader {
    name: Name,
    config_json: String,
    records: Records,
    index: Index,
    pages: File,
    pages_path: PathBuf,
}

impl MemberReader {
    pub(super) fn open(snapshot: &Path, member: &Member) -> Result<Self> {
        let dir = store::member_dir(snapshot, &member.name);
        let read = |name: &str| -> Result<(PathBuf, Vec<u8>)> {
            let path = dir.join(name);
            let bytes = files::read_checked(&path, facts(member, name, &path)?)?;
            Ok((path, bytes))
        };
        let (path, bytes) = read(CONFIG_NAME)?;
        let config_json =
            String::from_utf8(bytes).map_err(|_| Error::damaged(&path, "it is no text"))?;
        let (path, bytes) = read(RECORDS_NAME)?;
        let records = Records::decode(&bytes).map_err(|e| Error::damaged(&path, e))?;
        let (path, bytes) = read(INDEX_NAME)?;
        let index = Index::decode(&bytes).map_err(|e| Error::damaged(&path, e))?;
        let pages_path = dir.join(PAGES_NAME);
        let pages = open_pages(&pages_path, facts(member, PAGES_NAME, &pages_path)?, &index)?;
        Ok(MemberReader {
            name: member.name.clone(),
            config_json,
            records,
            index,
            pages,
            pages_path,
        })
    }

    /// The domain's configuration, as libxl's JSON.
    pub fn config_json(&self) -> &str {
        &self.config_json
    }

    /// Tells a sink what the stream contains: records in their places, pages by
    /// frame number upwards, each once.
    ///
    /// # Errors
    ///
    /// [`ReplayError::Store`] with [`Error::DamagedPages`] or [`Error::Io`];
    /// [`ReplayError::Sink`]. The sink has got only correct pages until then,
    /// and not its [`Sink::end`].
    pub fn replay<S: Sink>(&self, sink: &mut S) -> std::result::Result<(), ReplayError<S::Error>> {
        sink.xl_header(self.records.legacy)?;
        self.replay_records(sink, Place::XlBefore)?;
        sink.xc_header(&self.records.header)?;
        self.replay_records(sink, Place::XcBefore)?;
        self.for_each_page(|pfn, page_type, data| sink.page(pfn, page_type, data))?;
        self.replay_records(sink, Place::XcAfter)?;
        self.replay_records(sink, Place::XlAfter)?;
        Ok(sink.end()?)
    }

    /// Writes the member as a libxl stream, which `libxl_domain_create_restore`
    /// takes.
    ///
    /// # Errors
    ///
    /// [`Error::Stream`] if `output` fails; [`Error::DamagedPages`],
    /// [`Error::Io`]. What was written until then is an incomplete stream.
    pub fn write_stream(&self, output: impl Write) -> Result<()> {
        match self.replay(&mut Writer::new(output)) {
            Ok(()) => Ok(()),
            Err(ReplayError::Store(error)) => Err(error),
            Err(ReplayError::Sink(source)) => Err(self.stream_error(source)),
        }
    }

    /// Writes the member as a file that stock `xl restore` takes, with its
    /// configuration or the one in `config_json` instead.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`] if `config_json` is no JSON; else as
    /// [`MemberReader::write_stream`].
    pub fn write_save_file(&self, mut output: impl Write, config_json: Option<&str>) -> Result<()> {
        let config_json = config_json.unwrap_or(&self.config_json);
        store::check_config(config_json).map_err(|problem| {
            let what = format!("a configuration for member {}", self.name);
            Error::unstorable(what, problem)
        })?;
        let header = SaveHeader {
            config_json: Some(config_json.to_owned()),
        };
        header
            .write(&mut output)
            .map_err(|source| self.stream_error(source))?;
        self.write_stream(output)
    }

    /// Reads all pages and compares them with their hashes.
    ///
    /// # Errors
    ///
    /// The first [`Error::DamagedPages`] or [`Error::Io`].
    pub fn verify(&self) -> Result<()> {
        let nothing = |_, _, _: Option<&Page>| Ok::<(), std::convert::Infallible>(());
        match self.for_each_page(nothing) {
            Ok(()) => Ok(()),
            Err(ReplayError::Store(error)) => Err(error),
            Err(ReplayError::Sink(never)) => match never {},
        }
    }

    fn replay_records<S: Sink>(
        &self,
        sink: &mut S,
        place: Place,
    ) -> std::result::Result<(), S::Error> {
        let records = self.records.records.iter();
        for record in records.filter(|record| record.place == place) {
            sink.record(place, record.record_type, &record.body)?;
        }
        Ok(())
    }

    fn for_each_page<E: std::error::Error + 'static>(
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

    fn stream_error(&self, source: stream::Error) -> Error {
        Error::Stream {
            member: self.name.clone(),
            source,
        }
    }
}

const ZERO: Page = [0; PAGE_SIZE];

/// Why [`MemberReader::replay`] stopped.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError<E: std::error::Error + 'static> {
    /// The store couldn't give what was asked.
    #[error(transparent)]
    Store(Error),
    /// The sink didn't take it.
    #[error(transparent)]
    Sink(#[from] E),
}

fn facts<'a>(member: &'a Member, name: &str, path: &Path) -> Result<&'a FileFacts> {
    let facts = member.image.files.iter().find(|file| file.name == name);
    facts.ok_or_else(|| Error::damaged(path, "the manifest doesn't name it"))
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
