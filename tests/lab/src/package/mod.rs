//! Debian packages: `cargo xtask deb`. What they consist of is in
//! `packaging/debian`; this brings together what `debian/rules` there needs.

pub mod chroot;
mod crates;
pub mod on_xen;
mod paths;
pub mod release;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{bail, Context, Result};

use crate::builder::Builder;
use crate::lab::{self, process};
use crate::product;
use crate::suite::Suite;

/// What building needs besides what the product itself does.
const TOOLS: &[(&str, &str)] = &[
    ("debhelper", "dh"),
    ("dpkg-dev", "dpkg-buildpackage"),
    ("lintian", "lintian"),
    ("perl", "pod2man"),
    ("util-linux", "unshare"),
];

const LIMIT: Duration = Duration::from_secs(3600);

/// Where the packages of a suite are put.
pub fn folder(suite: Suite) -> PathBuf {
    product::target(&lab::workspace())
        .join("deb")
        .join(suite.name())
}

/// Builds the packages of a suite, has lintian look at them, and returns them.
pub fn build(suite: Suite) -> Result<Vec<PathBuf>> {
    let root = lab::workspace();
    let out = folder(suite);
    let source = out.join("source");
    fs::create_dir_all(&out).context("cannot create the packages' folder")?;
    for old in packages(&out)? {
        fs::remove_file(&old).with_context(|| format!("cannot remove {}", old.display()))?;
    }
    lay_out(&root, &source, suite)?;
    crates::licences(&root, &source.join("debian/third-party"))?;
    let xen = lab::xen_source(suite)?;
    let log = out.join("build.log");
    fs::write(&log, "").context("cannot begin a log")?;
    make(suite, &out, &source, &xen, &log)?;
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
fn lay_out(root: &Path, source: &Path, suite: Suite) -> Result<()> {
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
fn fill_in(from: &Path, to: &Path, suite: Suite) -> Result<()> {
    let filled = |text: &str| text.replace("@XEN@", suite.xen());
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

/// What lintian says against it keeps a package from being one.
const LINTIAN: &str = "lintian --fail-on error,warning --info --allow-root";

/// Runs dpkg-buildpackage and lintian.
fn make(suite: Suite, out: &Path, source: &Path, xen: &Path, log: &Path) -> Result<()> {
    let builder = Builder::of(suite)?;
    // rustup's Rust isn't a package of this machine.
    let profile = if builder.is_here() {
        lab::install(TOOLS)?;
        lab::upgrade_xen(suite)?;
        "-Ppkg.xl-vne.rustup"
    } else {
        ""
    };
    let script = format!(
        "cd \"$SOURCE\"; dpkg-buildpackage --build=binary --no-sign {profile}; cd ..; \
         {LINTIAN} ./*.deb"
    );
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let variables = [
        ("SOURCE", text(source)),
        ("CARGO_TARGET_DIR", text(&out.join("cargo"))),
        ("XEN_SOURCE", text(xen)),
        ("SUFFIX", suite.suffix().to_owned()),
    ];
    let variables: Vec<(&str, &str)> = variables
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    let mut command = builder.command(&[out, xen], &variables, &script)?;
    process::logged(&mut command, log, LIMIT)
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
    fn maintainer_scripts_are_for_the_suites_xen_only() -> Result<()> {
        let to = std::env::temp_dir().join(format!("xl-vne-debian-test-{}", std::process::id()));
        for &suite in Suite::ALL {
            fill_in(&lab::workspace().join("packaging/debian"), &to, suite)?;
            let script = to.join(format!("xen-vne-{}.preinst", suite.xen()));
            let text = fs::read_to_string(script)?;
            assert!(
                text.contains(&format!("/{}/bin/xl\n", suite.xen_folder())),
                "{text}"
            );
            assert!(!text.contains("@XEN@"), "{text}");
            fs::remove_dir_all(&to)?;
        }
        Ok(())
    }
}
