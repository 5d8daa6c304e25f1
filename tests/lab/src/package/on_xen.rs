//! The packages on real Xen: two hosts that have nothing of ours, the README's
//! steps, and then nothing of ours again.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use serde_json::Value;

use super::{folder, packages};
use crate::lab::{Guest, Lab, Life, Shape};
use crate::suite::Suite;

/// Until restored members have passed the token again.
const TURN_MAX: Duration = Duration::from_secs(30);
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// What Xen's packages have, and what there is in their folders. What a lab's
/// host has changed of Xen's configuration is its own matter.
const STATE: &str = "dpkg -V xen-utils-$XEN xen-utils-common libxenmisc$XEN | grep -v ' /etc/'; \
    find /usr/lib/xen-$XEN -type f -exec sha256sum {} + | sort -k 2; find /etc/xen | sort; \
    dpkg-divert --list '/usr/lib/xen*'";
/// Notes what hooks are told.
const HOOK: &str = "#!/bin/sh\necho $1 $VNE $VNE_RESULT >>/root/hooks.log\n";
const HOOKS_HEARD: &str = "pre-take lab\npost-take lab ok\npre-restore lab\npost-restore lab ok\n";

/// Tries the packages that lie in the suite's folder.
pub fn check(suite: Suite) -> Result<()> {
    let built = packages(&folder(suite))?;
    ensure!(
        !built.is_empty(),
        "there are no packages of {suite}: run `cargo xtask deb --suite {suite}`"
    );
    let shape = Shape {
        hosts: 2,
        suite,
        ..Shape::default()
    };
    let lab = Lab::up(&shape, Life::Tied)?;
    let before = [state(&lab, 0)?, state(&lab, 1)?];
    for host in 0..2 {
        install(&lab, host, &built)?;
    }
    start_members(&lab)?;
    make_known(&lab)?;
    take_and_restore(&lab)?;
    shutdown_and_boot(&lab)?;
    for (host, before) in before.iter().enumerate() {
        purge(&lab, host)?;
        let after = state(&lab, host)?;
        ensure!(
            after == *before,
            "host {host} was\n{before}\nand is\n{after}"
        );
    }
    lab.down()
}

fn state(lab: &Lab, host: usize) -> Result<String> {
    lab.run(host, &format!("XEN={}; {STATE}", lab.suite().xen()))
}

fn install(lab: &Lab, host: usize, built: &[PathBuf]) -> Result<()> {
    for package in built {
        lab.put(host, Path::new(package), "/root/")?;
    }
    let script = "cd /root; apt-get -q -y install ./xen-vne-*.deb >install.log 2>&1 || \
                  { cat install.log; exit 1; }; xl help | grep -q '^ vne-snapshot '; xl list";
    lab.run(host, &format!("set -e; {script}")).map(drop)
}

fn start_members(lab: &Lab) -> Result<()> {
    let peers = "10.77.1.10,10.77.1.11";
    let guest = |name: &str, index: &str, ip: [u8; 4]| Guest {
        memory_mib: 128,
        dirty_pages_per_s: 500,
        working_set_mib: 16,
        ip: Some(ip.into()),
        workload: ["ring", "--index", index, "--peers", peers]
            .map(str::to_owned)
            .to_vec(),
        ..Guest::new(name)
    };
    lab.guests(&[
        (0, guest("db", "0", [10, 77, 1, 10])),
        (1, guest("web1", "1", [10, 77, 1, 11])),
    ])
}

/// "Several hosts" of the README.
fn make_known(lab: &Lab) -> Result<()> {
    let mut lines = Vec::new();
    for host in 0..2 {
        let script = "echo 'members = [ \"host0:db\", \"host1:web1\" ]' >/etc/xen/vne/lab.cfg; \
                      xl vne-snapshot peer init";
        let told = lab.run(host, script)?;
        let line = told
            .lines()
            .map(str::trim)
            .find(|line| line.contains(" peer add "));
        let line = line.context("peer init told no command")?;
        let line = line.replace("ADDRESS", &format!("10.77.0.{}", host + 1));
        lines.push(line.replace("--vne VNE", "--vne lab"));
    }
    for (host, line) in [1, 0].into_iter().zip(&lines) {
        lab.run(host, line)?;
    }
    for host in 0..2 {
        lab.run(host, "systemctl enable --now vned")?;
    }
    for host in 0..2 {
        let patient = "for i in 1 2 3 4 5 6 7 8 9; do xl vne-snapshot peer test && exit; sleep 1; \
                       done; exit 1";
        lab.run(host, patient)?;
        lab.run(host, "vned --check-config")?;
    }
    Ok(())
}

