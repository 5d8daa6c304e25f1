//! `xl vne-snapshot take`.

use std::path::{Path, PathBuf};

use super::progress::Printer;
use super::units::{bytes, table};
use super::{config::VneConfig, print, print_json, Failure, Host, StoreArgument};
use crate::cut::{HostLimits, Limits, OnDivergence};
use crate::domain::policy::PolicyConfig;
use crate::domain::DomainFacts;
use crate::image::{Name, Store};
use crate::sentence::sentence;
use crate::sidecar::engine::{self, TakeRequest, Taken};

/// Members answer within seconds; this is for a host that swaps.
const PREPARE_S: u64 = 30;
/// Shorter than libxl's own 60 s, and than what peers of the guests put up
/// with.
const CUT_S: u64 = 10;
/// Both sides are in one process here, so only a host that stands still for so
/// long doesn't hear of itself.
const LEASE_S: u64 = 60;
/// Undoing includes waiting for guests and workers.
const ABORT_S: u64 = 30;
/// What passed the holds just before they closed is on its way through one
/// bridge: that takes microseconds, and a busy host some milliseconds.
const DRAIN_MS: u64 = 5;
const PRECOPY_MAX_S: u32 = 300;
const LAST_COPY_MS: u32 = 50;
/// 8 MiB: a 1 Gbit/s link at full speed for 64 ms.
const HOLD_KIB: u32 = 8 << 10;
const FINAL_BUFFER_BYTES: usize = 256 << 20;

/// Capture all members of a VNE at one consistent point. The guests keep
/// running; each is down only for its last few dirty pages.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The VNE
    vne: Name,
    /// Its members, by domain name [default: those of /etc/xen/vne/VNE.cfg]
    members: Vec<Name>,
    /// Say what would be done, and do nothing (as 'xl -N')
    #[arg(short = 'N', long)]
    dry_run: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// No progress, no summary
    #[arg(short, long)]
    quiet: bool,
    /// A word to find the snapshot by
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    /// How long pre-copy may take, in seconds [default: 300]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    precopy_max: Option<u32>,
    /// A member has converged when copying its dirty pages would take this
    /// long at most, in ms [default: 50]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(1..=60_000))]
    last_copy: Option<u32>,
    /// What to do when members don't converge in time [default: abort]
    #[arg(long, value_name = "WHAT")]
    diverging: Option<Diverging>,
    /// Leave out what is on the members' disks, which this version can't
    /// capture; without this, a member that can write to a disk is refused
    #[arg(long)]
    memory_only: bool,
    /// Size of each interface's queue for held frames, in KiB [default: 8192]
    #[arg(long, value_name = "KIB", value_parser = clap::value_parser!(u32).range(16..=1 << 20))]
    hold: Option<u32>,
    #[command(flatten)]
    store: StoreArgument,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Diverging {
    /// Cut all the same: those members are down for longer
    Go,
    /// Give up; no guest is harmed
    Abort,
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let request = request(host, arguments)?;
    let dry_run = arguments.dry_run || host.dry_run;
    if !dry_run {
        clear_garbage(&request.store);
    }
    let quiet = arguments.quiet || arguments.json || dry_run;
    let mut printer = Printer::new(&request.members, quiet);
    match engine::take(&request, dry_run, &mut printer)? {
        Taken::Planned(facts) if arguments.json => print_json(&facts),
        Taken::Planned(facts) => print(&plan(&request, &facts)),
        Taken::Snapshot(manifest) if arguments.json => print_json(&manifest),
        Taken::Snapshot(_) if arguments.quiet => Ok(()),
        Taken::Snapshot(manifest) => print(&super::show::describe(&manifest)),
    }
}

/// What was left behind when the host lost power may be all the space that is
/// missing now.
fn clear_garbage(root: &Path) {
    if let Err(error) = Store::open(root).and_then(|store| store.clean_tmp()) {
        log::warn!("{}", sentence(&error));
    }
}

