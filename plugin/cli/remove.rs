//! `xl vne-snapshot remove`.

use super::{print, Failure, Host, SnapshotName, StoreArgument};

/// Delete snapshots. Other snapshots stay as they are.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The snapshots, each as VNE@ID (VNE@latest is the newest)
    #[arg(required = true, value_name = "VNE@ID")]
    snapshots: Vec<Unmistakable>,
    /// Say what would be deleted, and delete nothing (as 'xl -N')
    #[arg(short = 'N', long)]
    dry_run: bool,
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
            print(&format!("Would remove {}@{id}.\n", name.vne))?;
        } else {
            store.catalogue().remove(&name.vne, &id)?;
        }
    }
    Ok(())
}
