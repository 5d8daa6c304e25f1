//! A VNE's own network: a bridge on each of its hosts, joined by VXLAN.
//!
//! ```text
//!  vif5.0 ─┐                                                    ┌─ vif2.0
//!  vif7.0 ─┴─ vne-lab ── vu-lab ── vx-lab ═══ UDP ═══ vx-lab … ─┴─ vif3.0
//!             bridge     macvlan   VXLAN    unicast    another host
//! ```
//!
//! dom0 takes no part in it: it has no address there, sends nothing, and takes
//! in nothing. What isn't known to be behind one host goes to each of the other
//! ones by itself, so the underlay needs no multicast.
//!
//! Guests keep an MTU of 1500. Where the hosts' own network can't carry 50 bytes
//! more, the kernel breaks the outer IPv4 packets up. A VXLAN device that is a
//! bridge's port doesn't come to that: it answers a packet that mustn't be broken
//! up itself, as a router would (Linux 5.9: `skb_tunnel_check_pmtu`), and the
//! guest finds that 1450 bytes are the most. Therefore the macvlan between. IPv6
//! has no such breaking up: there the VXLAN device is the bridge's port, and
//! guests are told what fits.
//!
//! Whatever is made is made under another name, marked as ours, set up, and only
//! then given its own name: what a process that was killed has left behind is
//! either complete or has a name that the next one may remove. All of this is
//! done under a [`Lock`].

use std::collections::BTreeSet;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_route::link::{
    BridgeStpState, InfoBridge, InfoData, InfoKind, InfoMacVlan, InfoVxlan, LinkAttribute,
    LinkInfo, MacVlanMode,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::fs::FlockOperation;

use super::links::{self, Link, Vxlan};
use super::{Error, Rtnl};

/// The UDP port, unless the VNE has another one: IANA's for VXLAN.
pub const DEFAULT_PORT: u16 = 4789;
/// The largest VNI.
pub const VNI_MAX: u32 = (1 << 24) - 1;
/// What guests' frames may carry.
pub const MTU: u32 = 1500;
/// The lock's file, below Xen's folder for what is gone after a reboot.
pub const LOCK: &str = "vne-net.lock";

/// What stands before the VNE's name on each interface of its network.
const MARK: &str = "xl-vne:";
/// Longest name that an interface can have.
const INTERFACE_BYTES_MAX: usize = libc::IFNAMSIZ - 1;
/// The address of frames for which no better place is known.
const ANYWHERE: [u8; 6] = [0; 6];

/// Only one at a time changes VNEs' networks.
pub struct Lock(#[allow(dead_code)] File);

impl Lock {
    /// Waits for its turn; the others need some milliseconds each.
    pub fn take(run_dir: &Path) -> Result<Self, Error> {
        let path = run_dir.join(LOCK);
        let refused = |source| Error::Refused {
            what: format!("lock {}", path.display()),
            source,
        };
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(refused)?;
        loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(Self(file)),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(refused(errno.into())),
            }
        }
    }
}

/// What a VNE's description may say about its network; it has to be the same on
/// all hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Settings {
    /// Its VNI, if not the one that follows from its name.
    pub vni: Option<u32>,
    /// Its UDP port, if not [`DEFAULT_PORT`].
    pub port: Option<u16>,
}

/// Where the other hosts of a VNE are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Peers {
    /// The hosts' addresses; none for a VNE that is on this host alone.
    pub addresses: BTreeSet<IpAddr>,
    /// There are more, whose addresses couldn't be found out: what an existing
    /// network knows stays.
    pub incomplete: bool,
}

impl Peers {
    /// Whether they are reached by IPv6. All have to be reached in one way, since
    /// a VXLAN device knows only one.
    fn by_ipv6(&self, vne: &str) -> Result<bool, Error> {
        let mut kinds = self.addresses.iter().map(IpAddr::is_ipv6);
        let first = kinds.next().unwrap_or_default();
        match kinds.all(|kind| kind == first) {
            true => Ok(first),
            false => Err(Error::MixedPeers {
                vne: vne.to_owned(),
            }),
        }
    }

