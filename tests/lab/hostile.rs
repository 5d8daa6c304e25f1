//! Who shouldn't come in, at the port of a vned:
//!
//! - `hostile no-certificate ADDRESS:PORT`: a handshake with none to show;
//! - `hostile strange ADDRESS:PORT`: with one that nobody has listed;
//! - `hostile flood ADDRESS:PORT --seconds N`: noise, endless handshakes, and
//!   connections that say nothing or a byte now and then, in turn and as many
//!   as it gets.
//!
//! The first two print how they were refused, and fail if they weren't. The
//! flood prints what it did, as JSON.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{CertificateParams, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};
use serde_json::json;

const PROTOCOL: &[u8] = b"xl-vne/1";
/// Until a handshake must have been refused.
const REFUSED_MAX: Duration = Duration::from_secs(30);
/// Connecting, while the port may be overrun.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// How much of anything is said on one connection.
const SAID_BYTES_MAX: usize = 256 << 10;
/// Connections that are kept open and say little.
const HELD_MAX: usize = 512;
/// How long it does one thing; longer than a handshake may take, so that what
/// it kept open is closed by the other side as well.
const TURN: Duration = Duration::from_secs(7);
/// The first bytes of a record that says it's a TLS handshake.
const RECORD: [u8; 3] = [22, 3, 1];

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["no-certificate", at] => knock(at, false),
        ["strange", at] => knock(at, true),
        ["flood", at, "--seconds", seconds] => flood(at, seconds),
        _ => Err(Failure::from(
            "hostile no-certificate AT | strange AT | flood AT --seconds N",
        )),
    };
    match result {
        Ok(told) => {
            println!("{told}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("hostile: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Comes in by a whole handshake and asks for the time.
fn knock(at: &str, with_certificate: bool) -> Result<String, Failure> {
    let mut stream = TcpStream::connect_timeout(&at.parse()?, CONNECT_MAX)?;
    stream.set_read_timeout(Some(REFUSED_MAX))?;
    let name = ServerName::try_from("vned")?;
    let mut connection = ClientConnection::new(Arc::new(config(with_certificate)?), name)?;
    while connection.is_handshaking() {
        if let Err(error) = connection.complete_io(&mut stream) {
            return refused(&error);
        }
    }
    let mut stream = StreamOwned::new(connection, stream);
    // It may be closed already.
    let _ = stream.write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"peer_clock\"}\n");
    let mut byte = [0];
    match stream.read(&mut byte) {
        Ok(0) => Ok(String::from("refused: the connection was closed")),
        Ok(_) => Err("it was answered".into()),
        Err(error) => refused(&error),
    }
}

fn refused(error: &std::io::Error) -> Result<String, Failure> {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Err("the connection stays open".into()),
        _ => Ok(format!("refused: {error}")),
    }
}

fn config(with_certificate: bool) -> Result<ClientConfig, Failure> {
    let trusting = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody));
    let mut config = if with_certificate {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let certificate = CertificateParams::default().self_signed(&key)?;
        let key = PrivateKeyDer::try_from(key.serialize_der())?;
        trusting.with_client_auth_cert(vec![certificate.der().clone()], key)?
    } else {
        trusting.with_no_client_auth()
    };
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    Ok(config)
}

/// Talks to whoever answers.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// What a flood did.
#[derive(Default)]
struct Counts {
    noise: u64,
    endless: u64,
    half_open: u64,
    dripping: u64,
    not_connected: u64,
    bytes: u64,
    /// Most connections that were open at a time, as far as this side knows.
    held_peak: usize,
    /// Bytes that came back; alerts are 7 each.
    came_back: u64,
}

/// A connection that is kept open.
struct Held {
    stream: TcpStream,
    drips: bool,
}

