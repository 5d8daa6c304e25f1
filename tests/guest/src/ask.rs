//! Asks a guest for its counters.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use crate::args::Args;
use crate::status::PORT;

/// Asks, a few times if need be, and prints the answer.
pub fn run(line: &[String]) -> Result<(), String> {
    let args = Args::parse(line, &["timeout-ms", "tries"])?;
    let [address] = args.words.as_slice() else {
        return Err("ask wants one address".to_owned());
    };
    let ip: IpAddr = address
        .parse()
        .map_err(|_| format!("{address:?} is no address"))?;
    let timeout: u64 = args.or("timeout-ms", 1000)?;
    let tries: u32 = args.or("tries", 5)?;
    let socket =
        UdpSocket::bind("0.0.0.0:0").map_err(|error| format!("cannot open a socket: {error}"))?;
    socket
        .connect((ip, PORT))
        .map_err(|error| format!("cannot reach {ip}: {error}"))?;
    socket
        .set_read_timeout(Some(Duration::from_millis(timeout.max(1))))
        .map_err(|error| format!("cannot bound a wait: {error}"))?;
    let mut buffer = vec![0u8; 65_536];
    for _ in 0..tries {
        // A refusal or a lost datagram: the next try tells.
        if socket.send(b"?").is_err() {
            std::thread::sleep(Duration::from_millis(timeout));
            continue;
        }
        if let Ok(count) = socket.recv(&mut buffer) {
            let answer = buffer.get(..count).unwrap_or_default();
            println!("{}", String::from_utf8_lossy(answer));
            return Ok(());
        }
    }
    Err(format!(
        "no answer from {ip} after {tries} tries of {timeout} ms"
    ))
}
