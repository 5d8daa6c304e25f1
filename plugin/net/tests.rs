//! VNEs' networks on the kernel that this runs on: each host, and each guest, is
//! a network namespace.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs::File;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use super::announce;
use super::links;
use super::overlay::{self, Lock, Network, Peers, Seen, Settings, DEFAULT_PORT};
use super::tap::Tap;
use super::{Error, Rtnl};

/// A network namespace, for as long as this is there.
struct Place(File);

impl Place {
    /// None, told on stderr, where no such thing can be made.
    fn new() -> Option<Self> {
        let made = std::thread::spawn(|| {
            // SAFETY: only this thread's view of the network changes.
            match unsafe { libc::unshare(libc::CLONE_NEWNET) } {
                0 => File::open("/proc/thread-self/ns/net").ok(),
                _ => None,
            }
        });
        let place = Self(made.join().unwrap()?);
        let can = [
            "ip link set lo up",
            "ip link add name t0 type bridge && ip link del t0",
            "ip link add name t0 type vxlan id 1 dstport 1 && ip link del t0",
            "ip link add name t0 type veth peer name t1 && \
             ip link add link t0 name t2 type macvlan mode passthru && ip link del t0",
        ];
        can.iter().all(|line| place.try_sh(line)).then_some(place)
    }

    fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let entered = || {
            // SAFETY: the descriptor is an open network namespace's, and only
            // this thread's view of the network changes.
            let r = unsafe { libc::setns(self.0.as_raw_fd(), libc::CLONE_NEWNET) };
            assert_eq!(r, 0);
            work()
        };
        std::thread::scope(|scope| scope.spawn(entered).join().unwrap())
    }

    fn try_sh(&self, line: &str) -> bool {
        let output = self.enter(|| Command::new("sh").args(["-c", line]).output());
        output.is_ok_and(|output| output.status.success())
    }

    fn sh(&self, line: &str) -> String {
        let output = self.enter(|| Command::new("sh").args(["-c", line]).output());
        let output = output.unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {told}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// How other commands name it.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    fn rtnl(&self) -> Rtnl {
        self.enter(|| Rtnl::open().unwrap())
    }

    fn up(&self, network: &Network, peers: &Peers) -> Result<(), Error> {
        let dir = tempfile::tempdir().unwrap();
        let lock = Lock::take(dir.path()).unwrap();
        self.enter(|| network.up(&lock, &mut Rtnl::open().unwrap(), Some(peers)))
    }

    fn down(&self, network: &Network) -> bool {
        let dir = tempfile::tempdir().unwrap();
        let lock = Lock::take(dir.path()).unwrap();
        self.enter(|| network.down(&lock, &mut Rtnl::open().unwrap()).unwrap())
    }

    fn seen(&self) -> Vec<Seen> {
        overlay::seen(&mut self.rtnl()).unwrap()
    }

    /// Interfaces of a network, in whatever state.
    fn left(&self) -> String {
        self.sh("ip -o link | grep -E ' (vne|vx|vu)[-+]' || true")
    }

    /// A guest with a vif on a bridge.
    fn guest(&self, bridge: &str, vif: &str, ip: &str) -> Place {
        let guest = Place::new().unwrap();
        self.sh(&format!(
            "ip link add name {vif} type veth peer name eth0 netns {}; \
             ip link set {vif} master {bridge}; ip link set {vif} up",
            guest.path()
        ));
        guest.sh(&format!(
            "ip link set eth0 address 00:16:3e:00:00:{:02x}; ip addr add {ip}/16 dev eth0; \
             ip link set eth0 up",
            ip.bytes().last().unwrap()
        ));
        guest
    }
}

/// Whether the kernel can do what a test wants; told loudly if not.
macro_rules! place_or_skip {
    () => {
        match Place::new() {
            Some(place) => place,
            None => {
                eprintln!(
                    "SKIPPED: this kernel, or who runs this, can't make network namespaces with \
                     bridge, vxlan, macvlan and veth"
                );
                return;
            }
        }
    };
}

fn network(vne: &str) -> Network {
    Network::of(vne, Settings::default())
}

fn peers(addresses: &[&str]) -> Peers {
    Peers {
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        incomplete: false,
    }
}

/// Two hosts with a wire between them, 10.0.0.1 and 10.0.0.2, or fd00::1 and ::2.
fn two_hosts(mtu: u32) -> Option<[Place; 2]> {
    let hosts = [Place::new()?, Place::new()?];
    hosts[0].sh(&format!(
        "ip link add name u0 mtu {mtu} type veth peer name u0 mtu {mtu} netns {}",
        hosts[1].path()
    ));
    for (host, last) in hosts.iter().zip(1..) {
        host.sh(&format!(
            "ip addr add 10.0.0.{last}/24 dev u0; ip addr add fd00::{last}/64 dev u0 nodad; \
             ip link set u0 up"
        ));
    }
    Some(hosts)
}

