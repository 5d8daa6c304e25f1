//! `xl vne-snapshot take`.

use std::ffi::OsString;
use std::path::Path;

use super::hooks::{self, Hooks};
use super::hostconf;
use super::progress::Printer;
use super::units::{bytes, table};
use super::{config::VneConfig, print, print_json, Failure, Host, StoreArgument};
use crate::cut::{HostLimits, Limits, OnDivergence};
use crate::domain::policy::PolicyConfig;
use crate::domain::DomainFacts;
use crate::image::{Manifest, Name, Store};
use crate::sentence::sentence;
use crate::sidecar::admin::Daemon;
use crate::sidecar::lead::{MemberName, TakeRequest, Taken};
use crate::sidecar::{self, Place, FINAL_BUFFER_BYTES};

/// Members answer within seconds; this is for a host that swaps.
const PREPARE_S: u64 = 30;
/// Shorter than libxl's own 60 s, and than what peers of the guests put up
/// with.
const CUT_S: u64 = 10;
/// With both sides in one process, only a host that stands still for so long
/// doesn't hear of itself.
const LEASE_S: u64 = 60;
/// How long another host may not be heard of. What is held or suspended doesn't
/// wait for that.
const REMOTE_LEASE_S: u64 = 20;
/// Undoing includes waiting for guests and workers.
const ABORT_S: u64 = 15;
/// What passed the holds just before they closed is on its way through a bridge,
/// or from host to host through a few: that takes microseconds, and a busy host
/// some milliseconds.
const DRAIN_MS: u64 = 5;
/// What is gained by approaching is less downtime: not worth more than this.
const APPROACH_S: u64 = 3;
const PRECOPY_MAX_S: u32 = 300;
const LAST_COPY_MS: u32 = 50;
/// 8 MiB: a 1 Gbit/s link at full speed for 64 ms.
const HOLD_KIB: u32 = 8 << 10;

/// Capture all members of a VNE at one consistent point. The guests keep
/// running; each is down only for its last few dirty pages.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The VNE
    vne: Name,
    /// Its members, each as DOMAIN or HOST:DOMAIN [default: those of
    /// /etc/xen/vne/VNE.cfg]
    members: Vec<Placed>,
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
    /// Leave out what is on the members' disks; without this, a member that can
    /// write to a disk that can't be captured is refused
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
    /// Slow them down until they have, for as long again; then give up
    Throttle,
    /// Give up; no guest is harmed
    Abort,
}

/// `DOMAIN`, on this host, or `HOST:DOMAIN`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    host: Option<Name>,
    name: Name,
}

impl std::str::FromStr for Placed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = |text: &str| Name::new(text).map_err(|error| sentence(&error));
        match text.split_once(':') {
            Some((host, domain)) => Ok(Self {
                host: Some(name(host)?),
                name: name(domain)?,
            }),
            None => Ok(Self {
                host: None,
                name: name(text)?,
            }),
        }
    }
}

/// The members of a description, with their hosts.
pub fn placed(members: &[String], here: &Name) -> Result<Vec<MemberName>, String> {
    let parse = |text: &String| text.parse::<Placed>();
    let members: Vec<Placed> = members.iter().map(parse).collect::<Result<_, _>>()?;
    Ok(members.into_iter().map(|member| member.on(here)).collect())
}

impl Placed {
    fn on(self, here: &Name) -> MemberName {
        MemberName {
            host: self.host.unwrap_or_else(|| here.clone()),
            name: self.name,
        }
    }
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let vne = &arguments.vne;
    let here = host.name()?;
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
    let store = arguments
        .store
        .store
        .clone()
        .or_else(|| config.store.clone());
    let place = Place {
        host: here.clone(),
        store: store.unwrap_or_else(super::default_root),
        run_dir: host.run_dir.clone(),
        program: host.program(),
        final_buffer_bytes: FINAL_BUFFER_BYTES,
        memory_bytes: hostconf::load(&host.config_dir)?.store_memory_bytes(),
    };
    let request = request(&here, arguments, host.dry_run, config)?;
    if !request.dry_run {
        clear_garbage(&place.store);
    }
    let quiet = arguments.quiet || arguments.json || request.dry_run;
    let mut printer = Printer::new(&request.members, &here, quiet);
    let elsewhere = request.members.iter().find(|member| member.host != here);
    if elsewhere.is_some() && arguments.store.store.is_some() {
        return Err(
            "with members on several hosts each has a store of its own: set 'store' in the VNE's \
             description there"
                .into(),
        );
    }
    let mut work = || -> Result<Taken, Failure> {
        Ok(match elsewhere {
            None => sidecar::take(&request, &place, &mut printer)?,
            Some(member) => {
                let what = format!("'{}' is on host '{}'", member.name, member.host);
                Daemon::connect(&host.run_dir, &what)?.take(&request, &mut printer)?
            }
        })
    };
    let taken = match request.dry_run {
        true => work()?,
        false => hooks(host, &request)?.around(work, snapshot_of)?,
    };
    show(&request, &place.store, arguments, taken)
}

