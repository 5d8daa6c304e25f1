//! Runs the cut protocol over a network and hosts that fail in every way, and
//! checks after every step what it promises. `cargo xtask sim` starts it.

mod growth;
mod schedule;
mod world;

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;

use clap::Parser;
use xl_vne::cut::Mutant;

use schedule::Schedule;
use world::{Outcome, Violation, World};

/// Derived seeds with which a simpler schedule is tried.
const TRIES: u64 = 40;
/// Violations after which nothing new is learnt.
const SHOWN_MAX: u64 = 1;
const TRACE_LINES_MAX: usize = 120;

#[derive(Parser)]
#[command(about = "Runs the cut protocol through everything that can go wrong")]
struct Cli {
    /// How many schedules
    #[arg(long, default_value_t = 20_000)]
    schedules: u64,
    /// The first one's seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Break the protocol in this way
    #[arg(long, value_parser = mutant)]
    mutant: Option<Mutant>,
    /// Nothing fails: print as JSON what takes of more and more hosts and members
    /// cost
    #[arg(long, conflicts_with = "mutant")]
    growth: bool,
}

fn mutant(name: &str) -> Result<Mutant, String> {
    let known = Mutant::ALL.iter().find(|(known, _)| *known == name);
    known.map(|(_, mutant)| *mutant).ok_or_else(|| {
        let names: Vec<&str> = Mutant::ALL.iter().map(|(name, _)| *name).collect();
        format!("there are {}", names.join(", "))
    })
}

fn run(schedule: &Schedule, mutant: Option<Mutant>) -> Result<Outcome, Violation> {
    World::new(schedule, mutant, false).run()
}

/// Simplifies a schedule for as long as something is still violated.
fn shrink(schedule: Schedule, mutant: Option<Mutant>) -> Schedule {
    let mut best = schedule;
    loop {
        let simpler = best.simpler().into_iter().find_map(|candidate| {
            (0..TRIES).find_map(|number| {
                let mut candidate = candidate.clone();
                // What is drawn on the way differs from here on.
                candidate.seed = candidate.seed.wrapping_add(number);
                run(&candidate, mutant).is_err().then_some(candidate)
            })
        });
        match simpler {
            Some(simpler) => best = simpler,
            None => return best,
        }
    }
}

fn explain(seed: u64, mutant: Option<Mutant>) {
    let small = shrink(Schedule::draw(seed), mutant);
    let mut world = World::new(&small, mutant, true);
    let Err(violation) = world.run() else {
        println!("seed {seed}: not seen again");
        return;
    };
    println!("seed {seed}, simplified: {small:?}");
    let trace = world.trace();
    let skipped = trace.len().saturating_sub(TRACE_LINES_MAX);
    if skipped > 0 {
        println!("({skipped} lines before these)");
    }
    for line in trace.iter().skip(skipped) {
        println!("{line}");
    }
    println!(
        "{} at {:.3} ms",
        violation.what,
        violation.at_ns as f64 / 1e6
    );
}

/// What all runs came to.
#[derive(Default)]
struct Totals {
    committed: AtomicU64,
    failed: AtomicU64,
    messages: AtomicU64,
    violations: AtomicU64,
    seeds: Mutex<Vec<u64>>,
}

fn run_all(first: u64, count: u64, mutant: Option<Mutant>) -> Totals {
    let totals = Totals::default();
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return;
                }
                let seed = first.wrapping_add(number);
                match run(&Schedule::draw(seed), mutant) {
                    Ok(outcome) => {
                        let add = |to: &AtomicU64, what| to.fetch_add(what, Ordering::Relaxed);
                        add(&totals.committed, outcome.committed);
                        add(&totals.failed, outcome.failed);
                        add(&totals.messages, outcome.messages);
                    }
                    Err(_) => {
                        totals.violations.fetch_add(1, Ordering::Relaxed);
                        if let Ok(mut seeds) = totals.seeds.lock() {
                            seeds.push(seed);
                        }
                    }
                }
            });
        }
    });
    totals
}

/// Hosts and members of takes that are simulated.
const SIZES: [(usize, usize); 7] = [
    (1, 10),
    (1, 100),
    (10, 100),
    (10, 1_000),
    (100, 1_000),
    (100, 10_000),
    (1_000, 10_000),
];

/// Prints what takes of growing size cost, with 1 ms from host to host.
fn grow() -> Result<(), String> {
    // First, when the process has no memory to reuse.
    let hosts = 1_000;
    let coordinator_bytes = growth::coordinator_bytes(hosts)?;
    let mut takes = Vec::new();
    for works in [false, true] {
        for (hosts, members) in SIZES {
            takes.push(growth::run(growth::Size {
                hosts,
                members,
                latency_ns: schedule::MS,
                works,
            })?);
        }
    }
    let told = serde_json::json!({
        "coordinator": { "hosts": hosts, "bytes": coordinator_bytes },
        "takes": takes,
    });
    println!("{told}");
    Ok(())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.growth {
        return match grow() {
            Ok(()) => ExitCode::SUCCESS,
            Err(why) => {
                eprintln!("sim: {why}");
                ExitCode::FAILURE
            }
        };
    }
    let totals = run_all(cli.seed, cli.schedules, cli.mutant);
    let violations = totals.violations.into_inner();
    let mut seeds = totals.seeds.into_inner().unwrap_or_default();
    seeds.sort_unstable();
    for &seed in seeds.iter().take(SHOWN_MAX as usize) {
        explain(seed, cli.mutant);
    }
    println!(
        "{} snapshots, {} failed takes, {} messages",
        totals.committed.into_inner(),
        totals.failed.into_inner(),
        totals.messages.into_inner()
    );
    println!("schedules {}, violations {violations}", cli.schedules);
    match violations {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_schedule_violates_anything_and_many_make_snapshots() {
        let totals = run_all(1, 2_000, None);
        assert_eq!(totals.violations.into_inner(), 0);
        assert!(totals.committed.into_inner() > 500);
    }

    #[test]
    fn every_mutant_is_caught() {
        for (name, mutant) in Mutant::ALL {
            let caught = (1..200_000).any(|seed| run(&Schedule::draw(seed), Some(mutant)).is_err());
            assert!(caught, "{name} is not noticed");
        }
    }

    #[test]
    fn a_run_is_repeatable() {
        let mut one = World::new(&Schedule::draw(7), None, true);
        let mut other = World::new(&Schedule::draw(7), None, true);
        assert_eq!(one.run().is_ok(), other.run().is_ok());
        assert_eq!(one.trace(), other.trace());
    }
}
