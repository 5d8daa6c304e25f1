//! Stations that know one another: who they are, and waiting for them.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use crate::args::Args;
use crate::card::Card;
use crate::{clock, sys};

/// Longest message between stations.
pub const MESSAGE_MAX: usize = 32;

/// No suspend is shorter; some delays between two clocks are.
const SUSPENDED_MIN_NS: u64 = 10_000_000;

const MAGIC: u32 = 0x564e_4531;

/// What stations say to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Is there anybody? From which station.
    Hello(u32),
    /// Yes. From which station.
    Here(u32),
    /// A number, from which station.
    Number(u32, u64),
    /// A number that may not have left, and may be here already.
    Again(u32, u64),
}

impl Message {
    /// As bytes on the wire.
    pub fn encode(self) -> [u8; 20] {
        let (kind, from, number) = match self {
            Message::Hello(from) => (0u32, from, 0),
            Message::Here(from) => (1, from, 0),
            Message::Number(from, number) => (2, from, number),
            Message::Again(from, number) => (3, from, number),
        };
        let mut bytes = [0u8; 20];
        bytes[0..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&kind.to_be_bytes());
        bytes[8..12].copy_from_slice(&from.to_be_bytes());
        bytes[12..20].copy_from_slice(&number.to_be_bytes());
        bytes
    }

    /// From bytes on the wire; `None` for what isn't ours.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
        };
        if bytes.len() != 20 || word(0)? != MAGIC {
            return None;
        }
        let from = word(8)?;
        let number = u64::from_be_bytes(bytes.get(12..20)?.try_into().ok()?);
        match word(4)? {
            0 => Some(Message::Hello(from)),
            1 => Some(Message::Here(from)),
            2 => Some(Message::Number(from, number)),
            3 => Some(Message::Again(from, number)),
            _ => None,
        }
    }
}

/// All stations in their order, and which one this is.
pub struct Peers {
    /// This station's place.
    pub index: usize,
    /// Where each station is.
    pub all: Vec<SocketAddr>,
    /// This station's socket.
    pub socket: UdpSocket,
}

impl Peers {
    /// Reads `--index` and `--peers` and binds the port.
    pub fn open(args: &Args, port: u16) -> Result<Self, String> {
        let index: usize = args.need("index")?;
        let list: String = args.need("peers")?;
        let all = list
            .split(',')
            .map(|text| {
                text.parse::<IpAddr>()
                    .map(|ip| SocketAddr::new(ip, port))
                    .map_err(|_| format!("--peers has {text:?}, which is no address"))
            })
            .collect::<Result<Vec<_>, _>>()?;
        if all.len() < 2 || index >= all.len() {
            return Err(format!(
                "--index {index} and {} stations don't go together",
                all.len()
            ));
        }
        let socket = UdpSocket::bind(("0.0.0.0", port))
            .map_err(|error| format!("cannot bind UDP port {port}: {error}"))?;
        sys::room_for_bursts(&socket)?;
        Ok(Peers { index, all, socket })
    }

    /// The place of this station as it's sent.
    pub fn me(&self) -> u32 {
        self.index as u32
    }

    /// Sends a message to one station. Nothing is repeated: what is lost is
    /// lost, and shows.
    pub fn send(&self, to: usize, message: Message) -> Result<(), String> {
        let Some(address) = self.all.get(to) else {
            return Err(format!("there's no station {to}"));
        };
        self.socket
            .send_to(&message.encode(), address)
            .map(drop)
            .map_err(|error| format!("cannot send to {address}: {error}"))
    }

    /// Sends a number to a station when the guest has its card. Whether that had to be
    /// waited for.
    ///
    /// A guest that is suspended between its look at the card and the call has no card
    /// when it's restored, and its kernel drops the datagram: that's nobody's fault but
    /// this program's, which sees that it was suspended, and says the number again.
    pub fn send_number(&self, card: &Card, to: usize, number: u64) -> (bool, Result<(), String>) {
        let before = clock::suspended_ns();
        let mut waited = card.wait();
        let mut sent = self.send(to, Message::Number(self.me(), number));
        if clock::suspended_ns() > before + SUSPENDED_MIN_NS {
            waited |= card.wait();
            sent = self.send(to, Message::Again(self.me(), number));
        }
        (waited, sent)
    }

    /// The next message; greetings are answered here. `None` after a while
    /// without any.
    pub fn receive(&self) -> Option<Message> {
        let mut buffer = [0u8; MESSAGE_MAX];
        let (count, _) = self.socket.recv_from(&mut buffer).ok()?;
        let message = Message::decode(buffer.get(..count)?)?;
        if let Message::Hello(from) = message {
            // It asks again when this is lost.
            let _ = self.send(from as usize, Message::Here(self.me()));
        }
        Some(message)
    }

    /// How long [`Peers::receive`] waits.
    pub fn set_wait(&self, wait: Option<Duration>) -> Result<(), String> {
        self.socket
            .set_read_timeout(wait)
            .map_err(|error| format!("cannot bound a wait: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire_and_others_are_ignored() {
        for message in [
            Message::Hello(1),
            Message::Here(2),
            Message::Number(3, u64::MAX),
            Message::Again(4, 5),
        ] {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
        assert_eq!(Message::decode(b"hello"), None);
        assert_eq!(Message::decode(&[0; 20]), None);
    }
}