    /// This host's own address on the way to all of them, if it's one. Nothing is
    /// sent for that.
    fn local(&self) -> Option<IpAddr> {
        let address_towards = |peer: &IpAddr| {
            let any: IpAddr = match peer {
                IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let socket = UdpSocket::bind((any, 0)).ok()?;
            socket.connect((*peer, DEFAULT_PORT)).ok()?;
            socket.local_addr().ok().as_ref().map(SocketAddr::ip)
        };
        let mut found = self.addresses.iter().filter_map(address_towards);
        let first = found.next()?;
        found.all(|other| other == first).then_some(first)
    }
}

/// A VNE's network. What it's called and how hosts tell its frames from others'
/// follows from the VNE's name, and so from nothing that hosts would have to
/// agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    vne: String,
    vni: u32,
    port: u16,
    names: Names,
}

/// The names of its interfaces, and those that they have while they are made.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Names {
    bridge: String,
    vxlan: String,
    relay: String,
    unfinished: Unfinished,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Unfinished {
    bridge: String,
    vxlan: String,
    relay: String,
}

impl Names {
    /// `vne-NAME`, or for a name that is too long `vne--` and ten hexadecimal
    /// digits, the first of the name's BLAKE3. No VNE's name begins with a `-`,
    /// nor with the `+` of what isn't finished.
    fn of(vne: &str) -> Self {
        let hash: String = blake3::hash(vne.as_bytes())
            .to_hex()
            .chars()
            .take(10)
            .collect();
        let stem = match vne.len() + "vne-".len() > INTERFACE_BYTES_MAX {
            true => format!("-{hash}"),
            false => vne.to_owned(),
        };
        Names {
            bridge: format!("vne-{stem}"),
            vxlan: format!("vx-{stem}"),
            relay: format!("vu-{stem}"),
            unfinished: Unfinished {
                bridge: format!("vne+{hash}"),
                vxlan: format!("vx+{hash}"),
                relay: format!("vu+{hash}"),
            },
        }
    }
}

/// The VNI of a VNE that doesn't say another one: the first three bytes of its
/// name's BLAKE3 as a number, 1 in place of 0.
fn vni_of(vne: &str) -> u32 {
    let hash = blake3::hash(vne.as_bytes());
    let [a, b, c, ..] = *hash.as_bytes();
    u32::from_be_bytes([0, a, b, c]).max(1)
}

/// A network that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The VNE.
    pub vne: String,
    /// Its bridge.
    pub bridge: String,
    /// The bridge's MTU.
    pub mtu: u32,
    /// Whether it runs.
    pub up: bool,
    /// What guests have on it.
    pub vifs: Vec<String>,
    /// The way to other hosts, if it has one.
    pub tunnel: Option<Tunnel>,
}

/// The way to other hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tunnel {
    /// The VXLAN device.
    pub interface: String,
    /// What its frames are marked with.
    pub vni: u32,
    /// The UDP port.
    pub port: u16,
    /// This host's own address, if it's always the same.
    pub local: Option<IpAddr>,
    /// The other hosts' addresses.
    pub peers: BTreeSet<IpAddr>,
}

impl Network {
    /// The network of a VNE.
    pub fn of(vne: &str, settings: Settings) -> Self {
        Self {
            vne: vne.to_owned(),
            vni: settings.vni.unwrap_or_else(|| vni_of(vne)),
            port: settings.port.unwrap_or(DEFAULT_PORT),
            names: Names::of(vne),
        }
    }

    /// The name of its bridge.
    pub fn bridge(&self) -> &str {
        &self.names.bridge
    }

    /// What its frames are marked with between hosts.
    pub fn vni(&self) -> u32 {
        self.vni
    }

