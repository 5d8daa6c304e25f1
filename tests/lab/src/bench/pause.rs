//! How long a guest is down, seen from outside: the longest pause in what it
//! sends every millisecond, at its vif, before any hold.

use anyhow::{ensure, Context, Result};
use serde_json::Value;

use crate::check::vne::Vne;
use crate::lab::Guest;

const PORT: u16 = 9000;
/// The VNE that a guest is taken as.
const ONE: &str = "one";
/// Packets that a pause is looked for in, at least.
const PACKETS_MIN: usize = 500;
/// How long tcpdump goes on: it's handed packets once a second, and those that it
/// wasn't handed when it ends are lost.
const FLUSH_S: u32 = 2;

/// A guest that sends a packet every millisecond.
pub fn guest(name: &str) -> Guest {
    let line = format!("stream --to 10.77.0.1:{PORT} --interval-us 1000");
    Guest {
        workload: line.split(' ').map(str::to_owned).collect(),
        ..Guest::new(name)
    }
}

/// The ways to stop a guest that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Suspend and resume, nothing in between.
    Floor,
    /// `xl save -c`.
    Save,
    /// A live save with libxl's own policy, then resume.
    Live,
    /// A take of it alone.
    Ours,
}

impl Way {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Way::Floor => "floor",
            Way::Save => "xl save -c",
            Way::Live => "stock live policy",
            Way::Ours => "ours",
        }
    }

    fn command(self, guest: &str) -> String {
        match self {
            Way::Floor => format!("measure floor {guest}"),
            Way::Save => format!("xl save -c {guest} /root/measured.save"),
            Way::Live => format!("measure live {guest} /root/measured.live"),
            // With the times at which the phases began. Nothing is started for
            // that: it would be in the way just then.
            Way::Ours => format!(
                "xl vne-snapshot take --precopy-max 40 --diverging go {ONE} {guest} 2>&1 | \
                 while read -r line; do echo \"$EPOCHREALTIME $line\"; done"
            ),
        }
    }
}

/// What one repetition has shown.
pub struct Pause {
    /// The pause, in ms.
    pub ms: f64,
    /// How long its processors were stopped, in ms, as Xen says it, if somebody
    /// watched and saw it.
    pub still_ms: Option<f64>,
    /// Of a take, its manifest.
    pub manifest: Option<Value>,
}

/// Stops a guest of the first host in one of the ways, and leaves nothing behind.
/// Xen is asked about its processors only if it's `watched`, since asking every few
/// milliseconds makes dom0 slower.
pub fn measure(vne: &Vne, guest: &str, way: Way, watched: bool) -> Result<Pause> {
    let ms = longest_ms(vne, guest, &way.command(guest), watched)?;
    let manifest = match way {
        Way::Ours => {
            let text = vne.sh(&format!("xl vne-snapshot show --json {ONE}"))?;
            vne.sh(&format!("xl vne-snapshot remove {ONE}@latest"))?;
            Some(serde_json::from_str(&text).context(text)?)
        }
        _ => None,
    };
    vne.sh("rm -f /root/measured.*")?;
    let still = vne.sh("sort -n /tmp/pause.still | tail -n 1")?;
    Ok(Pause {
        ms,
        still_ms: still.trim().parse().ok(),
        manifest,
    })
}

/// Runs a command and returns the longest pause meanwhile. Of one that tells
/// when it cuts, only what overlaps the cut counts: guests are slower during
/// pre-copy as well.
fn longest_ms(vne: &Vne, guest: &str, command: &str, watched: bool) -> Result<f64> {
    let watch = match watched {
        true => format!("measure watch {guest}"),
        false => String::from("sleep 600"),
    };
    let script = format!(
        "vif=vif$(xl domid {guest}).0; rm -f /tmp/pause.pcap /tmp/pause.err; \
         tcpdump -Z root -i $vif -n -s 64 -w /tmp/pause.pcap udp port {PORT} 2>/tmp/pause.err & \
         dump=$!; {watch} > /tmp/pause.still & watch=$!; \
         until grep -qs 'listening on' /tmp/pause.err; do \
         kill -0 $dump || exit 1; sleep 0.1; done; \
         sleep 0.5; set -o pipefail; echo $EPOCHREALTIME; \
         {{ {command}; }} > /tmp/pause.out 2>>/tmp/pause.err; \
         status=$?; echo $EPOCHREALTIME; sleep {FLUSH_S}; \
         kill $watch; kill -INT $dump; wait $dump; \
         test $status = 0 || cat /tmp/pause.out /tmp/pause.err >&2; exit $status"
    );
    let ran = vne.sh(&script)?;
    let ran: Result<Vec<f64>, _> = ran.lines().map(str::parse).collect();
    let ran = ran.context("when it began and ended")?;
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
        times.len() > PACKETS_MIN,
        "only {} packets during {command}",
        times.len()
    );
    // Else the pause may be one that has no end here.
    let spanned = times.first() < ran.first() && times.last() > ran.last();
    ensure!(spanned, "no packet before or after {command}");
    Ok(longest(&times, &cut) * 1e3)
}

/// The longest time without a packet that overlaps the cut, in s.
fn longest(times: &[f64], cut: &std::ops::Range<f64>) -> f64 {
    times
        .windows(2)
        .filter(|pair| pair[1] > cut.start && pair[0] < cut.end)
        .map(|pair| pair[1] - pair[0])
        .fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_pause_that_overlaps_the_cut_counts() {
        let times = [0.0, 3.0, 3.1, 5.0, 5.1, 9.0];
        assert!((longest(&times, &(3.5..4.0)) - 1.9).abs() < 1e-9);
        assert!((longest(&times, &(0.0..f64::INFINITY)) - 3.9).abs() < 1e-9);
    }
}
