//! How much of the store is whose.

use std::collections::BTreeMap;

use serde::Serialize;

use super::bits::Bits;
use super::catalogue::Catalogue;
use super::manifest::Manifest;
use super::name::{Name, SnapshotId};
use super::pack::PackId;
use super::sweep::{self, Used};
use super::Result;

/// What a snapshot takes, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// What its removal would free.
    pub own_bytes: u64,
    /// What it shares with other snapshots.
    pub shared_bytes: u64,
}

/// Who uses a pack's pages.
#[derive(Default)]
struct Users {
    /// Bytes of its file.
    bytes: u64,
    once: Option<Bits>,
    /// By more than one.
    more: Option<Bits>,
}

impl Users {
    fn add(&mut self, used: &Bits) {
        match (&mut self.once, &mut self.more) {
            (Some(once), Some(more)) => {
                more.add(&once.and(used));
                once.add(used);
            }
            _ => {
                self.more = Some(used.and(&Bits::default()));
                self.once = Some(used.clone());
            }
        }
    }

    /// The bytes of so many pages. What nobody uses is divided among the others.
    fn bytes_of(&self, pages: usize) -> u64 {
        let all = self.once.as_ref().map_or(1, Bits::count).max(1);
        (u128::from(self.bytes) * pages as u128 / all as u128) as u64
    }
}

impl Catalogue {
    /// The sizes of these snapshots, which should be all that there are: what is
    /// shared with others counts as a snapshot's own. One whose index can't be
    /// read has none, and counts for nothing.
    ///
    /// # Errors
    ///
    /// [`super::Error::Io`].
    pub fn sizes(&self, all: &[Manifest]) -> Result<BTreeMap<(Name, SnapshotId), Sizes>> {
        let mut users: BTreeMap<PackId, Users> = BTreeMap::new();
        for (id, bytes) in self.store().packs().list()? {
            users.entry(id).or_default().bytes = bytes;
        }
        let mut uses: Vec<(&Manifest, Used)> = Vec::new();
        for manifest in all {
            let dir = self.store().snapshot_dir(&manifest.vne, &manifest.id);
            let mut used = Used::new();
            match sweep::use_of_members(&dir, manifest, self.store().vault(), &mut used) {
                Ok(()) => uses.push((manifest, used)),
                Err(error) => log::info!("its size isn't known: {error}"),
            }
        }
        for (_, used) in &uses {
            for (id, pages) in used {
                users.entry(*id).or_default().add(pages);
            }
        }
        let sizes = uses.iter().map(|(manifest, used)| {
            let key = (manifest.vne.clone(), manifest.id.clone());
            (key, size(manifest, used, &users))
        });
        Ok(sizes.collect())
    }
}

fn size(manifest: &Manifest, used: &Used, users: &BTreeMap<PackId, Users>) -> Sizes {
    let mut sizes = Sizes::default();
    for member in manifest.members_here() {
        let files = member.image.files.iter().map(|file| file.length);
        let recorded = member.recorded.as_ref().map(|kept| kept.file.length);
        sizes.own_bytes += files.chain(recorded).sum::<u64>();
    }
    for (id, pages) in used {
        let Some(users) = users.get(id) else {
            continue;
        };
        let shared = users
            .more
            .as_ref()
            .map_or(0, |more| more.and(pages).count());
        sizes.own_bytes += users.bytes_of(pages.count() - shared);
        sizes.shared_bytes += users.bytes_of(shared);
    }
    sizes
}
