//! The VNE under test: three stations that pass a token, and a fourth guest
//! that sends a numbered datagram every two milliseconds.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use serde_json::Value;

use crate::lab::{Guest, Lab};

/// The stations of the ring, in its order.
pub const RING: [&str; 3] = ["ring0", "ring1", "ring2"];
/// The sender of the stream.
pub const STREAM: &str = "stream";
/// All members, as `take` is given them.
pub const MEMBERS: &str = "ring0 ring1 ring2 stream";
/// The name of the VNE.
pub const NAME: &str = "lab";

const STREAM_PORT: u16 = 9000;
const RING_IPS: [&str; 3] = ["10.77.1.10", "10.77.1.11", "10.77.1.12"];
const STREAM_IP: &str = "10.77.1.20";

/// A lab with the VNE in it.
pub struct Vne {
    /// The lab.
    pub lab: Lab,
}

impl Vne {
    /// Starts the guests.
    pub fn start(lab: Lab) -> Result<Self> {
        let vne = Self { lab };
        // In a lab that was up already.
        vne.destroy()?;
        vne.sh("mkdir -p /etc/xen/vne")?;
        vne.sh(&format!(
            "printf 'members = [ %s ]\\n' '{}' > /etc/xen/vne/{NAME}.cfg",
            MEMBERS
                .split(' ')
                .map(|name| format!("\"{name}\""))
                .collect::<Vec<_>>()
                .join(", ")
        ))?;
        vne.start_guests()?;
        Ok(vne)
    }

    fn start_guests(&self) -> Result<()> {
        let peers = RING_IPS.join(",");
        let mut guests = Vec::new();
        for (index, (name, ip)) in RING.iter().zip(RING_IPS).enumerate() {
            // Longer than restored guests take to connect to the network again:
            // what is sent before that is lost.
            let line =
                format!("ring --index {index} --peers {peers} --rest-every 8 --rest-ms 4000");
            guests.push((0, guest(name, ip, 500, &line)?));
        }
        let line = format!("stream --to 10.77.0.1:{STREAM_PORT} --interval-us 2000");
        guests.push((0, guest(STREAM, STREAM_IP, 500, &line)?));
        self.lab.guests(&guests)?;
        self.turning(Duration::from_secs(60))
    }

    /// Destroys what is there and starts the guests again, for the next test
    /// after one that failed.
    pub fn start_afresh(&self) -> Result<()> {
        self.destroy()?;
        self.start_guests()
    }

    /// Runs a shell line in dom0.
    pub fn sh(&self, line: &str) -> Result<String> {
        self.lab.run(0, line)
    }

    /// Runs a shell line in dom0 that must fail, and returns its exit status
    /// and everything that it printed.
    pub fn sh_fails(&self, line: &str) -> Result<(i32, String)> {
        let output = self.lab.sh(0, &format!("{{ {line}; }} 2>&1"))?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(!output.status.success(), "`{line}` should fail: {printed}");
        Ok((output.status.code().unwrap_or(-1), printed))
    }

    /// Takes a snapshot of all members and returns its manifest.
    pub fn take(&self) -> Result<Value> {
        let text = self.sh(&format!("xl vne-snapshot take --json {NAME}"))?;
        serde_json::from_str(&text).with_context(|| format!("take printed {text}"))
    }

    /// Destroys all members.
    pub fn destroy(&self) -> Result<()> {
        self.sh(&format!(
            "for d in {MEMBERS}; do xl domid $d >/dev/null 2>&1 && xl destroy $d; done; true"
        ))
        .map(drop)
    }

    /// What a guest tells of itself.
    pub fn ask(&self, ip: &str) -> Result<Value> {
        let text = self.sh(&format!("vne-guest ask {ip}"))?;
        serde_json::from_str(&text).with_context(|| format!("{ip} said {text}"))
    }

    /// What one of the stations tells.
    pub fn station(&self, index: usize) -> Result<Value> {
        self.ask(RING_IPS[index])
    }

    /// What the stations tell, in the ring's order.
    pub fn stations(&self) -> Result<Vec<Value>> {
        (0..RING.len()).map(|index| self.station(index)).collect()
    }

    /// How many tokens the first station has seen.
    pub fn received(&self) -> Result<u64> {
        number(&self.ask(RING_IPS[0])?, "/ring/received")
    }

