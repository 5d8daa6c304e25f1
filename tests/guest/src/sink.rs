//! The listening end of a stream, in dom0: what came, and where it paused.
//! Times are the kernel's at arrival, so that a late wake-up of this program
//! isn't taken for a pause.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::args::Args;
use crate::json::Json;
use crate::sequence::Sequence;
use crate::stream;
use crate::sys;

/// Pauses from here on are listed one by one.
const LISTED_US: u64 = 20_000;
/// Pauses that are listed at most.
const LISTED_MAX: usize = 10_000;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// What was seen.
#[derive(Default)]
struct Seen {
    sequence: Sequence,
    last: Option<(u64, u64)>,
    arrival: Pause,
    sender: Pause,
    listed: Vec<(Pause, u64)>,
}

/// A pause and when it ended.
#[derive(Clone, Copy, Default)]
struct Pause {
    us: u64,
    end_wall_ns: u64,
}

impl Seen {
    fn take(&mut self, number: u64, sent_ns: u64, wall_ns: u64) {
        self.sequence.take(number);
        if let Some((last_wall, last_sent)) = self.last {
            let arrival = Pause {
                us: wall_ns.saturating_sub(last_wall) / 1000,
                end_wall_ns: wall_ns,
            };
            let sender = Pause {
                us: sent_ns.saturating_sub(last_sent) / 1000,
                end_wall_ns: wall_ns,
            };
            if arrival.us > self.arrival.us {
                self.arrival = arrival;
            }
            if sender.us > self.sender.us {
                self.sender = sender;
            }
            if arrival.us.max(sender.us) >= LISTED_US && self.listed.len() < LISTED_MAX {
                self.listed.push((arrival, sender.us));
            }
        }
        self.last = Some((wall_ns, sent_ns));
    }

    fn tell(&self) -> Json {
        let mut json = Json::new();
        self.sequence.tell(&mut json);
        json.number("max_gap_us", self.arrival.us)
            .number("max_gap_end_wall_ns", self.arrival.end_wall_ns)
            .number("max_sender_gap_us", self.sender.us)
            .number("max_sender_gap_end_wall_ns", self.sender.end_wall_ns);
        let gaps = self.listed.iter().map(|(pause, sender_us)| {
            let mut json = Json::new();
            json.number("us", pause.us)
                .number("sender_us", *sender_us)
                .number("end_wall_ns", pause.end_wall_ns);
            json
        });
        json.list("gaps", gaps.collect());
        json
    }
}

/// Listens, then prints its account.
pub fn run(line: &[String]) -> Result<(), String> {
    let args = Args::parse(line, &["port", "seconds"])?;
    let port: u16 = args.need("port")?;
    let end = args
        .get::<u64>("seconds")?
        .map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let socket = UdpSocket::bind(("0.0.0.0", port))
        .map_err(|error| format!("cannot bind UDP port {port}: {error}"))?;
    socket
        .set_read_timeout(Some(Duration::from_millis(100)))
        .map_err(|error| format!("cannot bound a wait: {error}"))?;
    sys::timestamp_arrivals(&socket)?;
    sys::on_interrupt(interrupted)?;
    let mut seen = Seen::default();
    let mut buffer = [0u8; 64];
    while !INTERRUPTED.load(Ordering::Relaxed) && end.is_none_or(|end| Instant::now() < end) {
        let Some((count, wall_ns)) = sys::receive_stamped(&socket, &mut buffer) else {
            continue;
        };
        if let Some((number, sent_ns)) = buffer.get(..count).and_then(stream::decode) {
            seen.take(number, sent_ns, wall_ns);
        }
    }
    println!("{}", seen.tell().finish());
    Ok(())
}

extern "C" fn interrupted(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_is_told_with_its_end() {
        let mut seen = Seen::default();
        for (number, at_ms) in [(0, 0), (1, 1), (2, 51), (3, 52)] {
            seen.take(number, at_ms * 1_000_000, at_ms * 1_000_000);
        }
        let text = seen.tell().finish();
        assert!(text.contains(r#""max_gap_us":50000"#), "{text}");
        assert!(text.contains(r#""max_gap_end_wall_ns":51000000"#), "{text}");
        assert!(
            text.contains(r#""gaps":[{"us":50000,"sender_us":50000,"end_wall_ns":51000000}]"#),
            "{text}"
        );
    }
}
