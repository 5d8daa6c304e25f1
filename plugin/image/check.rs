//! Looks at everything that is stored and compares it with its hashes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::bits::Bits;
use super::catalogue::Snapshot;
use super::codec::Unpacker;
use super::error::Error;
use super::manifest::Member;
use super::map::{PageMap, Where};
use super::name::{Name, SnapshotId};
use super::pack::{hash_page, Pack, PackId};
use super::packs::Packs;
use super::reader;
use super::store::Store;
use super::Result;
use crate::stream::PAGE_SIZE;

/// Threads, at most.
const THREADS_MAX: usize = 4;

/// What is told while packs are read: bytes of packs that were looked at.
pub type Progress<'a> = &'a mut dyn FnMut(u64);

/// Checks snapshots, and each pack only once.
#[derive(Debug)]
pub struct Checker {
    store: Store,
    packs: Packs,
    known: BTreeMap<PackId, Health>,
    /// Packs of which damage was told as some snapshot's.
    told: BTreeSet<PackId>,
    bytes: u64,
}

/// What was found in a pack.
#[derive(Debug)]
enum Health {
    Good,
    /// It can't be used at all.
    Lost(String),
    /// These pages aren't what was written.
    Bad(Bits),
}

impl Checker {
    /// Has looked at nothing yet.
    pub fn new(store: &Store) -> Self {
        Checker {
            store: store.clone(),
            packs: store.packs(),
            known: BTreeMap::new(),
            told: BTreeSet::new(),
            bytes: 0,
        }
    }

    /// Bytes of all packs, for who shows progress.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn total_bytes(&self) -> Result<u64> {
        Ok(self.packs.list()?.iter().map(|(_, bytes)| bytes).sum())
    }

    /// All that is wrong with a snapshot: with pages by member and range.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`], [`Error::Io`].
    pub fn snapshot(
        &mut self,
        vne: &Name,
        id: &SnapshotId,
        progress: Progress<'_>,
    ) -> Result<Vec<Error>> {
        let snapshot = match self.store.catalogue().get(vne, id) {
            Ok(snapshot) => snapshot,
            // Its files may have the wrong length, and a member be whole for all that.
            Err(error) if error.is_damage() => return Ok(vec![error]),
            Err(error) => return Err(error),
        };
        let mut found = Vec::new();
        for member in snapshot.manifest().members_here() {
            self.member(&snapshot, member, &mut found, progress)?;
        }
        Ok(found)
    }

    fn member(
        &mut self,
        snapshot: &Snapshot,
        member: &Member,
        found: &mut Vec<Error>,
        progress: Progress<'_>,
    ) -> Result<()> {
        let mut note = |result: Result<()>| match result {
            Err(error) if error.is_damage() => {
                found.push(error);
                Ok(())
            }
            other => other,
        };
        note(snapshot.recorded_frames(&member.name).map(drop))?;
        note(snapshot.check_disks(&member.name))?;
        if snapshot.manifest().format == 1 {
            return note(snapshot.member(&member.name).and_then(|m| m.verify()));
        }
        note(reader::check_files(
            self.packs.vault(),
            snapshot.dir(),
            member,
        ))?;
        match reader::read_map(self.packs.vault(), snapshot.dir(), member) {
            Ok(map) => self.pages(&map, &member.name, found, progress),
            Err(error) => note(Err(error)),
        }
    }

    /// Compares what a member needs with what the packs have.
    fn pages(
        &mut self,
        map: &PageMap,
        name: &Name,
        found: &mut Vec<Error>,
        progress: Progress<'_>,
    ) -> Result<()> {
        for (id, _) in &map.packs {
            self.pack(id, progress)?;
        }
        // The range at hand: pack, first frame, last one.
        let mut range: Option<(PackId, u64, u64)> = None;
        let mut ranges = Vec::new();
        for run in &map.runs {
            let Where::Pack { pack, page } = run.content else {
                continue;
            };
            let Some((id, _)) = map.packs.get(usize::from(pack)) else {
                continue;
            };
            for nth in 0..run.count {
                let pfn = u64::from(run.pfn) + u64::from(nth);
                let is_bad = match self.known.get(id) {
                    Some(Health::Bad(bad)) => bad.get((page + nth) as usize),
                    Some(Health::Good) => break,
                    Some(Health::Lost(_)) | None => true,
                };
                match &mut range {
                    _ if !is_bad => {}
                    Some((of, _, last)) if of == id && *last + 1 == pfn => *last = pfn,
                    _ => ranges.extend(range.replace((*id, pfn, pfn))),
                }
            }
        }
        ranges.extend(range);
        for (id, first_pfn, last_pfn) in ranges {
            self.told.insert(id);
            found.push(Error::DamagedPages {
                member: name.clone(),
                path: self.packs.path(&id),
                first_pfn,
                last_pfn,
                problem: match self.known.get(&id) {
                    Some(Health::Lost(problem)) => problem.clone(),
                    _ => String::from("its contents are not what was written"),
                },
            });
        }
        Ok(())
    }

    /// What is wrong with packs and wasn't told as any snapshot's.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn other_packs(&mut self, progress: Progress<'_>) -> Result<Vec<Error>> {
        let mut found = Vec::new();
        for (id, _) in self.packs.list()? {
            self.pack(&id, progress)?;
            let problem = match self.known.get(&id) {
                Some(Health::Bad(_)) => "pages that no snapshot uses are not what was written",
                Some(Health::Lost(problem)) => problem,
                Some(Health::Good) | None => continue,
            };
            if !self.told.contains(&id) {
                found.push(Error::damaged(&self.packs.path(&id), problem));
            }
        }
        Ok(found)
    }

    fn pack(&mut self, id: &PackId, progress: Progress<'_>) -> Result<()> {
        if self.known.contains_key(id) {
            return Ok(());
        }
        let health = match self.packs.open(id) {
            Ok(pack) => {
                self.bytes += pack.file.metadata().map_or(0, |facts| facts.len());
                check(&pack)?
            }
            Err(Error::Damaged { problem, .. }) => Health::Lost(problem),
            Err(error) => return Err(error),
        };
        progress(self.bytes);
        self.known.insert(*id, health);
        Ok(())
    }
}

/// Reads all frames of a pack.
fn check(pack: &Pack) -> Result<Health> {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let bad = Mutex::new(Bits::none(pack.table.hashes.len()));
    let work = || -> Result<()> {
        let mut unpacker = Unpacker::new(&pack.path)?;
        while let Some(frame) = pack.table.frames.get(next.fetch_add(1, Ordering::Relaxed)) {
            let unpacked = unpacker.unpack(pack, frame)?;
            let mut pages = unpacker.pages.chunks_exact(PAGE_SIZE);
            for number in pack.table.pages_of(frame) {
                let hash = pages.next().map(hash_page);
                let right = pack.table.hashes.get(number as usize);
                if unpacked.is_err() || hash.as_ref() != right {
                    let mut bad = bad.lock().unwrap_or_else(PoisonError::into_inner);
                    bad.set(number as usize);
                }
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count.clamp(1, THREADS_MAX))
            .map(|_| scope.spawn(work))
            .collect();
        let panicked = || {
            Err(Error::damaged(
                &pack.path,
                "a thread that reads it panicked",
            ))
        };
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|_| panicked()))
    })?;
    let bad = bad.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(match bad.count() {
        0 => Health::Good,
        _ => Health::Bad(bad),
    })
}