fn flood(at: &str, seconds: &str) -> Result<String, Failure> {
    let at: SocketAddr = at.parse()?;
    let start = Instant::now();
    let end = start + Duration::from_secs(seconds.parse()?);
    let mut counts = Counts::default();
    let mut held: VecDeque<Held> = VecDeque::new();
    let mut random = Random(u64::from(std::process::id()) | 1);
    let mut dripped = start;
    let mut turn = 0;
    while Instant::now() < end {
        let now = start.elapsed().as_secs() / TURN.as_secs();
        if now != turn {
            turn = now;
            // Else there would be no place for those of the next kind.
            held.clear();
        }
        let Ok(mut stream) = TcpStream::connect_timeout(&at, CONNECT_MAX) else {
            counts.not_connected += 1;
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        match turn % 4 {
            0 => {
                counts.noise += 1;
                let mut noise = vec![0; random.below(SAID_BYTES_MAX)];
                noise.fill_with(|| random.next() as u8);
                pour(stream, &noise, &mut counts)?;
            }
            1 => {
                counts.endless += 1;
                pour(stream, &endless(&mut random), &mut counts)?;
            }
            kind => {
                let drips = kind == 3;
                if drips {
                    counts.dripping += 1;
                    // May be refused already.
                    counts.bytes += written(stream.write(&[RECORD[0]]));
                } else {
                    counts.half_open += 1;
                }
                stream.set_nonblocking(true)?;
                held.push_back(Held { stream, drips });
            }
        }
        if dripped.elapsed() > Duration::from_millis(500) {
            dripped = Instant::now();
            // Those that were closed by the other side make room.
            held.retain_mut(|one| is_open(one, &mut random, &mut counts));
        }
        counts.held_peak = counts.held_peak.max(held.len());
        if held.len() > HELD_MAX {
            held.pop_front();
        }
    }
    let connections = counts.noise + counts.endless + counts.half_open + counts.dripping;
    Ok(json!({
        "seconds": start.elapsed().as_secs(),
        "connections": connections,
        "noise": counts.noise,
        "endless": counts.endless,
        "half_open": counts.half_open,
        "dripping": counts.dripping,
        "not_connected": counts.not_connected,
        "bytes": counts.bytes,
        "held_peak": counts.held_peak,
        "came_back": counts.came_back,
    })
    .to_string())
}

/// Says all of it, unless the other side has enough, and looks what comes.
fn pour(mut stream: TcpStream, bytes: &[u8], counts: &mut Counts) -> Result<(), Failure> {
    stream.set_write_timeout(Some(Duration::from_millis(200)))?;
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    for part in bytes.chunks(16 << 10) {
        match stream.write(part) {
            Ok(said) => counts.bytes += said as u64,
            Err(_) => break,
        }
    }
    // It may be gone.
    let _ = stream.shutdown(Shutdown::Write);
    let mut came = [0; 4096];
    counts.came_back += written(stream.read(&mut came));
    Ok(())
}

fn written(result: std::io::Result<usize>) -> u64 {
    result.map_or(0, |bytes| bytes as u64)
}

/// Says another byte of a record to those that drip, and whether it's open.
fn is_open(one: &mut Held, random: &mut Random, counts: &mut Counts) -> bool {
    if one.drips {
        match one.stream.write(&[random.next() as u8]) {
            Ok(said) => counts.bytes += said as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
    }
    let mut came = [0; 64];
    match one.stream.read(&mut came) {
        Ok(0) => false,
        Ok(bytes) => {
            counts.came_back += bytes as u64;
            true
        }
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

/// A client's hello that says it has 16 MiB, in records as long as they may be
/// or longer.
fn endless(random: &mut Random) -> Vec<u8> {
    let length: u16 = if random.next() % 2 == 0 {
        0x4000
    } else {
        0xffff
    };
    let mut said = Vec::new();
    while said.len() < SAID_BYTES_MAX {
        let first = said.is_empty();
        said.extend(RECORD);
        said.extend(length.to_be_bytes());
        let from = said.len();
        said.resize(from + usize::from(length), 0);
        if first {
            said[from..from + 4].copy_from_slice(&[1, 0xff, 0xff, 0xff]);
        }
    }
    said
}

/// Xorshift: not for secrets.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
