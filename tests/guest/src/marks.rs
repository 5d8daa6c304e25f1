//! Datagrams that say whose they are, to one other station: on a network that
//! isn't theirs they would be seen. None may be broken up on its way.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use crate::args::Args;
use crate::clock::Pace;
use crate::json::Json;
use crate::status::{self, lock, Status};
use crate::sys;
use crate::workload::Run;

const PORT: u16 = 7005;
const MARK: &str = "VNE-MARK ";
/// Bytes of a datagram that fills an Ethernet frame.
const FULL: usize = 1472;

/// What a station counts.
#[derive(Default)]
struct Counts {
    sent: u64,
    send_failures: u64,
    received: u64,
    short: u64,
    foreign: u64,
}

/// A datagram's word, wherever in a frame it stands.
pub fn word_in(bytes: &[u8]) -> Option<&str> {
    let mark = MARK.as_bytes();
    let at = bytes.windows(mark.len()).position(|part| part == mark)?;
    let rest = bytes.get(at + mark.len()..)?;
    let end = rest.iter().position(|byte| *byte == b' ')?;
    std::str::from_utf8(rest.get(..end)?).ok()
}

fn datagram(word: &str, bytes: usize) -> Vec<u8> {
    let mut datagram = format!("{MARK}{word} ").into_bytes();
    datagram.resize(bytes.max(datagram.len()), b'.');
    datagram
}

/// See [`crate::workload::prepare`].
pub fn prepare(line: &[String], status: &Status) -> Result<Run, String> {
    let args = Args::parse(line, &["word", "to", "bytes", "interval-us"])?;
    let word: String = args.need("word")?;
    let to: Ipv4Addr = args.need("to")?;
    let bytes = args.or("bytes", FULL)?;
    let interval = Duration::from_micros(args.or("interval-us", 50_000)?);
    let socket = UdpSocket::bind(("0.0.0.0", PORT))
        .map_err(|error| format!("cannot bind UDP port {PORT}: {error}"))?;
    sys::never_fragment(&socket)?;
    let ears = socket
        .try_clone()
        .map_err(|error| format!("cannot share a socket: {error}"))?;
    let counts = status::shared(status, "marks", Counts::default(), |counts: &Counts| {
        let mut json = Json::new();
        json.number("sent", counts.sent)
            .number("send_failures", counts.send_failures)
            .number("received", counts.received)
            .number("short", counts.short)
            .number("foreign", counts.foreign);
        json
    });
    Ok(Box::new(move || {
        let datagram = datagram(&word, bytes);
        let heard = counts.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0u8; 65_536];
            loop {
                let Ok(count) = ears.recv(&mut buffer) else {
                    continue;
                };
                let got = buffer.get(..count).unwrap_or_default();
                let mut counts = lock(&heard);
                match word_in(got) {
                    Some(told) if told == word && count == bytes => counts.received += 1,
                    Some(told) if told == word => counts.short += 1,
                    _ => counts.foreign += 1,
                }
            }
        });
        let mut pace = Pace::new(interval);
        loop {
            pace.wait();
            let sent = socket.send_to(&datagram, (to, PORT));
            let mut counts = lock(&counts);
            match sent {
                Ok(_) => counts.sent += 1,
                Err(_) => counts.send_failures += 1,
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_within_a_frame() {
        let mut frame = vec![0xff; 42];
        frame.extend(datagram("red", 100));
        assert_eq!(word_in(&frame), Some("red"));
        assert_eq!(word_in(&frame[..40]), None);
        assert_eq!(datagram("red", FULL).len(), FULL);
    }
}
