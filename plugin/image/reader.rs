//! Gets a member out of the store again.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::error::Error;
use super::manifest::{FileFacts, Member};
use super::map::PageMap;
use super::memory::MemoryShare;
use super::name::Name;
use super::pack::Hash;
use super::packs::Packs;
use super::records::Records;
use super::replay::PackedPages;
use super::seal::Vault;
use super::slotted::SlottedPages;
use super::store::{self, CONFIG_NAME, INDEX_NAME, PAGES_NAME, RECORDS_NAME};
use super::Result;
use crate::stream::{self, Page, PageType, Place, SaveHeader, Sink, Writer};

/// A member of a committed snapshot.
///
/// Opening checks the configuration, the records and the index against the
/// manifest's hashes, and the packs' tables against the index; each page is
/// checked as it is read. So nothing that isn't what was written ever leaves this
/// type.
#[derive(Debug)]
pub struct MemberReader {
    name: Name,
    config_json: String,
    records: Records,
    pages: Pages,
}

#[derive(Debug)]
enum Pages {
    /// Format 1.
    Slotted(SlottedPages),
    Packed(PackedPages),
}

impl MemberReader {
    pub(super) fn open(
        snapshot: &Path,
        packs: &Packs,
        member: &Member,
        format: u32,
    ) -> Result<Self> {
        let vault = packs.vault();
        let (path, bytes) = read(vault, snapshot, member, CONFIG_NAME)?;
        let config_json =
            String::from_utf8(bytes).map_err(|_| Error::damaged(&path, "it is no text"))?;
        let (path, bytes) = read(vault, snapshot, member, RECORDS_NAME)?;
        let records = Records::decode(&bytes).map_err(|e| Error::damaged(&path, e))?;
        let pages = if format == 1 {
            let (path, bytes) = read(vault, snapshot, member, INDEX_NAME)?;
            let pages_path = store::member_dir(snapshot, &member.name).join(PAGES_NAME);
            let facts = facts(member, PAGES_NAME, &pages_path)?;
            let pages = SlottedPages::open((&path, &bytes), &pages_path, facts, &member.name)?;
            Pages::Slotted(pages)
        } else {
            let map = read_map(vault, snapshot, member)?;
            Pages::Packed(PackedPages::open(map, packs, &member.name)?)
        };
        Ok(MemberReader {
            name: member.name.clone(),
            config_json,
            records,
            pages,
        })
    }

    /// Takes no more memory than that for reading pages.
    pub fn limit(&mut self, memory: MemoryShare) {
        match &mut self.pages {
            // One page at a time.
            Pages::Slotted(_) => {}
            Pages::Packed(pages) => pages.limit(memory),
        }
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

    pub(super) fn for_each_page<E: std::error::Error + 'static>(
        &self,
        page: impl FnMut(u64, PageType, Option<&Page>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), ReplayError<E>> {
        match &self.pages {
            Pages::Slotted(pages) => pages.for_each(page),
            Pages::Packed(pages) => pages.for_each(page),
        }
    }

    /// What is known of each frame without reading it.
    pub(super) fn known_contents(&self) -> Option<BTreeMap<u64, (u8, Option<Hash>)>> {
        match &self.pages {
            Pages::Slotted(_) => None,
            Pages::Packed(pages) => Some(pages.contents()),
        }
    }

    fn stream_error(&self, source: stream::Error) -> Error {
        Error::Stream {
            member: self.name.clone(),
            source,
        }
    }
}

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

/// A member's file, compared with its hash.
pub(super) fn read(
    vault: &Vault,
    snapshot: &Path,
    member: &Member,
    name: &str,
) -> Result<(PathBuf, Vec<u8>)> {
    let path = store::member_dir(snapshot, &member.name).join(name);
    let bytes = vault.read_checked(&path, facts(member, name, &path)?)?;
    Ok((path, bytes))
}

/// Compares a member's files with their hashes, but for the index.
pub(super) fn check_files(vault: &Vault, snapshot: &Path, member: &Member) -> Result<()> {
    read(vault, snapshot, member, CONFIG_NAME)?;
    let (path, bytes) = read(vault, snapshot, member, RECORDS_NAME)?;
    let records = Records::decode(&bytes);
    records.map(drop).map_err(|e| Error::damaged(&path, e))
}

/// A member's index, of format 2.
pub(super) fn read_map(vault: &Vault, snapshot: &Path, member: &Member) -> Result<PageMap> {
    let (path, bytes) = read(vault, snapshot, member, INDEX_NAME)?;
    let map = PageMap::decode(&bytes).map_err(|e| Error::damaged(&path, e))?;
    let names = map.packs.iter().map(|(id, _)| id);
    if !names.eq(&member.image.packs) {
        let problem = "it names other packs than the manifest";
        return Err(Error::damaged(&path, problem));
    }
    Ok(map)
}

fn facts<'a>(member: &'a Member, name: &str, path: &Path) -> Result<&'a FileFacts> {
    let facts = member.image.files.iter().find(|file| file.name == name);
    facts.ok_or_else(|| Error::damaged(path, "the manifest doesn't name it"))
}
