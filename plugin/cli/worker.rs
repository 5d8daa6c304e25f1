//! The hidden command: what the engine starts in processes of their own,
//! because it needs libxl.

use std::ffi::{c_int, OsString};
use std::io::Write;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

use super::{net, power, start_log, Failure, Host};
use crate::domain::recover::recover_domains;
use crate::domain::worker::{self, Helpers};
use crate::image::Name;
use crate::sentence::sentence;
use crate::sidecar::guard;
use crate::sidecar::journal::{JournalDomain, Register, RestoreStage};

/// Internal to xl vne-snapshot.
#[derive(Debug, Parser)]
#[command(name = "xl vne-worker", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    work: Work,
}

#[derive(Debug, Subcommand)]
enum Work {
    /// Capture one domain; orders and answers by the socket that is stdin
    Capture { domain: String },
    /// Wait for the take with this journal to end, and clean up after it
    Guard { folder: PathBuf },
    /// Clean up after all takes that were killed
    Sweep,
    /// Bring domains back to running, each given as DOMID=UUID
    Recover {
        /// They may have been asked to suspend
        #[arg(long)]
        asked: bool,
        domains: Vec<String>,
    },
    /// Limit domains' processors, each given as DOMID=UUID=PERCENT
    Cap { caps: Vec<String> },
    /// Destroy domains that were built paused, each given as NAME=UUID
    Discard { domains: Vec<String> },
    /// Print what is known of domains that were built paused, as JSON
    Facts { domains: Vec<String> },
    /// Print what this host has, and which of these domains it has already, as JSON
    Host { domains: Vec<String> },
    /// Set domains running that were built paused
    Release { domains: Vec<String> },
    /// Print what the daemon has to know, as JSON
    Describe { vne: Option<Name> },
    /// Make a VNE's network on this host, and print the name of its bridge
    NetUp { vne: Name },
    /// Remove a VNE's network from this host unless it's in use
    NetDown { vne: Name },
    /// Have the networks that are there follow what is configured
    NetFollow,
    /// Take snapshots of the VNEs that vne.conf names, and destroy their members
    AtShutdown,
    /// Restore what was taken at shutdown
    AtBoot,
}

/// `xl vne-worker`.
pub fn main(host: &Host, arguments: Vec<OsString>) -> c_int {
    start_log(host.verbosity);
    super::find_key(host);
    let parsed = match Arguments::try_parse_from(arguments) {
        Ok(parsed) => parsed,
        Err(error) => {
            let printed = error.print();
            return if printed.is_ok() {
                error.exit_code()
            } else {
                1
            };
        }
    };
    match run(host, &parsed.work) {
        Ok(()) => 0,
        Err(error) => {
            log::error!("{}", sentence(error.as_ref()));
            1
        }
    }
}

