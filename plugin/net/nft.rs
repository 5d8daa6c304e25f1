//! The redirect of a vif's frames, as an nftables `netdev` chain with one
//! `fwd` rule, over nfnetlink.
//!
//! Not a tc ingress qdisc, as Remus uses: adding or removing one deactivates
//! the device's transmit queues as well (`qdisc_graft` in Linux up to 6.1 at
//! least), and frames *to* the guest are dropped meanwhile. And this hook
//! comes after tc's, so that an admin's own filters go on working.
//!
//! The table belongs to the socket (`NFT_TABLE_F_OWNER`, Linux 5.12): when
//! the process ends, however it ends, the kernel removes it.
//!
//! Numbers are those of `linux/netfilter/nfnetlink.h` and `nf_tables.h`.

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::Socket;

use super::rtnl::connect;
use super::Error;

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const DELETE_TABLE: u16 = SUBSYSTEM << 8 | 2;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
const FAMILY_NETDEV: u8 = 5;
const FAMILY_UNSPEC: u8 = 0;
const TABLE_OWNED: u32 = 2;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const NESTED: u16 = 0x8000;
const POLICY_ACCEPT: u32 = 1;
const REGISTER_1: u32 = 1;
const NLMSG_ERROR: u16 = 2;
const HEADER_BYTES: usize = 16;

/// A connection to nftables that owns the redirects made over it: they go when
/// it's dropped.
pub struct Nft {
    socket: Socket,
    sequence: u32,
}

impl Nft {
    /// Opens the socket.
    pub fn open() -> Result<Self, Error> {
        Ok(Self {
            socket: connect(NETLINK_NETFILTER)?,
            sequence: 0,
        })
    }

    /// Sends all frames that come in on `vif` to `ifb` instead. `name` names
    /// the table.
    pub fn redirect(&mut self, name: &str, vif: &str, ifb_index: u32) -> Result<(), Error> {
        let mut batch = self.batch();
        let table = string(1, name);
        batch.add(
            NEW_TABLE,
            REQUEST | CREATE,
            FAMILY_NETDEV,
            &[table.clone(), be32(2, TABLE_OWNED)].concat(),
        );
        // Hook number 0 is ingress; the priority is of no matter to us.
        let hook = [be32(1, 0), be32(2, 0), string(3, vif)].concat();
        batch.add(
            NEW_CHAIN,
            REQUEST | CREATE,
            FAMILY_NETDEV,
            &[
                table.clone(),
                string(3, "hold"),
                nested(4, &hook),
                be32(5, POLICY_ACCEPT),
                string(7, "filter"),
            ]
            .concat(),
        );
        let index = attribute(1, &ifb_index.to_ne_bytes());
        let load = expression(
            "immediate",
            &[be32(1, REGISTER_1), nested(2, &index)].concat(),
        );
        let forward = expression("fwd", &be32(1, REGISTER_1));
        batch.add(
            NEW_RULE,
            REQUEST | CREATE | APPEND | ACK,
            FAMILY_NETDEV,
            &[
                table,
                string(2, "hold"),
                nested(4, &[load, forward].concat()),
            ]
            .concat(),
        );
        self.send(
            batch,
            &format!(
                "redirect {vif} to its hold (are the kernel modules 'nf_tables' and \
                 'nft_fwd_netdev' there?)"
            ),
        )
    }

    /// Removes the redirect that was made under this name.
    pub fn remove(&mut self, name: &str) -> Result<(), Error> {
        let mut batch = self.batch();
        batch.add(DELETE_TABLE, REQUEST | ACK, FAMILY_NETDEV, &string(1, name));
        self.send(batch, &format!("remove the redirect to {name}"))
    }

    fn batch(&mut self) -> Batch {
        self.sequence = self.sequence.wrapping_add(16);
        let mut batch = Batch {
            bytes: Vec::new(),
            sequence: self.sequence,
        };
        batch.add(BATCH_BEGIN, REQUEST, FAMILY_UNSPEC, &[]);
        batch
    }

    /// The last message of a batch asks for an acknowledgement; an error of
    /// any undoes the whole.
    fn send(&mut self, mut batch: Batch, what: &str) -> Result<(), Error> {
        batch.add(BATCH_END, REQUEST, FAMILY_UNSPEC, &[]);
        self.socket.send(&batch.bytes, 0).map_err(Error::Socket)?;
        loop {
            let (bytes, _) = self.socket.recv_from_full().map_err(Error::Socket)?;
            let word = |at: usize| {
                let bytes = bytes.get(at..at + 4)?.try_into().ok()?;
                Some(u32::from_ne_bytes(bytes))
            };
            let (Some(kind), Some(sequence), Some(error)) = (word(4), word(8), word(HEADER_BYTES))
            else {
                return Err(Error::Answer(what.to_owned()));
            };
            if sequence.wrapping_sub(self.sequence) >= 16 || kind as u16 != NLMSG_ERROR {
                // Left over from a request that timed out.
                continue;
            }
            return match error as i32 {
                0 => Ok(()),
                code => Err(Error::Refused {
                    what: what.to_owned(),
                    source: io::Error::from_raw_os_error(code.saturating_abs()),
                }),
            };
        }
    }
}

struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    fn add(&mut self, kind: u16, flags: u16, family: u8, attributes: &[u8]) {
        // The batch's own messages name the subsystem instead of a resource.
        let resource = match family {
            FAMILY_UNSPEC => SUBSYSTEM,
            _ => 0,
        };
        let length = HEADER_BYTES + 4 + attributes.len();
        self.bytes.extend((length as u32).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(self.sequence.to_ne_bytes());
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        self.bytes.extend(attributes);
        self.sequence = self.sequence.wrapping_add(1);
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut bytes = Vec::with_capacity(length.next_multiple_of(4));
    bytes.extend((length as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(length.next_multiple_of(4), 0);
    bytes
}

fn nested(kind: u16, attributes: &[u8]) -> Vec<u8> {
    attribute(kind | NESTED, attributes)
}

fn string(kind: u16, text: &str) -> Vec<u8> {
    let mut value = text.as_bytes().to_vec();
    value.push(0);
    attribute(kind, &value)
}

fn be32(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn expression(name: &str, data: &[u8]) -> Vec<u8> {
    nested(1, &[string(1, name), nested(2, data)].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_say_their_own_length() {
        assert_eq!(string(1, "ab"), [7, 0, 1, 0, b'a', b'b', 0, 0]);
        assert_eq!(be32(2, 1), [8, 0, 2, 0, 0, 0, 0, 1]);
        assert_eq!(nested(4, &be32(1, 0))[..4], [12, 0, 4, 0x80]);
    }
}
