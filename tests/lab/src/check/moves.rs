//! Members that are restored on another host than they ran on.

use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use serde_json::Value;

use super::pace;
use super::vne::{number, Vne, NAME};

/// How long a ring may need after a restore.
const TURNING_MAX: Duration = Duration::from_secs(20);

const KEY: &str = "/etc/xen/vne-store.key";

/// Stores that are encrypted, each host's with a key of its own: a copy from one to the
/// other, and all members moved.
pub fn encrypted_and_moved(vne: &Vne) -> Result<String> {
    vne.remove_all()?;
    vne.everywhere(&format!(
        "(umask 077; od -An -tx1 -N32 /dev/urandom | tr -d ' \\n' > {KEY}); echo 'store_key=\"{KEY}\"' >> \
         /etc/xen/vne.conf; systemctl reload vned"
    ))?;
    let told = copied_and_locked(vne).and_then(|copied| Ok((copied, to_one_host_and_back(vne)?)));
    vne.everywhere(&format!(
        "sed -i '/^store_key/d; /^accept_members/d' /etc/xen/vne.conf; systemctl reload vned; rm -f {KEY} {KEY}.away"
    ))?;
    let (copied, moved) = told?;
    Ok(format!("  encrypted: {copied}\n{moved}"))
}

/// What the second host has of a snapshot is copied to the first one, and can't be read
/// without its key.
fn copied_and_locked(vne: &Vne) -> Result<String> {
    vne.take_on(0, NAME)?;
    let copied = vne.sh_on(1, &format!("xl vne-snapshot copy {NAME} host0 2>&1"))?;
    ensure!(copied.contains("copied to host0"), "{copied}");
    let again = vne.sh_on(1, &format!("xl vne-snapshot copy {NAME} host0 2>&1"))?;
    ensure!(again.contains("host0 has all of it"), "{again}");
    let verified = vne.sh("xl vne-snapshot verify 2>&1")?;
    for member in vne.ring() {
        let held = vne.sh(&format!(
            "xl vne-snapshot export {NAME} {} - | head -c 8",
            member.name
        ))?;
        ensure!(!held.is_empty(), "{} isn't on host0", member.name);
    }
    vne.sh(&format!("mv {KEY} {KEY}.away"))?;
    let locked = vne.sh_fails(&format!("xl vne-snapshot verify {NAME}"));
    vne.sh(&format!("mv {KEY}.away {KEY}"))?;
    let (_, locked) = locked?;
    ensure!(locked.contains(KEY), "{locked}");
    Ok(format!(
        "{}; {}",
        copied.trim(),
        verified.trim().replace('\n', "; ")
    ))
}

/// All members on the first host, with their parts of the snapshot copied there by the
/// restore; then the same when the other host can't be reached, from what is here
/// already; then where they were.
fn to_one_host_and_back(vne: &Vne) -> Result<String> {
    vne.remove_all()?;
    vne.take_on(0, NAME)?;
    vne.destroy()?;
    let moved = vne.members_on(1).map(|m| format!("--on {}=host0", m.name));
    let moved = moved.collect::<Vec<_>>().join(" ");
    let restore = format!("{{ time -p xl vne-snapshot restore {moved} {NAME}; }} 2>&1");
    let refused = vne.sh_fails(&format!("xl vne-snapshot restore --on nobody=host0 {NAME}"))?;
    ensure!(refused.1.contains("has no member 'nobody'"), "{refused:?}");
    vne.nothing_there()?;

    // The second host is asked for its members' memory, and doesn't give it at once.
    let (_, untrusted) = vne.sh_fails(&restore)?;
    ensure!(untrusted.contains("accept_members"), "{untrusted}");
    vne.nothing_there()?;
    vne.sh_on(
        1,
        "echo 'accept_members=[ \"host0\" ]' >> /etc/xen/vne.conf; systemctl reload vned",
    )?;
    let first = vne.sh(&restore)?;
    ensure!(first.contains("\"host0:ring1\""), "{first}");
    all_turn_on_the_first(vne)?;
    vne.destroy()?;
    for from in 0..2 {
        vne.lab.link(from, 1 - from, false)?;
    }
    let second = vne
        .sh(&restore)
        .and_then(|told| all_turn_on_the_first(vne).map(|()| told));
    for from in 0..2 {
        vne.lab.link(from, 1 - from, true)?;
    }
    let second = second?;
    ensure!(second.contains("make sure that"), "{second}");
    vne.destroy()?;
    super::peers::reach(vne, 0)?;
    vne.sh(&format!("xl vne-snapshot restore -q {NAME}"))?;
    vne.turning(TURNING_MAX)?;
    vne.no_violations()?;
    vne.remove_all()?;
    let real = |told: &str| {
        let line = told.lines().find_map(|line| line.strip_prefix("real "));
        line.unwrap_or("?").to_owned()
    };
    Ok(format!(
        "  all members restored on one of their two hosts in {} s, parts copied; again in {} s with \
         the other host out of reach; then on both",
        real(&first),
        real(&second)
    ))
}

/// Asked on the first host: the others may be out of reach.
fn all_turn_on_the_first(vne: &Vne) -> Result<()> {
    let start = Instant::now();
    let asked = || -> Result<Vec<Value>> {
        let ring = vne.ring().iter();
        ring.map(|member| {
            let text = vne.sh(&format!("vne-guest ask {}", member.ip))?;
            serde_json::from_str(&text).context(text)
        })
        .collect()
    };
    let received = |stations: &[Value]| -> Result<u64> {
        let each = stations.iter().map(|one| number(one, "/ring/received"));
        each.sum()
    };
    let before = received(&asked()?)?;
    let rounds = 5 * vne.ring().len() as u64;
    loop {
        let stations = asked()?;
        for station in &stations {
            for path in ["/ring/violations", "/memory/corrupt"] {
                ensure!(number(station, path)? == 0, "{path} in {station}");
            }
        }
        if received(&stations)? > before + rounds {
            break;
        }
        ensure!(
            start.elapsed() < pace::here(TURNING_MAX),
            "the token doesn't go round: {stations:?}"
        );
    }
    let running = vne.sh("xl list | tail -n +3 | wc -l")?;
    let members = vne.ring().len();
    ensure!(
        running.trim() == members.to_string(),
        "{} of {members} members are on the first host",
        running.trim()
    );
    Ok(())
}
