//! Disks: after each restore a guest's disk is of the same moment as its memory.
//! The guest keeps a log on it and compares the two all the time, see `writer` of
//! `vne-guest`.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use serde_json::Value;

use super::pace;
use super::vne::{number, Vne};
use crate::lab::{self, Guest};
use crate::product;
use crate::scale;

const NAME: &str = "disks";
const WRITER: &str = "writer0";
const IP: &str = "10.77.2.10";
/// The guest compares its whole log once a round of it.
const COMPARED_MAX: Duration = Duration::from_secs(60);
/// The least that xfs can do with.
const FILE_SYSTEM_BYTES: u64 = 320 << 20;
/// How far a guest goes on after a take: several rounds of its log.
const BEYOND: u64 = 200;

/// A way to have a disk, and what makes it in dom0.
struct Way {
    /// What the manifest calls it.
    driver: &'static str,
    /// The disk, as xl wants it.
    disk: &'static str,
    /// Makes it; run once.
    setup: &'static str,
    /// Lists what is kept of captured disks.
    kept: &'static str,
    /// Undoes `setup`.
    undo: &'static str,
}

const WAYS: &[Way] = &[
    Way {
        driver: "lvm-thin",
        disk: "phy:/dev/vnetest/web,xvda,w",
        setup: "truncate -s 300M /var/tmp/pv.img && modprobe dm-thin-pool && \
                vgcreate -qq vnetest $(losetup -f --show /var/tmp/pv.img) && \
                lvcreate -qq -L 200M -T vnetest/pool && \
                lvcreate -qq -V 16M -T vnetest/pool -n web",
        kept: "lvs --noheadings -o lv_name vnetest | grep -E 'vne(snap|old|new)' || true",
        undo: "vgremove -qq -y vnetest; losetup -D; rm -f /var/tmp/pv.img",
    },
    Way {
        driver: "lvm",
        disk: "phy:/dev/vnetest/web,xvda,w",
        setup: "truncate -s 300M /var/tmp/pv.img && \
                vgcreate -qq vnetest $(losetup -f --show /var/tmp/pv.img) && \
                lvcreate -qq -L 16M vnetest -n web",
        kept: "lvs --noheadings -o lv_name vnetest | grep -E 'vne(snap|cow|old|new)' || true",
        undo: "vgremove -qq -y vnetest; losetup -D; rm -f /var/tmp/pv.img",
    },
    Way {
        driver: "reflink",
        disk: "phy:/dev/loop7,xvda,w",
        setup: "gunzip -kf /var/tmp/xfs.img.gz && modprobe xfs && mkdir -p /mnt/disks && \
                mount -o loop /var/tmp/xfs.img /mnt/disks && \
                truncate -s 16M /mnt/disks/web.img && losetup /dev/loop7 /mnt/disks/web.img",
        kept: "ls -A /mnt/disks/.vne-snapshots 2>/dev/null || true",
        undo: "losetup -d /dev/loop7; umount /mnt/disks; rm -f /var/tmp/xfs.img",
    },
    Way {
        driver: "qcow2",
        disk: "/mnt/disks/web.qcow2,qcow2,xvda,w",
        setup: "gunzip -kf /var/tmp/xfs.img.gz && modprobe xfs && mkdir -p /mnt/disks && \
                mount -o loop /var/tmp/xfs.img /mnt/disks && \
                gunzip -c /var/tmp/web.qcow2.gz >/mnt/disks/web.qcow2",
        kept: "ls -A /mnt/disks/.vne-snapshots 2>/dev/null || true",
        undo: "umount /mnt/disks; rm -f /var/tmp/xfs.img",
    },
];

