//! Holds, and what they record.

use std::time::Duration;

use anyhow::{ensure, Context, Result};

use super::vne::{Vne, NAME};

/// Frames of all protocols are held, recorded and let go in order; a redirect for
/// IPv4 alone wouldn't do. An overflow is noticed, and a vif may vanish.
pub fn all_protocols(vne: &Vne) -> Result<String> {
    let told = vne.sh("holds 2>&1")?;
    let (_, why) = vne.sh_fails("holds ipv4-only")?;
    ensure!(
        why.contains("wasn't held"),
        "it failed for another reason: {why}"
    );
    Ok(format!(
        "  {}; with IPv4 alone: {}",
        told.trim(),
        why.trim()
    ))
}

/// A take whose queue overflows, whose hold is deleted or whose member loses a vif
/// fails, says why, and leaves the network as it was.
pub fn failing_holds(vne: &Vne) -> Result<String> {
    vne.remove_all()?;
    let first = vne.ring().first().context("the ring has no station")?;
    let (ip, name) = (first.ip, first.name);
    // The answers wait. No queue can be smaller.
    let overflow = format!(
        "ping -q -i 0.002 -s 1400 -w 120 {ip} >/dev/null & ping=$!; \
         xl vne-snapshot take -q --hold 16 {NAME}; status=$?; kill $ping; exit $status"
    );
    let at_precopy = |fault: &str| {
        format!(
            "rm -f /tmp/fault.log; xl vne-snapshot take {NAME} >/tmp/fault.log 2>&1 & take=$!; \
             until grep -q '^precopy' /tmp/fault.log; do kill -0 $take || break; done; {fault} >&2; \
             wait $take; status=$?; cat /tmp/fault.log; exit $status"
        )
    };
    let domid = || -> Result<String> {
        let told = vne.sh(&format!("xl domid {name}"))?;
        Ok(told.trim().to_owned())
    };
    let mut told = String::new();
    let mut fails = |why: &str, fault: &str| -> Result<()> {
        let (status, printed) = vne.sh_fails(fault)?;
        let line = printed.lines().find(|line| line.contains(why));
        let line = line.with_context(|| format!("it failed for another reason: {printed}"))?;
        ensure!(status == 1, "exit status {status}: {printed}");
        told.push_str(&format!("  {}\n", line.trim()));
        vne.intact()?;
        let listed = vne.listed()?;
        ensure!(listed.is_empty(), "{listed:?} is listed after: {printed}");
        Ok(())
    };

    fails("overflowed", &overflow)?;
    // What didn't fit is lost, perhaps the token too; and so is what comes while a
    // hold's device is gone and its redirect isn't.
    vne.start_afresh()?;
    let deleted = at_precopy(&format!("ip link delete vneh{}.0", domid()?));
    fails("No such device", &deleted)?;
    vne.start_afresh()?;

    let domid = domid()?;
    vne.sh(&format!(
        "xl network-attach {name} bridge=xenbr0 && \
         until ip link show vif{domid}.1 >/dev/null 2>&1; do sleep 0.1; done"
    ))?;
    let detached = at_precopy(&format!("xl network-detach {name} 1"));
    fails("No such device", &detached)?;
    vne.turning(Duration::from_secs(10))?;

    vne.take()?;
    vne.remove_all()?;
    vne.no_violations()?;
    Ok(told + "  nothing was left of any of them, and the next take worked")
}
