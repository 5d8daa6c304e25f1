//! Makes the lab's hosts each other's peers, as an admin would.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use super::pace;
use super::vne::{Vne, NAME};

/// Until a daemon that was started takes commands and peers.
const READY_LIMIT: Duration = Duration::from_secs(20);
/// Where a host's daemon is reached by the others.
pub fn address(host: usize) -> String {
    format!("10.77.0.{}", host + 1)
}

/// Gives every host an identity, unless it has one.
pub fn identify(vne: &Vne, host: usize) -> Result<()> {
    vne.sh_on(
        host,
        "test -e /etc/xen/vne.key || xl vne-snapshot peer init; systemctl restart vned",
    )
    .map(drop)
}

/// Has both hosts trust each other for these VNEs.
pub fn trust_for(vne: &Vne, vnes: &[&str]) -> Result<()> {
    trust(vne, 0, 1, vnes)?;
    trust(vne, 1, 0, vnes)
}

/// Has one host trust another for these VNEs.
pub fn trust(vne: &Vne, host: usize, peer: usize, vnes: &[&str]) -> Result<()> {
    let id = vne.sh_on(peer, "xl vne-snapshot peer id --json")?;
    let id: Value = serde_json::from_str(&id).context(id)?;
    let fingerprint = id["fingerprint"].as_str().unwrap_or_default();
    vne.sh_on(
        host,
        &format!(
            "xl vne-snapshot peer add host{peer} {} {fingerprint} --vne {}",
            address(peer),
            vnes.join(" --vne ")
        ),
    )
    .map(drop)
}

/// Waits until a host reaches all its peers.
pub fn reach(vne: &Vne, host: usize) -> Result<()> {
    let start = Instant::now();
    loop {
        match vne.sh_on(host, "xl vne-snapshot peer test 2>&1") {
            Ok(_) => return Ok(()),
            Err(error) if start.elapsed() > pace::here(READY_LIMIT) => return Err(error),
            Err(_) => {}
        }
    }
}

/// All of that, for both of two hosts.
pub fn introduce(vne: &Vne) -> Result<()> {
    for host in 0..2 {
        identify(vne, host)?;
    }
    trust_for(vne, &[NAME])?;
    reach(vne, 0)?;
    reach(vne, 1)
}