fn take_and_restore(lab: &Lab) -> Result<()> {
    let hook = "/etc/xen/vne-snapshot.d/10-log";
    lab.run(0, &format!("printf %s '{HOOK}' >{hook}; chmod 755 {hook}"))?;
    lab.run(0, "xl vne-snapshot take lab --label before-upgrade 2>&1")?;
    let drawn = lab.run(0, "xl vne-snapshot show lab --timeline")?;
    for what in ["host0:db", "host1:web1", "hhh", "sss"] {
        ensure!(drawn.contains(what), "the timeline has no {what}:\n{drawn}");
    }
    for (host, member) in [(0, "db"), (1, "web1")] {
        lab.run(host, &format!("xl destroy {member}"))?;
    }
    lab.run(0, "xl vne-snapshot restore lab 2>&1")?;
    let heard = lab.run(0, "cat /root/hooks.log")?;
    // What isn't known yet leaves a space.
    let heard: String = heard
        .lines()
        .map(|line| line.trim_end().to_owned() + "\n")
        .collect();
    ensure!(heard == HOOKS_HEARD, "the hooks heard:\n{heard}");
    let first = received(lab)?;
    let start = Instant::now();
    while received(lab)? <= first {
        ensure!(
            start.elapsed() < TURN_MAX,
            "the restored ring doesn't turn: it has received {first}"
        );
        std::thread::sleep(LOOK_INTERVAL);
    }
    Ok(())
}

/// How many tokens the member on host 0 has received, all of them sound.
fn received(lab: &Lab) -> Result<u64> {
    let text = lab.run(0, "vne-guest ask 10.77.1.10")?;
    let counters: Value = serde_json::from_str(&text).context("a guest's counters")?;
    for bad in ["/ring/violations", "/memory/corrupt"] {
        let count = counters.pointer(bad).and_then(Value::as_u64);
        ensure!(count == Some(0), "{bad} is {count:?}");
    }
    counters
        .pointer("/ring/received")
        .and_then(Value::as_u64)
        .context("a ring counts")
}

/// What the unit does, without the host's going; and that stopping it alone
/// does nothing.
fn shutdown_and_boot(lab: &Lab) -> Result<()> {
    lab.run(
        0,
        "echo 'members = [ \"db\" ]' >/etc/xen/vne/solo.cfg; \
         echo 'at_shutdown = [ \"solo\" ]' >>/etc/xen/vne.conf; \
         systemctl restart xen-vne-domains && xl domid db",
    )?;
    lab.run(
        0,
        "xl vne-worker at-shutdown 2>&1 && ! xl domid db 2>/dev/null",
    )?;
    lab.run(0, "xl vne-worker at-boot 2>&1 && xl domid db")?;
    let left = lab.run(0, "xl vne-snapshot list solo; ls /var/lib/xen-vne/at-boot")?;
    ensure!(
        left.lines().count() == 1,
        "left over after the boot:\n{left}"
    );
    Ok(())
}

fn purge(lab: &Lab, host: usize) -> Result<()> {
    let xen = lab.suite().xen();
    let script = format!(
        "xl destroy db 2>/dev/null; xl destroy web1 2>/dev/null; \
         rm /etc/xen/vne/*.cfg /etc/xen/vne-snapshot.d/10-log 2>/dev/null; set -e; \
         apt-get -q -y purge xen-vne-{xen} xen-vne-common 2>&1; \
         if pgrep -x vned; then exit 1; fi; xl list"
    );
    lab.run(host, &script).map(drop)
}
