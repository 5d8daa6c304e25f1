//! A member's pages out of their packs, in the order of their frames.
//!
//! The guest's frames are divided into segments. Threads take the segments in
//! turn, unpack what each needs and check it; who asked gets them in order. So
//! the memory that this takes depends on the number of threads alone.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::codec::Unpacker;
use super::error::Error;
use super::map::{PageMap, Run, Where};
use super::memory::MemoryShare;
use super::name::Name;
use super::pack::{hash_page, Hash, Pack};
use super::packs::Packs;
use super::reader::ReplayError;
use super::Result;
use crate::stream::{Page, PageType, PAGE_SIZE};

/// Pages with contents in a segment, at most: 8 MiB.
const SEGMENT_PAGES: usize = 2048;
/// The same where memory is short: frames that two segments have a part of are
/// unpacked for both.
pub(super) const SEGMENT_PAGES_MIN: usize = 512;

/// Threads, at most.
const THREADS_MAX: usize = 4;

const ZERO: Page = [0; PAGE_SIZE];

/// A member's pages in packs.
#[derive(Debug)]
pub(super) struct PackedPages {
    name: Name,
    map: PageMap,
    packs: Vec<Pack>,
    memory: Option<MemoryShare>,
}

/// Pages that aren't what was written.
pub(super) struct BadPages {
    /// Which pack, by its place in the map.
    pack: usize,
    first_pfn: u64,
    last_pfn: u64,
    problem: &'static str,
}

/// A page that a segment needs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Need {
    pack: usize,
    frame: usize,
    place: usize,
    page: u32,
    /// Which of the segment's pages with contents it is.
    at: usize,
    pfn: u64,
}

impl PackedPages {
    /// Opens the packs and checks that they have what the map says.
    pub(super) fn open(map: PageMap, packs: &Packs, name: &Name) -> Result<Self> {
        let mut opened = Vec::new();
        for (id, pages) in &map.packs {
            let path = packs.path(id);
            let pack = packs.open(id)?;
            if pack.table.pages() != *pages {
                return Err(Error::damaged(&path, "it has another number of pages"));
            }
            opened.push(pack);
        }
        let pages = PackedPages {
            name: name.clone(),
            map,
            packs: opened,
            memory: None,
        };
        match pages.missing() {
            None => Ok(pages),
            Some(bad) => Err(pages.error(&bad)),
        }
    }

    /// Takes no more memory than that.
    pub(super) fn limit(&mut self, memory: MemoryShare) {
        self.memory = Some(memory);
    }

    /// The index, and the packs in its order.
    pub(super) fn into_parts(self) -> (PageMap, Vec<Pack>) {
        (self.map, self.packs)
    }

    /// Frames whose pages have gone from their pack.
    fn missing(&self) -> Option<BadPages> {
        for run in &self.map.runs {
            let Where::Pack { pack, page } = run.content else {
                continue;
            };
            let pack = usize::from(pack);
            let present = self.packs.get(pack).map(|pack| &pack.table.present);
            let from = page as usize;
            let there = present.map_or(0, |bits| {
                bits.count_between(from, from + run.count as usize)
            });
            if there != run.count as usize {
                return Some(BadPages {
                    pack,
                    first_pfn: u64::from(run.pfn),
                    last_pfn: u64::from(run.pfn) + u64::from(run.count) - 1,
                    problem: "pages of it are gone",
                });
            }
        }
        None
    }

    fn error(&self, bad: &BadPages) -> Error {
        Error::DamagedPages {
            member: self.name.clone(),
            path: self
                .packs
                .get(bad.pack)
                .map_or_else(Default::default, |pack| pack.path.clone()),
            first_pfn: bad.first_pfn,
            last_pfn: bad.last_pfn,
            problem: bad.problem.to_owned(),
        }
    }

    /// Each frame's type, and its contents' hash if it has any.
    pub(super) fn contents(&self) -> BTreeMap<u64, (u8, Option<Hash>)> {
        let zero = hash_page(&ZERO);
        let mut contents = BTreeMap::new();
        for run in &self.map.runs {
            for nth in 0..run.count {
                let hash = match run.content {
                    Where::Nothing => None,
                    Where::Zero => Some(zero),
                    Where::Pack { pack, page } => {
                        let pack = self.packs.get(usize::from(pack));
                        let hash = pack.and_then(|p| p.table.hashes.get((page + nth) as usize));
                        hash.copied()
                    }
                };
                let pfn = u64::from(run.pfn) + u64::from(nth);
                contents.insert(pfn, (run.page_type.bits(), hash));
            }
        }
        contents
    }

