//! `xl vne-snapshot list`.

use std::path::Path;

use super::units::{bytes, ms, table};
use super::{print, print_json, Failure, Host, StoreArgument};
use crate::image::{Manifest, Name, Sizes};
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
    // Sizes depend on all there are.
    let mut listing = store.catalogue().list(None)?;
    let sizes = store.catalogue().sizes(&listing.snapshots)?;
    if let Some(vne) = &arguments.vne {
        listing.snapshots.retain(|manifest| manifest.vne == *vne);
        let dir = Some(std::ffi::OsStr::new(vne.as_str()));
        let of_vne = |path: &Path| path.parent().and_then(Path::file_name) == dir;
        listing.damaged.retain(|damaged| of_vne(&damaged.path));
    }
    let listed: Vec<Listed> = listing
        .snapshots
        .iter()
        .map(|manifest| Listed {
            manifest,
            sizes: sizes
                .get(&(manifest.vne.clone(), manifest.id.clone()))
                .copied(),
        })
        .collect();
    if arguments.json {
        print_json(&listed)?;
    } else {
        print(&describe(&listed))?;
    }
    for damaged in &listing.damaged {
        log::warn!("{}: {}", damaged.path.display(), sentence(&damaged.error));
    }
    Ok(())
}

/// A manifest, and what isn't in it.
#[derive(serde::Serialize)]
pub struct Listed<'a> {
    #[serde(flatten)]
    pub manifest: &'a Manifest,
    /// None if it can't be told.
    #[serde(flatten)]
    pub sizes: Option<Sizes>,
}

fn describe(snapshots: &[Listed]) -> String {
    let mut rows = vec![[
        "SNAPSHOT", "CREATED", "MEMBERS", "OWN", "SHARED", "DOWNTIME", "SKEW", "LABEL",
    ]
    .map(String::from)
    .to_vec()];
    rows.extend(snapshots.iter().map(row));
    table(&rows)
}

fn row(listed: &Listed) -> Vec<String> {
    let manifest = listed.manifest;
    let worst = manifest
        .members
        .iter()
        .map(|member| member.downtime.total_ns())
        .max();
    let size = |of: fn(Sizes) -> u64| match listed.sizes {
        Some(sizes) => bytes(of(sizes)),
        None => String::from("?"),
    };
    vec![
        format!("{}@{}", manifest.vne, manifest.id),
        manifest.created.clone(),
        manifest.members.len().to_string(),
        size(|sizes| sizes.own_bytes),
        size(|sizes| sizes.shared_bytes),
        ms(worst.unwrap_or_default()),
        ms(manifest.cut.skew_ns),
        manifest.label.clone().unwrap_or_default(),
    ]
}
