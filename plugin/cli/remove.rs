//! `xl vne-snapshot remove`.

use super::{print, Failure, Host, SnapshotName, StoreArgument};
use crate::image::{Error, Name, SnapshotId, Store};
use crate::sidecar::admin::Daemon;
use crate::sidecar::rpc::SnapshotRef;

/// Delete snapshots. Other snapshots stay as they are.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The snapshots, each as VNE@ID (VNE@latest is the newest)
    #[arg(required = true, value_name = "VNE@ID")]
    snapshots: Vec<Unmistakable>,
    /// Say what would be deleted, and delete nothing (as 'xl -N')
    #[arg(short = 'N', long)]
    dry_run: bool,
    /// Only this host's part of a snapshot that several hosts have
    #[arg(long)]
    here: bool,
    #[command(flatten)]
    store: StoreArgument,
}

/// A snapshot whose name says which: VNE alone could mean all of them.
#[derive(Debug, Clone)]
struct Unmistakable(SnapshotName);

impl std::str::FromStr for Unmistakable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.parse()?;
        if text.contains('@') {
            Ok(Self(name))
        } else {
            Err(format!("write {text}@ID or {text}@latest"))
        }
    }
}

/// The other hosts that have a part. What is too damaged to tell has none that
/// could be asked.
fn other_hosts(store: &Store, vne: &Name, id: &SnapshotId) -> Result<Vec<Name>, Failure> {
    match store.catalogue().get(vne, id) {
        Ok(snapshot) => {
            let manifest = snapshot.manifest();
            if manifest.is_copy() {
                return Ok(Vec::new());
            }
            let others = manifest.hosts.iter().filter(|host| **host != manifest.host);
            Ok(others.cloned().collect())
        }
        Err(Error::Damaged { .. }) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

fn also(hosts: &[Name]) -> String {
    let names: Vec<&str> = hosts.iter().map(Name::as_str).collect();
    if names.is_empty() {
        String::new()
    } else {
        format!(", also on {}", names.join(", "))
    }
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    for Unmistakable(name) in &arguments.snapshots {
        let store = arguments.store.open(host, Some(&name.vne))?;
        let id = match &name.id {
            Some(id) => id.clone(),
            None => name.open(&store)?.manifest().id.clone(),
        };
        if arguments.dry_run || host.dry_run {
            store.catalogue().get(&name.vne, &id)?;
            let elsewhere = elsewhere(&store, &name.vne, &id, arguments.here)?;
            print(&format!(
                "Would remove {}@{id}{}.\n",
                name.vne,
                also(&elsewhere)
            ))?;
            continue;
        }
        remove(host, &store, &name.vne, &id, arguments.here)?;
    }
    Ok(())
}

fn elsewhere(store: &Store, vne: &Name, id: &SnapshotId, here: bool) -> Result<Vec<Name>, Failure> {
    match here {
        true => Ok(Vec::new()),
        false => other_hosts(store, vne, id),
    }
}

/// Removes a snapshot, on other hosts too unless it's to be `here` alone.
pub fn remove(
    host: &Host,
    store: &Store,
    vne: &Name,
    id: &SnapshotId,
    here: bool,
) -> Result<(), Failure> {
    let elsewhere = elsewhere(store, vne, id, here)?;
    if let Some(other) = elsewhere.first() {
        let what =
            format!("host '{other}' has a part of {vne}@{id} (--here removes only this host's)");
        let snapshot = SnapshotRef {
            vne: vne.clone(),
            id: id.clone(),
        };
        Daemon::connect(&host.run_dir, &what)?.remove(snapshot, elsewhere)?;
    }
    Ok(store.catalogue().remove(vne, id)?)
}
