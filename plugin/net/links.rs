//! This host's interfaces, as far as a VNE's network has to know them, and what
//! is done to one.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVxlan, LinkAttribute,
    LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::RouteNetlinkMessage;

use super::{Error, Rtnl};

/// An interface.
#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    /// What somebody has written on it.
    pub(super) alias: Option<String>,
    pub(super) kind: Option<InfoKind>,
    /// The bridge that it's a port of.
    pub(super) bridge: Option<u32>,
    /// The interface that it lies on.
    pub(super) lower: Option<u32>,
    pub(super) mtu: u32,
    pub(super) up: bool,
    /// What a VXLAN device was made with.
    pub(super) vxlan: Option<Vxlan>,
}

/// What a VXLAN device was made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Vxlan {
    pub(super) vni: u32,
    pub(super) port: u16,
    /// From where it sends; none for whatever the route says.
    pub(super) local: Option<IpAddr>,
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Link {
            index: message.header.index,
            name: String::new(),
            alias: None,
            kind: None,
            bridge: None,
            lower: None,
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            vxlan: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::Controller(index) if index != 0 => link.bridge = Some(index),
                LinkAttribute::Link(index) => link.lower = Some(index),
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::LinkInfo(infos) => link.take_infos(infos),
                _ => {}
            }
        }
        link
    }
}

impl Link {
    fn take_infos(&mut self, infos: Vec<LinkInfo>) {
        for info in infos {
            match info {
                LinkInfo::Kind(kind) => self.kind = Some(kind),
                LinkInfo::Data(InfoData::Vxlan(facts)) => self.vxlan = Some(Vxlan::from(facts)),
                _ => {}
            }
        }
    }
}

impl From<Vec<InfoVxlan>> for Vxlan {
    fn from(facts: Vec<InfoVxlan>) -> Self {
        let mut vxlan = Vxlan {
            vni: 0,
            port: 0,
            local: None,
        };
        for fact in facts {
            match fact {
                InfoVxlan::Id(vni) => vxlan.vni = vni,
                InfoVxlan::Port(port) => vxlan.port = port,
                InfoVxlan::Local(ip) => vxlan.local = Some(ip.into()),
                InfoVxlan::Local6(ip) => vxlan.local = Some(ip.into()),
                _ => {}
            }
        }
        vxlan.local = vxlan.local.filter(|ip| !ip.is_unspecified());
        vxlan
    }
}

/// All interfaces of this host, or of the network namespace.
pub(super) fn all(rtnl: &mut Rtnl) -> Result<Vec<Link>, Error> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let found = rtnl.dump("list interfaces", request)?;
    Ok(found
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(Link::from(link)),
            _ => None,
        })
        .collect())
}

/// Makes an interface that must not be there yet.
pub(super) fn create(
    rtnl: &mut Rtnl,
    what: &str,
    name: &str,
    attributes: Vec<LinkAttribute>,
) -> Result<(), Error> {
    let mut link = LinkMessage::default();
    link.attributes = attributes;
    link.attributes.push(LinkAttribute::IfName(name.to_owned()));
    rtnl.ack(
        what,
        RouteNetlinkMessage::NewLink(link),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

/// Changes an interface that is there.
pub(super) fn change(
    rtnl: &mut Rtnl,
    what: &str,
    index: u32,
    attributes: Vec<LinkAttribute>,
) -> Result<(), Error> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = attributes;
    rtnl.ack(what, RouteNetlinkMessage::NewLink(link), 0)
}

/// Sets an interface going. ARP for this host's own addresses isn't answered
/// there.
pub(super) fn start(rtnl: &mut Rtnl, name: &str, index: u32) -> Result<(), Error> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up | LinkFlags::Noarp;
    link.header.change_mask = LinkFlags::Up | LinkFlags::Noarp;
    rtnl.ack(
        &format!("set {name} going"),
        RouteNetlinkMessage::NewLink(link),
        0,
    )
}

/// Removes an interface. One that isn't there is fine.
pub(super) fn remove(rtnl: &mut Rtnl, name: &str, index: u32) -> Result<(), Error> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    let removed = rtnl.ack(
        &format!("remove {name}"),
        RouteNetlinkMessage::DelLink(link),
        0,
    );
    match removed {
        Err(error) if error.is_absent() => Ok(()),
        other => other,
    }
}

/// Keeps this host itself out of what passes through an interface: it has no
/// address there and makes none, says nothing unasked, and takes nothing in.
/// Before the interface is set going.
pub(super) fn keep_out(rtnl: &mut Rtnl, name: &str, index: u32) -> Result<(), Error> {
    let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let spec = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![none])]);
    let what = format!("keep IPv6 from giving {name} an address");
    match change(rtnl, &what, index, vec![spec]) {
        // A kernel that was started without IPv6.
        Err(Error::Refused { source, .. }) if source.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
        }
        other => other?,
    }
    // A frame that a guest addresses to this interface would else be taken in,
    // whatever address of this host it's for; with the strict filter it needs a
    // way back by the same interface, and there is none.
    write_setting("ipv6", name, "disable_ipv6", "1")?;
    write_setting("ipv4", name, "rp_filter", "1")?;
    write_setting("ipv4", name, "forwarding", "0")
}

/// Only in /proc/sys; netlink has no way to it.
fn write_setting(family: &str, name: &str, setting: &str, value: &str) -> Result<(), Error> {
    let path = format!("/proc/sys/net/{family}/conf/{name}/{setting}");
    match std::fs::write(&path, value) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && family == "ipv6" => Ok(()),
        other => other.map_err(|source| Error::Refused {
            what: format!("write {path}"),
            source,
        }),
    }
}
