//! `cargo xtask release-check`: whether what is here can be given to others.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{bail, ensure, Context, Result};

use super::chroot::Chroot;
use super::{build, on_xen, paths};
use crate::lab::cache::{Cache, Key};
use crate::lab::{self, process};
use crate::suite::Suite;

const PACKAGES: &str = include_str!("../../scripts/packages.sh");
/// Which cargo-deny is installed where there is none.
const DENY_VERSION: &str = "0.20.2";

/// Checks all of it; `suite` leaves the packages of others out, and without
/// `lab` README's two commands aren't tried.
pub fn check(suite: Option<Suite>, lab: bool) -> Result<ExitCode> {
    step("the changelog is current", changelog)?;
    step("licences", licences)?;
    let suites = || {
        let all = Suite::ALL.iter().copied();
        all.filter(|one| suite.is_none_or(|only| only == *one))
    };
    for one in suites() {
        step(&format!("packages for {one}"), || packages(one))?;
    }
    if lab {
        for one in suites() {
            step(&format!("packages for {one} on real Xen"), || {
                on_xen::check(one)
            })?;
        }
        step("cargo xtask demo", crate::demo::run)?;
        println!("cargo xtask test ...");
        return crate::test::run(crate::test::Request::default());
    }
    Ok(ExitCode::SUCCESS)
}

fn step(name: &str, does: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("{name} ...");
    does().with_context(|| format!("{name} ... FAILED"))?;
    println!("{name} ... ok");
    Ok(())
}

/// One version everywhere, and all that users type is in the changelog.
fn changelog() -> Result<()> {
    let root = lab::workspace();
    let read = |name: &str| {
        fs::read_to_string(root.join(name)).with_context(|| format!("cannot read {name}"))
    };
    let version = env!("CARGO_PKG_VERSION");
    let changes = read("CHANGELOG.md")?;
    let first = changes.lines().find(|line| line.starts_with("## "));
    let heading = first.unwrap_or_default();
    ensure!(
        heading.split_whitespace().nth(1) == Some(version),
        "CHANGELOG.md begins with '{heading}', and this is version {version}"
    );
    let debian = read("packaging/debian/changelog")?;
    ensure!(
        debian.starts_with(&format!("xl-vne ({version}) ")),
        "packaging/debian/changelog doesn't begin with version {version}"
    );
    let manual = read("packaging/man/xl-vne-snapshot.1.pod")?;
    let verbs = manual
        .split("\n=head1 ")
        .find(|part| part.starts_with("VERBS"));
    let mut depth = 0;
    for line in verbs.context("the manual has no VERBS")?.lines() {
        match line.split(' ').next() {
            Some("=over") => depth += 1,
            Some("=back") => depth -= 1,
            _ => {}
        }
        let verb = line.strip_prefix("=item B<").filter(|_| depth == 1);
        let Some((verb, _)) = verb.and_then(|rest| rest.split_once('>')) else {
            continue;
        };
        let verb = verb.split(' ').next().unwrap_or(verb);
        ensure!(
            changes.contains(verb),
            "CHANGELOG.md doesn't tell of '{verb}'"
        );
    }
    Ok(())
}

fn licences() -> Result<()> {
    let status = Command::new(cargo_deny()?)
        .args(["--workspace", "check", "licenses", "bans", "sources"])
        .current_dir(lab::workspace())
        .status()
        .context("cannot run cargo-deny")?;
    ensure!(status.success(), "cargo deny found something ({status})");
    Ok(())
}

/// The one that is there, or one of our own.
fn cargo_deny() -> Result<PathBuf> {
    if process::installed("cargo-deny") {
        return Ok(PathBuf::from("cargo-deny"));
    }
    let cache = Cache::open()?;
    let key = Key::new("cargo-deny")
        .with("version", DENY_VERSION)
        .finish();
    let dir = cache.artefact("cargo-deny", &key, |out| {
        process::logged(
            Command::new(env!("CARGO"))
                .args(["install", "--locked", "cargo-deny"])
                .args(["--version", DENY_VERSION, "--root"])
                .arg(out)
                .env_remove("CARGO_TARGET_DIR"),
            &out.join("build.log"),
            super::LIMIT,
        )
    })?;
    Ok(dir.join("bin/cargo-deny"))
}

/// Builds them, looks into them, and tries them in a Debian that has nothing else.
fn packages(suite: Suite) -> Result<()> {
    let built = build(suite)?;
    let Some(folder) = built.first().and_then(|package| package.parent()) else {
        bail!("no packages were built");
    };
    paths::check(suite, &built)?;
    install(suite, folder)
}

/// Installs, upgrades, removes and purges what is in a folder.
pub fn install(suite: Suite, folder: &Path) -> Result<()> {
    let log = folder.join("install.log");
    fs::write(&log, "").context("cannot begin a log")?;
    let clean = Chroot::get(suite, &[])?;
    let binds = [(folder, "/packages")];
    clean.run(&binds, &[("XEN", suite.xen())], PACKAGES, &log)?;
    let told = fs::read_to_string(&log).context("cannot read a log")?;
    for line in told.lines().filter(|line| line.starts_with("== ")) {
        println!("  {}", line.trim_start_matches("== "));
    }
    Ok(())
}
