//! The receiving end of a TCP stream: verifies every byte.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::args::Args;
use crate::card::Card;
use crate::json::Json;
use crate::status::{self, lock, Status};
use crate::tcp_stream;
use crate::workload::Run;

const PORT: u16 = 7003;

#[derive(Default)]
struct Received {
    connections: u64,
    bytes: u64,
    mismatches: u64,
    resets: u64,
    /// The longest time between two pieces of a stream, by the clock that stands
    /// still while the guest does.
    longest_wait: Duration,
    /// When the guest's network card came back after a restore, until the first
    /// piece that arrives by it.
    card_back: Option<Instant>,
    /// How long that piece took, at most.
    longest_after_card: Duration,
}

/// Between two looks at the card, which is away for longer.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// See [`crate::workload::prepare`].
pub fn prepare(line: &[String], status: &Status) -> Result<Run, String> {
    let args = Args::parse(line, &["port"])?;
    let port = args.or("port", PORT)?;
    let listener = TcpListener::bind(("0.0.0.0", port))
        .map_err(|error| format!("cannot bind TCP port {port}: {error}"))?;
    let state = status::shared(
        status,
        "tcp_server",
        Received::default(),
        |state: &Received| {
            let mut json = Json::new();
            json.number("connections", state.connections)
                .number("bytes", state.bytes)
                .number("mismatches", state.mismatches)
                .number("resets", state.resets)
                .number("longest_wait_ms", state.longest_wait.as_millis() as u64)
                .number(
                    "longest_after_card_ms",
                    state.longest_after_card.as_millis() as u64,
                );
            json
        },
    );
    Ok(Box::new(move || {
        let seen: Arc<Mutex<Received>> = state.clone();
        std::thread::spawn(move || watch_card(&seen));
        for stream in listener.incoming().flatten() {
            let state: Arc<Mutex<Received>> = state.clone();
            lock(&state).connections += 1;
            std::thread::spawn(move || receive(stream, &state));
        }
        Ok(())
    }))
}

fn watch_card(state: &Mutex<Received>) {
    let card = Card::open();
    loop {
        if card.wait() {
            lock(state).card_back = Some(Instant::now());
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

fn receive(mut stream: TcpStream, state: &Mutex<Received>) {
    let mut buffer = vec![0u8; 65_536];
    let mut position = 0;
    let mut last = Instant::now();
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                let bytes = buffer.get(..count).unwrap_or_default();
                let wrong = tcp_stream::mismatch(bytes, position);
                position += count as u64;
                let waited = last.elapsed();
                last = Instant::now();
                let mut state = lock(state);
                state.longest_wait = state.longest_wait.max(waited);
                if let Some(back) = state.card_back.take() {
                    state.longest_after_card = state.longest_after_card.max(back.elapsed());
                }
                state.bytes += count as u64;
                if let Some(at) = wrong {
                    state.mismatches += 1;
                    println!("TCP-CORRUPT at byte {at}");
                }
            }
            Err(error) => {
                lock(state).resets += 1;
                println!("TCP-RESET after {position} bytes: {error}");
                return;
            }
        }
    }
}