/// Sends a datagram of so many bytes that mustn't be broken up; whether it came.
fn datagram_comes(from: &Place, to: &Place, to_ip: &str, bytes: usize) -> bool {
    let address: SocketAddr = format!("{to_ip}:7000").parse().unwrap();
    let receiver = to.enter(|| UdpSocket::bind(address)).unwrap();
    receiver
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let sender = from.enter(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    let value = libc::IP_PMTUDISC_DO;
    // SAFETY: the option's value is an int that outlives the call, passed with
    // its size.
    let r = unsafe {
        libc::setsockopt(
            sender.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            std::ptr::from_ref(&value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    assert_eq!(r, 0);
    (0..3).any(|_| {
        // Too large for a way that is known by now.
        let sent = sender.send_to(&vec![7; bytes], address);
        let mut buffer = vec![0; bytes + 1];
        sent.is_ok() && receiver.recv(&mut buffer).is_ok_and(|got| got == bytes)
    })
}

#[test]
fn the_vni_is_the_documented_hash() {
    // As 'printf lab | b3sum' begins, for all times: hosts of any version have
    // to agree.
    assert_eq!(network("lab").vni(), 0x10_7070);
    let other = Settings {
        vni: Some(7),
        port: None,
    };
    assert_eq!(Network::of("lab", other).vni(), 7);
}

#[test]
fn names_fit_an_interface_and_differ() {
    let long = "a".repeat(64);
    let names: Vec<String> = ["lab", "elevenchars", "twelve.chars", &long, &long[1..]]
        .iter()
        .map(|vne| network(vne).bridge().to_owned())
        .collect();
    assert_eq!(names[..2], ["vne-lab", "vne-elevenchars"]);
    for name in &names {
        assert!(name.len() < libc::IFNAMSIZ, "{name}");
    }
    assert!(names[2..].iter().all(|name| name.starts_with("vne--")));
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
}

#[test]
fn a_network_of_one_host_comes_and_goes() {
    let host = place_or_skip!();
    let lab = network("lab");
    for _ in 0..2 {
        host.up(&lab, &Peers::default()).unwrap();
        let seen = host.seen();
        assert_eq!(seen.len(), 1);
        assert!(seen[0].up && seen[0].tunnel.is_none() && seen[0].vifs.is_empty());
        assert_eq!((seen[0].vne.as_str(), seen[0].mtu), ("lab", 1500));
    }
    let told = host.sh("ip -d link show vne-lab; ip addr show vne-lab");
    for expected in [
        "stp_state 0",
        "forward_delay 0",
        "mcast_snooping 0",
        "NOARP",
    ] {
        assert!(told.contains(expected), "{expected} in {told}");
    }
    assert!(!told.contains("inet"), "{told}");
    host.sh("ip link add name vif1.0 type veth peer name x; ip link set vif1.0 master vne-lab");
    assert!(!host.down(&lab));
    assert_eq!(host.seen()[0].vifs, ["vif1.0"]);
    host.sh("ip link del vif1.0");
    assert!(host.down(&lab) && host.down(&lab));
    assert_eq!(host.left(), "");
}

#[test]
fn guests_on_two_hosts_talk_and_a_full_packet_passes_where_the_wire_is_no_wider() {
    let Some(hosts) = two_hosts(1500) else {
        let _skipped = place_or_skip!();
        return;
    };
    // Two VNEs with the same addresses.
    let mut guests = Vec::new();
    for vne in ["red", "blue"] {
        let network = network(vne);
        for (host, other) in hosts.iter().zip(["10.0.0.2", "10.0.0.1"]) {
            host.up(&network, &peers(&[other])).unwrap();
        }
        guests.push([
            hosts[0].guest(network.bridge(), &format!("vif{vne}"), "10.77.0.1"),
            hosts[1].guest(network.bridge(), &format!("vif{vne}"), "10.77.0.2"),
        ]);
    }
    for vne in &guests {
        assert!(datagram_comes(&vne[0], &vne[1], "10.77.0.2", 1472));
        assert!(datagram_comes(&vne[1], &vne[0], "10.77.0.1", 1472));
    }
}

#[test]
fn a_network_is_closed_to_other_vnes_and_to_dom0() {
    let Some(hosts) = two_hosts(1500) else {
        let _skipped = place_or_skip!();
        return;
    };
    let [red, blue] = ["red", "blue"].map(network);
    for network in [&red, &blue] {
        hosts[0].up(network, &peers(&["10.0.0.2"])).unwrap();
        hosts[1].up(network, &peers(&["10.0.0.1"])).unwrap();
    }
    let sender = hosts[0].guest(blue.bridge(), "vif1.0", "10.77.0.1");
    let near = hosts[0].guest(red.bridge(), "vif2.0", "10.77.0.2");
    let far = hosts[1].guest(red.bridge(), "vif2.0", "10.77.0.3");
    assert!(datagram_comes(&near, &far, "10.77.0.3", 100));
    assert!(!datagram_comes(&sender, &near, "10.77.0.2", 100));
    assert!(!datagram_comes(&sender, &far, "10.77.0.3", 100));

    // dom0 doesn't say where it is, and doesn't listen to who knows it.
    near.sh("ip route add 10.0.0.0/24 dev eth0");
    hosts[0].sh("ip route add 10.77.0.0/16 dev u0");
    assert!(!datagram_comes(&near, &hosts[0], "10.0.0.1", 100));
    for interface in ["vne-red", "vx-red", "vu-red"] {
        let shown = hosts[0].sh(&format!("ip -o link show {interface}"));
        let told = shown.split("link/ether ").nth(1).unwrap();
        let told = told.split(' ').next().unwrap();
        near.sh(&format!("ip neigh replace 10.0.0.1 lladdr {told} dev eth0"));
        assert!(
            !datagram_comes(&near, &hosts[0], "10.0.0.1", 100),
            "{interface}"
        );
    }
}

#[test]
fn by_ipv6_a_guest_is_told_what_fits() {
    let Some(hosts) = two_hosts(1500) else {
        let _skipped = place_or_skip!();
        return;
    };
    let lab = network("lab");
    for (host, other) in hosts.iter().zip(["fd00::2", "fd00::1"]) {
        host.up(&lab, &peers(&[other])).unwrap();
        host.up(&lab, &peers(&[other])).unwrap();
    }
    let local = hosts[0].seen()[0].tunnel.as_ref().unwrap().local;
    assert_eq!(local, Some("fd00::1".parse().unwrap()));
    let first = hosts[0].guest("vne-lab", "vif1.0", "10.77.0.1");
    let second = hosts[1].guest("vne-lab", "vif1.0", "10.77.0.2");
    assert!(datagram_comes(&first, &second, "10.77.0.2", 1400));
    assert!(!datagram_comes(&first, &second, "10.77.0.2", 1472));
    let told = first.sh("ip route get 10.77.0.2");
    assert!(told.contains("mtu 1430"), "{told}");
}

#[test]
fn peers_are_followed() {
    let Some(hosts) = two_hosts(1500) else {
        let _skipped = place_or_skip!();
        return;
    };
    let (host, lab) = (&hosts[0], network("lab"));
    let known = || host.seen()[0].tunnel.as_ref().unwrap().peers.clone();
    let index = || host.sh("ip -o link show vx-lab | cut -d: -f1");
    host.up(&lab, &peers(&["10.0.0.2"])).unwrap();
    let first = index();
    for now in [&["10.0.0.2", "10.0.0.3"][..], &["10.0.0.3"], &["10.0.0.2"]] {
        host.up(&lab, &peers(now)).unwrap();
        assert_eq!(known(), peers(now).addresses);
    }
    let incomplete = Peers {
        incomplete: true,
        ..peers(&["10.0.0.4"])
    };
    host.up(&lab, &incomplete).unwrap();
    assert_eq!(known(), peers(&["10.0.0.2", "10.0.0.4"]).addresses);
    assert_eq!(index(), first, "it was made anew, and frames were lost");
    let dir = tempfile::tempdir().unwrap();
    let lock = Lock::take(dir.path()).unwrap();
    host.enter(|| lab.up(&lock, &mut Rtnl::open().unwrap(), None))
        .unwrap();
    assert_eq!(index(), first);

    // Another port, VNI or local address is another device.
    let settings = Settings {
        vni: Some(5),
        port: Some(8472),
    };
    let other = Network::of("lab", settings);
    host.up(&other, &peers(&["10.0.0.2"])).unwrap();
    let tunnel = host.seen()[0].tunnel.clone().unwrap();
    assert_eq!((tunnel.vni, tunnel.port), (5, 8472));
    assert_eq!(tunnel.local, Some("10.0.0.1".parse::<IpAddr>().unwrap()));
    // A VNE that is here alone now.
    host.up(&other, &Peers::default()).unwrap();
    assert_eq!(host.seen()[0].tunnel, None);
    let mixed = host.up(&lab, &peers(&["10.0.0.2", "fd00::2"]));
    assert!(matches!(mixed, Err(Error::MixedPeers { .. })));
}

#[test]
fn what_is_not_ours_is_left_alone() {
    let Some(hosts) = two_hosts(1500) else {
        let _skipped = place_or_skip!();
        return;
    };
    let (host, lab) = (&hosts[0], network("lab"));
    host.sh("ip link add name vne-lab type bridge");
    for peers in [Peers::default(), peers(&["10.0.0.2"])] {
        let error = host.up(&lab, &peers).unwrap_err().to_string();
        assert!(error.contains("vne-lab"), "{error}");
    }
    assert!(host.down(&lab));
    assert!(host.left().contains("vne-lab") && host.seen().is_empty());
    host.sh("ip link del vne-lab");

    host.sh(&format!(
        "ip link add name other type vxlan id {} dstport {DEFAULT_PORT}",
        lab.vni()
    ));
    let error = host.up(&lab, &peers(&["10.0.0.2"])).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("is that of other"), "{error}");
    assert!(host.down(&lab));
    assert_eq!(host.left(), "");
}

#[test]
fn killed_between_any_two_steps_it_is_repaired_or_removed() {
    let Some(hosts) = two_hosts(1500) else {
        let _skipped = place_or_skip!();
        return;
    };
    let (host, lab) = (&hosts[0], network("lab"));
    let dir = tempfile::tempdir().unwrap();
    let lock = Lock::take(dir.path()).unwrap();
    let there = peers(&["10.0.0.2"]);
    let killed_after = |requests: u32, goes_up: bool| {
        host.enter(|| {
            let mut rtnl = Rtnl::open().unwrap();
            rtnl.requests_left = Some(requests);
            match goes_up {
                true => lab.up(&lock, &mut rtnl, Some(&there)).is_err(),
                false => lab.down(&lock, &mut rtnl).is_err(),
            }
        })
    };
    host.up(&lab, &there).unwrap();
    let whole = host.seen();
    assert!(host.down(&lab));
    let mut steps = 0;
    for goes_up in [true, false] {
        for requests in 0.. {
            // Down from a whole one, up from nothing.
            if !goes_up {
                host.up(&lab, &there).unwrap();
            }
            let killed = killed_after(requests, goes_up);
            // Two ways on from there: up, or down.
            host.up(&lab, &there).unwrap();
            assert_eq!(host.seen(), whole, "after {requests} requests");
            assert!(!host.left().contains('+'), "{}", host.left());
            assert!(host.down(&lab));
            assert_eq!(host.left(), "", "after {requests} requests");
            if !goes_up {
                host.up(&lab, &there).unwrap();
            }
            killed_after(requests, goes_up);
            assert!(host.down(&lab));
            assert_eq!(host.left(), "", "after {requests} requests");
            if !killed {
                break;
            }
            steps += 1;
        }
    }
    assert!(steps > 20, "only {steps} steps");

    // However it came to lie on something else.
    host.sh("ip link add link u0 name vu-lab type macvlan && ip link set vu-lab alias xl-vne:lab");
    host.up(&lab, &there).unwrap();
    assert_eq!(host.seen(), whole);
}

#[test]
fn bridges_learn_where_a_member_is_now() {
    let host = place_or_skip!();
    host.sh("ip link add name br0 type bridge && ip link set br0 up");
    let _old = host.guest("br0", "wire", "10.1.0.1");
    let _new = host.guest("br0", "vif1.0", "10.1.0.2");
    let table = || host.sh("bridge fdb show br br0 | grep 00:16:3e:00:00:77 || true");
    host.sh("bridge fdb replace 00:16:3e:00:00:77 dev wire master dynamic");
    assert!(table().contains("dev wire"), "{}", table());

    // What goes there goes to all other hosts.
    let tap = host.enter(|| {
        let links = links::all(&mut Rtnl::open().unwrap()).unwrap();
        let wire = links.iter().find(|link| link.name == "wire").unwrap();
        let tap = Tap::open(wire.index).unwrap();
        tap.listen().unwrap();
        tap
    });
    let mac = announce::parse_mac("00:16:3e:00:00:77").unwrap();
    host.enter(|| {
        let mut rtnl = Rtnl::open().unwrap();
        announce::announce(&mut rtnl, &[("lo", mac), ("vif1.0", mac), ("gone", mac)]).unwrap();
    });
    assert!(table().contains("dev vif1.0"), "{}", table());
    // Beside what guests say by themselves.
    let deadline = Instant::now() + Duration::from_secs(5);
    let from_it = loop {
        let frame = tap.first(1, 0, deadline).unwrap().remove(0);
        if frame.bytes[6..12] == mac {
            break frame.bytes;
        }
    };
    assert_eq!(from_it[..6], [0xff; 6]);
    assert_eq!(from_it[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    assert_eq!(from_it.len(), 60);
}
