//! The emulators: the distribution's own, and one with a repair for PVH.

use std::path::PathBuf;

use anyhow::{bail, Result};

use super::apt::Apt;
use super::cache::Cache;
use super::shape::Flavour;

/// Finds or builds the emulator of a flavour.
pub fn emulator(_cache: &Cache, _apt: &Apt, flavour: Flavour) -> Result<PathBuf> {
    match flavour {
        Flavour::Pv => Ok(PathBuf::from("qemu-system-x86_64")),
        Flavour::Pvh => bail!("to be done"),
    }
}
