//! `xl vne-snapshot restore`.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use super::hooks::{self, Hooks};
use super::hostconf;
use super::meter::Meter;
use super::{print, Failure, Host, SnapshotName, StoreArgument};
use crate::image::{Manifest, Name};
use crate::sentence::sentence;
use crate::sidecar::admin::Daemon;
use crate::sidecar::copy;
use crate::sidecar::restore::{self, Progress, RestoreRequest};
use crate::sidecar::rpc::{CopyProgress, Placement, RestoreOrder, SnapshotRef};
use crate::stream::is_save_file;

/// Bring all members of a snapshot back, or none. They are built paused and
/// released together.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// VNE, for the newest one, or VNE@ID
    snapshot: Wanted,
    /// Say what would be done, and do nothing (as 'xl -N')
    #[arg(short = 'N', long)]
    dry_run: bool,
    /// Make copies of the members, called NEW-MEMBER, on a network of their
    /// own: the members themselves may go on
    #[arg(long = "as", value_name = "NEW")]
    copy: Option<Name>,
    /// Restore a member on another host than it ran on; may be given for several. Its
    /// part of the snapshot is copied there unless it's there
    #[arg(long, value_name = "MEMBER=HOST", value_parser = placement)]
    on: Vec<Placement>,
    /// Leave the members paused
    #[arg(short, long)]
    paused: bool,
    /// No progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    store: StoreArgument,
}

fn placement(text: &str) -> Result<Placement, String> {
    let Some((member, host)) = text.split_once('=') else {
        return Err(String::from("MEMBER=HOST is expected"));
    };
    let name = |text: &str| Name::new(text).map_err(|error| sentence(&error));
    Ok(Placement {
        member: name(member)?,
        host: name(host)?,
    })
}

/// What stands where a snapshot's name should.
#[derive(Debug, Clone)]
enum Wanted {
    Snapshot {
        text: String,
        name: SnapshotName,
    },
    /// No snapshot's name, but a file's: 'xl restore' takes those.
    File(String),
}

impl std::str::FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.to_owned();
        match text.parse() {
            Ok(name) => Ok(Self::Snapshot { text, name }),
            Err(_) if Path::new(&text).is_file() => Ok(Self::File(text)),
            Err(error) => Err(error),
        }
    }
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let (text, name) = match &arguments.snapshot {
        Wanted::Snapshot { text, name } => (text, name),
        Wanted::File(text) => return Err(explain_file(text).into()),
    };
    let store = arguments.store.open(host, Some(&name.vne))?;
    let snapshot = name.open(&store).map_err(|error| {
        if Path::new(text).is_file() {
            explain_file(text).into()
        } else {
            error
        }
    })?;
    if arguments.copy.as_ref() == Some(&name.vne) {
        return Err(format!(
            "a copy of VNE '{0}' can't be called '{0}': they'd be on one network",
            name.vne
        )
        .into());
    }
    if arguments.dry_run || host.dry_run {
        let manifest = snapshot.manifest();
        return print(&format!(
            "Would restore {} from {}@{}.\n",
            places(manifest, arguments)?.join(", "),
            manifest.vne,
            manifest.id
        ));
    }
    let request = RestoreRequest {
        store: store.root().to_owned(),
        run_dir: host.run_dir.clone(),
        program: host.program(),
        joint: None,
        members: None,
        copy: arguments.copy.clone(),
        paused: arguments.paused,
        memory_bytes: hostconf::load(&host.config_dir)?.store_memory_bytes(),
    };
    warn_of_disks(snapshot.manifest());
    let mut printer = Printer {
        quiet: arguments.quiet,
        meter: Meter::new("copied", 0, arguments.quiet),
    };
    let manifest = snapshot.manifest();
    let elsewhere = manifest.members.iter().find(|m| m.host != manifest.host);
    let elsewhere = match (arguments.on.first(), elsewhere) {
        (Some(place), _) => Some((&place.member, &place.host)),
        (None, Some(member)) => Some((&member.name, &member.host)),
        (None, None) => None,
    };
    let work = || -> Result<(), Failure> {
        let Some((member, elsewhere)) = elsewhere else {
            return Ok(restore::restore(&request, &snapshot, &mut printer)?);
        };
        let what = format!("hosts' vneds restore '{member}' on host '{elsewhere}'");
        let order = RestoreOrder {
            snapshot: SnapshotRef {
                vne: manifest.vne.clone(),
                id: manifest.id.clone(),
            },
            store: request.store,
            copy: request.copy,
            on: arguments.on.clone(),
            paused: request.paused,
        };
        let daemon = Daemon::connect(&host.run_dir, &what)?;
        Ok(daemon.restore(order, &mut printer)?)
    };
    hooks(host, manifest, arguments.copy.as_ref())?.around(work, |()| Vec::new())
}