fn run(host: &Host, work: &Work) -> Result<(), Failure> {
    match work {
        Work::Capture { domain } => {
            let helpers = Helpers::in_folder(&host.libexec_dir);
            Ok(worker::run(&host.xl, domain, &helpers, take_stdin()?)?)
        }
        Work::Guard { folder } => {
            outlive_the_take()?;
            Ok(guard::watch(&host.xl, &host.program(), folder)?)
        }
        Work::Sweep => {
            let register = Register::open(&host.run_dir)?;
            let program = host.program();
            Ok(register.sweep(|orphan| guard::clean_up(&host.xl, &program, orphan))?)
        }
        Work::Recover { asked, domains } => {
            let parse = |text: &'_ String| -> Option<(u32, String)> {
                let (domid, uuid) = text.split_once('=')?;
                Some((domid.parse().ok()?, uuid.to_owned()))
            };
            let domains: Vec<_> = domains.iter().filter_map(parse).collect();
            let domains: Vec<_> = domains
                .iter()
                .map(|(id, uuid)| (*id, uuid.as_str()))
                .collect();
            Ok(recover_domains(&host.xl, &domains, *asked)?)
        }
        Work::Cap { caps } => cap(host, caps),
        Work::Discard { domains } => {
            let parse = |text: &String| {
                let (name, uuid) = text.split_once('=')?;
                Some(JournalDomain {
                    name: name.to_owned(),
                    domid: 0,
                    uuid: uuid.to_owned(),
                })
            };
            let domains: Vec<_> = domains.iter().filter_map(parse).collect();
            let building = RestoreStage::Building;
            Ok(guard::end_restore(
                &host.xl,
                &host.program(),
                &domains,
                building,
            )?)
        }
        Work::Facts { domains } => {
            let facts = domains.iter().map(|name| {
                let mut facts = host.xl.built_facts(name)?;
                // Not asked for, and it may have passwords.
                facts.config_json.clear();
                Ok(facts)
            });
            super::print_json(&facts.collect::<Result<Vec<_>, Failure>>()?)
        }
        Work::Host { domains } => super::print_json(&host.xl.host_facts(domains)?),
        Work::Release { domains } => release(host, domains),
        Work::Describe { vne } => super::print_json(&super::describe(host, vne.as_ref())?),
        Work::NetUp { vne } => net::up(host, vne),
        Work::NetDown { vne } => net::down(host, vne),
        Work::NetFollow => net::follow(host),
        Work::AtShutdown => power::shutdown(host),
        Work::AtBoot => power::boot(host),
    }
}

/// A domain that has gone, or another one with its number, needs nothing.
fn cap(host: &Host, caps: &[String]) -> Result<(), Failure> {
    for text in caps {
        let mut parts = text.split('=');
        let (Some(domid), Some(uuid), Some(cap)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(format!("{text}: DOMID=UUID=PERCENT is expected").into());
        };
        let domid = domid.parse()?;
        match host.xl.state(domid) {
            Ok(state) if state.uuid == uuid => host.xl.set_cap(domid, cap.parse()?)?,
            Ok(_) | Err(crate::domain::xl::Error::Gone(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// All numbers are looked up first, so that nothing but the hypercalls lies
/// between the first and the last domain.
fn release(host: &Host, names: &[String]) -> Result<(), Failure> {
    let mut domids = Vec::new();
    for name in names {
        domids.push(host.xl.find(name)?);
    }
    let mut result = Ok(());
    for domid in domids {
        if let Err(error) = host.xl.unpause(domid) {
            log::error!("domain {domid}: {}", sentence(&error));
            result = Err(error);
        }
    }
    Ok(result?)
}

/// Makes stdin's socket our own and puts /dev/null in its place: a child must
/// not keep it open, and the engine must see the end of it with this process.
fn take_stdin() -> Result<UnixStream, Failure> {
    let stdin = std::io::stdin();
    let socket = rustix::io::fcntl_dupfd_cloexec(stdin.as_fd(), 3)?;
    let null = std::fs::File::open("/dev/null")?;
    // SAFETY: descriptor 0 is open (it was just duplicated) and isn't closed
    // here: the value is leaked below.
    let mut zero = unsafe { OwnedFd::from_raw_fd(0) };
    let replaced = rustix::io::dup2(&null, &mut zero);
    std::mem::forget(zero);
    replaced?;
    Ok(UnixStream::from(socket))
}

/// In the way of the scheduler's `nice`: before all that a take does itself.
const GUARD_NICE: i32 = -10;

/// A signal or a hang-up that ends the take must not end its guard, nor may work that
/// the take has left keep it from the processors.
fn outlive_the_take() -> Result<(), Failure> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, std::sync::Arc::default())?;
    }
    // Also not a 'killall xl'.
    rustix::thread::set_name(c"vne-guard")?;
    if let Err(error) = rustix::process::setpriority_process(None, GUARD_NICE) {
        // It's slower, then.
        log::debug!("the guard's priority: {error}");
    }
    let mut ready = std::io::stdout();
    ready.write_all(b"\n")?;
    ready.flush()?;
    Ok(())
}
