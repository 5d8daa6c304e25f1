//! The VNE under test: stations that pass a token, all on one host with a guest
//! that sends a numbered datagram every two milliseconds, or spread over two.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use serde_json::Value;

use super::pace;
use super::peers;
use crate::lab::{Guest, Lab};

/// The name of the VNE.
pub const NAME: &str = "lab";

const STREAM_PORT: u16 = 9000;
/// How long a station keeps the token: shorter than frames are held before a guest
/// has stopped, so that it's mostly on its way then; and long enough not to keep
/// an emulated dom0 busy.
const HOLD_US: u32 = 30_000;

/// A guest, and where it is.
#[derive(Clone, Copy)]
pub struct Member {
    /// The domain's name.
    pub name: &'static str,
    /// Its host.
    pub host: usize,
    /// Its address.
    pub ip: &'static str,
}

const fn member(name: &'static str, host: usize, ip: &'static str) -> Member {
    Member { name, host, ip }
}

/// Which members the VNE has, and where.
pub struct Placement {
    /// How many hosts.
    pub hosts: usize,
    /// The stations, in the ring's order.
    ring: &'static [Member],
    /// The sender of the stream.
    stream: Option<Member>,
}

/// Three stations and a stream on the first host.
pub const ONE_HOST: Placement = Placement {
    hosts: 1,
    ring: &[
        member("ring0", 0, "10.77.1.10"),
        member("ring1", 0, "10.77.1.11"),
        member("ring2", 0, "10.77.1.12"),
    ],
    stream: Some(member("stream", 0, "10.77.1.20")),
};

/// Four stations, so that every hop goes over the wire. No stream: each host
/// has one processor only.
pub const TWO_HOSTS: Placement = Placement {
    hosts: 2,
    ring: &[
        member("ring0", 0, "10.77.1.10"),
        member("ring1", 1, "10.77.1.11"),
        member("ring2", 0, "10.77.1.12"),
        member("ring3", 1, "10.77.1.13"),
    ],
    stream: None,
};

/// One host, for guests that aren't the VNE's.
static BARE_ONE: Placement = bare(1);
/// Two of these.
static BARE_TWO: Placement = bare(2);

const fn bare(hosts: usize) -> Placement {
    Placement {
        hosts,
        ring: &[],
        stream: None,
    }
}

impl Placement {
    fn members(&self) -> impl Iterator<Item = &Member> {
        self.ring.iter().chain(&self.stream)
    }

    /// What the configuration lists: without hosts when there's one only.
    fn listed(&self) -> String {
        let word = |member: &Member| match self.hosts {
            1 => format!("\"{}\"", member.name),
            _ => format!("\"host{}:{}\"", member.host, member.name),
        };
        self.members().map(word).collect::<Vec<_>>().join(", ")
    }
}

/// A lab with the VNE in it.
pub struct Vne {
    /// The lab.
    pub lab: Lab,
    placement: &'static Placement,
}

impl Vne {
    /// A lab that has no members yet.
    pub fn bare(lab: Lab, hosts: usize) -> Self {
        let placement = if hosts == 1 { &BARE_ONE } else { &BARE_TWO };
        Self { lab, placement }
    }

    /// Starts the guests on one host.
    pub fn start(lab: Lab) -> Result<Self> {
        Self::start_placed(lab, &ONE_HOST)
    }

    /// Starts the guests where they belong.
    pub fn start_placed(lab: Lab, placement: &'static Placement) -> Result<Self> {
        let vne = Self { lab, placement };
        // In a lab that was up already.
        vne.destroy()?;
        for host in 0..placement.hosts {
            vne.configure(host)?;
        }
        pace::measure(&vne.lab)?;
        if placement.hosts > 1 {
            peers::introduce(&vne)?;
        }
        vne.start_guests()?;
        Ok(vne)
    }

    /// Tells a host which members there are.
    pub fn configure(&self, host: usize) -> Result<()> {
        self.sh_on(host, "mkdir -p /etc/xen/vne")?;
        self.sh_on(
            host,
            &format!(
                "printf 'members = [ %s ]\\n' '{}' > /etc/xen/vne/{NAME}.cfg",
                self.placement.listed()
            ),
        )
        .map(drop)
    }

