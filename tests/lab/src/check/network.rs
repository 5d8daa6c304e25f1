//! VNEs' own networks: two of them with the same addresses side by side on two
//! hosts.

use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use serde_json::Value;

use super::pace;
use super::peers;
use super::vne::{number, Vne, NAME};
use crate::lab::Guest;

const VNES: [&str; 2] = ["red", "blue"];
/// What the first one's copy is called.
const COPY: &str = "try";
/// What each VNE's guests have, on the first host and on the second.
const IPS: [&str; 2] = ["10.88.0.1", "10.88.0.2"];
/// A guest of dom0's own on a VNE's network, for asking the others.
const PROBE_IP: &str = "10.88.9.9";
/// An Ethernet frame that is full.
const FULL_FRAME: u64 = 1514;
const PATIENCE: Duration = Duration::from_secs(90);
/// The script, killed between its steps: when the network is there and the card
/// isn't on it, and before it has removed anything.
const KILLED: &str = "sed -e 's/^    setup_virtual_bridge_port.*/    kill -9 $$/' \
                      -e 's/^offline | remove)$/&\\n    kill -9 $$/' \
                      /etc/xen/scripts/vif-vne > /etc/xen/scripts/vif-killed; \
                      grep -c 'kill -9' /etc/xen/scripts/vif-killed | grep -qx 2; \
                      chmod 755 /etc/xen/scripts/vif-killed";

/// All of it, and nothing of it left.
pub fn side_by_side(vne: &Vne) -> Result<String> {
    peers::trust_for(vne, &[NAME, VNES[0], VNES[1], COPY])?;
    let result = in_turn(vne);
    let cleaned = clean_up(vne);
    let told = result?;
    cleaned.map(|()| told)
}

fn in_turn(vne: &Vne) -> Result<String> {
    start(vne)?;
    shown(vne)?;
    let passed = apart(vne)?;
    answers(vne)?;
    let manifest = vne.take_on(0, VNES[0])?;
    ensure!(manifest["members"].as_array().map(Vec::len) == Some(2));
    copied(vne)?;
    followed(vne)?;
    killed(vne)?;
    gone(vne)?;
    Ok(format!(
        "  two VNEs with the same addresses on both hosts: {passed} full frames seen in dom0, each \
         on its own VNE's interfaces only; a take of one, and its copy beside it; peers followed; a killed script made good for; nothing \
         left of either"
    ))
}

fn name(vne: &str, host: usize) -> String {
    format!("{vne}{host}")
}

fn start(vne: &Vne) -> Result<()> {
    let mut guests = Vec::new();
    for of in VNES {
        vne.everywhere(&format!(
            "printf 'members = [ \"host0:{of}0\", \"host1:{of}1\" ]\\n' > /etc/xen/vne/{of}.cfg"
        ))?;
        for (host, (ip, to)) in IPS.iter().zip(IPS.iter().rev()).enumerate() {
            let line = format!("marks --word {of} --to {to}");
            guests.push((
                host,
                Guest {
                    memory_mib: 128,
                    working_set_mib: 16,
                    ip: Some(ip.parse()?),
                    mac: Some([0x55, 0, host as u8]),
                    vne: Some(of.to_owned()),
                    workload: line.split(' ').map(str::to_owned).collect(),
                    ..Guest::new(&name(of, host))
                },
            ));
        }
    }
    vne.lab.guests(&guests)
}

/// What 'net' says of a VNE on a host.
fn net(vne: &Vne, host: usize, of: &str) -> Result<Value> {
    let text = vne.sh_on(host, &format!("xl vne-snapshot net --json {of}"))?;
    serde_json::from_str(&text).context(text)
}

/// Both hosts show both networks, and agree on them.
fn shown(vne: &Vne) -> Result<()> {
    for of in VNES {
        let both = [net(vne, 0, of)?, net(vne, 1, of)?];
        for (host, told) in both.iter().enumerate() {
            let peer = format!("host{}", 1 - host);
            let good = told.as_array().map(Vec::len) == Some(1)
                && told.pointer("/0/bridge") == Some(&format!("vne-{of}").into())
                && told.pointer("/0/vifs/0").is_some()
                && told.pointer("/0/vifs/1").is_none()
                && told.pointer("/0/tunnel/peers/0/name") == Some(&peer.into())
                && told.pointer("/0/tunnel/peers/1").is_none();
            ensure!(good, "host {host}: {told}");
        }
        let vni = |told: &Value| told.pointer("/0/tunnel/vni").cloned();
        ensure!(vni(&both[0]).is_some() && vni(&both[0]) == vni(&both[1]));
    }
    Ok(())
}