fn hooks(host: &Host, manifest: &Manifest, copy: Option<&Name>) -> Result<Hooks, Failure> {
    let members = names(manifest, copy)?;
    let members = manifest.members.iter().zip(members);
    let members: Vec<_> = members
        .map(|(member, name)| format!("{}:{name}", member.host))
        .collect();
    let verb = hooks::Verb::Restore;
    let mut hooks = Hooks::find(&host.config_dir, verb, &manifest.vne, &members)?;
    hooks.tell("VNE_SNAPSHOT", format!("{}@{}", manifest.vne, manifest.id));
    if let Some(copy) = copy {
        hooks.tell("VNE_AS", copy.as_str());
    }
    Ok(hooks)
}

/// What the restored domains are called, with their hosts where the user names any.
fn places(manifest: &Manifest, arguments: &Arguments) -> Result<Vec<String>, Failure> {
    let names = names(manifest, arguments.copy.as_ref())?;
    if arguments.on.is_empty() {
        return Ok(names);
    }
    let members = manifest.members.iter().zip(names);
    let places = members.map(|(member, name)| {
        let mut on = arguments.on.iter();
        let placed = on.find(|place| place.member == member.name);
        let host = placed.map_or(&member.host, |place| &place.host);
        format!("{host}:{name}")
    });
    Ok(places.collect())
}

/// What the restored domains are called.
fn names(manifest: &Manifest, copy: Option<&Name>) -> Result<Vec<String>, Failure> {
    let of = |member: &Name| match copy {
        None => Ok(member.to_string()),
        Some(copy) => Ok(copy::name_in(copy, member)?.to_string()),
    };
    manifest.members.iter().map(|m| of(&m.name)).collect()
}

/// What an admin said yes to at the take may be forgotten by now.
fn warn_of_disks(manifest: &Manifest) {
    for member in &manifest.members {
        if !member.uncaptured_disks.is_empty() {
            log::warn!(
                "{} of {} aren't in the snapshot: they must be as they were at {}",
                member.uncaptured_disks.join(", "),
                member.name,
                manifest.created
            );
        }
    }
}

/// Says what this file is and what to do with it.
fn explain_file(text: &str) -> String {
    let mut start = Vec::new();
    let read = File::open(text).and_then(|file| file.take(64).read_to_end(&mut start));
    if read.is_ok() && is_save_file(&start) {
        format!(
            "{text} is a file of 'xl save', not a VNE snapshot: restore it with 'xl restore {text}'"
        )
    } else {
        format!("{text} is a file: name a snapshot as VNE or VNE@ID (see 'xl vne-snapshot list')")
    }
}

struct Printer {
    quiet: bool,
    meter: Meter,
}

impl Printer {
    fn say(&self, text: &str) {
        if !self.quiet {
            // Progress that can't be shown must not fail a restore.
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }
}

impl Progress for Printer {
    fn copying(&mut self, how_far: CopyProgress) {
        self.meter.expect(how_far.total_bytes);
        self.meter.tell(how_far.done_bytes);
    }

    fn building(&mut self, members: &[&str]) {
        self.meter.end();
        self.say(&format!("building {}", members.join(", ")));
    }

    fn built(&mut self, member: &str) {
        self.say(&format!("  {member}: built"));
    }

    fn released(&mut self, played: u64) {
        match played {
            0 => self.say("released"),
            1 => self.say("released; 1 frame that was on its way was played back"),
            _ => self.say(&format!(
                "released; {played} frames that were on their way were played back"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_told_from_a_bad_name() -> Result<(), Failure> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("x.save");
        let text = path.to_string_lossy();
        assert!(text.parse::<Wanted>().is_err());
        std::fs::write(&path, "no save file")?;
        let Wanted::File(file) = text.parse()? else {
            return Err("a path is no snapshot's name".into());
        };
        assert!(explain_file(&file).contains("name a snapshot"));
        std::fs::write(&path, b"Xen saved domain, xl format\n \0 \r....")?;
        assert!(explain_file(&file).contains(&format!("'xl restore {text}'")));
        Ok(())
    }
}