    fn mark(&self) -> String {
        format!("{MARK}{}", self.vne)
    }

    /// Makes the network, or makes it what it should be. Without `peers` the way
    /// to other hosts is left as it is, and a new network has none.
    pub fn up(&self, _lock: &Lock, rtnl: &mut Rtnl, peers: Option<&Peers>) -> Result<(), Error> {
        self.remove_unfinished(rtnl)?;
        let bridge = self.build_bridge(rtnl)?;
        let Some(peers) = peers else {
            return Ok(());
        };
        if peers.addresses.is_empty() {
            return match peers.incomplete {
                true => Ok(()),
                false => self.remove_tunnel(rtnl),
            };
        }
        let vxlan = self.build_tunnel(rtnl, &bridge, peers)?;
        self.follow(rtnl, &vxlan, peers)
    }

    /// Removes the network from this host unless something is on its bridge.
    /// Whether it's gone.
    pub fn down(&self, _lock: &Lock, rtnl: &mut Rtnl) -> Result<bool, Error> {
        self.remove_unfinished(rtnl)?;
        let all = links::all(rtnl)?;
        let bridge = self.ours(&all, &self.names.bridge);
        if bridge.is_some_and(|bridge| !self.vifs(&all, bridge).is_empty()) {
            return Ok(false);
        }
        // The bridge last: it's what a network is found by.
        self.remove_tunnel(rtnl)?;
        if let Some(bridge) = bridge {
            links::remove(rtnl, &bridge.name, bridge.index)?;
        }
        Ok(true)
    }

