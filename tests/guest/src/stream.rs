//! A steady stream of numbered datagrams, each with the time it was sent at:
//! a gap in it is a pause of the guest, or of the way from it.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use crate::args::Args;
use crate::clock::{boottime_ns, Pace};
use crate::json::Json;
use crate::status::{self, lock, Status};
use crate::workload::Run;

/// Bytes of a datagram: its number, and nanoseconds since the sender booted.
pub const DATAGRAM: usize = 16;

#[derive(Default)]
struct Sent {
    sent: u64,
    failures: u64,
}

/// A datagram as bytes.
pub fn encode(number: u64, sent_ns: u64) -> [u8; DATAGRAM] {
    let mut bytes = [0u8; DATAGRAM];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    bytes[8..].copy_from_slice(&sent_ns.to_be_bytes());
    bytes
}

/// A datagram's number and time.
pub fn decode(bytes: &[u8]) -> Option<(u64, u64)> {
    let bytes: &[u8; DATAGRAM] = bytes.try_into().ok()?;
    let (number, time) = bytes.split_at(8);
    Some((
        u64::from_be_bytes(number.try_into().ok()?),
        u64::from_be_bytes(time.try_into().ok()?),
    ))
}

/// See [`crate::workload::prepare`].
pub fn prepare(line: &[String], status: &Status) -> Result<Run, String> {
    let args = Args::parse(line, &["to", "interval-us"])?;
    let to: SocketAddr = args.need("to")?;
    let interval = Duration::from_micros(args.or("interval-us", 1000)?);
    let socket =
        UdpSocket::bind("0.0.0.0:0").map_err(|error| format!("cannot open a socket: {error}"))?;
    let state = status::shared(status, "stream", Sent::default(), |state: &Sent| {
        let mut json = Json::new();
        json.number("sent", state.sent)
            .number("send_failures", state.failures);
        json
    });
    Ok(Box::new(move || {
        let mut pace = Pace::new(interval);
        let mut number = 0;
        loop {
            pace.wait();
            let sent = socket.send_to(&encode(number, boottime_ns()), to);
            let mut state = lock(&state);
            if sent.is_ok() {
                state.sent += 1;
                number += 1;
            } else {
                state.failures += 1;
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_survive_the_wire() {
        assert_eq!(decode(&encode(7, 9)), Some((7, 9)));
        assert_eq!(decode(b"short"), None);
    }
}
