//! `xl vne-snapshot copy`.

use serde::Serialize;

use super::meter::Meter;
use super::units::bytes;
use super::{print, print_json, Failure, Host, SnapshotName, StoreArgument};
use crate::image::{Name, SnapshotId};
use crate::sidecar::admin::Daemon;
use crate::sidecar::rpc::{CopyDone, SnapshotRef};
use crate::stream::PAGE_SIZE;

/// Copy what this host has of a snapshot into another host's store. Only what that
/// lacks is sent.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// VNE, for the newest one, or VNE@ID
    snapshot: SnapshotName,
    /// The other host: a peer that is listed for the VNE
    host: Name,
    /// Say what would be copied, and copy nothing (as 'xl -N')
    #[arg(short = 'N', long)]
    dry_run: bool,
    /// Print as JSON
    #[arg(long)]
    json: bool,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    store: StoreArgument,
}

/// What is printed for scripts.
#[derive(Serialize)]
pub struct Printed<'a> {
    pub vne: &'a Name,
    pub id: &'a SnapshotId,
    pub host: &'a Name,
    #[serde(flatten)]
    pub done: &'a CopyDone,
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let store = arguments.store.open(host, Some(&arguments.snapshot.vne))?;
    let opened = arguments.snapshot.open(&store)?;
    opened.check_copyable()?;
    let manifest = opened.manifest();
    let (vne, id, to) = (&manifest.vne, &manifest.id, &arguments.host);
    if arguments.dry_run || host.dry_run {
        let here = manifest.members_here();
        let members: Vec<&str> = here.map(|member| member.name.as_str()).collect();
        return print(&format!(
            "Would copy {} of {vne}@{id} to {to}.\n",
            members.join(", ")
        ));
    }
    let daemon = Daemon::connect(&host.run_dir, "copies go from vned to vned")?;
    let mut meter = Meter::new("copied", 0, arguments.quiet || arguments.json);
    let snapshot = SnapshotRef {
        vne: vne.clone(),
        id: id.clone(),
    };
    let mut progress = |how_far: crate::sidecar::rpc::CopyProgress| {
        meter.expect(how_far.total_bytes);
        meter.tell(how_far.done_bytes);
    };
    let done = daemon.copy(snapshot, store.root().to_owned(), to.clone(), &mut progress)?;
    meter.end();
    if arguments.json {
        return print_json(&Printed {
            vne,
            id,
            host: to,
            done: &done,
        });
    }
    print(&describe(&format!("{vne}@{id}"), to, &done))
}

fn describe(snapshot: &str, host: &Name, done: &CopyDone) -> String {
    if done.members.is_empty() {
        return format!("{host} has all of it: nothing of {snapshot} was sent.\n");
    }
    let names: Vec<&str> = done.members.iter().map(Name::as_str).collect();
    format!(
        "{} of {snapshot} copied to {host}: {} of pages, of which it lacked {}; {} were sent in {:.1} s.\n",
        names.join(", "),
        bytes(done.pages * PAGE_SIZE as u64),
        bytes(done.pages_sent * PAGE_SIZE as u64),
        bytes(done.sent_bytes),
        done.duration_ns as f64 / 1e9
    )
}
