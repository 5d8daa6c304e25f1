//! A host's vote: its part of a snapshot is durable and waits for the outcome,
//! which only the leader knows. It outlasts every process, and a restart of the
//! host.

use serde::{Deserialize, Serialize};

use super::error::Error;
use super::wire::PartMember;
use crate::cut::{Session, TakeId};
use crate::image::{self, Manifest, Name, StoreId};

/// What is beside a part that waits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Vote {
    /// The take.
    pub take: TakeId,
    /// The time that this host prepared it.
    pub session: Session,
    /// Who knows the outcome.
    pub leader: Name,
    /// What was said to be stored.
    pub members: Vec<PartMember>,
    /// The leader's store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreId>,
}

impl Vote {
    /// As it's written.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        serde_json::to_vec(self).map_err(|error| Error::Failed(format!("the vote: {error}")))
    }

    /// Reads what [`Vote::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        serde_json::from_slice(bytes).map_err(|error| Error::Failed(format!("a vote: {error}")))
    }
}

/// Makes the snapshot visible on `host`, as the leader has decided; what it says
/// of this host's members must be what this host has stored.
pub(super) fn commit(
    snapshot: &mut image::Take,
    host: &Name,
    decided: &Manifest,
    stored: &[PartMember],
) -> Result<(), Error> {
    let manifest = decided.of_host(host);
    let ours = manifest
        .members_of_host()
        .eq(stored.iter().map(|part| &part.entry));
    if !ours || !manifest.hosts.contains(host) {
        return Err(Error::Failed(format!(
            "what was decided of snapshot {}@{} isn't what was stored here",
            manifest.vne, manifest.id
        )));
    }
    Ok(snapshot.commit(&manifest)?)
}