    /// The interface of this name, if it belongs to this network.
    fn ours<'a>(&self, all: &'a [Link], name: &str) -> Option<&'a Link> {
        let mark = self.mark();
        let is_it = |link: &&Link| link.name == name && link.alias.as_ref() == Some(&mark);
        all.iter().find(is_it)
    }

    /// The same, if there is one of the name at all, and of this kind.
    fn find<'a>(
        &self,
        all: &'a [Link],
        name: &str,
        kind: &InfoKind,
    ) -> Result<Option<&'a Link>, Error> {
        let Some(link) = all.iter().find(|link| link.name == name) else {
            return Ok(None);
        };
        match self.ours(all, name) {
            Some(ours) if ours.kind.as_ref() == Some(kind) => Ok(Some(link)),
            _ => Err(Error::Foreign {
                interface: name.to_owned(),
                vne: self.vne.clone(),
            }),
        }
    }

    fn vifs(&self, all: &[Link], bridge: &Link) -> Vec<String> {
        let ours = [&self.names.vxlan, &self.names.relay];
        let mut vifs: Vec<String> = all
            .iter()
            .filter(|link| link.bridge == Some(bridge.index) && !ours.contains(&&link.name))
            .map(|link| link.name.clone())
            .collect();
        vifs.sort();
        vifs
    }

    /// What a process that was killed has begun. Nobody else uses such names.
    fn remove_unfinished(&self, rtnl: &mut Rtnl) -> Result<(), Error> {
        let Unfinished {
            bridge,
            vxlan,
            relay,
        } = &self.names.unfinished;
        for link in links::all(rtnl)? {
            if [relay, vxlan, bridge].contains(&&link.name) {
                log::info!("{}: left unfinished, and removed", link.name);
                links::remove(rtnl, &link.name, link.index)?;
            }
        }
        Ok(())
    }

    fn build_bridge(&self, rtnl: &mut Rtnl) -> Result<Link, Error> {
        let (name, unfinished) = (&self.names.bridge, &self.names.unfinished.bridge);
        let settings = || {
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Bridge),
                LinkInfo::Data(InfoData::Bridge(vec![
                    InfoBridge::StpState(BridgeStpState::Disabled),
                    InfoBridge::ForwardDelay(0),
                    // A querier would be needed, and dom0 is to be none.
                    InfoBridge::MulticastSnooping(false),
                ])),
            ])
        };
        let all = links::all(rtnl)?;
        if let Some(link) = self.find(&all, name, &InfoKind::Bridge)? {
            let what = format!("set {name} up");
            links::change(rtnl, &what, link.index, vec![settings()])?;
            links::keep_out(rtnl, name, link.index)?;
            links::start(rtnl, name, link.index)?;
            return Ok(link.clone());
        }
        let what = format!("create {name} (is the kernel module 'bridge' there?)");
        let attributes = vec![settings(), LinkAttribute::Mtu(MTU)];
        links::create(rtnl, &what, unfinished, attributes)?;
        self.finish(rtnl, unfinished, name, None)
    }

    /// Marks an interface that was made, lets nothing of this host's own into it,
    /// and gives it its name.
    fn finish(
        &self,
        rtnl: &mut Rtnl,
        unfinished: &str,
        name: &str,
        bridge: Option<&Link>,
    ) -> Result<Link, Error> {
        let all = links::all(rtnl)?;
        let made = all.into_iter().find(|link| link.name == unfinished);
        let mut link = made.ok_or_else(|| Error::Answer(format!("create {name}")))?;
        let index = link.index;
        let alias = LinkAttribute::IfAlias(self.mark());
        links::change(rtnl, &format!("mark {name}"), index, vec![alias])?;
        if let Some(bridge) = bridge {
            let port = LinkAttribute::Controller(bridge.index);
            let what = format!("put {name} on {}", bridge.name);
            links::change(rtnl, &what, index, vec![port])?;
        }
        // Settings follow an interface to its new name.
        links::keep_out(rtnl, unfinished, index)?;
        let named = LinkAttribute::IfName(name.to_owned());
        links::change(rtnl, &format!("name {name}"), index, vec![named])?;
        links::start(rtnl, name, index)?;
        link.name = name.to_owned();
        Ok(link)
    }

    fn build_tunnel(&self, rtnl: &mut Rtnl, bridge: &Link, peers: &Peers) -> Result<Link, Error> {
        let Names { vxlan, relay, .. } = &self.names;
        let by_ipv6 = peers.by_ipv6(&self.vne)?;
        let wanted = Vxlan {
            vni: self.vni,
            port: self.port,
            local: peers.local(),
        };
        let all = links::all(rtnl)?;
        let here = self.find(&all, vxlan, &InfoKind::Vxlan)?;
        let relay_here = self.find(&all, relay, &InfoKind::MacVlan)?;
        if let Some(here) = here {
            // Its last step is to become a port of the bridge, by the relay or
            // itself.
            let port = match by_ipv6 {
                true => Some(here),
                false => relay_here.filter(|relay| relay.lower == Some(here.index)),
            };
            let complete = port.is_some_and(|port| port.bridge == Some(bridge.index));
            if complete && here.vxlan == Some(wanted) {
                for link in [here, port.unwrap_or(here)] {
                    links::keep_out(rtnl, &link.name, link.index)?;
                    links::start(rtnl, &link.name, link.index)?;
                }
                return Ok(here.clone());
            }
        }
        self.remove_tunnel(rtnl)?;
        let taken = |link: &&Link| {
            let other = link.vxlan.filter(|_| link.name != *vxlan);
            other.is_some_and(|other| (other.vni, other.port) == (wanted.vni, wanted.port))
        };
        if let Some(other) = all.iter().find(taken) {
            return Err(Error::VniTaken {
                vne: self.vne.clone(),
                vni: wanted.vni,
                port: wanted.port,
                interface: other.name.clone(),
            });
        }
        let made = self.build_vxlan(rtnl, by_ipv6, wanted, bridge)?;
        if !by_ipv6 {
            self.build_relay(rtnl, bridge, &made)?;
        }
        Ok(made)
    }

    fn build_vxlan(
        &self,
        rtnl: &mut Rtnl,
        by_ipv6: bool,
        wanted: Vxlan,
        bridge: &Link,
    ) -> Result<Link, Error> {
        let name = &self.names.vxlan;
        let local = match wanted.local {
            Some(IpAddr::V4(ip)) => InfoVxlan::Local(ip),
            Some(IpAddr::V6(ip)) => InfoVxlan::Local6(ip),
            None if by_ipv6 => InfoVxlan::Local6(Ipv6Addr::UNSPECIFIED),
            None => InfoVxlan::Local(Ipv4Addr::UNSPECIFIED),
        };
        let data = vec![
            InfoVxlan::Id(wanted.vni),
            InfoVxlan::Port(wanted.port),
            InfoVxlan::Learning(true),
            local,
        ];
        let attributes = vec![
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Vxlan),
                LinkInfo::Data(InfoData::Vxlan(data)),
            ]),
            LinkAttribute::Mtu(MTU),
        ];
        let what = format!("create {name} (is the kernel module 'vxlan' there?)");
        let unfinished = &self.names.unfinished.vxlan;
        links::create(rtnl, &what, unfinished, attributes)?;
        self.finish(rtnl, unfinished, name, by_ipv6.then_some(bridge))
    }

    fn build_relay(&self, rtnl: &mut Rtnl, bridge: &Link, vxlan: &Link) -> Result<(), Error> {
        let name = &self.names.relay;
        let data = vec![InfoMacVlan::Mode(MacVlanMode::Passthrough)];
        let attributes = vec![
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::MacVlan),
                LinkInfo::Data(InfoData::MacVlan(data)),
            ]),
            LinkAttribute::Link(vxlan.index),
        ];
        let what = format!("create {name} (is the kernel module 'macvlan' there?)");
        let unfinished = &self.names.unfinished.relay;
        links::create(rtnl, &what, unfinished, attributes)?;
        self.finish(rtnl, unfinished, name, Some(bridge)).map(drop)
    }

    fn remove_tunnel(&self, rtnl: &mut Rtnl) -> Result<(), Error> {
        let all = links::all(rtnl)?;
        // The relay goes with the device that it lies on, if that is ours.
        for name in [&self.names.vxlan, &self.names.relay] {
            if let Some(link) = self.ours(&all, name) {
                links::remove(rtnl, name, link.index)?;
            }
        }
        Ok(())
    }

    /// Has frames go to these peers, and to no others.
    fn follow(&self, rtnl: &mut Rtnl, vxlan: &Link, peers: &Peers) -> Result<(), Error> {
        let known = entries(rtnl, vxlan.index)?;
        for entry in &known {
            // Those that were learned of a peer that is gone go with it.
            if !peers.incomplete && !peers.addresses.contains(&entry.peer) {
                entry.remove(rtnl, vxlan)?;
            }
        }
        let is_known = |peer: &&IpAddr| {
            let mut anywhere = known.iter().filter(|entry| entry.mac == ANYWHERE);
            anywhere.any(|entry| entry.peer == **peer)
        };
        for peer in peers.addresses.iter().filter(|peer| !is_known(peer)) {
            let entry = Entry {
                mac: ANYWHERE,
                peer: *peer,
            };
            let message = RouteNetlinkMessage::NewNeighbour(entry.message(vxlan.index));
            rtnl.ack(
                &format!("have {} send to {peer}", vxlan.name),
                message,
                NLM_F_CREATE | NLM_F_APPEND,
            )?;
        }
        Ok(())
    }
}

