//! Telling bridges where an address is now.
//!
//! A bridge remembers for minutes behind which port it has seen an address, and sends
//! frames for it only there. A member that is restored on another host would be looked
//! for where it was, until it has sent something itself; and what the others had sent
//! first would be lost. So its new place is told before any frame goes: to its own
//! bridge by an entry in its table, to all others by a frame that seems to come from
//! it. That is a reverse ARP request (RFC 903), as machine emulators send it after a
//! migration: nobody answers.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::link::InfoKind;
use netlink_packet_route::neighbour::{
    NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::links::{self, Link};
use super::{Error, Rtnl};

/// A MAC address.
pub type Mac = [u8; 6];

/// Bytes of the shortest frame of Ethernet, without its checksum.
const FRAME_BYTES_MIN: usize = 60;
const BROADCAST: Mac = [0xff; 6];
const REVERSE_ARP: [u8; 2] = (libc::ETH_P_RARP as u16).to_be_bytes();
/// Ethernet, IPv4, their addresses' lengths, and that it's a reverse request.
const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];

/// A MAC address as libxl writes it.
pub fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = Mac::default();
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// Tells that each of these addresses is behind this interface. One that is no port of
/// a Linux bridge is left out: who switches its frames learns in a way of its own.
pub fn announce(rtnl: &mut Rtnl, interfaces: &[(&str, Mac)]) -> Result<(), Error> {
    let links = links::all(rtnl)?;
    let is_bridge = |link: &&Link| matches!(link.kind, Some(InfoKind::Bridge));
    for (name, mac) in interfaces {
        let port = links.iter().find(|link| link.name == *name);
        let on = port.and_then(|port| port.bridge);
        let bridge = on.and_then(|index| links.iter().find(|link| link.index == index));
        let (Some(port), Some(bridge)) = (port, bridge.filter(is_bridge)) else {
            continue;
        };
        let message = RouteNetlinkMessage::NewNeighbour(entry(port.index, mac));
        let what = format!("have {} send to {name}", bridge.name);
        rtnl.ack(&what, message, NLM_F_CREATE | NLM_F_REPLACE)?;
        send(bridge.index, &request(mac)).map_err(|source| Error::Refused {
            what: format!("announce {name} by {}", bridge.name),
            source,
        })?;
    }
    Ok(())
}

/// As if the bridge had learned it.
fn entry(port_index: u32, mac: &Mac) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = port_index;
    message.header.state = NeighbourState::Reachable;
    message.header.flags = NeighbourFlags::Controller;
    message.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.to_vec())];
    message
}

fn request(mac: &Mac) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_BYTES_MIN);
    frame.extend(BROADCAST);
    frame.extend(mac);
    frame.extend(REVERSE_ARP);
    frame.extend(REQUEST);
    for _ in ["sender", "target"] {
        frame.extend(mac);
        frame.extend([0; 4]);
    }
    frame.resize(FRAME_BYTES_MIN, 0);
    frame
}

/// Sends a frame by an interface, which is all ports of a bridge.
fn send(interface: u32, frame: &[u8]) -> io::Result<()> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the call takes numbers only.
    let socket = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: u16::from_ne_bytes(REVERSE_ARP),
        sll_ifindex: interface as libc::c_int,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0xff; 8],
    };
    // SAFETY: frame and address outlive the call; each is passed with its size.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            std::ptr::from_ref(&address).cast(),
            std::mem::size_of_val(&address) as libc::socklen_t,
        )
    };
    match sent {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_address_is_six_bytes_in_hex() {
        assert_eq!(
            parse_mac("00:16:3e:0A:b0:ff"),
            Some([0, 0x16, 0x3e, 10, 0xb0, 0xff])
        );
        for wrong in [
            "",
            "00:16:3e:00:00",
            "00:16:3e:00:00:01:02",
            "00:16:3e:00:00:100",
            "?",
        ] {
            assert_eq!(parse_mac(wrong), None, "{wrong}");
        }
    }
}