    /// Tells `page` each frame, upwards.
    pub(super) fn for_each<E: std::error::Error + 'static>(
        &self,
        mut page: impl FnMut(u64, PageType, Option<&Page>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), ReplayError<E>> {
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let count = count.clamp(1, THREADS_MAX);
        let (count, pages) = match self.memory {
            Some(memory) => memory.reader(count, SEGMENT_PAGES),
            None => (count, SEGMENT_PAGES),
        };
        let segments = segments(&self.map.runs, pages);
        let count = count.min(segments.len());
        let desk = Desk::new(count);
        std::thread::scope(|scope| {
            for _ in 0..count {
                scope.spawn(|| self.work(&segments, &desk));
            }
            // However this ends, the threads have to.
            let _done = Done(&desk);
            for (number, segment) in segments.iter().enumerate() {
                let contents = desk.collect(number).map_err(ReplayError::Store)?;
                let mut data = contents.chunks_exact(PAGE_SIZE);
                for run in segment {
                    let pfn = u64::from(run.pfn);
                    for pfn in pfn..pfn + u64::from(run.count) {
                        let data = match run.content {
                            Where::Nothing => None,
                            Where::Zero => Some(&ZERO),
                            Where::Pack { .. } => data.next().and_then(|data| data.first_chunk()),
                        };
                        page(pfn, run.page_type, data)?;
                    }
                }
                desk.give_back(contents);
            }
            Ok(())
        })
    }

    fn work(&self, segments: &[Vec<Run>], desk: &Desk) {
        let mut unpacker = match Unpacker::new(self.path()) {
            Ok(unpacker) => unpacker,
            Err(error) => return desk.fail(error),
        };
        let _watched = Watched(desk);
        while let Some((number, mut contents)) = desk.next(segments.len()) {
            let segment = segments.get(number).map_or(&[][..], Vec::as_slice);
            let mut bad = Vec::new();
            let read = self.read(segment, &mut unpacker, &mut contents, &mut bad);
            let read = match (read, bad.first()) {
                (Ok(()), None) => Ok(contents),
                (Ok(()), Some(bad)) => Err(self.error(bad)),
                (Err(error), _) => Err(error),
            };
            desk.put(number, read);
        }
    }

    fn path(&self) -> &std::path::Path {
        let first = self.packs.first();
        first.map_or(std::path::Path::new("a pack"), |pack| &pack.path)
    }

    /// The pages of a segment, by pack and frame.
    fn needs(&self, segment: &[Run]) -> Vec<Need> {
        let mut needs = Vec::new();
        for run in segment {
            let Where::Pack { pack, page } = run.content else {
                continue;
            };
            let pack = usize::from(pack);
            let table = self.packs.get(pack).map(|pack| &pack.table);
            for nth in 0..run.count {
                let page = page.saturating_add(nth);
                // Opening has seen to it that all are there.
                let found = table.and_then(|table| table.find(page));
                let (frame, place) = found.unwrap_or((usize::MAX, 0));
                needs.push(Need {
                    pack,
                    frame,
                    place,
                    page,
                    at: needs.len(),
                    pfn: u64::from(run.pfn) + u64::from(nth),
                });
            }
        }
        needs.sort_unstable();
        needs
    }

