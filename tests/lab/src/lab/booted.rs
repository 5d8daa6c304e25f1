//! The booted state: a host is booted once, and its memory and disk are kept;
//! every lab starts from there within seconds.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use super::cache::{Cache, Key};
use super::image::Image;
use super::process;
use super::qemu::{self, Files, Machine, Platform};
use super::ssh::Ssh;

const BOOT_LIMIT: Duration = Duration::from_secs(600);
const SAVE_LIMIT: Duration = Duration::from_secs(300);

/// dom0's share of the processors, where a guest's is 256.
pub const DOM0_WEIGHT: u32 = 4096;

/// Done once in dom0 after each boot, before its state is kept: what would
/// otherwise be slow or missing the first time.
///
/// With equal weights busy guests leave dom0 too little of the emulated
/// processors to copy memory faster than they change it, and even to answer:
/// with four of them and twice their weight it was out of reach for minutes.
/// Hosts give their dom0 more weight for the same reason.
///
/// The nftables chain on `lo` does nothing, but while there is one the kernel's
/// static key for ingress hooks stays on. Switching it patches code that other
/// processors run, and the emulator may go on executing the breakpoint that
/// stands there meanwhile: a processor of dom0 then hangs for ever at the first
/// branch of `__netif_receive_skb_core`. For the same reason there are a tc hook
/// and a VXLAN device that do nothing.
const SETTLE: &str = "set -e
timeout 300 systemctl is-system-running --wait >/dev/null || {
    systemctl --failed --no-legend
    systemctl is-system-running | grep -qx degraded
}
modprobe -a xen-netback xen-blkback sch_plug ifb nf_tables nft_fwd_netdev \\
    tun bridge vxlan macvlan sch_ingress cls_bpf
xl sched-credit2 -d Domain-0 -w \"$DOM0_WEIGHT\"
nft add table netdev lab
nft add chain netdev lab keep '{ type filter hook ingress device lo priority 0; }'
tc qdisc add dev lo clsact
ip link add keep type vxlan id 1 dstport 1
ip link set keep up
setsid perl -e \"$WATCH\" </dev/null >/dev/null 2>&1 &
xl info >/dev/null
xl list >/dev/null
sync";

/// Tells dom0's kernel log when even a process that only sleeps had to wait: the
/// emulator, or the machine under it, has stood still.
const WATCH: &str = "open(my $log, q(>), q(/dev/kmsg)) or die;
    sub now { open(my $up, q(<), q(/proc/uptime)) or die; (split(q( ), <$up>))[0] }
    for (my $last = now();;) {
        select(undef, undef, undef, 0.2);
        my $now = now();
        my $line = sprintf(qq(lab: dom0 stood still for %.1f s), $now - $last);
        syswrite($log, $line) if $now - $last > 1;
        $last = $now;
    }";

/// The command that makes a booted dom0 what a lab's should be.
pub(super) fn settle() -> String {
    format!("DOM0_WEIGHT={DOM0_WEIGHT}\nWATCH='{WATCH}'\n{SETTLE}")
}

/// A kept state.
#[derive(Clone, Debug)]
pub struct Booted {
    dir: PathBuf,
}

impl Booted {
    /// Finds the state, or boots a host and keeps it.
    pub fn get(cache: &Cache, image: &Image, platform: &Platform, key: &Path) -> Result<Self> {
        let version = process::capture(Command::new(&platform.emulator).arg("--version"))?;
        let hash = Key::new("booted")
            .with("image", &image.key)
            .with("xen", platform.xen.display().to_string())
            .with("emulator", platform.emulator.display().to_string())
            .with("version", version)
            .with("platform", platform.describe())
            .with("settle", settle())
            .finish();
        let dir = cache.artefact("booted", &hash, |out| boot(out, image, platform, key))?;
        Ok(Booted { dir })
    }

    /// The disk that belongs to the state; never written to.
    pub fn disk(&self) -> PathBuf {
        Files::new(&self.dir, 0).disk()
    }

    /// Memory and devices.
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }
}

fn boot(out: &Path, image: &Image, platform: &Platform, key: &Path) -> Result<()> {
    let files = Files::new(out, 0);
    qemu::overlay(&image.disk(), "raw", &files.disk())?;
    let mut machine = Machine::start(platform, &files, None, None)?;
    let ssh = Ssh {
        host: 0,
        port: machine.ssh_port,
        key: key.to_owned(),
        socket: files.ssh(),
    };
    let deadline = Instant::now() + BOOT_LIMIT;
    loop {
        machine.check()?;
        if process::output(&mut ssh.command("true"))?.status.success() {
            break;
        }
        if Instant::now() > deadline {
            bail!(
                "dom0 isn't up after {} s; {}",
                BOOT_LIMIT.as_secs(),
                machine.last_words()
            );
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    process::capture(&mut ssh.command(&settle()))
        .with_context(|| format!("dom0 doesn't settle; {}", machine.last_words()))?;
    let mut control = machine.control()?;
    control.save_and_quit(&out.join("state"), SAVE_LIMIT)?;
    machine.wait(Duration::from_secs(60))
}
