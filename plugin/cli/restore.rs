//! `xl vne-snapshot restore`.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use super::{print, Failure, Host, SnapshotName, StoreArgument};
use crate::sidecar::restore::{self, Progress, RestoreRequest};
use crate::stream::is_save_file;

/// Bring all members of a snapshot back, or none. They are built paused and
/// released together.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// VNE, for the newest one, or VNE@ID
    snapshot: String,
    /// Say what would be done, and do nothing (as 'xl -N')
    #[arg(short = 'N', long)]
    dry_run: bool,
    /// Leave the members paused
    #[arg(short, long)]
    paused: bool,
    /// No progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    store: StoreArgument,
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let name: SnapshotName = match arguments.snapshot.parse() {
        Ok(name) => name,
        Err(error) => return Err(explain_file(&arguments.snapshot).unwrap_or(error).into()),
    };
    let store = arguments.store.open(host, Some(&name.vne))?;
    let snapshot = name
        .open(&store)
        .map_err(|error| explain_file(&arguments.snapshot).map_or(error, Failure::from))?;
    if arguments.dry_run || host.dry_run {
        let manifest = snapshot.manifest();
        let members: Vec<&str> = manifest.members.iter().map(|m| m.name.as_str()).collect();
        return print(&format!(
            "Would restore {} from {}@{}.\n",
            members.join(", "),
            manifest.vne,
            manifest.id
        ));
    }
    let request = RestoreRequest {
        store: store.root().to_owned(),
        run_dir: host.run_dir.clone(),
        program: host.program(),
        paused: arguments.paused,
    };
    let mut printer = Printer {
        quiet: arguments.quiet,
    };
    restore::restore(&request, &snapshot, &mut printer)?;
    Ok(())
}

/// If a file is meant, says what it is and what to do with it.
fn explain_file(text: &str) -> Option<String> {
    let path = Path::new(text);
    if !path.is_file() {
        return None;
    }
    let mut start = [0; 64];
    let length = File::open(path)
        .and_then(|mut file| file.read(&mut start))
        .ok()?;
    Some(if is_save_file(start.get(..length)?) {
        format!(
            "{text} is a file of 'xl save', not a VNE snapshot: restore it with 'xl restore {text}'"
        )
    } else {
        format!("{text} is a file: name a snapshot as VNE or VNE@ID (see 'xl vne-snapshot list')")
    })
}

struct Printer {
    quiet: bool,
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
    fn building(&mut self, members: &[&str]) {
        self.say(&format!("building {}", members.join(", ")));
    }

    fn built(&mut self, member: &str) {
        self.say(&format!("  {member}: built"));
    }

    fn released(&mut self) {
        self.say("released");
    }
}
