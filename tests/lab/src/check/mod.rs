//! The lab tests: what the product promises, on real Xen.

mod across;
mod clock;
mod disks;
mod downtime;
mod failure;
mod frames;
mod hostile;
mod input;
mod loader;
mod matrix;
mod moves;
mod network;
mod numbered;
mod pace;
pub(crate) mod peers;
mod restored;
mod tcp;
pub(crate) mod vne;
pub(crate) mod whole;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::lab::{Flavour, Lab, Life, Shape};
use crate::product;
use crate::suite::Suite;
pub use clock::Clock;
use vne::Placement;
pub use vne::Vne;

/// One test: what it shows, and how.
struct Check {
    name: &'static str,
    /// How long it takes when nothing else runs on two cores of 2026, in seconds.
    usual_s: u64,
    run: fn(&Vne) -> Result<String>,
}

/// In this order, since a lab is dear: later ones use what earlier ones left. What
/// failures do comes early, should there be too little time.
const PV: &[Check] = &[
    Check {
        name: "broken_plugins_cost_one_line_and_built_ins_go_on",
        usual_s: 10,
        run: loader::broken_plugins,
    },
    Check {
        name: "bad_input_is_one_clear_line_and_touches_nothing",
        usual_s: 15,
        run: input::bad_input,
    },
    Check {
        name: "guests_go_on_through_snapshots_in_a_row",
        usual_s: 150,
        run: whole::many_in_a_row,
    },
    Check {
        name: "an_export_passes_verify_stream_v2_and_stock_xl_restores_it",
        usual_s: 45,
        run: whole::export_is_stock,
    },
    Check {
        name: "a_file_of_xl_save_is_refused_with_a_reason",
        usual_s: 10,
        run: whole::save_file_is_refused,
    },
    Check {
        name: "restores_have_exactly_one_token_each",
        usual_s: 119,
        run: whole::restores,
    },
    Check {
        name: "killed_at_any_phase_everybody_runs_within_5_s",
        usual_s: 200,
        run: failure::killed_at_each_phase,
    },
    Check {
        name: "a_restore_that_is_ended_leaves_no_member",
        usual_s: 114,
        run: failure::restore_is_all_or_none,
    },
    Check {
        name: "a_restore_killed_while_frames_wait_leaves_no_hold_and_all_run",
        usual_s: 121,
        run: restored::killed_while_frames_wait,
    },
    Check {
        name: "what_restored_members_send_waits_until_all_are_connected",
        usual_s: 56,
        run: restored::frames_wait,
    },
    Check {
        name: "a_full_disk_fails_the_take_and_harms_nobody",
        usual_s: 14,
        run: failure::full_disk,
    },
    Check {
        name: "frames_of_all_protocols_are_held_and_recorded",
        usual_s: 40,
        run: frames::all_protocols,
    },
    Check {
        name: "a_take_whose_hold_overflows_or_vanishes_fails_and_leaves_nothing",
        usual_s: 127,
        run: frames::failing_holds,
    },
    Check {
        name: "copies_under_another_name_run_beside_the_originals",
        usual_s: 78,
        run: whole::copy_beside,
    },
    Check {
        name: "disks_are_of_the_same_moment_as_memory_after_each_restore",
        usual_s: 400,
        run: disks::agree_with_memory,
    },
    Check {
        name: "downtime_is_near_the_floor_and_far_below_xl_save",
        usual_s: 131,
        run: downtime::compared,
    },
];

/// Over two hosts, likewise.
const TWO_HOSTS: &[Check] = &[
    Check {
        name: "a_ring_over_two_hosts_turns",
        usual_s: 64,
        run: across::ring_turns,
    },
    Check {
        name: "snapshots_over_two_hosts_are_restored_with_exactly_one_token",
        usual_s: 185,
        run: across::restores,
    },
    Check {
        name: "what_members_restored_on_two_hosts_send_waits_until_all_are_connected",
        usual_s: 72,
        run: restored::frames_wait,
    },
    Check {
        name: "a_restore_on_two_hosts_killed_while_frames_wait_leaves_no_hold_and_all_run",
        usual_s: 193,
        run: restored::killed_while_frames_wait,
    },
    Check {
        name: "whatever_fails_over_two_hosts_harms_nobody",
        usual_s: 600,
        run: matrix::all,
    },
    Check {
        name: "strangers_removed_peers_and_a_flood_get_nothing_and_harm_nobody",
        usual_s: 60,
        run: hostile::hostile_peers,
    },
    Check {
        name: "skew_over_two_hosts_is_small_and_downtime_is_as_alone",
        usual_s: 220,
        run: across::skew_and_downtime,
    },
    Check {
        name: "numbered_datagrams_both_ways_are_delivered_once_across_restores",
        usual_s: 150,
        run: numbered::across_restores,
    },
    Check {
        name: "a_tcp_stream_between_hosts_goes_on_through_snapshots",
        usual_s: 102,
        run: tcp::stream_goes_on,
    },
    Check {
        name: "a_tcp_stream_between_hosts_is_restored_in_the_middle",
        usual_s: 97,
        run: tcp::stream_is_restored,
    },
    Check {
        name: "networks_of_two_vnes_with_the_same_addresses_stay_apart",
        usual_s: 169,
        run: network::side_by_side,
    },
    Check {
        name: "encrypted_snapshots_are_copied_and_restored_on_another_host",
        usual_s: 248,
        run: moves::encrypted_and_moved,
    },
    Check {
        name: "a_tcp_stream_between_hosts_tells_what_was_sent_again",
        usual_s: 60,
        run: tcp::stream_tells,
    },
];

