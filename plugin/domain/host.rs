//! What a host has for domains.

use serde::{Deserialize, Serialize};

use crate::cpu::CpuFeatures;

/// A host, as far as it decides which domains can run there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The hypervisor's version, such as `4.17.6-pre`.
    pub xen_version: String,
    /// Memory that nobody has, in KiB.
    pub free_kib: u64,
    /// Memory that dom0 has, in KiB. xl may take some of it for domains.
    pub dom0_kib: u64,
    /// What its processors can do.
    pub cpu: CpuFeatures,
    /// Whether it runs PV domains.
    pub pv: bool,
    /// Whether it runs HVM and PVH domains.
    pub hvm: bool,
    /// Which of the names that were asked for are domains' already.
    pub taken: Vec<String>,
}
