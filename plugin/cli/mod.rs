//! What users type: `xl vne-snapshot VERB`, one file a verb.
//!
//! Exit status as xl's: 0 success, 1 failure, 2 arguments that make no sense.

mod config;
mod copy;
mod diff;
mod export;
mod hooks;
mod hostconf;
mod import;
mod list;
mod meter;
mod net;
mod peer;
mod power;
mod progress;
mod prune;
mod remove;
mod restore;
mod show;
mod statements;
mod status;
mod take;
mod timeline;
mod units;
mod verify;
mod worker;
mod xlcfg;

pub use worker::main as worker_main;

use std::ffi::{c_int, OsString};
use std::io::Write;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::domain::xl::Xl;
use crate::image::{Name, Snapshot, SnapshotId, Store};
use crate::sentence::sentence;
use crate::sidecar::vned::{Described, VneDescription};
use crate::sidecar::Program;

/// What xl tells its plugins.
pub struct Host {
    /// xl's libxl context.
    pub xl: Xl,
    /// The running xl.
    pub xl_path: PathBuf,
    /// Xen's folder of configuration files.
    pub config_dir: PathBuf,
    /// Xen's folder for what is gone after a reboot.
    pub run_dir: PathBuf,
    /// Xen's folder of private programs.
    pub libexec_dir: PathBuf,
    /// `xl -N`.
    pub dry_run: bool,
    /// How often `xl -v`.
    pub verbosity: u32,
}

impl Host {
    /// This host's name among those of a VNE.
    fn name(&self) -> Result<Name, Failure> {
        Ok(hostconf::load(&self.config_dir)?.name)
    }

    fn program(&self) -> Program {
        Program {
            xl: self.xl_path.clone(),
            verbosity: self.verbosity,
        }
    }
}

/// An error that ends a verb, already a sentence.
type Failure = Box<dyn std::error::Error>;

/// Consistent live snapshots of a set of networked domains (a virtual
/// networked environment, VNE).
#[derive(Debug, Parser)]
#[command(
    name = "xl vne-snapshot",
    bin_name = "xl vne-snapshot",
    version,
    disable_help_subcommand = true,
    after_help = "A VNE is described by /etc/xen/vne/NAME.cfg. See xl-vne-snapshot(1)."
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Capture all members of a VNE at one consistent point, live
    Take(take::Arguments),
    /// List the snapshots of this host
    List(list::Arguments),
    /// Show one snapshot
    Show(show::Arguments),
    /// Show what goes on
    Status(status::Arguments),
    /// Show the networks of VNEs on this host
    Net(net::Arguments),
    /// Bring all members of a snapshot back
    Restore(restore::Arguments),
    /// Read snapshots and compare all of it with what was written
    Verify(verify::Arguments),
    /// Show how much has changed from one snapshot to another
    Diff(diff::Arguments),
    /// Copy what this host has of a snapshot into another host's store
    Copy(copy::Arguments),
    /// Delete snapshots
    Remove(remove::Arguments),
    /// Delete old snapshots by a rule
    Prune(prune::Arguments),
    /// Write a member as a file for stock 'xl restore'
    Export(export::Arguments),
    /// Make a snapshot of files that 'xl save' has written
    Import(import::Arguments),
    /// Say which other hosts this one talks to, and who it is itself
    Peer(peer::Arguments),
}

/// The command line of `xl vne-snapshot`, for whoever checks that the manual
/// and the shell's completion know all of it.
pub fn command() -> clap::Command {
    <Arguments as clap::CommandFactory>::command()
}

/// `xl vne-snapshot`.
pub fn main(host: &Host, arguments: Vec<OsString>) -> c_int {
    start_log(host.verbosity);
    find_key(host);
    let parsed = match Arguments::try_parse_from(arguments) {
        Ok(parsed) => parsed,
        Err(error) => {
            // To stdout and 0 for help, else to stderr and 2.
            let printed = error.print();
            return if printed.is_ok() {
                error.exit_code()
            } else {
                1
            };
        }
    };
    let result = match &parsed.verb {
        Verb::Take(arguments) => take::run(host, arguments),
        Verb::List(arguments) => list::run(host, arguments),
        Verb::Show(arguments) => show::run(host, arguments),
        Verb::Status(arguments) => status::run(host, arguments),
        Verb::Net(arguments) => net::run(host, arguments),
        Verb::Restore(arguments) => restore::run(host, arguments),
        Verb::Verify(arguments) => verify::run(host, arguments),
        Verb::Diff(arguments) => diff::run(host, arguments),
        Verb::Copy(arguments) => copy::run(host, arguments),
        Verb::Remove(arguments) => remove::run(host, arguments),
        Verb::Prune(arguments) => prune::run(host, arguments),
        Verb::Export(arguments) => export::run(host, arguments),
        Verb::Import(arguments) => import::run(host, arguments),
        Verb::Peer(arguments) => peer::run(host, arguments),
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            // A closed stdout is how 'head' says that it has enough.
            let _ = writeln!(
                std::io::stderr(),
                "xl vne-snapshot: {}",
                sentence(error.as_ref())
            );
            1
        }
    }
}