const PVH: &[Check] = &[
    Check {
        name: "pvh_guests_go_on_through_snapshots",
        usual_s: 120,
        run: whole::three_in_a_row,
    },
    Check {
        name: "pvh_restores_as_it_was",
        usual_s: 60,
        run: whole::one_restore,
    },
];

/// Checks that share a lab and the members in it.
pub struct Group {
    flavour: Flavour,
    placement: &'static Placement,
    checks: &'static [Check],
    /// What part of the time left it may take, where there is a limit.
    share: f64,
}

/// In this order, each in a lab of its own.
pub const GROUPS: &[Group] = &[
    Group {
        flavour: Flavour::Pv,
        placement: &vne::ONE_HOST,
        checks: PV,
        share: 0.45,
    },
    Group {
        flavour: Flavour::Pv,
        placement: &vne::TWO_HOSTS,
        checks: TWO_HOSTS,
        share: 0.9,
    },
    Group {
        flavour: Flavour::Pvh,
        placement: &vne::ONE_HOST,
        checks: PVH,
        share: 1.0,
    },
];

/// Passed, failed and skipped.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    /// How many did what they should.
    pub passed: u32,
    /// How many didn't.
    pub failed: u32,
    /// For how many there was no time.
    pub skipped: u32,
}

impl Tally {
    /// Counts one result.
    pub fn count(&mut self, good: bool) {
        if good {
            self.passed += 1;
        } else {
            self.failed += 1;
        }
    }
}

/// Until a lab is up with guests in it, when all that can be cached is.
const UP_USUAL: Duration = Duration::from_secs(120);

impl Check {
    fn usual(&self) -> Duration {
        Duration::from_secs(self.usual_s)
    }
}

/// Runs, on hosts of a suite, the tests of a group whose name contains `filter`, or
/// a part of it between commas; and of these the ones that there is time for.
pub fn run(
    suite: Suite,
    group: &Group,
    filter: &str,
    tally: &mut Tally,
    clock: &mut Clock,
) -> Result<()> {
    let is_meant = |check: &&Check| filter.split(',').any(|part| check.name.contains(part));
    clock.share(group.share);
    let mut up = None;
    for check in group.checks.iter().filter(is_meant) {
        let before = up.as_ref().map_or(UP_USUAL, |_| Duration::ZERO);
        if let Err(why) = clock.allows(before + check.usual()) {
            println!("test {} ... skipped: {why}", check.name);
            tally.skipped += 1;
            continue;
        }
        let vne = match &up {
            Some(vne) => vne,
            None => &*up.insert(start(suite, group)?),
        };
        let start = Instant::now();
        let result = (check.run)(vne).and_then(|told| vne.intact().map(|()| told));
        let took = start.elapsed();
        clock.took(check.usual(), took);
        let seconds = took.as_secs();
        tally.count(result.is_ok());
        match result {
            Ok(told) => println!("test {} ... ok ({seconds} s)\n{told}", check.name),
            Err(error) => {
                println!("test {} ... FAILED ({seconds} s)\n  {error:#}", check.name);
                println!("{}", vne.state_for_humans());
                vne.start_afresh().context("after a failed test")?;
            }
        }
    }
    Ok(())
}

/// The group's lab, with what is to be tested in it.
fn start(suite: Suite, group: &Group) -> Result<Vne> {
    let stage: PathBuf = product::stage(suite)?;
    let programs = ["measure", "hostile", "holds"];
    let shape = Shape {
        flavour: group.flavour,
        hosts: group.placement.hosts,
        suite,
    };
    let lab = Lab::up(&shape, Life::Tied)?;
    for host in 0..shape.hosts {
        product::install(&lab, host, &stage)?;
        for name in programs {
            let program = product::example(suite, name)?;
            lab.put(host, &program, &format!("/usr/local/bin/{name}"))?;
        }
    }
    Vne::start_placed(lab, group.placement).context("the VNE under test doesn't start")
}
