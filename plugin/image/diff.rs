//! What has changed from one snapshot to another.

use std::collections::BTreeMap;
use std::convert::Infallible;

use serde::Serialize;

use super::catalogue::Snapshot;
use super::error::Error;
use super::name::Name;
use super::pack::{hash_page, Hash};
use super::reader::{MemberReader, ReplayError};
use super::Result;
use crate::stream::Page;

/// How a member differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemberDiff {
    /// The member.
    pub member: Name,
    /// Guest frames in the first snapshot; 0 if the member isn't in it.
    pub pages_before: u64,
    /// In the second one.
    pub pages_after: u64,
    /// Those whose contents or type differ, or that are in one of them only.
    pub pages_changed: u64,
}

/// A frame's type, and its contents' hash if it has any.
type Content = (u8, Option<Hash>);

/// Compares the members of two snapshots that are stored here, by name.
///
/// # Errors
///
/// [`Error::Damaged`], [`Error::DamagedPages`], [`Error::Io`].
pub fn diff(before: &Snapshot, after: &Snapshot) -> Result<Vec<MemberDiff>> {
    let mut names: Vec<&Name> = Vec::new();
    for snapshot in [before, after] {
        for member in snapshot.manifest().members_here() {
            if !names.contains(&&member.name) {
                names.push(&member.name);
            }
        }
    }
    let mut diffs = Vec::new();
    for name in names {
        let old = contents(before, name)?;
        let new = contents(after, name)?;
        let mut changed = old.keys().filter(|pfn| !new.contains_key(pfn)).count();
        changed += new
            .iter()
            .filter(|(pfn, new)| old.get(pfn) != Some(new))
            .count();
        diffs.push(MemberDiff {
            member: name.clone(),
            pages_before: old.len() as u64,
            pages_after: new.len() as u64,
            pages_changed: changed as u64,
        });
    }
    Ok(diffs)
}

fn contents(snapshot: &Snapshot, name: &Name) -> Result<BTreeMap<u64, Content>> {
    match snapshot.member(name) {
        Ok(member) => member.contents(),
        Err(Error::NoMember { .. } | Error::Elsewhere { .. }) => Ok(BTreeMap::new()),
        Err(error) => Err(error),
    }
}

impl MemberReader {
    /// The hash of each frame's contents. Only format 1 has to be read for that.
    fn contents(&self) -> Result<BTreeMap<u64, Content>> {
        if let Some(known) = self.known_contents() {
            return Ok(known);
        }
        let mut contents = BTreeMap::new();
        let read = self.for_each_page(|pfn, page_type, data: Option<&Page>| {
            let hash = data.map(|page| hash_page(page));
            contents.insert(pfn, (page_type.bits(), hash));
            Ok::<(), Infallible>(())
        });
        match read {
            Ok(()) => Ok(contents),
            Err(ReplayError::Store(error)) => Err(error),
            Err(ReplayError::Sink(never)) => match never {},
        }
    }
}
