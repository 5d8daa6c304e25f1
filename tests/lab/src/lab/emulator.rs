//! The emulators: the distribution's own, and one with a repair for PVH.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::apt::{self, Apt};
use super::cache::{Cache, Key};
use super::process;
use super::shape::Flavour;
use crate::suite::Suite;

const SCRIPT: &str = include_str!("../../scripts/emulator.sh");
const LIMIT: Duration = Duration::from_secs(2 * 3600);

/// What the emulator's build takes.
const TOOLS: &[(&str, &str)] = &[
    ("ninja-build", "ninja"),
    ("meson", "/usr/bin/meson"),
    ("pkg-config", "pkg-config"),
    ("libglib2.0-dev", "/usr/include/glib-2.0/glib.h"),
    ("libpixman-1-dev", "/usr/include/pixman-1/pixman.h"),
    ("libslirp-dev", "/usr/include/slirp/libslirp.h"),
    ("libfdt-dev", "/usr/include/libfdt.h"),
    ("zlib1g-dev", "/usr/include/zlib.h"),
];

/// Whose QEMU both are: that of the machines that labs run on, whatever runs in
/// them.
const SUITE: Suite = Suite::Bookworm;

/// Finds or builds the emulator of a flavour; `refresh` as with [`Apt::open`].
pub fn emulator(cache: &Cache, flavour: Flavour, refresh: bool) -> Result<PathBuf> {
    match flavour {
        Flavour::Pv => Ok(PathBuf::from("qemu-system-x86_64")),
        Flavour::Pvh => {
            let apt = Apt::open(cache, SUITE, refresh)?;
            let (source, source_key) = apt.source(cache, "qemu")?;
            let key = Key::new("emulator")
                .with("script", SCRIPT)
                .with("source", &source_key)
                .finish();
            let dir = cache.artefact("emulator", &key, |out| {
                apt::install(TOOLS)?;
                process::logged(
                    Command::new("bash")
                        .args(["-c", SCRIPT])
                        .env("SRC", &source)
                        .env("OUT", out),
                    &out.join("build.log"),
                    LIMIT,
                )
            })?;
            Ok(dir.join("qemu-system-x86_64"))
        }
    }
}
