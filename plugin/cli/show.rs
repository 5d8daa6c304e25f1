//! `xl vne-snapshot show`.

use super::list::Listed;
use super::timeline::{self, Canvas};
use super::units::{bytes, ms, table};
use super::{print, print_json, Failure, Host, SnapshotName, StoreArgument};
use crate::image::{Manifest, Name, Sizes};
use crate::sidecar::lead::Offset;
use crate::stream::PAGE_SIZE;

/// Show one snapshot: when, of what, and how long the members were down.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// VNE, for the newest one, or VNE@ID
    snapshot: SnapshotName,
    /// Print the manifest as JSON
    #[arg(long)]
    json: bool,
    /// Draw what happened to each member when, here or into FILE.html or FILE.svg
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true,
          default_missing_value = timeline::TERMINAL, conflicts_with = "json")]
    timeline: Option<Canvas>,
    #[command(flatten)]
    store: StoreArgument,
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let store = arguments.store.open(host, Some(&arguments.snapshot.vne))?;
    let snapshot = arguments.snapshot.open(&store)?;
    let manifest = snapshot.manifest();
    if let Some(canvas) = &arguments.timeline {
        return timeline::draw(manifest, canvas);
    }
    let all = store.catalogue().list(None)?.snapshots;
    let sizes = store.catalogue().sizes(&all)?;
    let sizes = sizes.get(&(manifest.vne.clone(), manifest.id.clone()));
    let sizes = sizes.copied();
    match arguments.json {
        true => print_json(&Listed { manifest, sizes }),
        false => print(&describe(manifest, sizes)),
    }
}

/// The summary that `take` prints too.
pub fn describe(manifest: &Manifest, sizes: Option<Sizes>) -> String {
    let mut rows = vec![[
        "MEMBER", "HOST", "TYPE", "MEMORY", "DOWNTIME", "SUSPEND", "PAGES", "STATE", "RESUME",
        "ROUNDS", "SENT", "LAST", "CONTENT", "NEW",
    ]
    .map(String::from)
    .to_vec()];
    for member in &manifest.members {
        let downtime = &member.downtime;
        let stats = &member.image.stats;
        rows.push(vec![
            member.name.to_string(),
            member.host.to_string(),
            format!("{:?}", member.domain_type).to_lowercase(),
            bytes(member.memory_kib << 10),
            ms(downtime.total_ns()),
            ms(downtime.suspend_ns),
            ms(downtime.last_pages_ns),
            ms(downtime.device_state_ns),
            ms(downtime.resume_ns),
            member.rounds.to_string(),
            member.pages_sent.to_string(),
            member.pages_final_dirty.to_string(),
            bytes(stats.pages_stored * PAGE_SIZE as u64),
            // Format 1 shares nothing.
            bytes(match manifest.format {
                1 => member.image.files.iter().map(|file| file.length).sum(),
                _ => stats.bytes_new,
            }),
        ]);
    }
    let hosts: Vec<&str> = manifest.hosts.iter().map(Name::as_str).collect();
    let error = match manifest.cut.skew_error_ns {
        0 => String::new(),
        error if error >= Offset::UNKNOWN_NS => {
            String::from(" (unknown: hosts' clocks couldn't be compared)")
        }
        error => format!(" (known within {})", ms(error)),
    };
    let mut notes = String::new();
    let mut in_flight = 0;
    for member in &manifest.members {
        in_flight += member.recorded.as_ref().map_or(0, |kept| kept.frames);
        if !member.disks.is_empty() {
            let disks = member.disks.iter();
            let disks: Vec<_> = disks
                .map(|disk| format!("{} ({}, {})", disk.vdev, disk.driver, bytes(disk.bytes)))
                .collect();
            notes.push_str(&format!(
                "With {}'s {}; {} of its downtime were for that.\n",
                member.name,
                disks.join(", "),
                ms(member.downtime.disks_ns)
            ));
        }
        if !member.uncaptured_disks.is_empty() {
            notes.push_str(&format!(
                "Without {}'s {}.\n",
                member.name,
                member.uncaptured_disks.join(", ")
            ));
        }
        if !member.read_only_disks.is_empty() {
            notes.push_str(&format!(
                "{}'s {} can only be read, and is not in it.\n",
                member.name,
                member.read_only_disks.join(", ")
            ));
        }
        if member.late_frames > 0 {
            notes.push_str(&format!(
                "{} frames came for {} while it was suspended: they aren't in the snapshot.\n",
                member.late_frames, member.name
            ));
        }
        if let Some(cap) = member.throttled_to {
            notes.push_str(&format!(
                "{} didn't converge and was throttled to {cap}% of a processor.\n",
                member.name
            ));
        }
        if member.diverged {
            notes.push_str(&format!(
                "{} was cut before it had converged.\n",
                member.name
            ));
        }
    }
    if let Some(sizes) = sizes {
        notes.push_str(&format!(
            "It takes {} of its own, and shares {} with other snapshots.\n",
            bytes(sizes.own_bytes),
            bytes(sizes.shared_bytes)
        ));
    }
    let label = manifest.label.as_ref().map(|label| format!(", '{label}'"));
    format!(
        "Snapshot {}@{} of {} on {} (Xen {}){}\n{}{notes}Skew {}{error}, frames held for {}, {in_flight} of them \
         recorded.\n",
        manifest.vne,
        manifest.id,
        manifest.created,
        hosts.join(", "),
        manifest.xen_version,
        label.unwrap_or_default(),
        table(&rows),
        ms(manifest.cut.skew_ns),
        ms(manifest.cut.hold_ns)
    )
}