/// An entry of a VXLAN device's table: behind which peer an address is.
#[derive(Debug, Clone, Copy)]
struct Entry {
    mac: [u8; 6],
    peer: IpAddr,
}

impl Entry {
    fn message(&self, vxlan_index: u32) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = vxlan_index;
        message.header.state = NeighbourState::Permanent;
        message.header.flags = NeighbourFlags::Own;
        message.attributes = vec![
            NeighbourAttribute::LinkLayerAddress(self.mac.to_vec()),
            NeighbourAttribute::Destination(NeighbourAddress::from(self.peer)),
        ];
        message
    }

    fn remove(&self, rtnl: &mut Rtnl, vxlan: &Link) -> Result<(), Error> {
        let message = RouteNetlinkMessage::DelNeighbour(self.message(vxlan.index));
        let what = format!("keep {} from sending to {}", vxlan.name, self.peer);
        match rtnl.ack(&what, message, 0) {
            // One that was learned may have aged meanwhile.
            Err(error) if error.is_absent() => Ok(()),
            other => other,
        }
    }

    fn parse(message: NeighbourMessage) -> Option<Self> {
        let (mut mac, mut peer) = (None, None);
        for attribute in message.attributes {
            match attribute {
                NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.try_into().ok(),
                NeighbourAttribute::Destination(address) => peer = ip_of(address),
                _ => {}
            }
        }
        Some(Self {
            mac: mac?,
            peer: peer?,
        })
    }
}