/// Makes a file system that can share extents, and an image, and puts them into dom0,
/// which hasn't got their tools.
fn put_files(vne: &Vne) -> Result<()> {
    lab::install(&[("xfsprogs", "mkfs.xfs"), ("qemu-utils", "qemu-img")])?;
    let folder = product::target(&lab::workspace()).join("disks");
    std::fs::create_dir_all(&folder).context("cannot make a folder for a file system")?;
    let script = format!(
        "cd \"$1\"; rm -f xfs.img* web.qcow2*; truncate -s {FILE_SYSTEM_BYTES} xfs.img; \
         mkfs.xfs -q xfs.img; qemu-img create -q -f qcow2 web.qcow2 16M; gzip -1 xfs.img web.qcow2"
    );
    let made = Command::new("bash")
        .args(["-euc", &script, "bash"])
        .arg(&folder)
        .status();
    let made = made.context("cannot run bash")?;
    ensure!(made.success(), "cannot make a file system and an image");
    for name in ["xfs.img.gz", "web.qcow2.gz"] {
        vne.lab
            .put(0, &folder.join(name), &format!("/var/tmp/{name}"))?;
    }
    Ok(())
}

/// Each driver: restores, a copy, a killed take, a removal; and the same without the
/// capture, which must fail.
pub fn agree_with_memory(vne: &Vne) -> Result<String> {
    put_files(vne)?;
    // The VNE's own members would only make it slower.
    let members: Vec<&str> = vne.members_on(0).map(|member| member.name).collect();
    let each = |verb: &str| format!("for d in {}; do xl {verb} $d; done", members.join(" "));
    vne.sh(&each("pause"))?;
    let told = all_ways(vne);
    vne.sh(&each("unpause"))?;
    told
}

fn all_ways(vne: &Vne) -> Result<String> {
    let mut told = String::new();
    for way in WAYS {
        vne.sh(way.setup)?;
        let one = agrees(vne, way).with_context(|| way.driver);
        // A disk that can't be undone is the next lab's, not this result's.
        vne.sh(&format!(
            "for d in {WRITER} copy-{WRITER}; do xl destroy $d 2>/dev/null; done; \
             for s in $(xl vne-snapshot list {NAME} 2>/dev/null | grep -oE '{NAME}@[^ ]+'); do \
             xl vne-snapshot remove $s; done; rm -f /etc/xen/vne/{NAME}.cfg; {{ {}; }} >&2; true",
            way.undo
        ))?;
        told.push_str(&one?);
    }
    Ok(told)
}

fn agrees(vne: &Vne, way: &Way) -> Result<String> {
    vne.sh(&format!(
        "printf 'members = [ \"{WRITER}\" ]\\n' > /etc/xen/vne/{NAME}.cfg"
    ))?;
    vne.lab.guest(
        0,
        &Guest {
            memory_mib: 128,
            working_set_mib: 16,
            ip: Some(IP.parse()?),
            disks: vec![way.disk.to_owned()],
            workload: vec![String::from("writer")],
            ..Guest::new(WRITER)
        },
    )?;
    compared(vne)?;
    let manifest = vne.take_on(0, NAME)?;
    let disk = &manifest["members"][0]["disks"][0];
    ensure!(disk["driver"] == way.driver, "it captured {disk}");
    let window = number(&manifest, "/members/0/downtime/disks_ns")?;
    let snapshot = format!("{NAME}@{}", manifest["id"].as_str().unwrap_or_default());
    let times = scale::of(2, 10);
    let mut resumed_at = Vec::new();
    for _ in 0..times {
        beyond(vne)?;
        vne.sh(&format!(
            "xl destroy {WRITER} && xl vne-snapshot restore -q {snapshot} 2>&1"
        ))?;
        resumed_at.push(compared(vne)?);
    }
    copy(vne, way, &snapshot)?;
    killed(vne, way)?;

    // The same with memory alone: the disk is that of a later time.
    let memory = vne.take_on(0, &format!("--memory-only {NAME}"))?;
    let memory = format!("{NAME}@{}", memory["id"].as_str().unwrap_or_default());
    beyond(vne)?;
    vne.sh(&format!(
        "xl destroy {WRITER} && xl vne-snapshot restore -q {memory} 2>&1"
    ))?;
    let ahead = match compared(vne) {
        Ok(last) => bail!("without the disk all seems well at record {last}"),
        Err(_) => number(&writer(vne)?, "/writer/ahead")?,
    };
    ensure!(ahead > 0, "without the disk: {}", writer(vne)?);

    vne.sh(&format!(
        "xl destroy {WRITER}; xl vne-snapshot remove {snapshot} {memory}"
    ))?;
    let kept = vne.sh(way.kept)?;
    ensure!(kept.trim().is_empty(), "removed, and this is left: {kept}");
    Ok(format!(
        "  {}: {times} restores, memory and disk agreed in each (at records {resumed_at:?}); the \
         guest waited {:.1} ms for its disk; with memory alone {ahead} records were ahead; a copy \
         has a disk of its own; nothing was left of a killed take or a removed snapshot\n",
        way.driver,
        window as f64 / 1e6
    ))
}

