//! A guest's first program: sets the guest up, says that it's ready, and then
//! says every second that it's alive.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::clock::{boottime_ns, Pace};
use crate::json::Json;
use crate::status::{lock, Status};
use crate::{dirty, sys, tcp_counters, workload};

const SETTINGS: &str = "/etc/vne";
const INTERFACE: &str = "eth0";
const DEVICE_LIMIT: Duration = Duration::from_secs(60);

/// What the lab wants of this guest.
#[derive(Debug, Default, PartialEq, Eq)]
struct Settings {
    name: String,
    ip: Option<(Ipv4Addr, u32)>,
    dirty: u32,
    working_set_mib: u32,
    workload: Vec<String>,
}

/// Never returns: an init that ends takes the kernel along.
pub fn run() -> ! {
    if let Err(why) = set_up() {
        println!("VNE-FAILED {why}");
    }
    loop {
        match sys::wait_any() {
            Some((child, status)) => println!("VNE-CHILD-ENDED {child} status {status}"),
            None => std::thread::sleep(Duration::from_secs(1)),
        }
    }
}

fn set_up() -> Result<(), String> {
    sys::mount("devtmpfs", "/dev")?;
    sys::mount("proc", "/proc")?;
    sys::mount("sysfs", "/sys")?;
    let text = std::fs::read_to_string(SETTINGS)
        .map_err(|error| format!("cannot read {SETTINGS}: {error}"))?;
    let settings = Settings::parse(&text)?;
    for module in modules()? {
        sys::load_module(&module)?;
    }
    sys::configure("lo", Ipv4Addr::LOCALHOST, 8)?;
    if let Some((ip, prefix)) = settings.ip {
        await_content(&format!("/sys/class/net/{INTERFACE}/address"), "")?;
        // Neighbours learn quickly where a restored guest is.
        let notify = format!("/proc/sys/net/ipv4/conf/{INTERFACE}/arp_notify");
        std::fs::write(&notify, "1").map_err(|error| format!("cannot write {notify}: {error}"))?;
        sys::configure(INTERFACE, ip, prefix)?;
        await_content(&format!("/sys/class/net/{INTERFACE}/carrier"), "1")?;
    }

    let status = Status::default();
    let name = settings.name.clone();
    status.add("guest", move || {
        let mut json = Json::new();
        json.text("name", &name);
        json
    });
    status.add("tcp", tcp_counters::tell);
    let memory = dirty::start(&status, settings.dirty, settings.working_set_mib);
    status.serve()?;
    start_workload(&settings.workload, &status)?;
    let ip = settings.ip.map_or(Ipv4Addr::UNSPECIFIED, |(ip, _)| ip);
    println!("VNE-READY {} {ip}", settings.name);

    std::thread::spawn(move || {
        let mut pace = Pace::new(Duration::from_secs(1));
        let mut beat = 0u64;
        loop {
            pace.wait();
            beat += 1;
            let (written, corrupt) = {
                let count = lock(&memory);
                (count.written, count.corrupt)
            };
            println!(
                "VNE-BEAT {beat} boottime_ms={} written={written} corrupt={corrupt}",
                boottime_ns() / 1_000_000
            );
        }
    });
    Ok(())
}

fn start_workload(words: &[String], status: &Status) -> Result<(), String> {
    let Some((first, rest)) = words.split_first() else {
        return Ok(());
    };
    if first.starts_with('/') {
        // An added program; the init's loop says when it ends.
        return Command::new(first)
            .args(rest)
            .spawn()
            .map(drop)
            .map_err(|error| format!("cannot run {first}: {error}"));
    }
    let run = workload::prepare(words, status)?;
    std::thread::spawn(move || match run() {
        Ok(()) => println!("VNE-WORKLOAD-ENDED"),
        Err(why) => println!("VNE-WORKLOAD-FAILED {why}"),
    });
    Ok(())
}

/// The kernel modules, in the order of their names.
fn modules() -> Result<BTreeSet<PathBuf>, String> {
    let dir = Path::new("/modules");
    let entries =
        std::fs::read_dir(dir).map_err(|error| format!("cannot list /modules: {error}"))?;
    Ok(entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .collect())
}

/// Waits until a file exists and holds a text (any, when it's empty).
fn await_content(path: &str, wanted: &str) -> Result<(), String> {
    let end = Instant::now() + DEVICE_LIMIT;
    while Instant::now() < end {
        if let Ok(text) = std::fs::read_to_string(path) {
            if wanted.is_empty() || text.trim() == wanted {
                return Ok(());
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(format!(
        "{path} isn't there or not {wanted:?} after {} s",
        DEVICE_LIMIT.as_secs()
    ))
}

impl Settings {
    fn parse(text: &str) -> Result<Self, String> {
        let mut settings = Settings::default();
        for line in text.lines() {
            let (name, value) = line
                .split_once('=')
                .ok_or_else(|| format!("{SETTINGS} has the line {line:?}"))?;
            let bad = || format!("{SETTINGS}: {name} can't be {value:?}");
            match name {
                "name" => settings.name = value.to_owned(),
                "ip" => {
                    let (ip, prefix) = value.split_once('/').ok_or_else(bad)?;
                    let ip = ip.parse().map_err(|_| bad())?;
                    settings.ip = Some((ip, prefix.parse().map_err(|_| bad())?));
                }
                "dirty" => settings.dirty = value.parse().map_err(|_| bad())?,
                "working_set" => settings.working_set_mib = value.parse().map_err(|_| bad())?,
                "arg" => settings.workload.push(value.to_owned()),
                _ => return Err(format!("{SETTINGS}: there's no setting {name}")),
            }
        }
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_and_mistakes_told() -> Result<(), String> {
        let settings = Settings::parse(
            "name=g\nip=10.77.0.9/16\ndirty=5\nworking_set=64\narg=ring\narg=--x=1\n",
        )?;
        assert_eq!(settings.ip, Some((Ipv4Addr::new(10, 77, 0, 9), 16)));
        assert_eq!(settings.workload, ["ring", "--x=1"]);
        assert!(Settings::parse("ip=10.77.0.9\n").is_err());
        assert!(Settings::parse("colour=red\n").is_err());
        Ok(())
    }
}
