//! `xl vne-snapshot diff`.

use super::units::{bytes, table};
use super::{print, print_json, Failure, Host, SnapshotName, StoreArgument};
use crate::image::{diff, MemberDiff};
use crate::stream::PAGE_SIZE;

/// Show how much of each member has changed from one snapshot to another.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// VNE@ID, or VNE for its newest one
    before: SnapshotName,
    /// The same
    after: SnapshotName,
    /// Print as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgument,
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let open = |name: &SnapshotName| {
        let store = arguments.store.open(host, Some(&name.vne))?;
        name.open(&store)
    };
    let diffs = diff(&open(&arguments.before)?, &open(&arguments.after)?)?;
    match arguments.json {
        true => print_json(&diffs),
        false => print(&describe(&diffs)),
    }
}

fn describe(diffs: &[MemberDiff]) -> String {
    let mut rows = vec![["MEMBER", "PAGES", "CHANGED", "PERCENT", "BYTES"]
        .map(String::from)
        .to_vec()];
    for diff in diffs {
        let pages = diff.pages_before.max(diff.pages_after).max(1);
        rows.push(vec![
            diff.member.to_string(),
            diff.pages_after.to_string(),
            diff.pages_changed.to_string(),
            format!("{:.1}", diff.pages_changed as f64 * 100.0 / pages as f64),
            bytes(diff.pages_changed * PAGE_SIZE as u64),
        ]);
    }
    table(&rows)
}