fn writer(vne: &Vne) -> Result<Value> {
    let text = vne.sh(&format!("vne-guest ask {IP}"))?;
    serde_json::from_str(&text).context(text)
}

/// Waits until the guest has compared its whole log with its memory, twice, so that
/// once was begun by now. Fails when they differ. The last record.
fn compared(vne: &Vne) -> Result<u64> {
    let start = Instant::now();
    let mut first = None;
    loop {
        let told = writer(vne)?;
        for path in ["ahead", "behind", "torn", "failed"] {
            ensure!(number(&told, &format!("/writer/{path}"))? == 0, "{told}");
        }
        let now = number(&told, "/writer/compared")?;
        if now >= *first.get_or_insert(now) + 2 {
            return number(&told, "/writer/last");
        }
        ensure!(
            start.elapsed() < pace::here(COMPARED_MAX),
            "it doesn't go on: {told}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Has the guest write on for a while.
fn beyond(vne: &Vne) -> Result<()> {
    let start = Instant::now();
    let last = || number(&writer(vne)?, "/writer/last");
    let until = last()? + BEYOND;
    while last()? < until {
        ensure!(
            start.elapsed() < pace::here(COMPARED_MAX),
            "the guest doesn't write"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// A copy runs beside the original, each with its own disk: the original's goes on
/// to agree with its memory. The copy's console would say so of its own.
fn copy(vne: &Vne, way: &Way, snapshot: &str) -> Result<()> {
    if way.driver == "reflink" {
        // A copy would need a loop device of its own.
        let (_, why) = vne.sh_fails(&format!("xl vne-snapshot restore --as copy {snapshot}"))?;
        ensure!(
            why.contains("loop device"),
            "it failed for another reason: {why}"
        );
        return Ok(());
    }
    vne.sh(&format!(
        "xl vne-snapshot restore -q --as copy {snapshot} 2>&1"
    ))?;
    beyond(vne)?;
    compared(vne)?;
    let said = vne.sh(&format!(
        "xl list copy-{WRITER} >/dev/null && \
         grep -cE 'DISK-(MISMATCH|FAILED)' /var/log/xen/console/guest-copy-{WRITER}.log; true"
    ))?;
    ensure!(said.trim() == "0", "the copy's disk: {said}");
    vne.sh(&format!(
        "xl destroy copy-{WRITER}; \
        lvremove -qq -y vnetest/copy-web 2>/dev/null; rm -f /mnt/disks/copy-*"
    ))
    .map(drop)
}

/// A take that is killed while disks are captured leaves none, and its guest running.
fn killed(vne: &Vne, way: &Way) -> Result<()> {
    let before = vne.sh(way.kept)?;
    vne.sh(&format!(
        "xl vne-snapshot take {NAME} >/tmp/killed.log 2>&1 & take=$!; \
         until grep -q '^cut' /tmp/killed.log; do kill -0 $take || break; done; kill -9 $take; true"
    ))?;
    let start = Instant::now();
    let left = "ls -A /var/lib/xen-vne/tmp; ls -A /var/run/xen/vne | \
                grep -vE '^(register|vned[.](lock|sock))$'; true";
    while !vne.sh(left)?.trim().is_empty() {
        ensure!(
            start.elapsed() < Duration::from_secs(30),
            "a killed take left: {}",
            vne.sh(left)?
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    let after = vne.sh(way.kept)?;
    ensure!(before == after, "a killed take left disks: {after}");
    compared(vne).map(drop)
}