/// A bridge's table doesn't say of which kind its addresses are.
fn ip_of(address: NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(ip) => Some(ip.into()),
        NeighbourAddress::Inet6(ip) => Some(ip.into()),
        NeighbourAddress::Other(bytes) => {
            let four: Option<[u8; 4]> = bytes.as_slice().try_into().ok();
            let sixteen: Option<[u8; 16]> = bytes.as_slice().try_into().ok();
            four.map(IpAddr::from).or(sixteen.map(IpAddr::from))
        }
        _ => None,
    }
}

fn entries(rtnl: &mut Rtnl, vxlan_index: u32) -> Result<Vec<Entry>, Error> {
    let mut request = NeighbourMessage::default();
    request.header.family = AddressFamily::Bridge;
    request.header.ifindex = vxlan_index;
    let found = rtnl.dump(
        "list where frames are sent to",
        RouteNetlinkMessage::GetNeighbour(request),
    )?;
    let entries = found.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewNeighbour(entry) if entry.header.ifindex == vxlan_index => {
            Entry::parse(entry)
        }
        _ => None,
    });
    Ok(entries.collect())
}

/// The VNEs that have a network on this host.
pub fn vnes(rtnl: &mut Rtnl) -> Result<Vec<String>, Error> {
    let mut vnes: Vec<String> = links::all(rtnl)?
        .iter()
        .filter(|link| link.kind == Some(InfoKind::Bridge))
        .filter_map(|link| {
            let vne = link.alias.as_ref()?.strip_prefix(MARK)?;
            (Names::of(vne).bridge == link.name).then(|| vne.to_owned())
        })
        .collect();
    vnes.sort();
    Ok(vnes)
}

/// The networks on this host.
pub fn seen(rtnl: &mut Rtnl) -> Result<Vec<Seen>, Error> {
    let vnes = vnes(rtnl)?;
    let all = links::all(rtnl)?;
    let mut networks = Vec::new();
    for vne in vnes {
        let network = Network::of(&vne, Settings::default());
        let Some(bridge) = network.ours(&all, network.bridge()) else {
            // Gone meanwhile.
            continue;
        };
        let vxlan = network.ours(&all, &network.names.vxlan);
        let tunnel = match vxlan.and_then(|link| Some((link, link.vxlan?))) {
            Some((link, made)) => Some(Tunnel {
                interface: link.name.clone(),
                vni: made.vni,
                port: made.port,
                local: made.local,
                peers: entries(rtnl, link.index)?
                    .into_iter()
                    .filter(|entry| entry.mac == ANYWHERE)
                    .map(|entry| entry.peer)
                    .collect(),
            }),
            None => None,
        };
        networks.push(Seen {
            bridge: bridge.name.clone(),
            mtu: bridge.mtu,
            up: bridge.up,
            vifs: network.vifs(&all, bridge),
            tunnel,
            vne,
        });
    }
    Ok(networks)
}
