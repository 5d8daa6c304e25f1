//! `xl vne-snapshot prune`.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use super::remove;
use super::units::{bytes, table};
use super::{print, print_json, Failure, Host, StoreArgument};
use crate::image::{Name, Rule, SnapshotId, Store, Swept};

/// Delete old snapshots by a rule, and free what no snapshot uses.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Only those of this VNE; the rule is for each VNE's alone
    vne: Option<Name>,
    /// Keep the newest N
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_last: u32,
    /// Keep those that are no older, as in 90m, 36h, 14d or 8w
    #[arg(long, value_name = "TIME")]
    keep_within: Option<Within>,
    /// Keep the newest of each of the last N days that have any (UTC)
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_daily: u32,
    /// The same with weeks
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_weekly: u32,
    /// The same with months
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_monthly: u32,
    /// Say what would be deleted, and delete nothing (as 'xl -N')
    #[arg(short = 'N', long)]
    dry_run: bool,
    /// Only this host's part of snapshots that several hosts have
    #[arg(long)]
    here: bool,
    /// Print as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgument,
}

/// A length of time, in seconds.
#[derive(Debug, Clone, Copy)]
struct Within(u64);

impl std::str::FromStr for Within {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let split = text.len() - text.chars().last().map_or(0, char::len_utf8);
        let (number, unit) = text.split_at(split);
        let unit_s = match unit {
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            "w" => 7 * 86_400,
            _ => return Err(String::from("write a number and m, h, d or w, as in 14d")),
        };
        let number: u64 = number.parse().map_err(|e| format!("{number:?}: {e}"))?;
        let seconds = number.checked_mul(unit_s).filter(|&seconds| seconds > 0);
        seconds
            .map(Within)
            .ok_or(format!("{text}: that is no time"))
    }
}

/// What is to be done with a snapshot.
#[derive(serde::Serialize)]
struct Fate {
    vne: Name,
    id: SnapshotId,
    keep: bool,
    /// What its removal alone would free.
    own_bytes: u64,
}

/// What was done.
#[derive(serde::Serialize)]
struct Pruned {
    snapshots: Vec<Fate>,
    /// Beyond what went with the snapshots.
    swept: Option<Swept>,
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let rule = Rule {
        last: arguments.keep_last,
        within_s: arguments.keep_within.map_or(0, |within| within.0),
        daily: arguments.keep_daily,
        weekly: arguments.keep_weekly,
        monthly: arguments.keep_monthly,
    };
    if rule.is_empty() {
        return Err("say what to keep, as in --keep-last 10 (nothing is deleted)".into());
    }
    let store = arguments.store.open(host, arguments.vne.as_ref())?;
    let dry_run = arguments.dry_run || host.dry_run;
    let fates = fates(&store, arguments.vne.as_ref(), rule)?;
    let mut swept = None;
    if !dry_run {
        for fate in fates.iter().filter(|fate| !fate.keep) {
            remove::remove(host, &store, &fate.vne, &fate.id, arguments.here)?;
        }
        swept = Some(store.catalogue().sweep()?);
    }
    let pruned = Pruned {
        snapshots: fates,
        swept,
    };
    match arguments.json {
        true => print_json(&pruned),
        false => print(&describe(&pruned, dry_run)),
    }
}

/// A snapshot that is damaged is neither counted nor removed: what it's worth is for
/// the admin to say.
fn fates(store: &Store, vne: Option<&Name>, rule: Rule) -> Result<Vec<Fate>, Failure> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let all = store.catalogue().list(None)?.snapshots;
    let sizes = store.catalogue().sizes(&all)?;
    let is_meant = |name: &Name| vne.is_none_or(|vne| vne == name);
    let vnes: BTreeSet<&Name> = all.iter().map(|manifest| &manifest.vne).collect();
    let mut fates = Vec::new();
    for vne in vnes.into_iter().filter(|vne| is_meant(vne)) {
        let of_vne = all.iter().filter(|manifest| manifest.vne == *vne);
        let ids: Vec<SnapshotId> = of_vne.map(|manifest| manifest.id.clone()).collect();
        for (id, keep) in ids.iter().zip(rule.keeps(&ids, now)) {
            let size = sizes.get(&(vne.clone(), id.clone()));
            fates.push(Fate {
                vne: vne.clone(),
                id: id.clone(),
                keep,
                own_bytes: size.map_or(0, |size| size.own_bytes),
            });
        }
    }
    Ok(fates)
}

fn describe(pruned: &Pruned, dry_run: bool) -> String {
    let word = if dry_run { "would go" } else { "removed" };
    let mut rows = vec![["SNAPSHOT", "", "OWN"].map(String::from).to_vec()];
    rows.extend(pruned.snapshots.iter().map(|fate| {
        vec![
            format!("{}@{}", fate.vne, fate.id),
            String::from(if fate.keep { "kept" } else { word }),
            bytes(fate.own_bytes),
        ]
    }));
    let mut text = table(&rows);
    if let Some(swept) = pruned.swept.filter(|swept| swept.bytes_freed > 0) {
        let freed = bytes(swept.bytes_freed);
        text.push_str(&format!(
            "{freed} that no snapshot used were freed besides.\n"
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time() {
        let parse = |text: &str| text.parse::<Within>().map(|within| within.0);
        assert_eq!(parse("90m"), Ok(5400));
        assert_eq!(parse("2w"), Ok(14 * 86_400));
        for bad in [
            "",
            "d",
            "14",
            "14x",
            "-1d",
            "0d",
            "99999999999999999999d",
            "1é",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
