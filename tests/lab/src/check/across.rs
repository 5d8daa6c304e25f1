//! The members on two hosts, and the wire between.

use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use serde_json::Value;

use super::vne::{number, Vne, NAME};
use super::whole::{downtimes_ms, ms, restore, spread, tell};
use crate::bench::figures::median;
use crate::scale;

/// How long the token's way is watched.
const WATCHED: Duration = Duration::from_secs(20);
/// Longer than the token ever rests.
const STILL: Duration = Duration::from_secs(6);

/// Snapshots that are taken for restoring them, in a short run and in a full one.
const TAKES: (usize, usize) = (4, 20);
/// Takes of all, each beside one of every member alone.
const PAIRS: usize = 5;

/// Snapshots at moments that are spread over the token's way, taken and
/// restored by commands on either host.
pub fn restores(vne: &Vne) -> Result<String> {
    let takes = scale::of(TAKES.0, TAKES.1);
    vne.remove_all()?;
    let mut manifests = Vec::new();
    for round in 0..takes {
        std::thread::sleep(Duration::from_millis(213 * (round as u64 % 7)));
        let manifest = vne.take_on(round % 2, NAME)?;
        vne.turning(Duration::from_secs(15))?;
        manifests.push(manifest);
    }
    let each: Vec<Vec<String>> = (0..2)
        .map(|host| vne.listed_on(host))
        .collect::<Result<_>>()?;
    ensure!(
        each.iter().all(|listed| listed.len() == takes) && each[0] == each[1],
        "not the same {takes} snapshots are listed on both hosts: {each:?}"
    );
    let mut restored = Vec::new();
    for (round, snapshot) in each[0].iter().enumerate() {
        restored.push(restore(vne, round % 2, snapshot)?);
    }
    vne.remove_all()?;
    Ok(format!("{}\n{}", tell(&restored), describe(&manifests)))
}

/// Figures of some takes.
pub fn describe(manifests: &[Value]) -> String {
    let cut = |key: &str| spread(manifests.iter().map(|manifest| ms(&manifest["cut"][key])));
    format!(
        "  downtime {}, skew {}, known within {}, hold {}",
        spread(manifests.iter().flat_map(downtimes_ms)),
        cut("skew_ns"),
        cut("skew_error_ns"),
        cut("hold_ns")
    )
}

/// Takes of two members on different hosts, of each of them alone, and of all
/// four, in turn. What two members on a host cost each other, which has only one
/// processor in this lab, is told and not judged.
pub fn skew_and_downtime(vne: &Vne) -> Result<String> {
    let ring = vne.ring();
    let pair = [ring.first(), ring.get(1)].map(|member| member.context("no such station"));
    let [first, second] = pair;
    let pair = [first?, second?];
    let what = pair.map(|member| format!("host{}:{}", member.host, member.name));
    let what = format!("{NAME} {}", what.join(" "));
    let (mut pairs, mut alls) = (Vec::new(), Vec::new());
    let mut alone = [Vec::new(), Vec::new()];
    for _ in 0..PAIRS {
        pairs.push(vne.take_on(0, &what)?);
        for (member, downtimes) in pair.iter().zip(&mut alone) {
            let what = format!("alone {}", member.name);
            downtimes.extend(downtimes_ms(&vne.take_on(member.host, &what)?));
        }
        alls.push(vne.take()?);
        vne.remove_all()?;
    }
    let mut told = format!("  one member a host:\n{}", describe(&pairs));
    let mut worst: f64 = 0.0;
    for (at, (member, alone)) in pair.iter().zip(&alone).enumerate() {
        let together: Vec<f64> = pairs
            .iter()
            .filter_map(|m| downtimes_ms(m).get(at).copied())
            .collect();
        let ratio = median(&together) / median(alone);
        worst = worst.max(ratio);
        told.push_str(&format!(
            "\n  {}: {} together, {} alone, {ratio:.2} times",
            member.name,
            spread(together.iter().copied()),
            spread(alone.iter().copied())
        ));
    }
    let share = |manifests: &[Value]| {
        let shares: Vec<f64> = manifests
            .iter()
            .map(|manifest| {
                let most = downtimes_ms(manifest).into_iter().fold(0.0, f64::max);
                ms(&manifest["cut"]["skew_ns"]) / most
            })
            .collect();
        median(&shares)
    };
    let shares = [share(&pairs), share(&alls)];
    told.push_str(&format!(
        "\n  two members a host, on its one processor:\n{}\n  skew over the largest downtime: {:.2} \
         with one member a host, {:.2} with two",
        describe(&alls),
        shares[0],
        shares[1]
    ));
    // The target of 1.3 is told, not asserted: a member's downtimes alone lie as far
    // apart as 1.5 on the emulator. Beyond twice it's no noise.
    told.push_str(&format!(
        "\n  downtime at most 1.3 times that alone: {}",
        if worst <= 1.3 { "met" } else { "missed" }
    ));
    ensure!(
        shares.iter().all(|share| *share <= 1.0 / 3.0),
        "skew is too large:\n{told}"
    );
    ensure!(worst <= 2.0, "downtime is much longer than alone:\n{told}");
    Ok(told)
}

/// The token goes round by the wire, and doesn't when that is cut.
pub fn ring_turns(vne: &Vne) -> Result<String> {
    let before = each_received(vne)?;
    std::thread::sleep(WATCHED);
    let after = each_received(vne)?;
    let least = before.iter().zip(&after).map(|(a, b)| b - a).min();
    let rounds = least.context("the ring has no station")?;
    ensure!(rounds > 1, "{rounds} rounds: {:?}", vne.stations()?);
    vne.no_violations()?;
    vne.no_orphan()?;

    vne.lab.link(0, 1, false)?;
    let cut = stands_still(vne);
    // Whatever was found, or nothing works any more.
    vne.lab.link(0, 1, true)?;
    cut?;
    for member in vne.ring() {
        for host in 0..2 {
            vne.sh_on(host, &format!("vne-guest ask {}", member.ip))?;
        }
    }
    // The token was lost on the cut wire.
    vne.start_afresh()?;
    vne.no_violations()?;
    Ok(format!(
        "  {rounds} rounds in {} s; with the wire cut one way the token stood still, and all \
         answered their own dom0",
        WATCHED.as_secs()
    ))
}

fn each_received(vne: &Vne) -> Result<Vec<u64>> {
    let stations = vne.stations()?;
    let received = |station| number(station, "/ring/received");
    stations.iter().map(received).collect()
}

/// Waits until no station has received anything for longer than the token rests.
fn stands_still(vne: &Vne) -> Result<()> {
    let far = vne.ring().iter().find(|member| member.host == 1);
    let far = far.context("no station is on the other host")?;
    let (_, told) = vne.sh_fails(&format!("vne-guest ask {} --tries 2", far.ip))?;
    ensure!(told.contains("no answer"), "asked over a cut wire: {told}");

    let start = Instant::now();
    let (mut last, mut moved) = (each_received(vne)?, Duration::ZERO);
    while start.elapsed() < moved + STILL {
        let now = each_received(vne)?;
        if now != last {
            (last, moved) = (now, start.elapsed());
        }
        ensure!(
            moved < 2 * STILL,
            "the token goes round over a cut wire: {last:?}"
        );
    }
    Ok(())
}
