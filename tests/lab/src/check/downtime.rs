//! How long a guest is down, seen from outside: the longest pause in what it
//! sends every millisecond, at its vif, before any hold.

use anyhow::{ensure, Context, Result};

use super::vne::Vne;
use super::whole::downtimes_ms;
use crate::lab::{Guest, DOM0_WEIGHT};

const ROUNDS: usize = 3;
const GUEST: &str = "measured";

/// The four ways, interleaved, on one guest of 256 MiB that dirties 2,000
/// pages a second.
pub fn compared(vne: &Vne) -> Result<String> {
    vne.destroy()?;
    let guest = Guest {
        dirty_pages_per_s: 2000,
        workload: ["stream", "--to", "10.77.0.1:9000", "--interval-us", "1000"]
            .map(str::to_owned)
            .to_vec(),
        ..Guest::new(GUEST)
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
    let mut floor = Vec::new();
    let mut save = Vec::new();
    let mut live = Vec::new();
    let mut ours = Vec::new();
    let mut reported = Vec::new();
    for _ in 0..ROUNDS {
        floor.push(pause_ms(vne, &format!("measure floor {GUEST}"))?);
        save.push(pause_ms(
            vne,
            &format!("xl save -c {GUEST} /root/measured.save"),
        )?);
        live.push(pause_ms(
            vne,
            &format!("measure live {GUEST} /root/measured.live"),
        )?);
        ours.push(pause_ms(vne, TAKE)?);
        let manifest = vne.sh("xl vne-snapshot show --json one")?;
        let manifest = serde_json::from_str(&manifest).context(manifest)?;
        reported.extend(downtimes_ms(&manifest));
        vne.sh("xl vne-snapshot remove one@latest; rm -f /root/measured.*")?;
    }
    let told = format!(
        "  256 MiB, 2,000 pages/s, {ROUNDS} rounds, median pause at the vif:\n  \
         floor (suspend, resume)   {:7.1} ms\n  \
         xl save -c                {:7.1} ms\n  \
         stock live policy         {:7.1} ms\n  \
         ours                      {:7.1} ms, reported {:.1} ms\n  \
         ours is {:.2} times the floor, and xl save -c is {:.1} times ours",
        median(&floor),
        median(&save),
        median(&live),
        median(&ours),
        median(&reported),
        median(&ours) / median(&floor),
        median(&save) / median(&ours),
    );
    ensure!(median(&save) >= 10.0 * median(&ours), "{told}");
    // The report begins with the request, when the guest still runs, so it is
    // never the smaller one by more than what a packet is late.
    ensure!(
        median(&reported) >= median(&ours) - 15.0
            && median(&reported) <= 2.0 * median(&ours) + 50.0,
        "the report doesn't agree with what is seen: {told}"
    );
    Ok(told)
}

/// With the times at which the phases began.
const TAKE: &str = "xl vne-snapshot take one measured 2>&1 | \
     while read -r line; do echo \"$(date +%s.%N) $line\"; done";

/// Runs a command and returns the longest pause meanwhile. Of one that tells
/// when it cuts, only what overlaps the cut counts: guests are slower during
/// pre-copy as well.
fn pause_ms(vne: &Vne, command: &str) -> Result<f64> {
    let script = format!(
        "vif=vif$(xl domid {GUEST}).0; rm -f /tmp/pause.pcap; \
         tcpdump -Z root -i $vif -n -s 64 -w /tmp/pause.pcap udp port 9000 2>/tmp/pause.err & \
         dump=$!; sleep 1.5; set -o pipefail; {{ {command}; }} > /tmp/pause.out 2>>/tmp/pause.err; \
         status=$?; sleep 1; kill -INT $dump; wait $dump; \
         test $status = 0 || cat /tmp/pause.out /tmp/pause.err >&2; exit $status"
    );
    vne.sh(&script)?;
    let phases = vne.sh("cat /tmp/pause.out")?;
    let began = |phase: &str| {
        let mut lines = phases.lines().filter_map(|line| line.split_once(' '));
        let (time, _) = lines.find(|(_, what)| *what == phase)?;
        time.parse::<f64>().ok()
    };
    // The shell that notes the times is late when dom0 is busy.
    let start = began("hold").map_or(0.0, |time| time - 0.4);
    let cut = start..began("release").map_or(f64::INFINITY, |time| time + 0.1);
    let times = vne.sh("tcpdump -n -tt -r /tmp/pause.pcap 2>/dev/null | cut -d ' ' -f 1")?;
    let times: Vec<f64> = times.lines().filter_map(|line| line.parse().ok()).collect();
    ensure!(
        times.len() > 500,
        "only {} packets during {command}",
        times.len()
    );
    let pause = times
        .windows(2)
        .filter(|pair| pair[1] > cut.start && pair[0] < cut.end)
        .map(|pair| pair[1] - pair[0])
        .fold(0.0, f64::max);
    Ok(pause * 1e3)
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
