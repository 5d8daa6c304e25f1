//! `xl vne-snapshot verify`.

use super::meter::Meter;
use super::{print, print_json, Failure, Host, SnapshotName, StoreArgument};
use crate::image::{Checker, Name, SnapshotId};
use crate::sentence::sentence;

/// Read snapshots and compare all of it with what was written.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// VNE, for all of its snapshots, or VNE@ID [default: all there are]
    snapshots: Option<SnapshotName>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
    /// Show no progress, and of what is right nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    store: StoreArgument,
}

/// What was found of a snapshot.
#[derive(serde::Serialize)]
struct Verdict {
    vne: Name,
    id: SnapshotId,
    /// What is wrong, a sentence each.
    damage: Vec<String>,
}

/// What was found.
#[derive(serde::Serialize)]
struct Verdicts {
    snapshots: Vec<Verdict>,
    /// What is wrong and no snapshot's.
    damage: Vec<String>,
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let vne = arguments.snapshots.as_ref().map(|name| &name.vne);
    let store = arguments.store.open(host, vne)?;
    let mut checker = Checker::new(&store);
    let quiet = arguments.quiet || arguments.json;
    let mut meter = Meter::new("read", checker.total_bytes()?, quiet);
    let mut progress = |bytes: u64| meter.tell(bytes);
    let mut verdicts = Verdicts {
        snapshots: Vec::new(),
        damage: Vec::new(),
    };
    let one = arguments.snapshots.as_ref().and_then(|name| {
        let id = name.id.clone()?;
        Some(vec![(name.vne.clone(), id)])
    });
    let snapshots = match one {
        Some(one) => one,
        None => {
            let found = store.catalogue().names(vne)?;
            let strange = found.strange.iter().map(|error| sentence(error));
            verdicts.damage.extend(strange);
            found.snapshots
        }
    };
    let mut bad = 0;
    for (vne, id) in snapshots {
        let damage = checker.snapshot(&vne, &id, &mut progress)?;
        bad += u32::from(!damage.is_empty());
        verdicts.snapshots.push(Verdict {
            vne,
            id,
            damage: damage.iter().map(|error| sentence(error)).collect(),
        });
    }
    if arguments.snapshots.is_none() {
        let others = checker.other_packs(&mut progress)?;
        verdicts
            .damage
            .extend(others.iter().map(|error| sentence(error)));
    }
    meter.end();
    match arguments.json {
        true => print_json(&verdicts)?,
        false => print(&describe(&verdicts, arguments.quiet))?,
    }
    match bad + u32::from(!verdicts.damage.is_empty()) {
        0 => Ok(()),
        _ if bad == 0 => {
            Err("something in the store is damaged, but no snapshot that was read".into())
        }
        _ => Err(format!("{bad} damaged (remove them with 'xl vne-snapshot remove')").into()),
    }
}

fn describe(verdicts: &Verdicts, quiet: bool) -> String {
    let mut text = String::new();
    for Verdict { vne, id, damage } in &verdicts.snapshots {
        if !(quiet && damage.is_empty()) {
            let word = if damage.is_empty() { "good" } else { "DAMAGED" };
            text.push_str(&format!("{vne}@{id}: {word}\n"));
        }
        for line in damage {
            text.push_str(&format!("  {line}\n"));
        }
    }
    for line in &verdicts.damage {
        text.push_str(&format!("{line}\n"));
    }
    text
}
