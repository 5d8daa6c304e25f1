//! Where things are built for a suite: on this machine if it is of that suite,
//! else in a chroot, with the suite's own compilers and libraries.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};

use crate::lab;
use crate::package::chroot::Chroot;
use crate::product;
use crate::suite::Suite;

/// What a chroot needs to build the product and its packages.
const PACKAGES: &[&str] = &[
    "build-essential",
    "cargo",
    "clang",
    "debhelper",
    "libclang-dev",
    "libxen-dev",
    "libyajl-dev",
    "lintian",
    "patch",
    "perl",
    "pkg-config",
];

/// Where chroots have this machine's crates.
const CRATES: &str = "/cargo";

/// Builds for a suite.
pub struct Builder {
    suite: Suite,
    /// Without one it's this machine that builds.
    chroot: Option<Chroot>,
}

impl Builder {
    /// Finds or makes what building for the suite takes.
    pub fn of(suite: Suite) -> Result<Self> {
        let chroot = if suite.is_here()? {
            product::install_tools()?;
            None
        } else {
            // The chroot can't be expected to reach the registry.
            fetch_crates()?;
            Some(Chroot::get(suite, PACKAGES)?)
        };
        Ok(Self { suite, chroot })
    }

    /// Whether it's this machine that builds.
    pub fn is_here(&self) -> bool {
        self.chroot.is_none()
    }

    /// A folder for what cargo builds, and the stage: none that another suite's
    /// builds are in.
    pub fn folder(&self) -> PathBuf {
        let target = product::target(&lab::workspace());
        match self.chroot {
            None => target,
            Some(_) => target.join(self.suite.name()),
        }
    }

    /// A bash script that builds, by `$CARGO` for instance, run at the top of the
    /// checkout. It sees that, [`Builder::folder`] and `folders`, each at its own
    /// path, so that what it says of files there is true here as well.
    pub fn command(
        &self,
        folders: &[&Path],
        variables: &[(&str, &str)],
        script: &str,
    ) -> Result<Command> {
        let root = lab::workspace();
        let Some(chroot) = &self.chroot else {
            let mut command = Command::new("bash");
            command
                .args(["-euo", "pipefail", "-c", script])
                .current_dir(root)
                .env("CARGO", env!("CARGO"))
                .envs(variables.iter().copied());
            return Ok(command);
        };
        let (home, folder) = (cargo_home()?, self.folder());
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let text = |path: &Path| {
            let text = path
                .to_str()
                .filter(|text| !text.contains(char::is_whitespace));
            text.map(str::to_owned).with_context(|| {
                format!("{path:?} can't be used in a chroot: no spaces, please, and UTF-8 only")
            })
        };
        let mut binds = Vec::new();
        for path in [root.as_path(), &folder].iter().chain(folders) {
            binds.push((*path, text(path)?));
        }
        binds.push((&home, CRATES.to_owned()));
        let binds: Vec<(&Path, &str)> = binds.iter().map(|(path, to)| (*path, &**to)).collect();
        let folder = text(&folder)?;
        let jobs = std::env::var("CARGO_BUILD_JOBS").unwrap_or_default();
        let mut all = vec![
            ("CARGO", "cargo"),
            ("CARGO_HOME", CRATES),
            ("CARGO_NET_OFFLINE", "true"),
            ("CARGO_TARGET_DIR", folder.as_str()),
        ];
        if !jobs.is_empty() {
            all.push(("CARGO_BUILD_JOBS", &jobs));
        }
        // The last one of a name counts.
        all.extend(variables);
        let script = format!("cd {}\n{script}", text(&root)?);
        Ok(chroot.command(&binds, &all, &script))
    }
}

fn fetch_crates() -> Result<()> {
    let fetched = Command::new(env!("CARGO"))
        .args(["fetch", "--quiet", "--locked"])
        .current_dir(lab::workspace())
        .status()
        .context("cannot run cargo")?;
    if !fetched.success() {
        bail!("the crates can't be fetched ({fetched})");
    }
    Ok(())
}

/// Where cargo keeps the crates' sources.
pub fn cargo_home() -> Result<PathBuf> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| {
            let home = std::env::var_os("HOME")?;
            Some(Path::new(&home).join(".cargo"))
        });
    home.context("where are cargo's crates? Set CARGO_HOME")
}
