//! Kills takes, removals, prunings and copies of the image store at random points, and
//! looks at what is left: all that was there is there and right, nothing is
//! listed that isn't whole, and the next one to come frees what nobody uses.
//!
//! Processes are those of a real take: one that leads, and one a member. Either
//! all of them are killed, or the one that leads alone. A loss of power isn't
//! played: what was written and not synced survives here.

mod guest;
mod judge;
mod work;

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use rustix::process::{kill_process, kill_process_group, test_kill_process_group, Pid, Signal};

use judge::Judge;
use work::Work;

#[derive(Parser)]
struct Arguments {
    /// How often something is killed
    #[arg(long, default_value_t = 200)]
    points: u64,
    /// Where the random numbers begin
    #[arg(long)]
    seed: Option<u64>,
    /// What a process of this program does that is going to be killed
    #[arg(long, hide = true, num_args = 1.., allow_hyphen_values = true)]
    work: Option<Vec<String>>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(words) = arguments.work {
        Work::parse(&words)?.run()?;
        return Ok(ExitCode::SUCCESS);
    }
    let seed = match arguments.seed {
        Some(seed) => seed,
        None => fastrand::u64(..1 << 32),
    };
    println!("seed {seed}");
    let violations = points(arguments.points, seed)?;
    println!("points {}, violations {violations}", arguments.points);
    Ok(match violations {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn points(points: u64, seed: u64) -> Result<u64> {
    let mut random = fastrand::Rng::with_seed(seed);
    let dir = tempfile::tempdir()?;
    let mut judge = Judge::new(dir.path().join("store"));
    let mut usual = Durations::default();
    let (mut violations, mut done, mut cut_short) = (0, 0, [0; 4]);
    while done < points {
        let (work, is_spared) = judge.choose(&mut random)?;
        // The first of each kind shows how long it takes.
        let usual_one = usual.of(&work).filter(|_| !is_spared);
        let limit = usual_one.map(|usual| usual.mul_f64(random.f64() * 1.1));
        let begun = Instant::now();
        let whole = run(&work, limit, random.bool())?;
        if whole {
            usual.learn(&work, begun.elapsed());
        } else {
            cut_short[work.kind()] += 1;
        }
        done += u64::from(limit.is_some());
        for problem in judge.after(&work, whole)? {
            violations += 1;
            println!("point {done}, {work}, {}: {problem}", cut(limit));
        }
    }
    let [takes, removals, prunings, copies] = cut_short;
    println!(
        "killed before they were done: {takes} takes, {removals} removals, {prunings} prunings, \
         {copies} copies"
    );
    Ok(violations)
}

fn cut(limit: Option<Duration>) -> String {
    match limit {
        Some(limit) => format!("killed after {} ms", limit.as_millis()),
        None => String::from("not killed"),
    }
}

/// How long each kind of work takes if nobody kills it: the mean of what was seen,
/// newer ones counting more.
#[derive(Default)]
struct Durations([Option<Duration>; 4]);

impl Durations {
    fn of(&self, work: &Work) -> Option<Duration> {
        self.0[work.kind()]
    }

    fn learn(&mut self, work: &Work, took: Duration) {
        let known = &mut self.0[work.kind()];
        *known = Some(known.map_or(took, |known| (known * 3 + took) / 4));
    }
}

/// Runs the work in processes of its own; `false` if they were killed.
fn run(work: &Work, limit: Option<Duration>, all: bool) -> Result<bool> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("--work")
        .args(work.words())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()?;
    let pid = Pid::from_child(&child);
    let begun = Instant::now();
    let mut killed = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if !killed && limit.is_some_and(|limit| begun.elapsed() >= limit) {
            killed = true;
            // It may have ended just now.
            let _ = match all {
                true => kill_process_group(pid, Signal::KILL),
                false => kill_process(pid, Signal::KILL),
            };
        }
        std::thread::sleep(Duration::from_micros(200));
    };
    // Those that weren't killed come to their end.
    let until = Instant::now() + Duration::from_secs(600);
    while test_kill_process_group(pid).is_ok() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
    if !status.success() && !killed {
        anyhow::bail!("{work} failed");
    }
    Ok(status.success())
}
