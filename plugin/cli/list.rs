//! `xl vne-snapshot list`.

use super::units::{bytes, ms, table};
use super::{print, print_json, Failure, Host, StoreArgument};
use crate::image::{Manifest, Name};
use crate::sentence::sentence;

/// List the snapshots of this host.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Only those of this VNE
    vne: Option<Name>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgument,
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let store = arguments.store.open(host, arguments.vne.as_ref())?;
    let listing = store.catalogue().list(arguments.vne.as_ref())?;
    if arguments.json {
        print_json(&listing.snapshots)?;
    } else {
        print(&describe(&listing.snapshots))?;
    }
    for damaged in &listing.damaged {
        log::warn!("{}: {}", damaged.path.display(), sentence(&damaged.error));
    }
    Ok(())
}

fn describe(snapshots: &[Manifest]) -> String {
    let mut rows = vec![[
        "SNAPSHOT", "CREATED", "MEMBERS", "STORED", "DOWNTIME", "SKEW", "LABEL",
    ]
    .map(String::from)
    .to_vec()];
    rows.extend(snapshots.iter().map(row));
    table(&rows)
}

fn row(manifest: &Manifest) -> Vec<String> {
    let worst = manifest
        .members
        .iter()
        .map(|member| member.downtime.total_ns())
        .max();
    let stored: u64 = manifest
        .members
        .iter()
        .flat_map(|member| member.image.files.iter().map(|file| file.length))
        .sum();
    vec![
        format!("{}@{}", manifest.vne, manifest.id),
        manifest.created.clone(),
        manifest.members.len().to_string(),
        bytes(stored),
        ms(worst.unwrap_or_default()),
        ms(manifest.cut.skew_ns),
        manifest.label.clone().unwrap_or_default(),
    ]
}
