//! Strangers, peers that were removed or belong elsewhere, and a flood, all at
//! the port of the first host's daemon and coming from the second host.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use serde_json::Value;

use super::pace;
use super::vne::{number, Vne, NAME};

const PORT: &str = "10.77.0.1:7791";
/// Where the second host comes from.
const FROM: &str = "10.77.0.2";
/// The lab has the daemon write there.
const LOG: &str = "/var/log/vned.log";
/// Until a line is in it.
const LOG_LIMIT: Duration = Duration::from_secs(15);
/// Lines about strangers are one a second at most.
const LINE_INTERVAL: Duration = Duration::from_millis(1200);
/// Until nothing of a take that failed is left.
const INTACT_LIMIT: Duration = Duration::from_secs(15);
const FLOOD_S: u64 = 60;
/// Less wouldn't be a flood, even in a slow lab.
const FLOOD_CONNECTIONS_MIN: u64 = 200;
const ASK_INTERVAL: Duration = Duration::from_secs(5);
/// Until the daemon has closed what the flood left half open, and peers have
/// been able to come in again.
const SETTLED_LIMIT: Duration = Duration::from_secs(30);
/// What the allocator may keep, and connections of peers that come and go.
const GROWN_KIB_MAX: u64 = 4096;
const GROWN_DESCRIPTORS_MAX: u64 = 2;

const REMOVED: &str = "it refuses this host";
const NOT_TRUSTED: &str = "isn't one that is trusted here";
const NOT_FOR: &str = "host 'host0' doesn't act for 'host1' in a VNE 'lab'";

/// All of them, on two hosts that are each other's peers.
pub fn hostile_peers(vne: &Vne) -> Result<String> {
    let peer = Known::on_first(vne)?;
    vne.remove_all()?;
    let told = refused(vne, &peer).and_then(|refused| Ok(format!("{refused}\n{}", flood(vne)?)));
    // Whatever was found, or nothing works any more.
    peer.list_for(vne, NAME)?;
    vne.remove_all()?;
    told
}

/// What the first host knows of the second.
struct Known {
    address: String,
    fingerprint: String,
}

impl Known {
    fn on_first(vne: &Vne) -> Result<Self> {
        let text = vne.sh("xl vne-snapshot peer list --json")?;
        let peers: Vec<Value> = serde_json::from_str(&text).context(text)?;
        let peer = peers.iter().find(|peer| peer["name"] == "host1");
        let peer = peer.context("host1 is no peer of host0")?;
        let text = |key: &str| {
            let text = peer[key].as_str().map(str::to_owned);
            text.with_context(|| format!("no {key} in {peer}"))
        };
        Ok(Self {
            address: text("address")?,
            fingerprint: text("fingerprint")?,
        })
    }

    fn list_for(&self, vne: &Vne, listed: &str) -> Result<()> {
        vne.sh(&format!(
            "xl vne-snapshot peer add host1 {} {} --vne {listed}",
            self.address, self.fingerprint
        ))
        .map(drop)
    }
}

/// The first host's log from here on.
struct Log<'a> {
    vne: &'a Vne,
    from: u64,
}

impl<'a> Log<'a> {
    fn from_now(vne: &'a Vne) -> Result<Self> {
        std::thread::sleep(LINE_INTERVAL);
        let length = vne.sh(&format!("stat -c %s {LOG}"))?;
        let from = length.trim().parse().context(length)?;
        Ok(Self { vne, from })
    }

    /// Waits for a line with all these words.
    fn says(&self, words: &[&str]) -> Result<String> {
        let start = Instant::now();
        loop {
            let log = self.vne.sh(&format!("tail -c +{} {LOG}", self.from + 1))?;
            let mut lines = log.lines();
            if let Some(line) = lines.find(|line| words.iter().all(|word| line.contains(word))) {
                return Ok(line.trim().to_owned());
            }
            if start.elapsed() > pace::here(LOG_LIMIT) {
                bail!("{words:?} isn't in host0's log: {log}");
            }
        }
    }
}

/// Runs a line on the second host that must fail and say this, if not the first
/// time: its daemon may have to find out that a connection is gone.
fn fails(vne: &Vne, line: &str, saying: &str) -> Result<String> {
    let start = Instant::now();
    loop {
        let output = vne.lab.sh(1, &format!("{{ {line}; }} 2>&1"))?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(!output.status.success(), "`{line}` should fail: {printed}");
        if let Some(found) = printed.lines().find(|line| line.contains(saying)) {
            return Ok(found.trim().to_owned());
        }
        if start.elapsed() > pace::here(LOG_LIMIT) {
            bail!("`{line}` doesn't say {saying:?}: {printed}");
        }
    }
}

/// Nobody was touched by what was refused.
fn harmless(vne: &Vne) -> Result<()> {
    let start = Instant::now();
    while let Err(error) = vne.intact() {
        ensure!(start.elapsed() < pace::here(INTACT_LIMIT), error);
    }
    vne.turning(Duration::from_secs(15))?;
    vne.no_violations()
}

