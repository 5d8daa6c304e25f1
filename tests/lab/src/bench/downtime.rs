//! Downtime by memory, dirty rate and way, and the phases of ours.

use anyhow::Result;
use serde_json::Value;

use super::figures::Book;
use super::pause::{self, Way};
use super::Scale;
use crate::check::vne::Vne;
use crate::check::whole::{downtimes_ms, ms};
use crate::lab::{Guest, DOM0_WEIGHT};

/// What this part measures.
pub const TARGETS: &[&str] = &[
    "downtime_over_floor",
    "xl_save_over_downtime",
    "downtime_growth_128_1024",
    "busy_downtime_over_floor",
];

/// Memory over which writes are spread, the same for all guests, and little enough
/// for the smallest.
const WORKING_SET_MIB: u32 = 32;
/// Of dom0 with one guest beside it, which it would only keep from its own work:
/// as much as the guest's.
const EVEN_WEIGHT: u32 = 512;

/// A guest, and how it's stopped.
struct Cell {
    memory_mib: u32,
    dirty: u32,
    ways: &'static [Way],
}

impl Cell {
    fn guest(&self) -> String {
        format!("m{}d{}", self.memory_mib, self.dirty)
    }

    fn figure(&self, way: Way) -> String {
        figure(self.memory_mib, self.dirty, way.name())
    }
}

/// Of a take's downtime, in their order, as the manifest calls them; disks only where
/// there are some.
pub(crate) const PHASES: [(&str, &str); 5] = [
    ("suspend_ns", "suspend"),
    ("last_pages_ns", "last pages"),
    ("device_state_ns", "device state"),
    ("disks_ns", "disks"),
    ("resume_ns", "resume"),
];

fn figure(memory_mib: u32, dirty: u32, what: &str) -> String {
    format!("{memory_mib} MiB, {dirty} pages/s: {what}")
}

const ALL: &[Way] = &[Way::Floor, Way::Save, Way::Live, Way::Ours];

const fn cell(memory_mib: u32, dirty: u32, ways: &'static [Way]) -> Cell {
    Cell {
        memory_mib,
        dirty,
        ways,
    }
}

/// Guests that are there at a time: what a host's memory is enough for.
fn groups(scale: &Scale) -> Vec<Vec<Cell>> {
    if scale.quick {
        return vec![
            vec![
                cell(128, 2000, &[Way::Ours]),
                cell(512, 2000, ALL),
                cell(1024, 2000, &[Way::Ours]),
            ],
            vec![cell(512, 10_000, &[Way::Floor, Way::Live, Way::Ours])],
        ];
    }
    let mut groups = Vec::new();
    for dirty in [0, 500, 2000, 10_000] {
        // With one too large to be beside the others, growth couldn't be told from
        // what changes meanwhile.
        if dirty == 2000 {
            groups.push([128, 512, 1024].map(|mib| cell(mib, dirty, ALL)).into());
            groups.push(vec![cell(256, dirty, ALL)]);
            continue;
        }
        groups.push([128, 256, 512].map(|mib| cell(mib, dirty, ALL)).into());
        groups.push(vec![cell(1024, dirty, ALL)]);
    }
    groups
}

/// Measures all of it on one host without guests.
pub fn run(vne: &Vne, scale: &Scale, book: &mut Book) -> Result<()> {
    vne.sh(&format!("xl sched-credit2 -d Domain-0 -w {EVEN_WEIGHT}"))?;
    let mut done = Ok(());
    for group in groups(scale) {
        let measured = with_guests(vne, &group, scale, book);
        for cell in &group {
            let name = cell.guest();
            vne.sh(&format!("xl destroy {name} 2>/dev/null; true"))?;
        }
        done = done.and(measured);
    }
    vne.sh(&format!("xl sched-credit2 -d Domain-0 -w {DOM0_WEIGHT}"))?;
    targets(book);
    done
}

fn with_guests(vne: &Vne, group: &[Cell], scale: &Scale, book: &mut Book) -> Result<()> {
    for cell in group {
        let guest = Guest {
            memory_mib: cell.memory_mib,
            dirty_pages_per_s: cell.dirty,
            working_set_mib: WORKING_SET_MIB,
            ..pause::guest(&cell.guest())
        };
        vne.lab.guest(0, &guest)?;
        vne.sh(&format!("xl pause {}", guest.name))?;
    }
    // The first round warms up. Xen is asked about the processors only then, which
    // costs dom0 time.
    for round in 0..=scale.rounds(3, 7) {
        if scale.is_over(round) {
            break;
        }
        for cell in group {
            let guest = cell.guest();
            // The others wait: each is measured as if it were alone.
            vne.sh(&format!("xl unpause {guest}; sleep 1"))?;
            for &way in cell.ways {
                let pause = pause::measure(vne, &guest, way, round == 0)?;
                let figure = cell.figure(way);
                let still = format!("{figure}, processors stopped");
                book.add(&still, "ms", pause.still_ms);
                if round > 0 {
                    book.add(&figure, "ms", [pause.ms]);
                    if let Some(manifest) = pause.manifest {
                        phases(cell, &manifest, book);
                    }
                }
            }
            vne.sh(&format!("xl pause {guest}"))?;
        }
    }
    Ok(())
}

/// What a take itself says about its downtime, phase by phase.
fn phases(cell: &Cell, manifest: &Value, book: &mut Book) {
    let mut add = |what: &str, unit: &str, value: f64| {
        let name = figure(cell.memory_mib, cell.dirty, what);
        book.add(&name, unit, [value]);
    };
    let member = &manifest["members"][0];
    for total in downtimes_ms(manifest) {
        add("ours, as reported", "ms", total);
    }
    for (name, phase) in PHASES {
        if let ns @ Value::Number(_) = &member["downtime"][name] {
            add(&format!("ours, {phase}"), "ms", ms(ns));
        }
    }
    add("ours, frames held", "ms", ms(&manifest["cut"]["hold_ns"]));
    if let Some(pages) = member["pages_final_dirty"].as_u64() {
        add("ours, copied while it stood still", "pages", pages as f64);
    }
}

/// Those for which all was measured.
fn targets(book: &mut Book) {
    let of = |memory_mib, dirty, way: Way| book.median(&figure(memory_mib, dirty, way.name()));
    let over = |above: Result<f64>, below: Result<f64>| Some(above.ok()? / below.ok()?);
    let ours = |memory_mib, dirty| of(memory_mib, dirty, Way::Ours);
    let values = [
        over(ours(512, 2000), of(512, 2000, Way::Floor)),
        over(of(512, 2000, Way::Save), ours(512, 2000)),
        over(ours(1024, 2000), ours(128, 2000)),
        over(ours(512, 10_000), of(512, 10_000, Way::Floor)),
    ];
    let over_live = over(ours(512, 10_000), of(512, 10_000, Way::Live));
    for (name, value) in TARGETS.iter().zip(values) {
        book.target(name, value.unwrap_or(f64::NAN));
    }
    let name = figure(512, 10_000, "ours over stock live policy");
    book.add(&name, "", over_live);
}
