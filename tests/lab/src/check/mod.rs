//! The lab tests: what the product promises, on real Xen.

mod across;
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
pub(crate) mod peers;
mod restored;
mod tcp;
pub(crate) mod vne;
pub(crate) mod whole;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::lab::{Flavour, Lab, Life, Shape};
use crate::product;
use crate::suite::Suite;
use vne::Placement;
pub use vne::Vne;

/// One test: what it shows, and how.
struct Check {
    name: &'static str,
    run: fn(&Vne) -> Result<String>,
}

/// In this order, since a lab is dear: later ones use what earlier ones left.
const PV: &[Check] = &[
    Check {
        name: "broken_plugins_cost_one_line_and_built_ins_go_on",
        run: loader::broken_plugins,
    },
    Check {
        name: "bad_input_is_one_clear_line_and_touches_nothing",
        run: input::bad_input,
    },
    Check {
        name: "frames_of_all_protocols_are_held_and_recorded",
        run: frames::all_protocols,
    },
    Check {
        name: "a_take_whose_hold_overflows_or_vanishes_fails_and_leaves_nothing",
        run: frames::failing_holds,
    },
    Check {
        name: "guests_go_on_through_snapshots_in_a_row",
        run: whole::many_in_a_row,
    },
    Check {
        name: "an_export_passes_verify_stream_v2_and_stock_xl_restores_it",
        run: whole::export_is_stock,
    },
    Check {
        name: "a_file_of_xl_save_is_refused_with_a_reason",
        run: whole::save_file_is_refused,
    },
    Check {
        name: "restores_have_exactly_one_token_each",
        run: whole::restores,
    },
    Check {
        name: "copies_under_another_name_run_beside_the_originals",
        run: whole::copy_beside,
    },
    Check {
        name: "killed_at_any_phase_everybody_runs_within_5_s",
        run: failure::killed_at_each_phase,
    },
    Check {
        name: "a_restore_that_is_ended_leaves_no_member",
        run: failure::restore_is_all_or_none,
    },
    Check {
        name: "what_restored_members_send_waits_until_all_are_connected",
        run: restored::frames_wait,
    },
    Check {
        name: "a_restore_killed_while_frames_wait_leaves_no_hold_and_all_run",
        run: restored::killed_while_frames_wait,
    },
    Check {
        name: "disks_are_of_the_same_moment_as_memory_after_each_restore",
        run: disks::agree_with_memory,
    },
    Check {
        name: "a_full_disk_fails_the_take_and_harms_nobody",
        run: failure::full_disk,
    },
    Check {
        name: "downtime_is_near_the_floor_and_far_below_xl_save",
        run: downtime::compared,
    },
];

/// Over two hosts.
const TWO_HOSTS: &[Check] = &[
    Check {
        name: "a_ring_over_two_hosts_turns",
        run: across::ring_turns,
    },
    Check {
        name: "snapshots_over_two_hosts_are_restored_with_exactly_one_token",
        run: across::restores,
    },
    Check {
        name: "skew_over_two_hosts_is_small_and_downtime_is_as_alone",
        run: across::skew_and_downtime,
    },
    Check {
        name: "what_members_restored_on_two_hosts_send_waits_until_all_are_connected",
        run: restored::frames_wait,
    },
    Check {
        name: "a_restore_on_two_hosts_killed_while_frames_wait_leaves_no_hold_and_all_run",
        run: restored::killed_while_frames_wait,
    },
    Check {
        name: "a_tcp_stream_between_hosts_goes_on_through_snapshots",
        run: tcp::stream_goes_on,
    },
    Check {
        name: "a_tcp_stream_between_hosts_is_restored_in_the_middle",
        run: tcp::stream_is_restored,
    },
    Check {
        name: "numbered_datagrams_both_ways_are_delivered_once_across_restores",
        run: numbered::across_restores,
    },
    Check {
        name: "encrypted_snapshots_are_copied_and_restored_on_another_host",
        run: moves::encrypted_and_moved,
    },
    Check {
        name: "networks_of_two_vnes_with_the_same_addresses_stay_apart",
        run: network::side_by_side,
    },
    Check {
        name: "whatever_fails_over_two_hosts_harms_nobody",
        run: matrix::all,
    },
    Check {
        name: "a_tcp_stream_between_hosts_tells_what_was_sent_again",
        run: tcp::stream_tells,
    },
    Check {
        name: "strangers_removed_peers_and_a_flood_get_nothing_and_harm_nobody",
        run: hostile::hostile_peers,
    },
];

const PVH: &[Check] = &[
    Check {
        name: "pvh_guests_go_on_through_snapshots",
        run: whole::three_in_a_row,
    },
    Check {
        name: "pvh_restores_as_it_was",
        run: whole::one_restore,
    },
];

/// Checks that share a lab and the members in it.
pub struct Group {
    flavour: Flavour,
    placement: &'static Placement,
    checks: &'static [Check],
}

/// In this order, each in a lab of its own.
pub const GROUPS: &[Group] = &[
    Group {
        flavour: Flavour::Pv,
        placement: &vne::ONE_HOST,
        checks: PV,
    },
    Group {
        flavour: Flavour::Pv,
        placement: &vne::TWO_HOSTS,
        checks: TWO_HOSTS,
    },
    Group {
        flavour: Flavour::Pvh,
        placement: &vne::ONE_HOST,
        checks: PVH,
    },
];

/// Passed and failed.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    /// How many did what they should.
    pub passed: u32,
    /// How many didn't.
    pub failed: u32,
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

/// Runs, on hosts of a suite, the tests of a group whose name contains `filter`, or
/// a part of it between commas.
pub fn run(suite: Suite, group: &Group, filter: &str, tally: &mut Tally) -> Result<()> {
    let chosen: Vec<&Check> = group
        .checks
        .iter()
        .filter(|check| filter.split(',').any(|part| check.name.contains(part)))
        .collect();
    if chosen.is_empty() {
        return Ok(());
    }
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
    let vne =
        Vne::start_placed(lab, group.placement).context("the VNE under test doesn't start")?;
    for check in chosen {
        let start = Instant::now();
        let result = (check.run)(&vne).and_then(|told| vne.intact().map(|()| told));
        let seconds = start.elapsed().as_secs();
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
