//! What a copy reads: a snapshot's files and pages, in the form in which another
//! store asks for them.

use std::collections::HashSet;

use super::batch::{self, BatchRun, BATCH_HASHES_MAX, BATCH_RUNS_MAX};
use super::catalogue::Snapshot;
use super::codec::{Compressor, Unpacker};
use super::error::Error;
use super::manifest::Manifest;
use super::map::{PageMap, Run, Where};
use super::name::Name;
use super::pack::{hash_page, Hash, Pack, FRAME_PAGES};
use super::reader;
use super::replay::PackedPages;
use super::store::{self, CONFIG_NAME, FRAMES_NAME, RECORDS_NAME};
use super::Result;
use crate::stream::PAGE_SIZE;

/// Frames that follow each other and what is in them: what the other store is to
/// say which pages it lacks of.
#[derive(Debug)]
pub struct Batch {
    /// As it's sent.
    pub bytes: Vec<u8>,
    pages: Vec<Wanted>,
}

/// A page of a batch.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    hash: Hash,
    /// Its pack's place in the index.
    pack: usize,
    page: u32,
}

impl Batch {
    /// How many pages with contents.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }
}

/// Up to 64 pages, compressed together, on their way.
#[derive(Debug)]
pub struct SentFrame {
    /// One zstd frame.
    pub bytes: Vec<u8>,
    /// How many pages it has.
    pub count: u32,
    hashes: Vec<Hash>,
}

/// A member, page by page.
#[derive(Debug)]
pub struct OutgoingMember {
    map: PageMap,
    packs: Vec<Pack>,
    /// The run that comes next, and how many of its frames are done.
    next: (usize, u32),
    unpacker: Unpacker,
    compressor: Compressor,
    /// Pages of a frame that isn't full yet.
    open: Vec<u8>,
    open_hashes: Vec<Hash>,
    /// Pages that the other store will have soon, and may not know of yet.
    on_the_way: HashSet<Hash>,
}

impl Snapshot {
    /// Whether it can be copied to another store.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`] if it's of format 1.
    pub fn check_copyable(&self) -> Result<()> {
        let Manifest {
            format, vne, id, ..
        } = self.manifest();
        match format {
            1 => Err(Error::unstorable(
                format!("a copy of {vne}@{id}"),
                "it is of format 1 (export its members there, and import them)",
            )),
            _ => Ok(()),
        }
    }

    /// The manifest as another store is to have it: what it says of files is of their
    /// contents, also where they are encrypted here.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`], [`Error::Io`].
    pub fn manifest_to_copy(&self) -> Result<Manifest> {
        let mut manifest = self.manifest().clone();
        if !self.packs().vault().seals() {
            return Ok(manifest);
        }
        let here: Vec<Name> = manifest.members_here().map(|m| m.name.clone()).collect();
        for member in &mut manifest.members {
            if !here.contains(&member.name) {
                continue;
            }
            for (name, bytes) in self.files_to_copy(&member.name)? {
                let recorded = member.recorded.as_mut().map(|recorded| &mut recorded.file);
                let mut files = member.image.files.iter_mut().chain(recorded);
                if let Some(facts) = files.find(|facts| facts.name == name) {
                    facts.length = bytes.len() as u64;
                    facts.blake3 = Some(blake3::hash(&bytes).to_hex().to_string());
                }
            }
        }
        Ok(manifest)
    }

    /// A member's files but for its index, each compared with its hash: names and
    /// contents.
    ///
    /// # Errors
    ///
    /// [`Error::NoMember`], [`Error::Elsewhere`], [`Error::Damaged`], [`Error::Io`].
    pub fn files_to_copy(&self, name: &Name) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let member = self.entry(name)?;
        let vault = self.packs().vault();
        let mut found = Vec::new();
        for name in [CONFIG_NAME, RECORDS_NAME] {
            let (_, bytes) = reader::read(vault, self.dir(), member, name)?;
            found.push((name, bytes));
        }
        if let Some(frames) = self.recorded_frames(name)? {
            found.push((FRAMES_NAME, frames));
        }
        Ok(found)
    }

    /// A member's pages.
    ///
    /// # Errors
    ///
    /// As [`Snapshot::member`].
    pub fn member_to_copy(&self, name: &Name) -> Result<OutgoingMember> {
        let vault = self.packs().vault();
        let map = reader::read_map(vault, self.dir(), self.entry(name)?)?;
        let (map, packs) = PackedPages::open(map, self.packs(), name)?.into_parts();
        let dir = store::member_dir(self.dir(), name);
        Ok(OutgoingMember {
            map,
            packs,
            next: (0, 0),
            unpacker: Unpacker::new(&dir)?,
            compressor: Compressor::new(&dir)?,
            open: Vec::new(),
            open_hashes: Vec::new(),
            on_the_way: HashSet::new(),
        })
    }
}

impl OutgoingMember {
    /// How many frames have contents.
    pub fn pages(&self) -> u64 {
        let runs = self.map.runs.iter();
        let with = runs.filter(|run| matches!(run.content, Where::Pack { .. }));
        with.map(|run| u64::from(run.count)).sum()
    }

