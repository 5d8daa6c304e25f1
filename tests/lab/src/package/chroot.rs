//! A small Debian of some suite, to build and to try packages in. What is done
//! in it is gone afterwards.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{bail, Result};

use crate::lab::apt::{self, Apt};
use crate::lab::cache::{Cache, Key};
use crate::lab::process;
use crate::suite::Suite;

const MAKE: &str = include_str!("../../scripts/chroot.sh");
const ENTER: &str = include_str!("../../scripts/in-chroot.sh");
const LIMIT: Duration = Duration::from_secs(3600);

/// The chroot of a suite, with some packages.
pub struct Chroot(PathBuf);

impl Chroot {
    /// Finds or makes it.
    pub fn get(suite: Suite, packages: &[&str]) -> Result<Self> {
        if !apt::is_root() {
            bail!("a chroot needs root: run this as root");
        }
        apt::install(&[("debootstrap", "debootstrap")])?;
        let cache = Cache::open()?;
        let apt = Apt::open(&cache, suite, false)?;
        let key = Key::new("chroot")
            .with("script", MAKE)
            .with("sources", apt.sources_list())
            .with("packages", packages.join(" "))
            .finish();
        let dir = cache.artefact("chroot", &key, |out| {
            process::logged(
                Command::new("bash")
                    .args(["-c", MAKE])
                    .env("SUITE", suite.name())
                    .env("MIRROR", apt.mirror()?)
                    .env("SOURCES", apt.sources_list())
                    .env("PACKAGES", packages.join(" "))
                    .env("OUT", out),
                &out.join("build.log"),
                LIMIT,
            )
        })?;
        Ok(Self(dir.join("root")))
    }

    /// A bash script to be run there. Folders of this machine are at the places
    /// that `binds` says, and stay changed.
    pub fn command(
        &self,
        binds: &[(&Path, &str)],
        variables: &[(&str, &str)],
        script: &str,
    ) -> Command {
        let binds = binds
            .iter()
            .map(|(from, to)| format!("{} {to}\n", from.display()));
        let variables = variables
            .iter()
            .map(|(name, value)| format!("{name}={value}\n"));
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "bash", "-c", ENTER])
            .env("BASE", &self.0)
            .env("BINDS", binds.collect::<String>())
            .env("VARIABLES", variables.collect::<String>())
            .env("INNER", script);
        command
    }

    /// Runs a bash script there.
    pub fn run(
        &self,
        binds: &[(&Path, &str)],
        variables: &[(&str, &str)],
        script: &str,
        log: &Path,
    ) -> Result<()> {
        process::logged(&mut self.command(binds, variables, script), log, LIMIT)
    }
}
