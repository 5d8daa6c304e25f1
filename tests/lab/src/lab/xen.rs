//! Xen: the distribution's source, and the two hypervisors of the lab.

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

/// The unpacked source package.
#[derive(Clone, Debug)]
pub struct Source {
    /// The tree, with Debian's patches applied.
    pub dir: PathBuf,
    key: String,
}

/// Finds or fetches the source of Xen. The newest version that the archive
/// really has is taken: an index may name sources that have gone.
pub fn source(cache: &Cache, apt: &Apt) -> Result<Source> {
    let versions = apt.source_versions("xen")?;
    let key = Key::new("xen-src")
        .with("versions", versions.join(" "))
        .finish();
    let dir = cache.artefact("xen-src", &key, |out| {
        let mut failures = String::new();
        for version in versions.iter().rev() {
            match apt.unpack_source("xen", version, out, "xen") {
                Ok(()) => {
                    std::fs::write(out.join("version"), version)
                        .context("cannot note the source's version")?;
                    return Ok(());
                }
                Err(error) => failures.push_str(&format!("\n{version}: {error:#}")),
            }
        }
        bail!(
            "none of the archive's versions of Xen's source can be fetched; \
             `cargo xtask lab prepare --refresh` renews the lists:{failures}"
        )
    })?;
    Ok(Source {
        dir: dir.join("xen"),
        key,
    })
}

/// Finds or makes the hypervisor of a flavour, an ELF file for QEMU.
pub fn hypervisor(cache: &Cache, apt: &Apt, image: &Image, flavour: Flavour) -> Result<PathBuf> {
    let dir = match flavour {
        Flavour::Pv => {
            let source = source(cache, apt)?;
            let key = Key::new("xen")
                .with("script", SCRIPT)
                .with("source", &source.key)
                .finish();
            cache.artefact("xen", &key, |out| {
                process::logged(
                    Command::new("bash")
                        .args(["-c", SCRIPT])
                        .env("SRC", &source.dir)
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
