//! Numbered datagrams in both directions between two hosts, across restores.

use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use serde_json::Value;

use super::pace;
use super::vne::{self, number, Member, Vne};
use super::whole::recorded;
use super::{across, peers};
use crate::scale;

const ENDS: [Member; 2] = [
    Member {
        name: "mesh0",
        host: 0,
        ip: "10.77.1.40",
    },
    Member {
        name: "mesh1",
        host: 1,
        ip: "10.77.1.41",
    },
];
/// Where frames may have been dropped; the vifs are gone once the guests are.
const COUNTERS: &str = "ip -s -s link; tc -s qdisc; cat /proc/net/softnet_stat; \
                        bridge -s fdb show br xenbr0";
const PATIENCE: Duration = Duration::from_secs(20);
/// Datagrams that each end gets after a restore before it's believed.
const AFTER: u64 = 200;

/// Each end is destroyed and restored in the middle: no number is missing, none
/// comes twice or in another order.
pub fn across_restores(vne: &Vne) -> Result<String> {
    let told = start(vne).and_then(|()| through_restores(vne));
    let told = told.map_err(|error| match vne.everywhere(COUNTERS) {
        Ok(counters) => error.context(counters.join("\n")),
        Err(_) => error,
    });
    stop(vne)?;
    vne.remove_all()?;
    told
}

fn start(vne: &Vne) -> Result<()> {
    stop(vne)?;
    let ips = ENDS.map(|end| end.ip).join(",");
    let mut guests = Vec::new();
    for (index, end) in ENDS.iter().enumerate() {
        let line = format!("mesh --index {index} --peers {ips} --interval-us 5000");
        guests.push((end.host, vne::guest(end, 500, &line)?));
    }
    vne.lab.guests(&guests)?;
    let ends = ENDS.map(|end| format!("\"host{}:{}\"", end.host, end.name));
    vne.everywhere(&format!(
        "echo 'members = [ {} ]' > /etc/xen/vne/mesh.cfg",
        ends.join(", ")
    ))?;
    peers::trust_for(vne, &[vne::NAME, "mesh"])
}

fn stop(vne: &Vne) -> Result<()> {
    for Member { name, host, .. } in ENDS {
        vne.sh_on(
            host,
            &format!("xl domid {name} >/dev/null 2>&1 && xl destroy {name}; true"),
        )?;
    }
    Ok(())
}

/// How many datagrams each end has got. Fails if one of them isn't the next.
fn received(vne: &Vne) -> Result<Vec<u64>> {
    let mut counts = Vec::new();
    for end in &ENDS {
        let told = vne.ask(end)?;
        let link: &Value = told
            .pointer("/mesh/links/0")
            .with_context(|| format!("no link in {told}"))?;
        for what in ["/missing", "/duplicate", "/reordered", "/send_failures"] {
            ensure!(number(link, what)? == 0, "{what} in {told}");
        }
        counts.push(number(link, "/received")?);
    }
    Ok(counts)
}

/// Waits until each end has got so many more.
fn talk(vne: &Vne, more: u64) -> Result<()> {
    let first = received(vne)?;
    let until = Instant::now() + pace::here(PATIENCE);
    loop {
        let now = received(vne)?;
        if first
            .iter()
            .zip(&now)
            .all(|(first, now)| *now > first + more)
        {
            return Ok(());
        }
        ensure!(
            Instant::now() < until,
            "an end hears nothing any more: {first:?}, then {now:?}"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn through_restores(vne: &Vne) -> Result<String> {
    talk(vne, AFTER)?;
    let mut manifests = Vec::new();
    for round in 0..scale::of(3, 10) {
        let manifest = vne.take_on(round % 2, "mesh")?;
        talk(vne, AFTER)?;
        for end in &ENDS {
            vne.sh_on(end.host, &format!("xl destroy {}", end.name))?;
        }
        vne.sh_on(round % 2, "xl vne-snapshot restore -q mesh")?;
        talk(vne, AFTER)
            .with_context(|| format!("{} frames were on their way", recorded(&manifest)))?;
        manifests.push(manifest);
    }
    let frames: u64 = manifests.iter().map(recorded).sum();
    Ok(format!(
        "  {} restores: {frames} frames were on their way; none missing, doubled or out of order\n{}",
        manifests.len(),
        across::describe(&manifests)
    ))
}