/// Says where the key of this host's stores is to be looked for, once it's needed.
fn find_key(host: &Host) {
    let config_dir = host.config_dir.clone();
    crate::image::find_host_key(Box::new(move || {
        let conf = hostconf::load(&config_dir);
        conf.map(|conf| conf.store_key)
            .map_err(|error| sentence(error.as_ref()))
    }));
}

/// Warnings by default; each `-v` of xl's shows more.
fn start_log(verbosity: u32) {
    let level = match verbosity {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    };
    let started = env_logger::Builder::new()
        .filter_level(level)
        .format(|out, record| {
            writeln!(
                out,
                "xl vne-snapshot: {}: {}",
                record.level().as_str().to_lowercase(),
                record.args()
            )
        })
        .try_init();
    // Only a second logger in one process fails, and then one is there.
    drop(started);
}

/// What the daemon is told of the configuration, since it can't read it.
fn describe(host: &Host, vne: Option<&Name>) -> Result<Described, Failure> {
    let conf = hostconf::load(&host.config_dir)?;
    let vne = match vne {
        Some(vne) => match config::VneConfig::find(host, vne)? {
            Some(config) => Some(VneDescription {
                members: take::placed(&config.members, &conf.name)?,
                store: config.store.unwrap_or_else(default_root),
            }),
            None => None,
        },
        None => None,
    };
    let mut stores = vec![default_root()];
    stores.extend(config::VneConfig::all_stores(host));
    stores.sort();
    stores.dedup();
    Ok(Described {
        config_dir: host.config_dir.clone(),
        run_dir: host.run_dir.clone(),
        conf,
        vne,
        stores,
    })
}

fn default_root() -> PathBuf {
    PathBuf::from(crate::image::DEFAULT_ROOT)
}

/// Where the images are, and which VNE is meant.
#[derive(Debug, clap::Args)]
struct StoreArgument {
    /// Folder of the snapshots [default: the VNE's 'store', or /var/lib/xen-vne]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
}

impl StoreArgument {
    /// The store that the command line names, or the VNE's config, or the
    /// usual one.
    fn resolve(&self, host: &Host, vne: Option<&Name>) -> Result<PathBuf, Failure> {
        if let Some(store) = &self.store {
            return Ok(store.clone());
        }
        let configured = match vne {
            Some(vne) => config::VneConfig::find(host, vne)?.and_then(|config| config.store),
            None => None,
        };
        Ok(configured.unwrap_or_else(default_root))
    }

    /// Opens that store to look for what is there already. One that is named
    /// here must exist; the others do once there is a snapshot.
    fn open(&self, host: &Host, vne: Option<&Name>) -> Result<Store, Failure> {
        let root = self.resolve(host, vne)?;
        Ok(match self.store {
            Some(_) => Store::open_existing(&root)?,
            None => Store::open(&root)?,
        })
    }
}

/// `VNE` or `VNE@ID`: a snapshot, the newest if none is named.
#[derive(Debug, Clone)]
struct SnapshotName {
    vne: Name,
    id: Option<SnapshotId>,
}

impl std::str::FromStr for SnapshotName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (vne, id) = match text.split_once('@') {
            Some((vne, "latest")) => (vne, None),
            Some((vne, id)) => (vne, Some(id.parse().map_err(|e| format!("{e}"))?)),
            None => (text, None),
        };
        let vne = Name::new(vne).map_err(|error| sentence(&error))?;
        Ok(Self { vne, id })
    }
}

impl SnapshotName {
    fn open(&self, store: &Store) -> Result<Snapshot, Failure> {
        let catalogue = store.catalogue();
        Ok(match &self.id {
            Some(id) => catalogue.get(&self.vne, id)?,
            None => catalogue.newest(&self.vne)?,
        })
    }
}

/// Prints for people, and stays quiet when the reader has gone.
fn print(text: &str) -> Result<(), Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// Prints for scripts.
fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod json_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn snapshot_names() {
        let parse = |text: &str| text.parse::<SnapshotName>();
        assert!(parse("lab").is_ok_and(|name| name.id.is_none()));
        assert!(parse("lab@latest").is_ok_and(|name| name.id.is_none()));
        assert!(parse("lab@20261121T023652Z-2").is_ok_and(|name| name.id.is_some()));
        for bad in ["", "@", "lab@", "../etc", "lab@yesterday"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_names_nothing_is_refused_as_a_bad_argument() {
        for line in [
            "show lab@yesterday",
            "restore lab@yesterday",
            "restore /nonexistent/x.save",
            "remove lab",
            "remove lab@latest lab@yesterday",
            "export lab@yesterday db -",
            "take lab ../db",
        ] {
            let words = ["xl vne-snapshot"].into_iter().chain(line.split(' '));
            let refused = Arguments::try_parse_from(words).map_err(|error| error.exit_code());
            assert_eq!(refused.err(), Some(2), "{line}");
        }
    }
}
