//! How long a guest is down, seen from outside, by four ways.

use anyhow::{ensure, Result};
use serde_json::Value;

use super::vne::Vne;
use super::whole::{downtimes_ms, ms};
use crate::bench::downtime::PHASES;
use crate::bench::figures::median;
use crate::bench::pause::{self, Way};
use crate::lab::{Guest, DOM0_WEIGHT};

const ROUNDS: usize = 3;
const GUEST: &str = "measured";

/// The four ways, interleaved, on one guest of 256 MiB that dirties 2,000
/// pages a second.
pub fn compared(vne: &Vne) -> Result<String> {
    vne.destroy()?;
    let guest = Guest {
        dirty_pages_per_s: 2000,
        ..pause::guest(GUEST)
    };
    vne.lab.guest(0, &guest)?;
    // One guest doesn't keep dom0 from its work, and would only be kept from
    // its own by the weight that the lab gives to dom0.
    vne.sh("xl sched-credit2 -d Domain-0 -w 512")?;
    let told = measure(vne);
    vne.sh(&format!(
        "xl sched-credit2 -d Domain-0 -w {DOM0_WEIGHT}; xl destroy {GUEST}; rm -f /root/measured.*"
    ))?;
    vne.start_afresh()?;
    told
}

fn measure(vne: &Vne) -> Result<String> {
    let ways = [Way::Floor, Way::Save, Way::Live, Way::Ours];
    let mut pauses = ways.map(|_| Vec::new());
    let mut reported = Vec::new();
    let mut manifests = Vec::new();
    for _ in 0..ROUNDS {
        for (way, pauses) in ways.into_iter().zip(&mut pauses) {
            let pause = pause::measure(vne, GUEST, way, false)?;
            pauses.push(pause.ms);
            reported.extend(pause.manifest.iter().flat_map(downtimes_ms));
            manifests.extend(pause.manifest);
        }
    }
    let [floor, save, live, ours] = pauses.map(|pauses| median(&pauses));
    let reported = median(&reported);
    let told = format!(
        "  256 MiB, 2,000 pages/s, {ROUNDS} rounds, median pause at the vif:\n  \
         floor (suspend, resume)   {floor:7.1} ms\n  \
         xl save -c                {save:7.1} ms\n  \
         stock live policy         {live:7.1} ms\n  \
         ours                      {ours:7.1} ms, reported {reported:.1} ms\n  \
         ours is {:.2} times the floor, and xl save -c is {:.1} times ours\n  of it: {}",
        ours / floor,
        save / ours,
        phases(&manifests),
    );
    ensure!(save >= 10.0 * ours, "{told}");
    // The report begins with the request, when the guest still runs, so it is
    // never the smaller one by more than what a packet is late.
    ensure!(
        reported >= ours - 15.0 && reported <= 2.0 * ours + 50.0,
        "the report doesn't agree with what is seen: {told}"
    );
    Ok(told)
}

/// What our downtime is made of, as takes tell it, each the median.
fn phases(manifests: &[Value]) -> String {
    let middle = |value: &dyn Fn(&Value) -> f64| {
        let values: Vec<f64> = manifests.iter().map(|m| value(&m["members"][0])).collect();
        median(&values)
    };
    let mut told = String::new();
    for (name, phase) in PHASES {
        let took = middle(&|member| ms(&member["downtime"][name]));
        told.push_str(&format!("{phase} {took:.1} ms, "));
    }
    let pages = middle(&|member| member["pages_final_dirty"].as_f64().unwrap_or(f64::NAN));
    told + &format!("{pages:.0} pages copied while it stood still")
}
