//! The sending end of a TCP stream. A connection that breaks is counted and
//! made anew.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::time::Duration;

use crate::args::Args;
use crate::clock::Pace;
use crate::json::Json;
use crate::status::{self, lock, Status};
use crate::tcp_stream;
use crate::workload::Run;

const CHUNK_MAX: usize = 1 << 20;

#[derive(Default)]
struct Sent {
    connections: u64,
    bytes: u64,
    resets: u64,
}

/// See [`crate::workload::prepare`].
pub fn prepare(line: &[String], status: &Status) -> Result<Run, String> {
    let args = Args::parse(line, &["to", "interval-us", "chunk"])?;
    let to: SocketAddr = args.need("to")?;
    let interval = Duration::from_micros(args.or("interval-us", 1000)?);
    let chunk: usize = args.or("chunk", 1448)?;
    if chunk == 0 || chunk > CHUNK_MAX {
        return Err(format!("--chunk is 1 to {CHUNK_MAX}, not {chunk}"));
    }
    let state = status::shared(status, "tcp_client", Sent::default(), |state: &Sent| {
        let mut json = Json::new();
        json.number("connections", state.connections)
            .number("bytes", state.bytes)
            .number("resets", state.resets);
        json
    });
    Ok(Box::new(move || {
        let mut buffer = vec![0u8; chunk];
        loop {
            match TcpStream::connect_timeout(&to, Duration::from_secs(2)) {
                Ok(stream) => send(stream, &mut buffer, interval, &state),
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }))
}

fn send(mut stream: TcpStream, buffer: &mut [u8], interval: Duration, state: &Mutex<Sent>) {
    lock(state).connections += 1;
    // Without it small chunks are only sent later.
    let _ = stream.set_nodelay(true);
    let mut pace = Pace::new(interval);
    let mut position = 0;
    loop {
        tcp_stream::fill(buffer, position);
        if let Err(error) = stream.write_all(buffer) {
            lock(state).resets += 1;
            println!("TCP-RESET after {position} bytes: {error}");
            return;
        }
        position += buffer.len() as u64;
        lock(state).bytes += buffer.len() as u64;
        pace.wait();
    }
}
