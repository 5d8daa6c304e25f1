//! Take, go on, restore.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Result};
use serde_json::Value;

use super::pace;
use super::vne::{number, Vne, NAME};
use crate::scale;

/// Snapshots that stay for the restores that follow, in a short run and in a full
/// one.
const KEPT: (usize, usize) = (4, 10);

/// Takes of the busy VNE, one after the other.
pub fn many_in_a_row(vne: &Vne) -> Result<String> {
    in_a_row(vne, scale::of(6, 20))
}

/// As the above, for a slower lab.
pub fn three_in_a_row(vne: &Vne) -> Result<String> {
    in_a_row(vne, 3)
}

fn in_a_row(vne: &Vne, count: usize) -> Result<String> {
    let kept = scale::of(KEPT.0, KEPT.1);
    let before = vne.received()?;
    let (taken, heard) = vne.listening(|| {
        let mut taken = Vec::new();
        for round in 0..count {
            // At moments that are spread over the token's way.
            std::thread::sleep(Duration::from_millis(213 * (round as u64 % 7)));
            let manifest = vne.take()?;
            vne.turning(Duration::from_secs(10))?;
            if round + kept < count {
                let id = manifest["id"].as_str().unwrap_or_default();
                vne.sh(&format!("xl vne-snapshot remove {NAME}@{id}"))?;
            }
            taken.push(manifest);
        }
        Ok(taken)
    })?;
    vne.no_violations()?;
    vne.intact()?;
    let listed = vne.listed()?.len();
    ensure!(listed == count.min(kept), "{listed} snapshots are listed");
    for path in ["/missing", "/duplicate", "/reordered"] {
        ensure!(number(&heard, path)? == 0, "{path} in {heard}");
    }
    let downtimes = spread(taken.iter().flat_map(downtimes_ms));
    let skews = spread(taken.iter().map(|m| ms(&m["cut"]["skew_ns"])));
    let holds = spread(taken.iter().map(|m| ms(&m["cut"]["hold_ns"])));
    Ok(format!(
        "  {count} snapshots of 4 members; downtime {downtimes}, skew {skews}, hold {holds}\n  \
         {} datagrams at 2 ms: none missing, doubled or out of order; the token went round {} times",
        number(&heard, "/received")?,
        vne.received()? - before,
    ))
}

/// Restores snapshots that were each taken at another moment of the ring.
pub fn restores(vne: &Vne) -> Result<String> {
    let listed = at_least(vne, scale::of(KEPT.0, KEPT.1))?;
    let mut told = Vec::new();
    for snapshot in &listed {
        told.push(restore(vne, 0, snapshot)?);
        vne.sh(&format!("xl vne-snapshot remove {snapshot}"))?;
    }
    Ok(tell(&told))
}

/// What restores have shown.
pub fn tell(restored: &[Restored]) -> String {
    let on_its_way = restored.iter().filter(|one| one.recorded > 0).count();
    let frames: u64 = restored.iter().map(|one| one.recorded).sum();
    format!(
        "  {} restores: exactly one token each; no number that wasn't sent\n  {frames} frames were \
         on their way, in {on_its_way} of them",
        restored.len()
    )
}

/// The snapshots that an earlier test left, and more if those are too few.
fn at_least(vne: &Vne, count: usize) -> Result<Vec<String>> {
    for _ in vne.listed()?.len()..count {
        vne.take()?;
    }
    vne.listed()
}

/// Takes one snapshot and restores it.
pub fn one_restore(vne: &Vne) -> Result<String> {
    vne.remove_all()?;
    vne.take()?;
    let restored = restore(vne, 0, NAME)?;
    vne.remove_all()?;
    Ok(tell(&[restored]))
}

/// What a restore has shown.
pub struct Restored {
    /// Frames that had been on their way.
    pub recorded: u64,
}

/// Destroys the members, and restores the snapshot by a command on some host:
/// there is exactly one token.
pub fn restore(vne: &Vne, host: usize, snapshot: &str) -> Result<Restored> {
    let manifest = vne.sh_on(host, &format!("xl vne-snapshot show --json {snapshot}"))?;
    let recorded = recorded(&serde_json::from_str(&manifest)?);
    vne.destroy()?;
    vne.sh_on(host, &format!("xl vne-snapshot restore -q {snapshot}"))?;
    vne.all_run()?;
    vne.no_orphan()?;
    let received = |stations: &[Value]| -> Result<u64> {
        let mut sum = 0;
        for station in stations {
            sum += number(station, "/ring/received")?;
        }
        Ok(sum)
    };
    let first = received(&vne.stations()?)?;
    // A second token, or a number from the future, is a violation at the first
    // station that it reaches.
    let until = Instant::now() + pace::here(Duration::from_secs(10));
    loop {
        let stations = vne.stations()?;
        if received(&stations)? > first + 20 {
            vne.no_violations()?;
            return Ok(Restored { recorded });
        }
        if Instant::now() > until {
            let frames = vne.everywhere(
                "cd /var/lib/xen-vne && for f in $(find . -name frames.pcapng); do \
                 echo $f; tcpdump -Z root -nttr $f 2>/dev/null | tail -n 30; done",
            )?;
            bail!(
                "the token of {snapshot} is lost, {recorded} frames were recorded: {stations:?}\n\
                 {manifest}\n{}",
                frames.join("\n")
            );
        }
    }
}

/// The name of the copy.
const COPY: &str = "try";