/// The interfaces of a VNE's network on a host.
fn interfaces(vne: &Vne, host: usize, of: &str) -> Result<Vec<String>> {
    let told = net(vne, host, of)?;
    let mut names = vec![format!("vne-{of}"), format!("vu-{of}"), format!("vx-{of}")];
    let vifs = told.pointer("/0/vifs").and_then(Value::as_array);
    let vifs = vifs.with_context(|| format!("no vifs in {told}"))?;
    names.extend(vifs.iter().filter_map(Value::as_str).map(str::to_owned));
    Ok(names)
}

/// Listens in both dom0s: guests hear each other, with full frames that mustn't be
/// broken up, and no frame is seen on an interface of the other VNE. How many were.
fn apart(vne: &Vne) -> Result<u64> {
    let deadline = Instant::now() + pace::here(PATIENCE);
    loop {
        match listen(vne) {
            Err(error) if Instant::now() > deadline => return Err(error),
            // Bridges and guests are still learning.
            Err(error) if error.downcast_ref::<Silent>().is_some() => {}
            other => return other,
        }
    }
}

/// Nothing was heard where something should have been.
#[derive(Debug)]
struct Silent(String);

impl std::fmt::Display for Silent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no full frame was heard: {}", self.0)
    }
}

impl std::error::Error for Silent {}

fn listen(vne: &Vne) -> Result<u64> {
    let mut total = 0;
    for host in 0..2 {
        let each = [
            interfaces(vne, host, VNES[0])?,
            interfaces(vne, host, VNES[1])?,
        ];
        let line = format!("vne-guest frames {} --seconds 4", each.concat().join(" "));
        let text = vne.sh_on(host, &line)?;
        let told: Value = serde_json::from_str(&text).context(text)?;
        let passed = told["interfaces"].as_array();
        for (at, passed) in passed.context("no interfaces")?.iter().enumerate() {
            let own = VNES[usize::from(at >= each[0].len())];
            let words = passed["words"].as_object();
            let words = words.with_context(|| format!("no words in {passed}"))?;
            ensure!(
                words.keys().all(|word| word == own),
                "host {host}: others' frames on an interface of {own}: {passed}"
            );
            // The bridge itself is handed only what it doesn't know the place of.
            let carries = passed["interface"] != format!("vne-{own}");
            if carries && (words.is_empty() || number(passed, "/longest")? < FULL_FRAME) {
                return Err(Silent(format!("host {host}, {passed}")).into());
            }
            total += words.values().filter_map(Value::as_u64).sum::<u64>();
        }
    }
    Ok(total)
}

/// Asked on its own network, each guest says who it is, and that it has heard full
/// datagrams of its own VNE only.
fn answers(vne: &Vne) -> Result<()> {
    for of in VNES {
        for (host, ip) in IPS.iter().enumerate() {
            let told = asked(vne, of, ip)?;
            let expected = name(of, host);
            ensure!(
                told.pointer("/guest/name") == Some(&expected.into()),
                "{told}"
            );
            ensure!(number(&told, "/marks/received")? > 0, "{told}");
            for path in ["/marks/short", "/marks/foreign"] {
                ensure!(number(&told, path)? == 0, "{path} in {told}");
            }
        }
    }
    Ok(())
}

/// What a guest tells somebody on the first host who is on its network.
fn asked(vne: &Vne, of: &str, ip: &str) -> Result<Value> {
    let text = vne.sh(&format!(
        "set -e; trap 'ip link del probe; ip netns del probe' EXIT; ip netns add probe; \
         ip link add name probe type veth peer name eth0 netns probe; \
         echo 1 > /proc/sys/net/ipv6/conf/probe/disable_ipv6; \
         ip link set probe master vne-{of} up; \
         ip netns exec probe ip addr add {PROBE_IP}/16 dev eth0; \
         ip netns exec probe ip link set eth0 up; \
         ip netns exec probe vne-guest ask {ip} --tries 10"
    ))?;
    serde_json::from_str(&text).context(text)
}