    /// Waits until the token has come round, on which it rests for 4 s at most
    /// once.
    pub fn turning(&self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        let before = self.received()?;
        while self.received()? < before + 1 {
            ensure!(
                start.elapsed() < limit,
                "the token doesn't go round: {:?}",
                self.stations()?
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// No station has seen what it shouldn't, and no memory is corrupt.
    pub fn no_violations(&self) -> Result<()> {
        for station in self.stations()? {
            for path in ["/ring/violations", "/memory/corrupt", "/ring/send_failures"] {
                ensure!(number(&station, path)? == 0, "{path} in {station}");
            }
        }
        Ok(())
    }

    /// No frame waits anywhere.
    pub fn no_hold(&self) -> Result<()> {
        // The lab has a table of its own.
        let held =
            self.sh("ip -br link | grep vneh; nft list tables | grep -v 'netdev lab$'; true")?;
        ensure!(held.is_empty(), "a hold is left: {held}");
        Ok(())
    }

    /// All members run, and nothing of a take is left in this dom0. True
    /// between any two tests.
    pub fn intact(&self) -> Result<()> {
        self.nothing_left()?;
        self.all_run()
    }

    /// No member exists, and nothing of a restore is left in this dom0.
    pub fn nothing_there(&self) -> Result<()> {
        self.nothing_left()?;
        let domains = self.sh("xl list | tail -n +3")?;
        ensure!(domains.is_empty(), "there are domains:\n{domains}");
        Ok(())
    }

    fn nothing_left(&self) -> Result<()> {
        self.no_hold()?;
        let left = self.sh("tc qdisc show | grep plug; \
             ls -A /var/run/xen/vne | grep -v '^register$'; \
             ls -A /var/lib/xen-vne/tmp 2>/dev/null; ls -A /var/lib/xen | grep -v '^userdata'; \
             ps -eo args | grep -E '[v]ne-(worker|guard|save)|[l]ibxl-save-helper'; \
             xenstore-ls -f | grep -E 'control/shutdown = \"suspend\"'; true")?;
        ensure!(left.is_empty(), "something is left:\n{left}");
        Ok(())
    }

    /// All members run, and each has the process of xl's that acts on its
    /// `on_reboot` and the like.
    pub fn all_run(&self) -> Result<()> {
        let monitors = self.sh("pgrep -fc '/xl (create|restore) '; true")?;
        ensure!(
            monitors.trim() == MEMBERS.split(' ').count().to_string(),
            "there are {} monitors of xl's",
            monitors.trim()
        );
        let list = self.sh("xl list")?;
        for name in MEMBERS.split(' ') {
            let state = list
                .lines()
                .find(|line| line.split_whitespace().next() == Some(name))
                .and_then(|line| line.split_whitespace().nth(4));
            match state {
                Some(state) if !state.contains(['s', 'p', 'c', 'd']) => {}
                other => bail!("{name} is {other:?}:\n{list}"),
            }
        }
        Ok(())
    }

    /// The snapshots that are listed.
    pub fn listed(&self) -> Result<Vec<String>> {
        let text = self.sh("xl vne-snapshot list --json")?;
        let list: Vec<Value> = serde_json::from_str(&text)?;
        let id = |snapshot: &Value| {
            let text = |key: &str| snapshot[key].as_str().unwrap_or_default().to_owned();
            format!("{}@{}", text("vne"), text("id"))
        };
        Ok(list.iter().map(id).collect())
    }

    /// Deletes all snapshots.
    pub fn remove_all(&self) -> Result<()> {
        let listed = self.listed()?;
        if !listed.is_empty() {
            self.sh(&format!("xl vne-snapshot remove {}", listed.join(" ")))?;
        }
        Ok(())
    }

    /// Listens to the stream in dom0 while `work` runs; what was heard.
    pub fn listening<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Value)> {
        self.sh(&format!(
            "rm -f /tmp/sink.json; vne-guest sink --port {STREAM_PORT} --seconds 600 \
             > /tmp/sink.json 2>/tmp/sink.err & echo $! > /tmp/sink.pid; sleep 0.5"
        ))?;
        let result = work();
        let heard = self.sh(
            "kill -INT $(cat /tmp/sink.pid); for i in $(seq 100); do test -s /tmp/sink.json && \
             break; sleep 0.1; done; cat /tmp/sink.json /tmp/sink.err",
        )?;
        let result = result?;
        let mut heard: Value = serde_json::from_str(&heard).context(heard)?;
        // Hundreds of lines that nobody reads in an error.
        if let Some(all) = heard.as_object_mut() {
            all.remove("gaps");
        }
        Ok((result, heard))
    }

    /// What somebody wants to see after a failure.
    pub fn state_for_humans(&self) -> String {
        let line = "xl list; ls -laR /var/run/xen/vne; ip -br link; tc qdisc show; \
                    df -h / | tail -1; ps -eo pid,args | grep -E '[v]ne-|[s]ave-helper'; \
                    tail -n 5 /var/log/xen/xl-*.log; dmesg | tail -n 10";
        match self.lab.sh(0, line) {
            Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
            Err(error) => format!("dom0 doesn't answer: {error:#}"),
        }
    }
}

fn guest(name: &str, ip: &str, dirty: u32, workload: &str) -> Result<Guest> {
    Ok(Guest {
        memory_mib: 128,
        working_set_mib: 32,
        dirty_pages_per_s: dirty,
        ip: Some(ip.parse()?),
        workload: workload.split(' ').map(str::to_owned).collect(),
        ..Guest::new(name)
    })
}

/// A number in JSON.
pub fn number(value: &Value, path: &str) -> Result<u64> {
    value
        .pointer(path)
        .and_then(Value::as_u64)
        .with_context(|| format!("no number at {path} in {value}"))
}
