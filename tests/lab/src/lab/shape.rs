//! What a lab looks like: how many hosts, which suite, which flavour.

use anyhow::{bail, Result};
use serde::{Deserialize, Serialize};

use crate::suite::Suite;

/// Most hosts that one lab may have; each is an emulator of 3 GiB.
const HOSTS_MAX: usize = 8;

/// Which combination of emulator and hypervisor runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Flavour {
    /// Stock emulator, hypervisor rebuilt with shadow paging: for PV guests
    Pv,
    /// Repaired emulator, stock hypervisor: for PVH guests
    Pvh,
}

impl Flavour {
    /// The name as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Flavour::Pv => "pv",
            Flavour::Pvh => "pvh",
        }
    }
}

/// The shape of a lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// How many Xen hosts.
    pub hosts: usize,
    /// The Debian suite of the hosts.
    pub suite: Suite,
    /// Emulator and hypervisor.
    pub flavour: Flavour,
}

impl Shape {
    /// Refuses what can't work, before anything is built.
    pub fn check(&self) -> Result<()> {
        if self.hosts == 0 || self.hosts > HOSTS_MAX {
            bail!("a lab has 1 to {HOSTS_MAX} hosts, not {}", self.hosts);
        }
        Ok(())
    }

    /// Processors of each host. The machine's processors are shared out, and
    /// nested paging is only reliable with one.
    pub fn cpus(&self) -> usize {
        match self.flavour {
            Flavour::Pv if self.hosts == 1 => 2,
            _ => 1,
        }
    }
}

impl Default for Shape {
    fn default() -> Self {
        Shape {
            hosts: 1,
            suite: Suite::default(),
            flavour: Flavour::Pv,
        }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} host{}, {}, {}",
            self.hosts,
            if self.hosts == 1 { "" } else { "s" },
            self.suite,
            self.flavour.name()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_that_cannot_work_are_refused() {
        assert!(Shape::default().check().is_ok());
        for hosts in [0, HOSTS_MAX + 1] {
            let shape = Shape {
                hosts,
                ..Shape::default()
            };
            assert!(shape.check().is_err());
        }
    }

    #[test]
    fn processors_are_shared_out_and_nested_paging_has_one() {
        let mut shape = Shape::default();
        assert_eq!(shape.cpus(), 2);
        shape.flavour = Flavour::Pvh;
        assert_eq!(shape.cpus(), 1);
        shape = Shape {
            hosts: 2,
            ..Shape::default()
        };
        assert_eq!(shape.cpus(), 1);
    }
}
