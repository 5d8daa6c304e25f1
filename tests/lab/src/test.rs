//! `cargo xtask test`: everything, in the order of how soon it tells.

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::check::{self, Clock, Tally};
use crate::lab;
use crate::product;
use crate::suite::Suite;

/// Which tests.
#[derive(Clone, Copy, Default)]
pub struct Request<'a> {
    /// What hosts in the lab run.
    pub suite: Suite,
    /// Only lab tests, and of these the ones with such names.
    pub lab: Option<&'a str>,
    /// None in the lab.
    pub no_lab: bool,
    /// After how many minutes it's to be over: what can't be done by then is left out.
    pub minutes: Option<u64>,
}

/// Runs the tests.
pub fn run(request: Request<'_>) -> Result<ExitCode> {
    let Request {
        suite, lab, no_lab, ..
    } = request;
    let limit = request
        .minutes
        .map(|minutes| Duration::from_secs(60 * minutes));
    let mut clock = Clock::new(limit.map(|limit| Instant::now() + limit));
    let mut tally = Tally::default();
    if lab.is_none() {
        without_xen(&mut tally)?;
    }
    if !no_lab {
        for group in check::GROUPS {
            check::run(
                suite,
                group,
                lab.unwrap_or_default(),
                &mut tally,
                &mut clock,
            )?;
        }
    }
    let skipped = match tally.skipped {
        0 => String::new(),
        count => format!(", {count} skipped"),
    };
    println!("{} passed, {} failed{skipped}", tally.passed, tally.failed);
    Ok(match tally.failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// Schedules of the cut protocol that are simulated with every run of all
/// tests; a nightly run takes a million.
pub const SCHEDULES: u64 = 300_000;

fn simulator() -> Command {
    let mut command = Command::new(env!("CARGO"));
    command
        .args(["run", "--quiet", "--release", "--package", "sim", "--"])
        .current_dir(lab::workspace());
    command
}

/// `cargo xtask sim`.
pub fn simulate(schedules: u64, seed: Option<u64>, mutant: Option<&str>) -> Result<ExitCode> {
    product::install_tools()?;
    let mut command = simulator();
    command.args(["--schedules", &schedules.to_string()]);
    if let Some(seed) = seed {
        command.args(["--seed", &seed.to_string()]);
    }
    if let Some(mutant) = mutant {
        command.args(["--mutant", mutant]);
    }
    let status = command.status().context("cannot run cargo")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(255)))
}

/// Points at which the image store is killed with every run of all tests.
const FAULTS: u64 = 60;

fn faults() -> Command {
    let mut command = Command::new(env!("CARGO"));
    command
        .args([
            "run",
            "--quiet",
            "--release",
            "--package",
            "store-faults",
            "--",
        ])
        .current_dir(lab::workspace());
    command
}

/// `cargo xtask store-faults`.
pub fn store_faults(points: u64, seed: Option<u64>) -> Result<ExitCode> {
    product::install_tools()?;
    let mut command = faults();
    command.args(["--points", &points.to_string()]);
    if let Some(seed) = seed {
        command.args(["--seed", &seed.to_string()]);
    }
    let status = command.status().context("cannot run cargo")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(255)))
}

/// All that needs no lab.
fn without_xen(tally: &mut Tally) -> Result<()> {
    product::install_tools()?;
    let root = lab::workspace();
    let source = lab::xen_source(Suite::default())?;
    let cargo = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO"));
        command.args(arguments).current_dir(&root);
        command
    };
    let mut loader = Command::new(root.join("xl-ext/tests/run"));
    loader.arg(&source).current_dir(&root);
    let mut simulation = simulator();
    simulation.args(["--schedules", &SCHEDULES.to_string()]);
    let mut killing = faults();
    killing.args(["--points", &FAULTS.to_string()]);
    let steps = [
        ("formatting", cargo(&["fmt", "--all", "--check"])),
        (
            "lints",
            cargo(&[
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ]),
        ),
        ("unit tests", cargo(&["test", "--quiet", "--workspace"])),
        ("simulated schedules of the cut", simulation),
        ("image store, killed at any point", killing),
        ("plugin loader and ABI in C", loader),
    ];
    for (name, mut command) in steps {
        let start = Instant::now();
        println!("test {name} ...");
        // A step that can't be started has failed; the others still tell.
        let good = command.status().is_ok_and(|status| status.success());
        let word = if good { "ok" } else { "FAILED" };
        println!("test {name} ... {word} ({} s)", start.elapsed().as_secs());
        tally.count(good);
    }
    Ok(())
}
