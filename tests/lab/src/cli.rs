//! The command line.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};

use crate::lab::{self, Flavour, Guest, Lab, Life, Shape};
use crate::suite::Suite;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's task runner")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Set everything up, and show what this is about on real Xen
    Demo,
    /// Run all tests, those on real Xen included
    Test {
        /// Only the lab tests, and only those whose names contain this (or one
        /// of these, separated by commas)
        #[arg(long)]
        lab: Option<String>,
        /// Without those that need the lab
        #[arg(long, conflicts_with = "lab")]
        no_lab: bool,
        /// Each thing as often and in as many ways as the documents say; without
        /// this, some of it
        #[arg(long, conflicts_with = "no_lab")]
        full: bool,
        /// Debian suite of the lab's hosts
        #[arg(long, value_enum, default_value_t, conflicts_with = "no_lab")]
        suite: Suite,
        /// End within so many minutes: lab tests that would take longer, at the
        /// machine's pace, are skipped
        #[arg(long, conflicts_with = "no_lab")]
        minutes: Option<u64>,
    },
    /// Run the cut protocol through everything that can go wrong
    Sim {
        /// How many schedules: a million takes some minutes
        #[arg(long, default_value_t = crate::test::SCHEDULES)]
        schedules: u64,
        /// The first one's seed
        #[arg(long)]
        seed: Option<u64>,
        /// Break the protocol in this way, to see that it's noticed
        #[arg(long)]
        mutant: Option<String>,
    },
    /// Kill what works on the image store, and look at what is left
    StoreFaults {
        /// How often something is killed
        #[arg(long, default_value_t = 200)]
        points: u64,
        /// Where the random numbers begin
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Measure what the project claims: a table, targets and plots
    Bench {
        /// Few repetitions, only what the targets need, and none begun after 15 minutes
        #[arg(long)]
        quick: bool,
        /// Write all figures and the targets to this file
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Write the plots to this folder; cargo's own, without this
        #[arg(long, value_name = "DIR")]
        plots: Option<PathBuf>,
        /// Begin no further repetition after so many minutes, also of a quick run
        #[arg(long, value_name = "N")]
        minutes: Option<u64>,
        /// Only these parts, separated by commas
        #[arg(long, value_name = "PARTS", value_delimiter = ',', value_parser = parts())]
        only: Vec<String>,
    },
    /// Build the product, laid out as it's installed
    Build {
        /// Debian suite
        #[arg(long, value_enum, default_value_t)]
        suite: Suite,
    },
    /// Build Debian packages, into target/deb
    Deb {
        /// Debian suite
        #[arg(long, value_enum, default_value_t)]
        suite: Suite,
        /// Build none: try those that were built on two hosts with real Xen
        #[arg(long)]
        try_on_xen: bool,
    },
    /// Find out whether this can be released: changelog, licences, packages, and
    /// the README's commands
    ReleaseCheck {
        /// Only the packages of this Debian suite
        #[arg(long, value_enum)]
        suite: Option<Suite>,
        /// Without the README's commands, which take more than an hour
        #[arg(long)]
        no_lab: bool,
    },
    /// Real Xen hosts under QEMU
    #[command(subcommand)]
    Lab(LabVerb),
    /// Print the folder of the distribution's Xen source, fetched when missing
    XenSource {
        /// Debian suite
        #[arg(long, value_enum, default_value_t)]
        suite: Suite,
    },
}

#[derive(Args)]
struct ShapeArgs {
    /// Number of Xen hosts, all on one network
    #[arg(long, default_value_t = 1)]
    hosts: usize,
    /// Debian suite of the hosts
    #[arg(long, value_enum, default_value_t)]
    suite: Suite,
    /// Emulator and hypervisor
    #[arg(long, value_enum, default_value = "pv")]
    flavour: Flavour,
}

impl ShapeArgs {
    fn shape(self) -> Shape {
        Shape {
            hosts: self.hosts,
            suite: self.suite,
            flavour: self.flavour,
        }
    }
}