    /// Reads a segment's pages into `contents`; what isn't right is in `bad`.
    fn read(
        &self,
        segment: &[Run],
        unpacker: &mut Unpacker,
        contents: &mut Vec<u8>,
        bad: &mut Vec<BadPages>,
    ) -> Result<()> {
        let needs = self.needs(segment);
        contents.resize(needs.len() * PAGE_SIZE, 0);
        let mut failed: Vec<(Need, &'static str)> = Vec::new();
        for of_frame in needs.chunk_by(|a, b| (a.pack, a.frame) == (b.pack, b.frame)) {
            let Some(&first) = of_frame.first() else {
                continue;
            };
            let pack = self.packs.get(first.pack);
            let frame = pack.and_then(|pack| Some((pack, pack.table.frames.get(first.frame)?)));
            let Some((pack, frame)) = frame else {
                failed.extend(of_frame.iter().map(|&need| (need, "it has no such page")));
                continue;
            };
            // Mostly all of it is needed, in its order.
            let from = first.at * PAGE_SIZE;
            // As many as there are isn't enough: one may be needed twice, another not.
            let in_order = (of_frame.iter().zip(first.at..).enumerate())
                .all(|(nth, (need, at))| need.place == nth && need.at == at);
            let place = contents.get_mut(from..from + of_frame.len() * PAGE_SIZE);
            let unpacked = match place {
                Some(place) if in_order && of_frame.len() == frame.count as usize => {
                    unpacker.unpack_into(pack, frame, place)?
                }
                _ => {
                    let unpacked = unpacker.unpack(pack, frame)?;
                    copy(of_frame, &unpacker.pages, contents);
                    unpacked
                }
            };
            for &need in of_frame {
                let at = need.at * PAGE_SIZE;
                let page = contents.get(at..at + PAGE_SIZE).unwrap_or_default();
                let hash = pack.table.hashes.get(need.page as usize);
                match unpacked {
                    Err(problem) => failed.push((need, problem)),
                    Ok(()) if hash == Some(&hash_page(page)) => {}
                    Ok(()) => failed.push((need, "its contents are not what was written")),
                }
            }
        }
        failed.sort_unstable_by_key(|(need, _)| need.pfn);
        for (need, problem) in failed {
            add(bad, &need, problem);
        }
        Ok(())
    }
}

/// Puts a frame's pages where they are needed.
fn copy(needs: &[Need], pages: &[u8], contents: &mut [u8]) {
    for need in needs {
        let (from, to) = (need.place * PAGE_SIZE, need.at * PAGE_SIZE);
        let from = pages.get(from..from + PAGE_SIZE);
        let to = contents.get_mut(to..to + PAGE_SIZE);
        if let (Some(from), Some(to)) = (from, to) {
            to.copy_from_slice(from);
        }
    }
}

/// Adds a page to those that are bad.
fn add(bad: &mut Vec<BadPages>, need: &Need, problem: &'static str) {
    match bad.last_mut() {
        Some(last) if last.pack == need.pack && last.last_pfn + 1 == need.pfn => {
            last.last_pfn = need.pfn;
        }
        _ => bad.push(BadPages {
            pack: need.pack,
            first_pfn: need.pfn,
            last_pfn: need.pfn,
            problem,
        }),
    }
}

/// Divides runs so that each part has no more pages with contents than a segment
/// may.
fn segments(runs: &[Run], pages_max: usize) -> Vec<Vec<Run>> {
    let mut segments = Vec::new();
    let mut segment: Vec<Run> = Vec::new();
    let mut pages = 0;
    for run in runs {
        let Where::Pack { pack, page } = run.content else {
            segment.push(*run);
            continue;
        };
        let mut done = 0;
        while done < run.count {
            let count = (run.count - done).min((pages_max - pages) as u32);
            segment.push(Run {
                pfn: run.pfn + done,
                count,
                page_type: run.page_type,
                content: Where::Pack {
                    pack,
                    page: page.saturating_add(done),
                },
            });
            done += count;
            pages += count as usize;
            if pages == pages_max {
                segments.push(std::mem::take(&mut segment));
                pages = 0;
            }
        }
    }
    if !segment.is_empty() {
        segments.push(segment);
    }
    segments
}

/// Where segments are handed over.
struct Desk {
    state: Mutex<State>,
    changed: Condvar,
    /// Segments that may be there and not collected.
    ahead: usize,
}

#[derive(Default)]
struct State {
    /// The first segment that no thread has taken.
    next: usize,
    /// The segment that is waited for.
    wanted: usize,
    ready: BTreeMap<usize, Result<Vec<u8>>>,
    /// Memory to be used again.
    buffers: Vec<Vec<u8>>,
    failed: Option<Error>,
    is_over: bool,
}

impl Desk {
    fn new(threads: usize) -> Self {
        Desk {
            state: Mutex::default(),
            changed: Condvar::new(),
            ahead: threads + 1,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A segment to read, and memory for it; none at the end.
    fn next(&self, count: usize) -> Option<(usize, Vec<u8>)> {
        let mut state = self.lock();
        loop {
            if state.is_over || state.next >= count {
                return None;
            }
            if state.next < state.wanted + self.ahead {
                let number = state.next;
                state.next += 1;
                return Some((number, state.buffers.pop().unwrap_or_default()));
            }
            state = self.wait(state);
        }
    }

    fn put(&self, number: usize, read: Result<Vec<u8>>) {
        self.lock().ready.insert(number, read);
        self.changed.notify_all();
    }

    /// Says that a thread is lost.
    fn fail(&self, error: Error) {
        self.lock().failed.get_or_insert(error);
        self.changed.notify_all();
    }

    /// Waits for a segment.
    fn collect(&self, number: usize) -> Result<Vec<u8>> {
        let mut state = self.lock();
        state.wanted = number;
        self.changed.notify_all();
        loop {
            if let Some(read) = state.ready.remove(&number) {
                return read;
            }
            if let Some(error) = state.failed.take() {
                return Err(error);
            }
            state = self.wait(state);
        }
    }

    fn give_back(&self, buffer: Vec<u8>) {
        self.lock().buffers.push(buffer);
    }
}

/// Sees to it that nobody waits for a thread that has panicked.
struct Watched<'a>(&'a Desk);

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let problem = "a thread that reads it panicked";
            self.0.fail(Error::unstorable("its pages", problem));
        }
    }
}

/// Ends the threads.
struct Done<'a>(&'a Desk);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.lock().is_over = true;
        self.0.changed.notify_all();
    }
}