fn refused(vne: &Vne, peer: &Known) -> Result<String> {
    let test = "xl vne-snapshot peer test host0";
    let take = format!("xl vne-snapshot take -q {NAME}");
    let mut told = Vec::new();
    for (kind, why) in [
        ("no-certificate", "it has no certificate"),
        ("strange", NOT_TRUSTED),
    ] {
        let log = Log::from_now(vne)?;
        let answer = vne.sh_on(1, &format!("hostile {kind} {PORT}"))?;
        ensure!(answer.starts_with("refused"), "{kind}: {answer}");
        told.push(log.says(&["refused", FROM, why])?);
    }
    harmless(vne)?;

    // With a connection that is open.
    vne.sh_on(1, test)?;
    let log = Log::from_now(vne)?;
    vne.sh("xl vne-snapshot peer remove host1")?;
    told.push(log.says(&["'host1' is no peer any more"])?);
    told.push(fails(vne, test, REMOVED)?);
    told.push(fails(vne, &take, REMOVED)?);
    told.push(log.says(&["refused", FROM, NOT_TRUSTED])?);
    harmless(vne)?;

    peer.list_for(vne, "other")?;
    let log = Log::from_now(vne)?;
    told.push(fails(vne, &take, NOT_FOR)?);
    told.push(log.says(&["peer 'host1' asked about VNE 'lab'"])?);
    harmless(vne)?;
    let listed = vne.listed()?;
    ensure!(listed.is_empty(), "{listed:?} is listed");

    peer.list_for(vne, NAME)?;
    vne.sh_on(1, test)?;
    takes(vne)?;
    harmless(vne)?;
    Ok(format!("  {}", told.join("\n  ")))
}

/// The second host leads a take, which works.
fn takes(vne: &Vne) -> Result<()> {
    vne.sh_on(1, &format!("xl vne-snapshot take -q {NAME}"))?;
    let listed = vne.listed_on(0)?;
    ensure!(listed.len() == 1, "host0 lists {listed:?}");
    vne.remove_all()
}

/// What the daemon has of the host.
#[derive(Debug, Clone, Copy)]
struct Figures {
    pid: u64,
    rss_kib: u64,
    peak_kib: u64,
    descriptors: u64,
}

impl Figures {
    fn of(vne: &Vne) -> Result<Self> {
        let text = vne.sh(
            "pid=$(systemctl show -p MainPID --value vned) && echo $pid && \
             awk '/^VmRSS:/ { rss = $2 } /^VmHWM:/ { peak = $2 } END { print rss; print peak }' \
             /proc/$pid/status && ls /proc/$pid/fd | wc -l",
        )?;
        let numbers: Vec<u64> = text
            .split_whitespace()
            .map(|word| word.parse().with_context(|| text.clone()))
            .collect::<Result<_>>()?;
        let [pid, rss_kib, peak_kib, descriptors] = numbers[..] else {
            bail!("no figures of vned: {text}");
        };
        Ok(Self {
            pid,
            rss_kib,
            peak_kib,
            descriptors,
        })
    }

    fn is_like(&self, before: &Self) -> bool {
        self.pid == before.pid
            && self.rss_kib <= before.rss_kib + GROWN_KIB_MAX
            && self.descriptors <= before.descriptors + GROWN_DESCRIPTORS_MAX
    }
}

/// A minute of everything at once. The second host's own peer has to share its
/// address with the flood: it's tried after that.
fn flood(vne: &Vne) -> Result<String> {
    let before = Figures::of(vne)?;
    let (counts, answers) = std::thread::scope(|scope| -> Result<(String, u32)> {
        let line = format!("hostile flood {PORT} --seconds {FLOOD_S}");
        let flooding = scope.spawn(move || vne.sh_on(1, &line));
        let mut answers = 0;
        while !flooding.is_finished() {
            let status = vne.sh("xl vne-snapshot status")?;
            let runs = status.contains("runs on host host0 and listens for peers");
            ensure!(runs, "during the flood: {status}");
            answers += 1;
            std::thread::sleep(ASK_INTERVAL);
        }
        let counts = flooding.join();
        Ok((
            counts.unwrap_or_else(|_| bail!("the flood has panicked"))?,
            answers,
        ))
    })?;
    let flooded: Value = serde_json::from_str(&counts).context(counts)?;
    let connections = number(&flooded, "/connections")?;
    ensure!(connections >= FLOOD_CONNECTIONS_MIN, "no flood: {flooded}");

    let start = Instant::now();
    let after = loop {
        let now = Figures::of(vne)?;
        let reached = vne.sh_on(1, "xl vne-snapshot peer test host0");
        match reached {
            Ok(_) if now.is_like(&before) => break now,
            _ if start.elapsed() < pace::here(SETTLED_LIMIT) => {}
            Ok(_) => bail!("before the flood {before:?}, after it {now:?}"),
            Err(error) => return Err(error.context("peers can't come in after the flood")),
        }
    };
    // The token has the flood's wire, and isn't sent again.
    let lost = vne.turning(Duration::from_secs(15)).is_err();
    if lost {
        vne.start_afresh()?;
    }
    vne.no_violations()?;
    takes(vne)?;
    Ok(format!(
        "  flood: {flooded}\n  {answers} of {answers} times vned answered meanwhile; before and \
         after: {} and {} KiB (most ever: {}), {} and {} descriptors{}",
        before.rss_kib,
        after.rss_kib,
        after.peak_kib,
        before.descriptors,
        after.descriptors,
        if lost { "; the token was lost" } else { "" }
    ))
}
