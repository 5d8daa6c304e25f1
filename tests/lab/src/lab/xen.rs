//! The two hypervisors of the lab.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{bail, Context, Result};

use super::apt::Apt;
use super::cache::{Cache, Key};
use super::image::Image;
use super::process;
use super::shape::Flavour;

const SCRIPT: &str = include_str!("../../scripts/xen.sh");
const LIMIT: Duration = Duration::from_secs(3600);

/// Finds or makes the hypervisor of a flavour, an ELF file for QEMU.
pub fn hypervisor(cache: &Cache, apt: &Apt, image: &Image, flavour: Flavour) -> Result<PathBuf> {
    let dir = match flavour {
        Flavour::Pv => {
            let (source, source_key) = apt.source(cache, "xen")?;
            let key = Key::new("xen")
                .with("script", SCRIPT)
                .with("source", &source_key)
                .finish();
            cache.artefact("xen", &key, |out| {
                process::logged(
                    Command::new("bash")
                        .args(["-c", SCRIPT])
                        .env("SRC", &source)
                        .env("OUT", out),
                    &out.join("build.log"),
                    LIMIT,
                )
            })?
        }
        Flavour::Pvh => {
            let key = Key::new("xen-stock").with("image", &image.key).finish();
            cache.artefact("xen-stock", &key, |out| {
                let elf = std::fs::File::create(out.join("xen.elf"))
                    .context("cannot create the hypervisor's file")?;
                let status = Command::new("gunzip")
                    .arg("-c")
                    .arg(image.boot("xen.gz"))
                    .stdout(elf)
                    .status()
                    .context("cannot run gunzip")?;
                if !status.success() {
                    bail!("gunzip of the stock hypervisor failed ({status})");
                }
                Ok(())
            })?
        }
    };
    Ok(dir.join("xen.elf"))
}
