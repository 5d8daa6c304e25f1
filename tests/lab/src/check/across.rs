//! The members on two hosts, and the wire between.

use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};

use super::vne::{number, Vne};

/// How long the token's way is watched.
const WATCHED: Duration = Duration::from_secs(20);
/// Longer than the token ever rests.
const STILL: Duration = Duration::from_secs(6);

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
