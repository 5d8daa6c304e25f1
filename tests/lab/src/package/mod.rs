//! Debian packages: `cargo xtask deb`. What they consist of is in
//! `packaging/debian`; this brings together what `debian/rules` there needs.

pub mod chroot;
mod crates;
pub mod on_xen;
pub mod release;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{bail, Context, Result};

use crate::lab::{self, process};
use crate::product;
use chroot::Chroot;

/// A release of Debian that there are packages for.
pub struct Suite {
    /// As the archive calls it.
    pub name: &'static str,
    /// Its release of Xen.
    pub xen: &'static str,
    /// What tells its packages from those of another one, in their version:
    /// later suites have to have later versions.
    suffix: &'static str,
}

const SUITES: &[Suite] = &[
    Suite {
        name: "bookworm",
        xen: "4.17",
        suffix: "+deb12",
    },
    Suite {
        name: "trixie",
        xen: "4.20",
        suffix: "+deb13",
    },
];

/// What building needs besides what the product itself does.
const TOOLS: &[(&str, &str)] = &[
    ("debhelper", "dh"),
    ("dpkg-dev", "dpkg-buildpackage"),
    ("lintian", "lintian"),
    ("perl", "pod2man"),
    ("util-linux", "unshare"),
];

/// The same as packages in a chroot, where the suite's own Rust is used.
const CHROOT_PACKAGES: &[&str] = &[
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

const LIMIT: Duration = Duration::from_secs(3600);

impl Suite {
    /// The suite of that name.
    pub fn named(name: &str) -> Result<&'static Self> {
        let names = || SUITES.iter().map(|suite| suite.name).collect::<Vec<_>>();
        SUITES
            .iter()
            .find(|suite| suite.name == name)
            .with_context(|| {
                format!(
                    "there are no packages for {name}: there are for {}",
                    names().join(", ")
                )
            })
    }

    /// Where its packages are put.
    pub fn folder(&self) -> PathBuf {
        product::target(&lab::workspace())
            .join("deb")
            .join(self.name)
    }
}

/// Builds the packages of a suite, has lintian look at them, and returns them.
pub fn build(suite: &Suite) -> Result<Vec<PathBuf>> {
    let root = lab::workspace();
    let out = suite.folder();
    let source = out.join("source");
    fs::create_dir_all(&out).context("cannot create the packages' folder")?;
    for old in packages(&out)? {
        fs::remove_file(&old).with_context(|| format!("cannot remove {}", old.display()))?;
    }
    lay_out(&root, &source, suite)?;
    crates::licences(&root, &source.join("debian/third-party"))?;
    let xen = lab::xen_source(suite.name)?;
    let log = out.join("build.log");
    fs::write(&log, "").context("cannot begin a log")?;
    if machine_is(suite)? {
        product::install_tools()?;
        lab::install(TOOLS)?;
        here(suite, &out, &source, &xen, &log)?;
    } else {
        in_chroot(suite, &out, &xen, &log)?;
    }
    let built = packages(&out)?;
    if built.len() != 2 {
        bail!(
            "{} packages were built, not 2: see {}",
            built.len(),
            log.display()
        );
    }
    Ok(built)
}

/// Copies what git has, or would have, and `debian/` beside it.
fn lay_out(root: &Path, source: &Path, suite: &Suite) -> Result<()> {
    if source.exists() {
        fs::remove_dir_all(source).context("cannot clear an earlier source")?;
    }
    fs::create_dir(source).context("cannot create the packages' source")?;
    let files = process::capture(
        Command::new("git")
            .args([
                "ls-files",
                "--cached",
                "--others",
                "--exclude-standard",
                "--deduplicate",
            ])
            .current_dir(root),
    )?;
    // Those that were deleted and not committed are listed too.
    let there = files
        .lines()
        .filter(|name| root.join(name).symlink_metadata().is_ok());
    let names: Vec<&str> = there.collect();
    let mut tar = Command::new("sh")
        .args(["-c", "tar -cf - -T - | tar -xf - -C \"$1\"", "sh"])
        .arg(source)
        .current_dir(root)
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot run tar")?;
    if let Some(mut stdin) = tar.stdin.take() {
        let list = names.join("\n") + "\n";
        stdin
            .write_all(list.as_bytes())
            .context("cannot name files to tar")?;
    }
    if !tar.wait().context("cannot wait for tar")?.success() {
        bail!("the packages' source can't be copied");
    }
    fill_in(
        &source.join("packaging/debian"),
        &source.join("debian"),
        suite,
    )
}