fn hooks(host: &Host, request: &TakeRequest) -> Result<Hooks, Failure> {
    let members = request.members.iter();
    let members: Vec<_> = members
        .map(|member| format!("{}:{}", member.host, member.name))
        .collect();
    let mut hooks = Hooks::find(&host.config_dir, hooks::Verb::Take, &request.vne, &members)?;
    if let Some(label) = &request.label {
        hooks.tell("VNE_LABEL", label);
    }
    Ok(hooks)
}

/// What hooks are told once there is a snapshot.
fn snapshot_of(taken: &Taken) -> Vec<(&'static str, OsString)> {
    match taken {
        Taken::Snapshot { manifest, .. } => {
            let id = format!("{}@{}", manifest.vne, manifest.id);
            vec![("VNE_SNAPSHOT", id.into())]
        }
        Taken::Planned(_) => Vec::new(),
    }
}

fn show(
    request: &TakeRequest,
    store: &Path,
    arguments: &Arguments,
    taken: Taken,
) -> Result<(), Failure> {
    match taken {
        Taken::Planned(facts) if arguments.json => print_json(&facts),
        Taken::Planned(facts) => print(&plan(request, store, &facts)),
        Taken::Snapshot {
            manifest,
            unconfirmed,
        } => {
            warn_of_unconfirmed(&manifest, &unconfirmed);
            match arguments {
                Arguments { json: true, .. } => print_json(&manifest),
                Arguments { quiet: true, .. } => Ok(()),
                _ => print(&super::show::describe(&manifest, None)),
            }
        }
    }
}

fn warn_of_unconfirmed(manifest: &Manifest, hosts: &[Name]) {
    for host in hosts {
        log::warn!(
            "host '{host}' hasn't confirmed {}@{} yet: it lists it as soon as it can be reached",
            manifest.vne,
            manifest.id
        );
    }
}

/// What was left behind when the host lost power may be all the space that is
/// missing now.
fn clear_garbage(root: &Path) {
    if let Err(error) = Store::open(root).and_then(|store| store.clean_tmp()) {
        log::warn!("{}", sentence(&error));
    }
}

fn request(
    here: &Name,
    arguments: &Arguments,
    dry_run: bool,
    config: VneConfig,
) -> Result<TakeRequest, Failure> {
    let members = if arguments.members.is_empty() {
        placed(&config.members, here)?
    } else {
        let named = arguments.members.iter().cloned();
        named.map(|member| member.on(here)).collect()
    };
    let seconds = |s: u64| s * 1_000_000_000;
    let precopy_max = arguments.precopy_max.or(config.precopy_max_s);
    let last_copy = arguments
        .last_copy
        .or(config.last_copy_ms)
        .unwrap_or(LAST_COPY_MS);
    let diverging = arguments.diverging.map(|choice| match choice {
        Diverging::Go => OnDivergence::Go,
        Diverging::Throttle => OnDivergence::Throttle,
        Diverging::Abort => OnDivergence::Abort,
    });
    let alone = members.iter().all(|member| member.host == *here);
    let lease_s = if alone { LEASE_S } else { REMOTE_LEASE_S };
    let hold_kib = arguments.hold.or(config.hold_kib).unwrap_or(HOLD_KIB);
    Ok(TakeRequest {
        vne: arguments.vne.clone(),
        members,
        label: arguments.label.clone(),
        limits: Limits {
            prepare_ns: seconds(PREPARE_S),
            precopy_ns: seconds(precopy_max.unwrap_or(PRECOPY_MAX_S).into()),
            approach_ns: seconds(APPROACH_S),
            drain_ns: DRAIN_MS * 1_000_000,
            hold_ns: seconds(CUT_S),
            lease_ns: seconds(lease_s),
            repeat_ns: seconds(1),
            abort_ns: seconds(ABORT_S),
        },
        host_limits: HostLimits {
            hold_ns: seconds(CUT_S),
            lease_ns: seconds(lease_s),
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
        dry_run: arguments.dry_run || dry_run,
        memory_only: arguments.memory_only || config.memory_only,
    })
}

fn plan(request: &TakeRequest, store: &Path, members: &[DomainFacts]) -> String {
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
        store.display()
    );
    text.push_str(&table(&rows));
    for member in members {
        let disks = member.writable_disks();
        if !disks.is_empty() {
            let (name, disks) = (&member.name, disks.join(", "));
            text.push_str(&match request.memory_only {
                true => format!(
                    "Without {name}'s {disks}: restore it with those disks as they are at the \
                     cut.\n"
                ),
                false => format!("With {name}'s {disks}.\n"),
            });
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