/// Copies of all members beside the originals, with the same addresses: both
/// rings turn, and neither sees the other's token.
pub fn copy_beside(vne: &Vne) -> Result<String> {
    vne.turning(Duration::from_secs(10))?;
    vne.take()?;
    let told = vne
        .sh(&format!(
            "xl vne-snapshot restore -q --as {COPY} {NAME} 2>&1"
        ))
        .and_then(|_| both_turn(vne));
    vne.sh(&format!(
        "ip link delete look 2>/dev/null; ip netns delete look 2>/dev/null; \
         for d in $(xl list | grep -o '^{COPY}-[^ ]*'); do xl destroy $d; done"
    ))?;
    vne.remove_all()?;
    let told = told?;
    // The last one takes its network along.
    vne.sh(&format!("! ip link show vne-{COPY} 2>/dev/null"))?;
    Ok(told)
}

fn both_turn(vne: &Vne) -> Result<String> {
    // dom0 has no address on a VNE's own network.
    vne.sh(&format!(
        "ip netns add look && ip link add look type veth peer name eth0 netns look && \
         ip link set look master vne-{COPY} up && \
         ip -n look addr add 10.77.0.1/16 dev eth0 && ip -n look link set eth0 up"
    ))?;
    let ask = |ip: &str| -> Result<Value> {
        let text = vne.sh(&format!("ip netns exec look vne-guest ask {ip}"))?;
        Ok(serde_json::from_str(&text)?)
    };
    let asked = || -> Result<Vec<Value>> { vne.ring().iter().map(|one| ask(one.ip)).collect() };
    let received = |stations: &[Value]| -> Result<Vec<u64>> {
        let number = |station| number(station, "/ring/received");
        stations.iter().map(number).collect()
    };
    let before = (received(&vne.stations()?)?, received(&asked()?)?);
    std::thread::sleep(Duration::from_secs(6));
    let (originals, copies) = (vne.stations()?, asked()?);
    let after = (received(&originals)?, received(&copies)?);
    for (whose, before, after) in [
        ("originals'", &before.0, &after.0),
        ("copies'", &before.1, &after.1),
    ] {
        ensure!(
            before
                .iter()
                .zip(after)
                .all(|(before, after)| before < after),
            "the {whose} ring stands still: {before:?}, {after:?}"
        );
    }
    for station in originals.iter().chain(&copies) {
        for path in ["/ring/violations", "/memory/corrupt"] {
            ensure!(number(station, path)? == 0, "{path} in {station}");
        }
    }
    Ok(format!(
        "  originals went from {:?} to {:?}, copies with the same addresses from {:?} to {:?}",
        before.0, after.0, before.1, after.1
    ))
}

/// How many frames a snapshot has recorded.
pub fn recorded(manifest: &Value) -> u64 {
    let members = manifest["members"].as_array();
    let frames = |member: &Value| member["recorded"]["frames"].as_u64();
    members.into_iter().flatten().filter_map(frames).sum()
}

/// A member as a plain save file.
pub fn export_is_stock(vne: &Vne) -> Result<String> {
    vne.sh("rm -rf /root/export; mkdir -m 700 /root/export")?;
    let told = (|| {
        let newest = at_least(vne, 1)?.pop().unwrap_or_default();
        vne.sh(&format!(
            "xl vne-snapshot export {newest} ring1 /root/export/ring1"
        ))?;
        let mode = vne.sh("stat -c %a /root/export/ring1")?;
        ensure!(mode.trim() == "600", "the file has mode {mode}");
        // A file of xl: its own header in front of libxl's stream.
        let verified = vne.sh("verify-stream-v2 -f xl -i /root/export/ring1 2>&1")?;
        let stock = format!("/{}/bin/xl.stock", vne.lab.suite().xen_folder());
        vne.sh(&format!(
            "xl destroy ring1; {stock} restore /root/export/ring1 2>&1"
        ))?;
        let station = vne.station(1)?;
        ensure!(number(&station, "/memory/corrupt")? == 0, "{station}");
        let size = vne.sh("stat -c %s /root/export/ring1")?;
        Ok(format!(
            "  {} bytes; verify-stream-v2: {}; stock xl restored it, and it answers",
            size.trim(),
            verified.lines().last().unwrap_or("passed")
        ))
    })();
    vne.sh("rm -rf /root/export")?;
    // Its ring may have lost its token with the one that was destroyed.
    vne.start_afresh()?;
    told
}

/// What `xl save` wrote isn't ours to restore.
pub fn save_file_is_refused(vne: &Vne) -> Result<String> {
    vne.sh("xl save -c ring2 /root/ring2.save 2>&1")?;
    let result = vne.sh_fails("xl vne-snapshot restore /root/ring2.save");
    vne.sh("rm -f /root/ring2.save")?;
    let (status, told) = result?;
    // xl save -c ends the monitor of what it saves.
    vne.start_afresh()?;
    ensure!(status == 1, "exit status {status}");
    if !told.contains("xl restore /root/ring2.save") || told.lines().count() != 1 {
        bail!("it said: {told}");
    }
    Ok(format!("  {}", told.trim()))
}

pub fn ms(ns: &Value) -> f64 {
    ns.as_u64().unwrap_or_default() as f64 / 1e6
}

/// Each member's downtime in a manifest, in ms.
pub fn downtimes_ms(manifest: &Value) -> Vec<f64> {
    let members = manifest["members"].as_array();
    members
        .into_iter()
        .flatten()
        .map(|member| {
            let phases = member["downtime"].as_object();
            phases.into_iter().flatten().map(|(_, ns)| ms(ns)).sum()
        })
        .collect()
}

/// Median and extremes, for people.
pub fn spread(values: impl Iterator<Item = f64>) -> String {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match (values.first(), values.get(values.len() / 2), values.last()) {
        (Some(least), Some(median), Some(most)) => {
            format!("{median:.0} ms ({least:.0} to {most:.0})")
        }
        _ => String::from("-"),
    }
}
