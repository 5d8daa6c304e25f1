//! What the leader of a take and its hosts say to each other: the protocol's
//! messages (`cut`), and what goes along with them.

use serde::{Deserialize, Serialize};

use crate::cut::{FromHost, HostLimits, TakeId, ToHost};
use crate::domain::messages::CutTimes;
use crate::domain::policy::{PolicyConfig, Round};
use crate::domain::DomainFacts;
use crate::image::{Manifest, Member, Name, SnapshotId, StoreId};

/// All that a host has to know to prepare its part of a take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The VNE.
    pub vne: Name,
    /// What the snapshot is called on all hosts.
    pub id: SnapshotId,
    /// The host that leads.
    pub leader: Name,
    /// The members on this host, in the VNE's order; there may be none.
    pub members: Vec<Name>,
    /// How long it waits for what.
    pub limits: HostLimits,
    /// When a member has converged.
    pub policy: PolicyConfig,
    /// Size of each vif's hold queue in bytes.
    pub hold_bytes: u32,
    /// Whether members may have disks that they write to: those aren't
    /// captured.
    pub memory_only: bool,
    /// Only look whether it could be done.
    pub dry_run: bool,
    /// The leader's store, where it decides. With members on its own host only,
    /// nobody has to know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreId>,
}

/// From the leader to a host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Order {
    /// The protocol's part.
    pub message: ToHost,
    /// With the order to prepare.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Box<Plan>>,
    /// With the order to commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<Box<Manifest>>,
}

/// From a host to the leader.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum News {
    /// The protocol's part, and what goes along with it.
    Said {
        /// The protocol's part.
        message: FromHost,
        /// What goes along with it.
        attached: Attached,
    },
    /// A member has sent a pre-copy round. For people: it isn't repeated.
    Round {
        /// The take.
        take: TakeId,
        /// Which of the host's members.
        member: usize,
        /// Its figures.
        round: Round,
        /// Whether what is left is within the policy's aim.
        converged: bool,
    },
    /// A member was cut and runs again. For people as well.
    Cut {
        /// The take.
        take: TakeId,
        /// Which of the host's members.
        member: usize,
        /// When, by the host's own clock.
        times: CutTimes,
    },
    /// A member was slowed down, as it doesn't converge. For people as well.
    Throttled {
        /// The take.
        take: TakeId,
        /// Which of the host's members.
        member: usize,
        /// What it may use now, in percent of one physical CPU.
        cap: u32,
    },
    /// A member's part is stored. For people as well.
    Stored {
        /// The take.
        take: TakeId,
        /// Which of the host's members.
        member: usize,
    },
}

impl News {
    /// The take that it's about.
    pub fn take(&self) -> TakeId {
        match self {
            Self::Said { message, .. } => message.take,
            Self::Round { take, .. }
            | Self::Cut { take, .. }
            | Self::Throttled { take, .. }
            | Self::Stored { take, .. } => *take,
        }
    }
}

/// What goes along with a reply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attached {
    /// Nothing.
    Nothing,
    /// With `prepared`.
    Looked {
        /// What was seen of the members.
        facts: Vec<DomainFacts>,
        /// The hypervisor's version; empty where there is no member to ask.
        xen_version: String,
    },
    /// With `released`.
    Held {
        /// How long frames were held, in ns.
        hold_ns: u64,
    },
    /// With `stored`.
    Part {
        /// The VNE, so that the snapshot can be looked up.
        vne: Name,
        /// The snapshot.
        id: SnapshotId,
        /// What is stored; empty where that was said before a restart.
        members: Vec<PartMember>,
        /// From the plan: where the outcome is to be looked up.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        store: Option<StoreId>,
    },
}

/// One member's part of a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartMember {
    /// Its entry in the manifest.
    pub entry: Member,
    /// When it was cut, `CLOCK_MONOTONIC` of its host in ns.
    pub suspended_ns: u64,
}
