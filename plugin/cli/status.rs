//! `xl vne-snapshot status`.

use serde::Serialize;

use super::units::table;
use super::{print, print_json, Failure, Host};
use crate::image::Name;
use crate::sidecar::admin::Daemon;
use crate::sidecar::journal::Register;
use crate::sidecar::rpc::DaemonStatus;

/// Show what goes on: takes and restores on this host, whoever leads them, and
/// how the daemon is.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Only what is about this VNE
    vne: Option<Name>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Status {
    pub(super) activities: Vec<Activity>,
    /// None if it isn't running.
    pub(super) daemon: Option<DaemonStatus>,
}

#[derive(Debug, Serialize)]
pub(super) struct Activity {
    /// Take or restore.
    pub(super) what: &'static str,
    pub(super) vne: String,
    /// The host that leads it; none if it's this one's alone.
    pub(super) leader: Option<String>,
    pub(super) members: Vec<String>,
    /// Its process here.
    pub(super) pid: u32,
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let records = Register::open(&host.run_dir)?.records()?;
    let wanted = |vne: &str| {
        arguments
            .vne
            .as_ref()
            .is_none_or(|only| only.as_str() == vne)
    };
    let activities = records.into_iter().filter(|record| wanted(&record.vne));
    let activities = activities.map(|record| Activity {
        what: record.what(),
        leader: record.leader,
        vne: record.vne,
        members: record
            .domains
            .into_iter()
            .map(|domain| domain.name)
            .collect(),
        pid: record.pid,
    });
    let daemon = match Daemon::find(&host.run_dir)? {
        Some(daemon) => Some(daemon.status()?),
        None => None,
    };
    let status = Status {
        activities: activities.collect(),
        daemon,
    };
    if arguments.json {
        print_json(&status)
    } else {
        print(&describe(&status))
    }
}

fn describe(status: &Status) -> String {
    let mut text = match &status.daemon {
        None => String::from("vned isn't running.\n"),
        Some(daemon) => {
            let place = match (&daemon.listen, &daemon.fingerprint) {
                (Some(listen), Some(_)) => format!("listens for peers at {listen}"),
                _ => String::from("takes no peers"),
            };
            format!(
                "vned {} runs on host {} and {place}.\n",
                daemon.version, daemon.host
            )
        }
    };
    for doubt in status.daemon.iter().flat_map(|daemon| &daemon.in_doubt) {
        text.push_str(&format!(
            "{} waits to hear from host {} whether it exists.\n",
            doubt.snapshot, doubt.leader
        ));
    }
    if status.activities.is_empty() {
        text.push_str("No take or restore is running here.\n");
        return text;
    }
    let mut rows = vec![["WHAT", "VNE", "LED BY", "MEMBERS HERE", "PROCESS"]
        .map(String::from)
        .to_vec()];
    rows.extend(status.activities.iter().map(|activity| {
        vec![
            activity.what.to_owned(),
            activity.vne.clone(),
            activity.leader.clone().unwrap_or_else(|| String::from("-")),
            activity.members.join(","),
            activity.pid.to_string(),
        ]
    }));
    text.push_str(&table(&rows));
    text
}