    /// The next frames; none at the end.
    pub fn next_batch(&mut self) -> Option<Batch> {
        let mut runs = Vec::new();
        let mut pages = Vec::new();
        while pages.len() < BATCH_HASHES_MAX && runs.len() < BATCH_RUNS_MAX {
            let (nth, done) = self.next;
            let Some(run) = self.map.runs.get(nth).copied() else {
                break;
            };
            let left = run.count - done;
            let run = match run.content {
                Where::Nothing | Where::Zero => run,
                Where::Pack { pack, page } => Run {
                    pfn: run.pfn + done,
                    count: left.min((BATCH_HASHES_MAX - pages.len()) as u32),
                    content: Where::Pack {
                        pack,
                        page: page + done,
                    },
                    ..run
                },
            };
            self.next = match run.count < left {
                true => (nth, done + run.count),
                false => (nth + 1, 0),
            };
            let hashes = self.hashes(&run, &mut pages);
            runs.push(BatchRun::of(&run, hashes));
        }
        (!runs.is_empty()).then(|| Batch {
            bytes: batch::encode(&runs),
            pages,
        })
    }

    /// Notes a run's pages; their hashes.
    fn hashes(&self, run: &Run, pages: &mut Vec<Wanted>) -> Vec<Hash> {
        let Where::Pack { pack, page } = run.content else {
            return Vec::new();
        };
        let pack = usize::from(pack);
        let table = self.packs.get(pack).map(|pack| &pack.table);
        let of = |page: u32| table.and_then(|table| table.hashes.get(page as usize).copied());
        let first = pages.len();
        for page in page..page + run.count {
            // Opening has seen to it that all are there.
            let hash = of(page).unwrap_or_default();
            pages.push(Wanted { hash, pack, page });
        }
        let new = pages.get(first..).unwrap_or_default();
        new.iter().map(|wanted| wanted.hash).collect()
    }

    /// Reads those pages of a batch that the other store lacks, a bit a page, the
    /// lowest of a byte first. What doesn't fill a frame waits for the next batch.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`] if a page isn't what was written, [`Error::Io`].
    pub fn read(&mut self, batch: &Batch, lacking: &[u8]) -> Result<Vec<SentFrame>> {
        let mut wanted: Vec<(usize, usize, Wanted)> = Vec::new();
        for (nth, page) in batch.pages.iter().enumerate() {
            let bit = lacking
                .get(nth / 8)
                .is_some_and(|byte| byte >> (nth % 8) & 1 == 1);
            if bit && self.on_the_way.insert(page.hash) {
                let pack = self.packs.get(page.pack);
                let found = pack.and_then(|pack| pack.table.find(page.page));
                let (frame, place) = found.unwrap_or((usize::MAX, 0));
                wanted.push((frame, place, *page));
            }
        }
        wanted.sort_unstable_by_key(|(frame, place, page)| (page.pack, *frame, *place));
        let mut sent = Vec::new();
        for of_frame in wanted.chunk_by(|a, b| (a.2.pack, a.0) == (b.2.pack, b.0)) {
            self.read_frame(of_frame, &mut sent)?;
        }
        Ok(sent)
    }

    fn read_frame(
        &mut self,
        wanted: &[(usize, usize, Wanted)],
        sent: &mut Vec<SentFrame>,
    ) -> Result<()> {
        let Some(&(frame, _, first)) = wanted.first() else {
            return Ok(());
        };
        let Some(pack) = self.packs.get(first.pack) else {
            return Ok(());
        };
        let path = pack.path.clone();
        let gone = || Error::damaged(&path, format!("page {} is gone", first.page));
        let frame = *pack.table.frames.get(frame).ok_or_else(gone)?;
        let unpacked = self.unpacker.unpack(pack, &frame)?;
        unpacked.map_err(|problem| {
            let what = format!("the frame at page {}: {problem}", frame.first);
            Error::damaged(&path, what)
        })?;
        for (_, place, page) in wanted {
            let at = place * PAGE_SIZE;
            let bytes = self.unpacker.pages.get(at..at + PAGE_SIZE);
            // Damage isn't passed on.
            let bytes = bytes.filter(|bytes| hash_page(bytes) == page.hash);
            let bytes = bytes.ok_or_else(|| {
                let what = format!("page {} is not what was written", page.page);
                Error::damaged(&path, what)
            })?;
            self.open.extend_from_slice(bytes);
            self.open_hashes.push(page.hash);
            if self.open_hashes.len() >= FRAME_PAGES {
                sent.extend(self.close_frame()?);
            }
        }
        Ok(())
    }

    /// The pages that wait, in the end.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn close_frame(&mut self) -> Result<Option<SentFrame>> {
        if self.open_hashes.is_empty() {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        let path = std::path::Path::new("a page");
        self.compressor.pack(&self.open, &mut bytes, path)?;
        self.open.clear();
        let hashes = std::mem::take(&mut self.open_hashes);
        Ok(Some(SentFrame {
            bytes,
            count: hashes.len() as u32, // at most FRAME_PAGES
            hashes,
        }))
    }

    /// The other store has a frame, and will say so.
    pub fn arrived(&mut self, hashes: &[Hash]) {
        for hash in hashes {
            self.on_the_way.remove(hash);
        }
    }
}

impl SentFrame {
    /// The pages that [`OutgoingMember::arrived`] is to be told of.
    pub fn take_hashes(&mut self) -> Vec<[u8; 32]> {
        std::mem::take(&mut self.hashes)
    }
}
