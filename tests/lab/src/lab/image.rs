//! dom0: its disk image, and the files from it that are needed outside.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};

use super::apt::{self, Apt};
use super::cache::{Cache, Key};
use super::process;
use crate::suite::Suite;

const SCRIPT: &str = include_str!("../../scripts/rootfs.sh");
const LIMIT: Duration = Duration::from_secs(3600);

/// In dom0 from the start, by debootstrap.
const PACKAGES: &[&str] = &[
    "systemd",
    "systemd-sysv",
    "udev",
    "kmod",
    "iproute2",
    "iputils-ping",
    "lvm2",
    "nftables",
    "thin-provisioning-tools",
    "openssh-server",
    "openssh-client",
    "tcpdump",
    "procps",
    "strace",
];

/// Installed in the chroot, since their scripts want /proc and /dev.
fn xen_packages(suite: Suite) -> [String; 6] {
    [
        "linux-image-amd64".to_owned(),
        format!("xen-hypervisor-{}-amd64", suite.xen()),
        format!("xen-utils-{}", suite.xen()),
        "xen-utils-common".to_owned(),
        "xenstore-utils".to_owned(),
        "qemu-system-xen".to_owned(),
    ]
}

/// A built dom0.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Image {
    /// The folder in the cache.
    pub dir: PathBuf,
    /// What it's keyed by.
    pub key: String,
}

impl Image {
    /// Finds or builds the image of a suite.
    pub fn get(cache: &Cache, apt: &Apt, suite: Suite) -> Result<Self> {
        let xen_packages = xen_packages(suite);
        let xen_packages: Vec<&str> = xen_packages.iter().map(String::as_str).collect();
        let ssh_key = ssh_key(cache)?;
        let public = ssh_key.with_extension("pub");
        let key = Key::new("dom0")
            .with("script", SCRIPT)
            .with("sources", apt.sources_list())
            .with("packages", PACKAGES.join(" "))
            .with("versions", apt.candidates(&xen_packages)?)
            .with(
                "ssh key",
                std::fs::read(&public)
                    .with_context(|| format!("cannot read {}", public.display()))?,
            )
            .finish();
        let dir = cache.artefact("dom0", &key, |out| {
            if !apt::is_root() {
                bail!(
                    "debootstrap needs root: run `cargo xtask lab prepare` as root once \
                     with the same cache folder"
                );
            }
            process::logged(
                Command::new("bash")
                    .args(["-c", SCRIPT])
                    .env("MIRROR", apt.mirror()?)
                    .env("SUITE", suite.name())
                    .env("SOURCES", apt.sources_list())
                    .env("PACKAGES", PACKAGES.join(" "))
                    .env("XEN_PACKAGES", xen_packages.join(" "))
                    .env("KEY_PUB", &public)
                    .env("OUT", out),
                &out.join("build.log"),
                LIMIT,
            )
        })?;
        Ok(Image { dir, key })
    }

    /// dom0's disk: raw, never written to.
    pub fn disk(&self) -> PathBuf {
        self.dir.join("dom0.img")
    }

    /// A file of /boot: `vmlinuz`, `initrd.img`.
    pub fn boot(&self, name: &str) -> PathBuf {
        self.dir.join("boot").join(name)
    }

    /// The kernel modules that a guest loads, in order.
    pub fn guest_modules(&self) -> Result<Vec<PathBuf>> {
        let dir = self.dir.join("guest-modules");
        let mut modules: Vec<PathBuf> = std::fs::read_dir(&dir)
            .with_context(|| format!("cannot list {}", dir.display()))?
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .collect();
        modules.sort();
        Ok(modules)
    }
}

/// The key that opens every host of every lab of this cache.
pub fn ssh_key(cache: &Cache) -> Result<PathBuf> {
    let dir = cache.artefact("ssh", &Key::new("ssh").finish(), |out: &Path| {
        process::capture(
            Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-C", "xl-vne-lab", "-f"])
                .arg(out.join("key")),
        )
        .map(drop)
    })?;
    Ok(dir.join("key"))
}