    fn start_guests(&self) -> Result<()> {
        let ring = self.placement.ring;
        let ips: Vec<&str> = ring.iter().map(|member| member.ip).collect();
        let peers = ips.join(",");
        let mut guests = Vec::new();
        for (index, member) in ring.iter().enumerate() {
            let line = format!("ring --index {index} --peers {peers} --hold-us {HOLD_US}");
            guests.push((member.host, guest(member, 500, &line)?));
        }
        if let Some(member) = &self.placement.stream {
            let line = format!("stream --to 10.77.0.1:{STREAM_PORT} --interval-us 2000");
            guests.push((member.host, guest(member, 500, &line)?));
        }
        self.lab.guests(&guests)?;
        self.turning(Duration::from_secs(60))
    }

    /// Destroys what is there and starts the guests again, for the next test
    /// after one that failed.
    pub fn start_afresh(&self) -> Result<()> {
        self.destroy()?;
        self.start_guests()
    }

    /// Runs a shell line in the first host's dom0.
    pub fn sh(&self, line: &str) -> Result<String> {
        self.sh_on(0, line)
    }

    /// Runs a shell line in a host's dom0.
    pub fn sh_on(&self, host: usize, line: &str) -> Result<String> {
        self.lab.run(host, line)
    }

    /// Runs a shell line in every host's dom0, in all at once, and returns what
    /// each printed.
    pub fn everywhere(&self, line: &str) -> Result<Vec<String>> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.placement.hosts)
                .map(|host| scope.spawn(move || self.sh_on(host, line)))
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|_| bail!("running a command has panicked"))
                })
                .collect()
        })
    }

    /// Runs a shell line in the first host's dom0 that must fail, and returns its exit status
    /// and everything that it printed.
    pub fn sh_fails(&self, line: &str) -> Result<(i32, String)> {
        let output = self.lab.sh(0, &format!("{{ {line}; }} 2>&1"))?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(!output.status.success(), "`{line}` should fail: {printed}");
        Ok((output.status.code().unwrap_or(-1), printed))
    }

    /// Takes a snapshot of all members and returns its manifest.
    pub fn take(&self) -> Result<Value> {
        self.take_on(0, NAME)
    }

    /// Takes a snapshot with a command on some host: of the VNE, or of what its
    /// name is followed by.
    pub fn take_on(&self, host: usize, what: &str) -> Result<Value> {
        let text = self.sh_on(host, &format!("xl vne-snapshot take --json {what}"))?;
        serde_json::from_str(&text).with_context(|| format!("take printed {text}"))
    }

    /// How many hosts there are.
    pub fn hosts(&self) -> usize {
        self.placement.hosts
    }

    /// The members on a host.
    pub fn members_on(&self, host: usize) -> impl Iterator<Item = &Member> {
        let here = move |member: &&Member| member.host == host;
        self.placement.members().filter(here)
    }

    /// Destroys all members, on whichever host they are.
    pub fn destroy(&self) -> Result<()> {
        let names: Vec<&str> = self.placement.members().map(|m| m.name).collect();
        self.everywhere(&format!(
            "for d in {}; do xl domid $d >/dev/null 2>&1 && xl destroy $d; done; true",
            names.join(" ")
        ))
        .map(drop)
    }

    /// What a guest tells of itself to the dom0 of its own host, which no wire
    /// between hosts keeps from it.
    pub fn ask(&self, member: &Member) -> Result<Value> {
        let text = self.sh_on(member.host, &format!("vne-guest ask {}", member.ip))?;
        serde_json::from_str(&text).with_context(|| format!("{} said {text}", member.name))
    }

    /// The stations, in the ring's order.
    pub fn ring(&self) -> &'static [Member] {
        self.placement.ring
    }

    /// What one of the stations tells.
    pub fn station(&self, index: usize) -> Result<Value> {
        let member = self.ring().get(index);
        self.ask(member.with_context(|| format!("there's no station {index}"))?)
    }

    /// What the stations tell, in the ring's order.
    pub fn stations(&self) -> Result<Vec<Value>> {
        self.ring().iter().map(|member| self.ask(member)).collect()
    }

    /// How many tokens the first station has seen.
    pub fn received(&self) -> Result<u64> {
        number(&self.station(0)?, "/ring/received")
    }

    /// Waits until the token has come round.
    pub fn turning(&self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        let before = self.received()?;
        while self.received()? < before + 1 {
            ensure!(
                start.elapsed() < pace::here(limit),
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

    /// No station has received what the one before it hasn't sent. Each is asked
    /// before its sender is, so that a token that moves meanwhile can't look like
    /// an orphan, and one that is an orphan can't look well.
    pub fn no_orphan(&self) -> Result<()> {
        let count = self.ring().len();
        let asked: Vec<Value> = (0..=count)
            .map(|step| self.station((count - 1 + step * (count - 1)) % count))
            .collect::<Result<_>>()?;
        for pair in asked.windows(2) {
            let received = pair[0]["ring"]["last_received"].as_u64();
            let sent = pair[1]["ring"]["last_sent"].as_u64();
            ensure!(
                received <= sent,
                "received {received:?}, sent {sent:?}: {pair:?}"
            );
        }
        Ok(())
    }

    /// Fails when a shell line prints something in a host's dom0.
    fn silent(&self, host: usize, line: &str, what: &str) -> Result<()> {
        let printed = self.sh_on(host, line)?;
        ensure!(printed.is_empty(), "host {host}: {what}:\n{printed}");
        Ok(())
    }

    /// Does something for every host, in all at once.
    fn each_host(&self, look: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
        let look = &look;
        std::thread::scope(|scope| {
            let hosts = 0..self.placement.hosts;
            let threads: Vec<_> = hosts.map(|host| scope.spawn(move || look(host))).collect();
            let mut results = threads.into_iter().map(|thread| thread.join());
            results.try_for_each(|result| {
                result.unwrap_or_else(|_| bail!("looking at a host has panicked"))
            })
        })
    }

    /// No frame waits anywhere.
    pub fn no_hold(&self) -> Result<()> {
        self.each_host(|host| self.no_hold_on(host))
    }

    /// No frame waits on a host.
    fn no_hold_on(&self, host: usize) -> Result<()> {
        // The lab has a table of its own, and one test cuts the wire with one.
        self.silent(
            host,
            "ip -br link | grep 'vne[hp]'; nft list tables | grep -vE 'netdev (lab|cut)$'; true",
            "a hold is left",
        )
    }

    /// All members run, and nothing of a take is left in any dom0. True
    /// between any two tests.
    pub fn intact(&self) -> Result<()> {
        self.nothing_left()?;
        self.all_run()
    }

    /// No member exists, and nothing of a restore is left in any dom0.
    pub fn nothing_there(&self) -> Result<()> {
        self.nothing_left()?;
        self.each_host(|host| self.silent(host, "xl list | tail -n +3", "there are domains"))
    }

    fn nothing_left(&self) -> Result<()> {
        self.each_host(|host| self.nothing_left_on(host))
    }

    /// Nothing of a take or restore is left on a host. vned has xl read the
    /// configuration from time to time, which takes a moment and isn't of either.
    pub fn nothing_left_on(&self, host: usize) -> Result<()> {
        self.no_hold_on(host)?;
        self.silent(
            host,
            "tc qdisc show | grep plug; \
             ls -A /var/run/xen/vne | grep -vE '^(register|vned[.](lock|sock))$'; \
             ls -A /var/lib/xen-vne/tmp 2>/dev/null; ls -A /var/lib/xen | grep -v '^userdata'; \
             ps -eo etimes,args | grep -E '[v]ne-(worker|guard|save)|[l]ibxl-save-helper' | \
             awk '$1 >= 5 || $0 !~ /vne-[w]orker (describe|net-follow)/'; \
             xenstore-ls -f | grep -E 'control/shutdown = \"suspend\"'; true",
            "something is left",
        )
    }

    /// All members run on their hosts, and each has the process of xl's that
    /// acts on its `on_reboot` and the like.
    pub fn all_run(&self) -> Result<()> {
        self.each_host(|host| self.run_on(host))
    }

    /// The same for the members on one host.
    pub fn run_on(&self, host: usize) -> Result<()> {
        let told = self.sh_on(host, "pgrep -fc '/xl (create|restore) '; xl list")?;
        let (monitors, list) = told.split_once('\n').unwrap_or_default();
        let members: Vec<&Member> = self.members_on(host).collect();
        ensure!(
            monitors.trim() == members.len().to_string(),
            "host {host}: there are {} monitors of xl's",
            monitors.trim()
        );
        for member in members {
            running(list, member.name).with_context(|| format!("host {host}"))?;
        }
        Ok(())
    }

    /// The snapshots that any host lists, each once.
    pub fn listed(&self) -> Result<Vec<String>> {
        let mut all = Vec::new();
        let mut seen = BTreeSet::new();
        for host in 0..self.placement.hosts {
            let listed = self.listed_on(host)?;
            all.extend(listed.into_iter().filter(|name| seen.insert(name.clone())));
        }
        Ok(all)
    }

    /// The snapshots that a host lists.
    pub fn listed_on(&self, host: usize) -> Result<Vec<String>> {
        let text = self.sh_on(host, "xl vne-snapshot list --json")?;
        let list: Vec<Value> = serde_json::from_str(&text)?;
        let id = |snapshot: &Value| {
            let text = |key: &str| snapshot[key].as_str().unwrap_or_default().to_owned();
            format!("{}@{}", text("vne"), text("id"))
        };
        Ok(list.iter().map(id).collect())
    }

    /// Deletes all snapshots.
    pub fn remove_all(&self) -> Result<()> {
        for host in 0..self.placement.hosts {
            // Only now: another host may have removed it with its own.
            let listed = self.listed_on(host)?;
            if !listed.is_empty() {
                self.sh_on(
                    host,
                    &format!("xl vne-snapshot remove {}", listed.join(" ")),
                )?;
            }
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
                    tail -n 5 /var/log/xen/xl-*.log; tail -n 30 /var/log/vned.log; \
                    dmesg | tail -n 10";
        let one = |host: usize| match self.lab.sh(host, line) {
            Ok(output) => format!("host{host}:\n{}", String::from_utf8_lossy(&output.stdout)),
            Err(error) => format!("host{host}: dom0 doesn't answer: {error:#}\n"),
        };
        (0..self.placement.hosts).map(one).collect()
    }
}

/// Fails unless `xl list` says that a domain runs.
fn running(list: &str, name: &str) -> Result<()> {
    let state = list
        .lines()
        .find(|line| line.split_whitespace().next() == Some(name))
        .and_then(|line| line.split_whitespace().nth(4));
    match state {
        Some(state) if !state.contains(['s', 'p', 'c', 'd']) => Ok(()),
        other => bail!("{name} is {other:?}:\n{list}"),
    }
}

/// A small guest, as all members are.
pub fn guest(member: &Member, dirty: u32, workload: &str) -> Result<Guest> {
    Ok(Guest {
        memory_mib: 128,
        working_set_mib: 32,
        dirty_pages_per_s: dirty,
        ip: Some(member.ip.parse()?),
        workload: workload.split(' ').map(str::to_owned).collect(),
        ..Guest::new(member.name)
    })
}

/// A number in JSON.
pub fn number(value: &Value, path: &str) -> Result<u64> {
    value
        .pointer(path)
        .and_then(Value::as_u64)
        .with_context(|| format!("no number at {path} in {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_named_only_where_there_are_two() {
        assert_eq!(ONE_HOST.listed(), r#""ring0", "ring1", "ring2", "stream""#);
        assert_eq!(
            TWO_HOSTS.listed(),
            r#""host0:ring0", "host1:ring1", "host0:ring2", "host1:ring3""#
        );
    }

    #[test]
    fn every_hop_of_the_ring_over_two_hosts_goes_over_the_wire() {
        let ring = TWO_HOSTS.ring;
        for (here, next) in ring.iter().zip(ring.iter().cycle().skip(1)) {
            assert_ne!(here.host, next.host, "{} and {}", here.name, next.name);
        }
    }
}