fn request(host: &Host, arguments: &Arguments) -> Result<TakeRequest, Failure> {
    let vne = &arguments.vne;
    let config = VneConfig::find(host, vne)?;
    if config.is_none() && arguments.members.is_empty() {
        let path = VneConfig::path(host, vne);
        return Err(format!(
            "there is no VNE '{vne}': write {} with a line members = [ \"DOMAIN\", … ], or name \
             the members after it",
            path.display()
        )
        .into());
    }
    let config = config.unwrap_or_default();
    let members = if arguments.members.is_empty() {
        config.members
    } else {
        arguments.members.iter().map(Name::to_string).collect()
    };
    for member in &members {
        Name::new(member)?;
    }
    let store = arguments.store.store.clone().or(config.store);
    let seconds = |s: u64| s * 1_000_000_000;
    let precopy_max = arguments.precopy_max.or(config.precopy_max_s);
    let last_copy = arguments
        .last_copy
        .or(config.last_copy_ms)
        .unwrap_or(LAST_COPY_MS);
    let diverging = arguments.diverging.map(|choice| match choice {
        Diverging::Go => OnDivergence::Go,
        Diverging::Abort => OnDivergence::Abort,
    });
    let hold_kib = arguments.hold.or(config.hold_kib).unwrap_or(HOLD_KIB);
    Ok(TakeRequest {
        vne: vne.to_string(),
        members,
        label: arguments.label.clone(),
        store: store.unwrap_or_else(|| PathBuf::from(crate::image::DEFAULT_ROOT)),
        run_dir: host.run_dir.clone(),
        program: host.program(),
        limits: Limits {
            prepare_ns: seconds(PREPARE_S),
            precopy_ns: seconds(precopy_max.unwrap_or(PRECOPY_MAX_S).into()),
            drain_ns: DRAIN_MS * 1_000_000,
            hold_ns: seconds(CUT_S),
            lease_ns: seconds(LEASE_S),
            repeat_ns: seconds(1),
            abort_ns: seconds(ABORT_S),
        },
        host_limits: HostLimits {
            hold_ns: seconds(CUT_S),
            lease_ns: seconds(LEASE_S),
            ask_ns: seconds(1),
        },
        on_divergence: diverging
            .or(config.diverging)
            .unwrap_or(OnDivergence::Abort),
        policy: PolicyConfig {
            last_copy_ns_max: u64::from(last_copy) * 1_000_000,
            ..PolicyConfig::default()
        },
        hold_bytes: hold_kib.saturating_mul(1024),
        final_buffer_bytes: FINAL_BUFFER_BYTES,
        memory_only: arguments.memory_only || config.memory_only,
    })
}

fn plan(request: &TakeRequest, members: &[DomainFacts]) -> String {
    let mut rows = vec![[
        "MEMBER", "DOMID", "TYPE", "MEMORY", "VCPUS", "HELD", "DISKS",
    ]
    .map(String::from)
    .to_vec()];
    for member in members {
        let vifs: Vec<&str> = member.vifs.iter().map(|vif| vif.ifname.as_str()).collect();
        rows.push(vec![
            member.name.clone(),
            member.domid.to_string(),
            member.kind.to_string(),
            bytes(member.memory_kib << 10),
            member.vcpus.to_string(),
            or_dash(vifs.join(",")),
            member.disks.len().to_string(),
        ]);
    }
    let mut text = format!(
        "Would take a snapshot of VNE '{}' into {}:\n",
        request.vne,
        request.store.display()
    );
    text.push_str(&table(&rows));
    for member in members {
        let disks = member.writable_disks();
        if !disks.is_empty() {
            text.push_str(&format!(
                "Without {}'s {}: restore it with those disks as they are at the cut.\n",
                member.name,
                disks.join(", ")
            ));
        }
    }
    text
}

fn or_dash(text: String) -> String {
    if text.is_empty() {
        String::from("-")
    } else {
        text
    }
}
