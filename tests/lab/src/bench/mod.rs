//! `cargo xtask bench`: what the project claims, measured.

pub(crate) mod downtime;
pub(crate) mod figures;
mod hosts;
mod hover;
mod nolab;
pub(crate) mod pause;
mod plot;
mod restore;
mod targets;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{bail, Context, Result};

use crate::check::vne::Vne;
use crate::lab::{self, Lab, Life, Shape};
use crate::product;
use figures::Book;

/// When a quick run begins no further repetition, if nothing else is asked for.
pub const QUICK_MINUTES: u64 = 15;

/// How much is done.
pub struct Scale {
    /// Few repetitions, and only what targets need.
    pub quick: bool,
    /// When no further repetition is begun.
    pub until: Option<Instant>,
}

impl Scale {
    /// Repetitions in a quick run and in a whole one.
    fn rounds(&self, quick: usize, whole: usize) -> usize {
        if self.quick {
            quick
        } else {
            whole
        }
    }

    /// Whether this repetition is one too many: there is one that counts already, and
    /// no time for another.
    fn is_over(&self, round: usize) -> bool {
        round > 1 && self.until.is_some_and(|until| Instant::now() > until)
    }
}

/// What is asked for.
pub struct Request {
    /// How much.
    pub scale: Scale,
    /// Only these parts; without any, all.
    pub only: Vec<String>,
    /// Where the figures go as JSON.
    pub json: Option<PathBuf>,
    /// The folder for plots; without it, one in cargo's.
    pub plots: Option<PathBuf>,
}

enum How {
    /// Without Xen.
    Alone(fn(&Scale, &mut Book) -> Result<()>),
    /// In a lab of so many hosts, without guests of its own.
    Lab(usize, fn(&Vne, &Scale, &mut Book) -> Result<()>),
}

/// Something that can be measured by itself.
struct Part {
    name: &'static str,
    targets: &'static [&'static str],
    how: How,
}

/// In this order; those that share a lab are next to each other.
const PARTS: &[Part] = &[
    Part {
        name: "protocol",
        targets: nolab::PROTOCOL_TARGETS,
        how: How::Alone(nolab::protocol),
    },
    Part {
        name: "store",
        targets: nolab::STORE_TARGETS,
        how: How::Alone(nolab::store),
    },
    Part {
        name: "stream",
        targets: &[],
        how: How::Alone(nolab::stream),
    },
    Part {
        name: "downtime",
        targets: downtime::TARGETS,
        how: How::Lab(1, downtime::run),
    },
    Part {
        name: "guest",
        targets: hover::TARGETS,
        how: How::Lab(1, hover::run),
    },
    Part {
        name: "restore",
        targets: restore::TARGETS,
        how: How::Lab(1, restore::run),
    },
    Part {
        name: "hosts",
        targets: hosts::TARGETS,
        how: How::Lab(2, hosts::run),
    },
];

/// The parts' names.
pub fn parts() -> impl Iterator<Item = &'static str> {
    PARTS.iter().map(|part| part.name)
}

/// Measures what is asked for, prints the table, and writes JSON and plots. A part
/// that fails doesn't keep the others from being measured; the exit status tells.
pub fn run(request: &Request) -> Result<ExitCode> {
    let start = Instant::now();
    let mut book = Book::default();
    let mut failed = false;
    let wanted = |part: &&Part| {
        let only = &request.only;
        only.is_empty() || only.iter().any(|name| name == part.name)
    };
    let chosen: Vec<&Part> = PARTS.iter().filter(wanted).collect();
    let mut lab: Option<(usize, Vne)> = None;
    for part in &chosen {
        eprintln!("bench: {}", part.name);
        book.begin(part.name);
        let done = match part.how {
            How::Alone(work) => work(&request.scale, &mut book),
            How::Lab(hosts, work) => {
                in_lab(&mut lab, hosts).and_then(|vne| work(vne, &request.scale, &mut book))
            }
        };
        if let Err(error) = done {
            failed = true;
            eprintln!("bench: {} fails: {error:#}", part.name);
            book.miss(part.targets, &reason(part.name, &error));
        }
        // Each time: whoever ends a run that takes hours keeps what there is.
        if let Some(path) = &request.json {
            save(path, &book, request.scale.quick, start.elapsed().as_secs())?;
        }
    }
    down(lab)?;
    print!("{}", book.table());
    let seconds = start.elapsed().as_secs();
    let folder = match &request.plots {
        Some(folder) => folder.clone(),
        None => product::target(&lab::workspace()).join("bench/plots"),
    };
    let count = plot::write(&book, &folder)?;
    eprintln!("bench: {seconds} s; {count} plots in {}", folder.display());
    Ok(match failed {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

/// What failed, in a line.
fn reason(part: &str, error: &anyhow::Error) -> String {
    const CHARACTERS_MAX: usize = 160;
    let text = format!("{part} failed: {error}");
    let line = text.lines().next().unwrap_or_default();
    line.chars().take(CHARACTERS_MAX).collect()
}

fn save(path: &Path, book: &Book, quick: bool, seconds: u64) -> Result<()> {
    let text = serde_json::to_string_pretty(&book.json(quick, seconds))
        .context("cannot word the figures")?;
    std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

/// The lab of so many hosts; another one that is up goes first.
fn in_lab(lab: &mut Option<(usize, Vne)>, hosts: usize) -> Result<&Vne> {
    if lab.as_ref().is_some_and(|(count, _)| *count != hosts) {
        down(lab.take())?;
    }
    if lab.is_none() {
        *lab = Some((hosts, up(hosts)?));
    }
    match lab {
        Some((_, vne)) => Ok(vne),
        None => bail!("the lab has gone"),
    }
}

fn up(hosts: usize) -> Result<Vne> {
    let shape = Shape {
        hosts,
        ..Shape::default()
    };
    let stage = product::stage(shape.suite)?;
    let measure = product::example(shape.suite, "measure")?;
    let lab = Lab::up(&shape, Life::Tied)?;
    for host in 0..hosts {
        product::install(&lab, host, &stage)?;
        lab.put(host, &measure, "/usr/local/bin/measure")?;
    }
    Ok(Vne::bare(lab, hosts))
}

fn down(lab: Option<(usize, Vne)>) -> Result<()> {
    match lab {
        Some((_, vne)) => vne.lab.down(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_target_is_measured_by_exactly_one_part() {
        let measured: Vec<&str> = PARTS
            .iter()
            .flat_map(|part| part.targets)
            .copied()
            .collect();
        let all: BTreeSet<&str> = targets::TARGETS.iter().map(|target| target.name).collect();
        assert_eq!(measured.len(), all.len());
        assert_eq!(measured.into_iter().collect::<BTreeSet<_>>(), all);
    }
}