#[derive(Subcommand)]
enum LabVerb {
    /// Install and build all that a lab needs
    Prepare {
        #[command(flatten)]
        shape: ShapeArgs,
        /// Renew the package lists first, so that newer packages are used
        #[arg(long)]
        refresh: bool,
    },
    /// Bring the lab up; does nothing when it's up already
    Up {
        #[command(flatten)]
        shape: ShapeArgs,
        /// End the lab when standard input closes, and wait for that
        #[arg(long)]
        tied: bool,
    },
    /// Say what's up
    Status {
        /// For scripts
        #[arg(long)]
        json: bool,
    },
    /// End the lab
    Down,
    /// Run a command in a host's dom0; one word is a shell line, several are
    /// a program and its arguments
    Sh {
        /// The host: 0, 1, …
        host: usize,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Copy a file or folder into a host
    Put {
        /// The host: 0, 1, …
        host: usize,
        /// The path here
        source: PathBuf,
        /// The path in the host
        destination: String,
    },
    /// Copy a file or folder out of a host
    Get {
        /// The host: 0, 1, …
        host: usize,
        /// The path in the host
        source: String,
        /// The path here
        destination: PathBuf,
    },
    /// Build the product and install it on a host
    Install {
        /// The host: 0, 1, …
        host: usize,
    },
    /// Start a guest and wait until it's ready
    Guest(GuestArgs),
    /// Print all that a guest's console, or without a name the host's own, said
    Console {
        /// The host: 0, 1, …
        host: usize,
        /// The guest
        name: Option<String>,
    },
    /// Cut or mend the wire from one host to another (one way)
    Link {
        /// The sending host
        from: usize,
        /// The receiving host
        to: usize,
        /// Whether frames pass
        #[arg(value_parser = ["up", "down"])]
        state: String,
    },
    /// Pull a host's plug, or have it boot again from its disk
    Power {
        /// The host: 0, 1, …
        host: usize,
        /// Whether it runs
        #[arg(value_parser = ["on", "off"])]
        state: String,
    },
    /// Own a lab; started by `up`
    #[command(hide = true)]
    Supervise {
        /// What to do, in JSON
        job: String,
    },
}

#[derive(Args)]
struct GuestArgs {
    /// The host: 0, 1, …
    host: usize,
    /// The domain's name
    name: String,
    /// Type of the domain; as the lab's flavour when not given
    #[arg(long = "type", value_enum)]
    kind: Option<Flavour>,
    /// Memory in MiB
    #[arg(long, default_value_t = 256)]
    memory: u32,
    /// Virtual processors
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// Pages to write a second, each verified before it's written again
    #[arg(long, default_value_t = 0)]
    dirty: u32,
    /// Memory in MiB over which the written pages are spread
    #[arg(long, default_value_t = 64)]
    working_set: u32,
    /// Address in 10.77.0.0/16; follows from host and name when not given
    #[arg(long)]
    ip: Option<Ipv4Addr>,
    /// The VNE whose own network it's on, if it isn't on the hosts'
    #[arg(long)]
    vne: Option<String>,
    /// A disk, as xl wants it: phy:/dev/vg0/web,xvda,w
    #[arg(long)]
    disk: Vec<String>,
    /// Local file to be found at /BASENAME in the guest
    #[arg(long)]
    add: Vec<PathBuf>,
    /// The workload and its arguments (`vne-guest --help` in a host lists
    /// them), or an added file's path and its arguments
    #[arg(last = true)]
    workload: Vec<String>,
}

fn parts() -> PossibleValuesParser {
    PossibleValuesParser::new(crate::bench::parts())
}

/// Reads the command line and does what it says.
pub fn run() -> Result<ExitCode> {
    match Cli::parse().verb {
        Verb::Demo => crate::demo::run().map(|()| ExitCode::SUCCESS),
        Verb::Test {
            lab,
            no_lab,
            full,
            suite,
            minutes,
        } => {
            crate::scale::set_full(full);
            crate::test::run(crate::test::Request {
                suite,
                lab: lab.as_deref(),
                no_lab,
                minutes,
            })
        }
        Verb::Sim {
            schedules,
            seed,
            mutant,
        } => crate::test::simulate(schedules, seed, mutant.as_deref()),
        Verb::StoreFaults { points, seed } => crate::test::store_faults(points, seed),
        Verb::Bench {
            quick,
            json,
            plots,
            minutes,
            only,
        } => crate::bench::run(&crate::bench::Request {
            scale: crate::bench::Scale {
                quick,
                until: minutes
                    .or_else(|| quick.then_some(crate::bench::QUICK_MINUTES))
                    .map(|minutes| Instant::now() + Duration::from_secs(60 * minutes)),
            },
            only,
            json,
            plots,
        }),
        Verb::Build { suite } => {
            println!("{}", crate::product::stage(suite)?.display());
            Ok(ExitCode::SUCCESS)
        }
        Verb::Deb { suite, try_on_xen } => {
            if try_on_xen {
                crate::package::on_xen::check(suite)?;
                println!("installed, taken, restored, purged: as it should be");
                return Ok(ExitCode::SUCCESS);
            }
            for package in crate::package::build(suite)? {
                println!("{}", package.display());
            }
            Ok(ExitCode::SUCCESS)
        }
        Verb::ReleaseCheck { suite, no_lab } => crate::package::release::check(suite, !no_lab),
        Verb::Lab(verb) => lab_verb(verb),
        Verb::XenSource { suite } => {
            println!("{}", lab::xen_source(suite)?.display());
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn lab_verb(verb: LabVerb) -> Result<ExitCode> {
    match verb {
        LabVerb::Prepare { shape, refresh } => lab::prepare(&shape.shape(), refresh)?,
        LabVerb::Up { shape, tied } => up(&shape.shape(), tied)?,
        LabVerb::Status { json } => return status(json),
        LabVerb::Down => {
            if !lab::down()? {
                eprintln!("lab: nothing is up");
            }
        }
        LabVerb::Sh { host, command } => {
            let line = match command.as_slice() {
                [line] => line.clone(),
                words => lab::shell_line(words),
            };
            let status = Lab::attach()?.through(host, &line)?;
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            return Ok(ExitCode::from(code.unwrap_or(255)));
        }
        LabVerb::Put {
            host,
            source,
            destination,
        } => Lab::attach()?.put(host, &source, &destination)?,
        LabVerb::Get {
            host,
            source,
            destination,
        } => Lab::attach()?.get(host, &source, &destination)?,
        LabVerb::Install { host } => {
            let lab = Lab::attach()?;
            crate::product::install(&lab, host, &crate::product::stage(lab.suite())?)?;
        }
        LabVerb::Guest(args) => guest(args)?,
        LabVerb::Console { host, name } => {
            let lab = Lab::attach()?;
            let text = match name {
                Some(name) => lab.console(host, &name)?,
                None => lab.host_console(host)?,
            };
            print!("{text}");
        }
        LabVerb::Link { from, to, state } => Lab::attach()?.link(from, to, state == "up")?,
        LabVerb::Power { host, state } => match state.as_str() {
            "on" => Lab::attach()?.power_on(host)?,
            _ => Lab::attach()?.power_off(host)?,
        },
        LabVerb::Supervise { job } => {
            let job = serde_json::from_str(&job).context("cannot read the supervisor's job")?;
            lab::supervise(&job)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn up(shape: &Shape, tied: bool) -> Result<()> {
    let was_up = Lab::find()?.is_some();
    let life = if tied { Life::Tied } else { Life::Own };
    let lab = Lab::up(shape, life)?;
    eprintln!(
        "lab: {} ({shape})",
        if was_up { "is up already" } else { "up" }
    );
    if tied {
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())
            .context("cannot wait for the end of standard input")?;
        lab.down()?;
    }
    Ok(())
}

fn status(json: bool) -> Result<ExitCode> {
    match Lab::find()? {
        Some(lab) if json => {
            let text = serde_json::to_string(lab.status()).context("cannot word the status")?;
            println!("{text}");
        }
        Some(lab) => {
            println!(
                "up: {}; supervisor is process {}",
                lab.status().shape,
                lab.status().pid
            );
            for host in &lab.status().off {
                println!("host {host} is off");
            }
        }
        None => {
            println!("{}", if json { "null" } else { "nothing is up" });
            return Ok(ExitCode::from(1));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn guest(args: GuestArgs) -> Result<()> {
    let guest = Guest {
        name: args.name,
        kind: args.kind,
        memory_mib: args.memory,
        vcpus: args.vcpus,
        dirty_pages_per_s: args.dirty,
        working_set_mib: args.working_set,
        ip: args.ip,
        mac: None,
        vne: args.vne,
        disks: args.disk,
        add: args.add,
        workload: args.workload,
    };
    let lab = Lab::attach()?;
    lab.guest(args.host, &guest)?;
    println!("{} {}", guest.name, guest.address(args.host));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