/// Copies a folder with the release of Xen in place of `@XEN@`, in names and
/// contents.
fn fill_in(from: &Path, to: &Path, suite: &Suite) -> Result<()> {
    let filled = |text: &str| text.replace("@XEN@", suite.xen);
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))? {
        let entry = entry.context("cannot list a folder")?;
        let target = to.join(filled(&entry.file_name().to_string_lossy()));
        if entry.path().is_dir() {
            fill_in(&entry.path(), &target, suite)?;
            continue;
        }
        let failed = || format!("cannot copy {}", entry.path().display());
        let text = fs::read_to_string(entry.path()).with_context(failed)?;
        let mode = entry.metadata().with_context(failed)?.permissions();
        fs::write(&target, filled(&text)).with_context(failed)?;
        fs::set_permissions(&target, mode).with_context(failed)?;
    }
    Ok(())
}

/// Whether this machine is of the suite.
fn machine_is(suite: &Suite) -> Result<bool> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let wanted = format!("VERSION_CODENAME={}", suite.name);
    Ok(text.lines().any(|line| line == wanted))
}

/// What lintian says against it keeps a package from being one.
const LINTIAN: &str = "lintian --fail-on error,warning --info --allow-root";

fn here(suite: &Suite, out: &Path, source: &Path, xen: &Path, log: &Path) -> Result<()> {
    process::logged(
        Command::new("dpkg-buildpackage")
            .args(["--build=binary", "--no-sign", "-Ppkg.xl-vne.rustup"])
            .current_dir(source)
            .env("CARGO_TARGET_DIR", out.join("cargo"))
            .env("XEN_SOURCE", xen)
            .env("SUFFIX", suite.suffix),
        log,
        LIMIT,
    )?;
    let script = format!("{LINTIAN} ./*.deb");
    process::logged(
        Command::new("sh").args(["-c", &script]).current_dir(out),
        log,
        LIMIT,
    )
}

/// With the suite's own compilers; crates come from this machine's cache, since
/// the chroot can't be expected to reach the registry.
fn in_chroot(suite: &Suite, out: &Path, xen: &Path, log: &Path) -> Result<()> {
    let root = lab::workspace();
    let fetched = Command::new(env!("CARGO"))
        .args(["fetch", "--quiet", "--locked"])
        .current_dir(&root)
        .status()
        .context("cannot run cargo")?;
    if !fetched.success() {
        bail!("the crates can't be fetched ({fetched})");
    }
    let home = cargo_home()?;
    let chroot = Chroot::get(suite, CHROOT_PACKAGES)?;
    let script = format!(
        "cd /build/source; dpkg-buildpackage --build=binary --no-sign; cd ..; {LINTIAN} ./*.deb"
    );
    let jobs = std::env::var("CARGO_BUILD_JOBS").unwrap_or_default();
    let mut variables = vec![
        ("CARGO_HOME", "/cargo"),
        ("CARGO_NET_OFFLINE", "true"),
        ("CARGO_TARGET_DIR", "/build/cargo"),
        ("XEN_SOURCE", "/xen"),
        ("SUFFIX", suite.suffix),
    ];
    if !jobs.is_empty() {
        variables.push(("CARGO_BUILD_JOBS", &jobs));
    }
    let binds = [(out, "/build"), (xen, "/xen"), (home.as_path(), "/cargo")];
    chroot.run(&binds, &variables, &script, log)
}

fn cargo_home() -> Result<PathBuf> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| {
            let home = std::env::var_os("HOME")?;
            Some(Path::new(&home).join(".cargo"))
        });
    home.context("where are cargo's crates? Set CARGO_HOME")
}

/// The packages in a folder.
pub fn packages(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|end| end == "deb"))
        .collect();
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_suites_have_later_versions() -> Result<()> {
        for pair in SUITES.windows(2) {
            let [earlier, later] = pair else { continue };
            let versions = [earlier, later].map(|suite| format!("0.1.0{}", suite.suffix));
            let [earlier, later] = versions;
            let status = Command::new("dpkg")
                .args(["--compare-versions", &earlier, "lt", &later])
                .status()?;
            assert!(status.success(), "{earlier} {later}");
        }
        Ok(())
    }

    #[test]
    fn maintainer_scripts_are_for_the_suites_xen_only() -> Result<()> {
        let to = std::env::temp_dir().join(format!("xl-vne-debian-test-{}", std::process::id()));
        for suite in SUITES {
            fill_in(&lab::workspace().join("packaging/debian"), &to, suite)?;
            let script = to.join(format!("xen-vne-{}.preinst", suite.xen));
            let text = fs::read_to_string(script)?;
            assert!(
                text.contains(&format!("/usr/lib/xen-{}/bin/xl\n", suite.xen)),
                "{text}"
            );
            assert!(!text.contains("@XEN@"), "{text}");
            fs::remove_dir_all(&to)?;
        }
        Ok(())
    }
}
