//! What a store must be like after anything was killed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::Result;
use xl_vne::image::{Checker, Name, SnapshotId, Store};

use crate::guest::{stored_digest, Digests};
use crate::work::{self, member_seed, vne, Work};

/// With fewer none is removed.
const SNAPSHOTS_MIN: usize = 3;

/// Snapshots that are let come together.
const SNAPSHOTS_MAX: usize = 6;

/// Knows what was there.
pub struct Judge {
    store: PathBuf,
    /// Each with the seed of its contents.
    there: BTreeMap<SnapshotId, u64>,
    next_seed: u64,
    /// A copy that was begun and isn't there yet.
    unfinished: Option<Work>,
    digests: Digests,
}

impl Judge {
    /// Of a store that doesn't exist yet.
    pub fn new(store: PathBuf) -> Self {
        Judge {
            store,
            there: BTreeMap::new(),
            next_seed: 0,
            unfinished: None,
            digests: Digests::default(),
        }
    }

    /// A copy of a snapshot that another store has; mostly one that was killed goes
    /// on.
    fn choose_copy(&mut self, random: &mut fastrand::Rng) -> Result<Work> {
        if let Some(work) = self.unfinished.take().filter(|_| random.u32(..8) > 0) {
            return Ok(work);
        }
        self.next_seed += 1;
        let seed = self.next_seed;
        let from = self.store.with_extension("source");
        let (day, hour) = (seed % 28 + 1, seed / 28 % 24);
        let year = 2000 + seed / (28 * 24) % 20;
        let id: SnapshotId = format!("{year}01{day:02}T{hour:02}0000Z").parse()?;
        work::take(&from, seed, Some(&id))?;
        let store = self.store.clone();
        Ok(Work::Copy {
            store,
            from,
            id,
            seed,
        })
    }

    /// What to do next, and whether it is to be spared.
    pub fn choose(&mut self, random: &mut fastrand::Rng) -> Result<(Work, bool)> {
        let store = self.store.clone();
        let there: Vec<&SnapshotId> = self.there.keys().collect();
        let few = there.len() < SNAPSHOTS_MIN;
        let some = there.get(random.usize(..there.len().max(1)));
        let many = there.len() >= SNAPSHOTS_MAX;
        Ok(match (some, random.u32(..6)) {
            (_, 4 | 5) if !many => (self.choose_copy(random)?, false),
            (Some(_), 0) if !few => (Work::Prune { store, keep: 1 }, false),
            (Some(id), kind) if many || (kind == 1 && !few) => {
                let id = (*id).clone();
                (Work::Remove { store, id }, false)
            }
            _ => {
                self.next_seed += 1;
                let seed = self.next_seed;
                // Else there would never be much to lose.
                (Work::Take { store, seed }, few && random.bool())
            }
        })
    }

    /// What is wrong, after the next one to come has cleaned up.
    pub fn after(&mut self, work: &Work, whole: bool) -> Result<Vec<String>> {
        let mut problems = Vec::new();
        if !self.store.exists() {
            return Ok(problems);
        }
        let store = Store::open(&self.store)?;
        if let Work::Copy { .. } = work {
            self.unfinished = Some(work.clone()).filter(|_| !whole);
        }
        // Before anybody cleans up, too.
        self.compare(&store, work, whole, &mut problems)?;
        let cleaned = store.clean_tmp()?;
        if cleaned.live > 0 {
            problems.push(format!("{} folders in tmp/ stay", cleaned.live));
        }
        self.verify(&store, &mut problems)?;
        // What has arrived of a copy is kept for the next one.
        let left = std::fs::read_dir(self.store.join("tmp"))?.count();
        let kept = cleaned.unfinished as usize;
        if left != kept {
            problems.push(format!("{left} entries of tmp/ are left, {kept} of copies"));
        }
        if self.store.join("packs").exists() {
            let swept = store.catalogue().sweep()?;
            if swept.packs_removed > 0 && kept == 0 {
                problems.push(format!("{} packs were used by nobody", swept.packs_removed));
            }
        }
        Ok(problems)
    }

    /// Compares the list with what must be in it, and takes it over.
    fn compare(
        &mut self,
        store: &Store,
        work: &Work,
        whole: bool,
        problems: &mut Vec<String>,
    ) -> Result<()> {
        let listing = store.catalogue().list(None)?;
        for damaged in &listing.damaged {
            problems.push(format!("{}: {}", damaged.path.display(), damaged.error));
        }
        let listed: BTreeMap<SnapshotId, u64> = listing
            .snapshots
            .iter()
            .map(|manifest| {
                let seed = manifest.label.as_ref().and_then(|label| label.parse().ok());
                (manifest.id.clone(), seed.unwrap_or(0))
            })
            .collect();
        let may_go: BTreeSet<SnapshotId> = match work {
            Work::Take { .. } | Work::Member { .. } | Work::Copy { .. } => BTreeSet::new(),
            Work::Remove { id, .. } => [id.clone()].into(),
            Work::Prune { keep, .. } => {
                let old = self.there.len().saturating_sub(*keep);
                self.there.keys().take(old).cloned().collect()
            }
        };
        for id in self.there.keys().filter(|id| !listed.contains_key(id)) {
            if !may_go.contains(id) {
                problems.push(format!("{id} is gone"));
            }
        }
        for id in may_go.iter().filter(|id| whole && listed.contains_key(id)) {
            problems.push(format!("{id} was removed and is there"));
        }
        let new: Vec<u64> = listed
            .iter()
            .filter(|(id, _)| !self.there.contains_key(id))
            .map(|(_, seed)| *seed)
            .collect();
        let is_right = match work {
            Work::Take { seed, .. } | Work::Copy { seed, .. } => {
                new.iter().all(|new| new == seed) && new.len() <= 1
            }
            _ => new.is_empty(),
        };
        let is_missing = match work {
            Work::Take { .. } => whole && new.is_empty(),
            Work::Copy { id, .. } => whole && !listed.contains_key(id),
            _ => false,
        };
        if !is_right || is_missing {
            problems.push(format!("snapshots {new:?} are new"));
        }
        self.there = listed;
        Ok(())
    }

    /// All that is listed is whole, and what was taken.
    fn verify(&mut self, store: &Store, problems: &mut Vec<String>) -> Result<()> {
        let mut checker = Checker::new(store);
        let vne = vne()?;
        for (id, seed) in &self.there {
            let found = checker.snapshot(&vne, id, &mut |_| ())?;
            problems.extend(found.iter().map(|error| format!("{id}: {error}")));
            if !found.is_empty() {
                continue;
            }
            let snapshot = store.catalogue().get(&vne, id)?;
            for name in ["db", "web"] {
                let member = snapshot.member(&Name::new(name)?)?;
                if stored_digest(&member)? != self.digests.of(member_seed(*seed, name)) {
                    problems.push(format!("{id}: {name} isn't what was taken"));
                }
            }
        }
        let others = checker.other_packs(&mut |_| ())?;
        problems.extend(others.iter().map(ToString::to_string));
        Ok(())
    }
}