/// A copy over both hosts talks on a network of its own, beside the original, which
/// has the same addresses and goes on talking.
fn copied(vne: &Vne) -> Result<()> {
    let red = VNES[0];
    let (_, why) = vne.sh_fails(&format!("xl vne-snapshot restore -q --as nobody {red}"))?;
    ensure!(why.contains("has to say members"), "{why}");
    vne.everywhere(&format!(
        "printf 'members = [ \"host0:{COPY}-{red}0\", \"host1:{COPY}-{red}1\" ]\\n' \
         > /etc/xen/vne/{COPY}.cfg"
    ))?;
    vne.sh(&format!("xl vne-snapshot restore -q --as {COPY} {red}"))?;
    let heard = || -> Result<Vec<u64>> {
        let mut counts = Vec::new();
        for of in [red, COPY] {
            for (host, ip) in IPS.iter().enumerate() {
                let told = asked(vne, of, ip)?;
                // A copy's memory is its original's.
                let expected = name(red, host);
                ensure!(
                    told.pointer("/guest/name") == Some(&expected.into()),
                    "{told}"
                );
                counts.push(number(&told, "/marks/received")?);
            }
        }
        Ok(counts)
    };
    let (before, after) = (heard()?, heard()?);
    ensure!(
        before
            .iter()
            .zip(&after)
            .all(|(before, after)| before < after),
        "somebody hears nothing beside a copy: {before:?}, {after:?}"
    );
    for host in 0..2 {
        vne.sh_on(host, &format!("xl destroy {COPY}-{}", name(red, host)))?;
        ensure!(
            net(vne, host, COPY)? == Value::Array(Vec::new()),
            "not gone"
        );
    }
    Ok(())
}

/// Frames stop going to a host that is no peer for a VNE any more, and go there again
/// once it is.
fn followed(vne: &Vne) -> Result<()> {
    let [red, blue] = VNES;
    peers::trust(vne, 0, 1, &[NAME, blue])?;
    ensure!(net(vne, 0, red)?.pointer("/0/tunnel") == Some(&Value::Null));
    ensure!(net(vne, 0, blue)?.pointer("/0/tunnel/peers/0").is_some());
    peers::trust(vne, 0, 1, &[NAME, red, blue, COPY])?;
    shown(vne)?;
    apart(vne).map(drop)
}

/// A script that is killed between its steps leaves what the next one uses.
fn killed(vne: &Vne) -> Result<()> {
    let guest = name(VNES[0], 0);
    let config = format!("/var/lib/xl-vne-lab/{guest}.cfg");
    vne.sh(&format!("xl destroy {guest}"))?;
    ensure!(
        net(vne, 0, VNES[0])? == Value::Array(Vec::new()),
        "not gone"
    );
    vne.sh(KILLED)?;
    vne.sh_fails(&format!(
        "sed s/vif-vne/vif-killed/ {config} > /tmp/killed.cfg; xl create -q /tmp/killed.cfg"
    ))?;
    let left = net(vne, 0, VNES[0])?;
    ensure!(
        left.pointer("/0/vifs").and_then(Value::as_array) == Some(&Vec::new()),
        "the network should be there without a vif: {left}"
    );
    vne.sh(&format!("xl create -q {config}"))?;
    apart(vne).map(drop)
}

/// With the last guest a network goes from its host, and from no other.
fn gone(vne: &Vne) -> Result<()> {
    for of in VNES {
        for host in 0..2 {
            ensure!(net(vne, host, of)? != Value::Array(Vec::new()));
            vne.sh_on(host, &format!("xl destroy {}", name(of, host)))?;
            ensure!(net(vne, host, of)? == Value::Array(Vec::new()), "not gone");
        }
    }
    for left in vne.everywhere("ip -br link | grep -E '^(vne|vx|vu)[-+]' || true")? {
        ensure!(left.trim().is_empty(), "left: {left}");
    }
    Ok(())
}

fn clean_up(vne: &Vne) -> Result<()> {
    let [red, blue] = VNES;
    vne.everywhere(&format!(
        "for d in {red}0 {red}1 {blue}0 {blue}1 {COPY}-{red}0 {COPY}-{red}1; do xl domid $d >/dev/null 2>&1 && xl destroy $d; \
         done; rm -f /etc/xen/scripts/vif-killed /tmp/killed.cfg; true"
    ))?;
    let removed = vne.remove_all();
    vne.everywhere(&format!(
        "rm -f /etc/xen/vne/{red}.cfg /etc/xen/vne/{blue}.cfg /etc/xen/vne/{COPY}.cfg"
    ))?;
    peers::trust_for(vne, &[NAME])?;
    removed
}
