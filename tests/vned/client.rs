//! Who comes to a daemon's port: good peers and others.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver};
use std::sync::Arc;

use rustix::net::{bind, connect, socket, AddressFamily, SocketType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ClientConnection, ServerConnection, SignatureScheme, StreamOwned};
use serde_json::{json, Value};
use xl_vne::sidecar::conf::Peer;
use xl_vne::sidecar::tls::{client_config, server_config, Identity, KEY_FILE};

use super::host::{Fallible, Host, PATIENCE};

/// Where clients come from, if it isn't said.
pub const HERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 1);

/// A bare connection from an address of this host's.
pub fn connect_from(from: Ipv4Addr, to: &Host) -> Fallible<TcpStream> {
    let fd = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    bind(&fd, &SocketAddr::new(IpAddr::V4(from), 0))?;
    connect(&fd, &to.address.parse::<SocketAddr>()?)?;
    let stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Reads to the end of a connection, whichever way it ends. What came by it.
pub fn rest(stream: &mut impl Read) -> Fallible<Vec<u8>> {
    let mut came = Vec::new();
    match stream.read_to_end(&mut came) {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            Err("the connection doesn't end".into())
        }
        _ => Ok(came),
    }
}

/// As a good peer would have it.
pub fn config(of: &Identity, to: &Host) -> Fallible<ClientConfig> {
    let config = client_config(of, to.identity.fingerprint())?;
    Ok((*config).clone())
}

/// With no certificate to show.
pub fn nameless(to: &Host) -> Fallible<ClientConfig> {
    #[derive(Debug)]
    struct Nothing;
    impl rustls::client::ResolvesClientCert for Nothing {
        fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
            None
        }
        fn has_certs(&self) -> bool {
            false
        }
    }
    let mut config = config(&to.identity, to)?;
    config.client_auth_cert_resolver = Arc::new(Nothing);
    Ok(config)
}

/// With the certificate of one and the key of another.
pub fn forged(of: &Host, with: &Host, to: &Host) -> Fallible<ClientConfig> {
    let certificate = CertificateDer::from_pem_file(of.certificate())?;
    let key = PrivateKeyDer::from_pem_file(with.path("etc").join(KEY_FILE))?;
    let key = rustls::crypto::ring::sign::any_supported_type(&key)?;
    let pair = CertifiedKey::new(vec![certificate], key);
    let mut config = config(&to.identity, to)?;
    config.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(pair));
    Ok(config)
}

/// A connection that says lines of JSON.
pub struct Client {
    stream: BufReader<StreamOwned<ClientConnection, TcpStream>>,
    calls: u64,
}

impl Client {
    /// Its own side of the handshake is over then: whether the other side
    /// agrees shows what it says next.
    pub fn connect(from: Ipv4Addr, to: &Host, config: ClientConfig) -> Fallible<Self> {
        let mut stream = connect_from(from, to)?;
        let name = ServerName::try_from("vned")?;
        let mut connection = ClientConnection::new(Arc::new(config), name)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut stream)?;
        }
        Ok(Self {
            stream: BufReader::new(StreamOwned::new(connection, stream)),
            calls: 0,
        })
    }

    /// A good peer's.
    pub fn of(identity: &Identity, to: &Host) -> Fallible<Self> {
        Self::connect(HERE, to, config(identity, to)?)
    }

    /// Says something that may be no request.
    pub fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes)?;
        self.stream.get_mut().flush()
    }

    /// The answer to the next request: what was asked for, or the refusal.
    pub fn answer(&mut self) -> Fallible<(Value, Result<Value, String>)> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err("the connection ended".into());
        }
        let mut answer: Value = serde_json::from_str(&line)?;
        let refusal = answer.pointer("/error/message").and_then(Value::as_str);
        let refusal = refusal.map(str::to_owned);
        Ok((
            answer["id"].take(),
            match refusal {
                Some(why) => Err(why),
                None => Ok(answer["result"].take()),
            },
        ))
    }

    /// Makes a call.
    pub fn call(&mut self, method: &str, params: Value) -> Fallible<Result<Value, String>> {
        self.calls += 1;
        let call = json!({"jsonrpc": "2.0", "id": self.calls, "method": method, "params": params});
        self.say(format!("{call}\n").as_bytes())?;
        let (id, answer) = self.answer()?;
        if id != json!(self.calls) {
            return Err(format!("an answer to {id}: {answer:?}").into());
        }
        Ok(answer)
    }

    /// Greets, as peers do first.
    pub fn greet(&mut self, called: &str) -> Fallible<Result<Value, String>> {
        let hello = json!({"protocols": [1], "version": "a test", "host": called});
        self.call("peer_hello", json!({ "hello": hello }))
    }

    /// What comes until the other side ends the connection.
    pub fn rest(&mut self) -> Fallible<Vec<u8>> {
        rest(&mut self.stream)
    }
}

/// Knocks and greets; what came back before the connection was ended.
pub fn knock(to: &Host, config: ClientConfig) -> Fallible<Vec<u8>> {
    let mut client = match Client::connect(HERE, to, config) {
        Ok(client) => client,
        // Refused before this side was done.
        Err(_) => return Ok(Vec::new()),
    };
    // It may be ended already.
    let _ = client.say(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"peer_clock\"}\n");
    client.rest()
}

/// The place where a peer listens: takes in all that a daemon says to it.
pub struct Ear(Receiver<Value>);

impl Ear {
    /// Listens as a host does that has no daemon.
    pub fn of(host: &Host) -> Fallible<Self> {
        let listener = TcpListener::bind(&host.address)?;
        let config = server_config(&host.identity, Arc::new(|_| true))?;
        let called = host.name.clone();
        let (tell, heard) = mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Ok(connection) = ServerConnection::new(Arc::clone(&config)) else {
                    return;
                };
                let mut stream = BufReader::new(StreamOwned::new(connection, stream));
                let mut line = String::new();
                while stream.read_line(&mut line).is_ok_and(|length| length > 0) {
                    let said: Value = serde_json::from_str(&line).unwrap_or_default();
                    line.clear();
                    let hello = json!({"protocols": [1], "version": "a test", "host": called});
                    let result = match said["method"].as_str() {
                        Some("peer_hello") => hello,
                        _ => Value::Null,
                    };
                    let answer = json!({"jsonrpc": "2.0", "id": said["id"], "result": result});
                    let _ = stream.get_mut().write_all(format!("{answer}\n").as_bytes());
                    if result.is_null() && tell.send(said["params"].clone()).is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Self(heard))
    }

    /// What is said next, but for greetings.
    pub fn hears(&self) -> Fallible<Value> {
        let heard = self.0.recv_timeout(PATIENCE);
        heard.map_err(|_| "nothing was said".into())
    }
}

/// An order to prepare, as `leader` would give it.
pub fn prepare(take: u64, vne: &str, leader: &Peer, members: &[&str]) -> Value {
    json!({"order": {
        "message": {"take": format!("{take:016x}"), "session": null, "order": "prepare"},
        "plan": {
            "vne": vne,
            "id": "20261121T023652Z",
            "leader": leader.name,
            "members": members,
            "limits": {
                "hold_ns": 5_000_000_000_u64,
                "lease_ns": 20_000_000_000_u64,
                "ask_ns": 1_000_000_000,
            },
            "policy": {
                "last_copy_ns_max": 50_000_000,
                "hover_ns_min": 10_000_000,
                "hover_ns_max": 100_000_000,
            },
            "hold_bytes": 1 << 20,
            "memory_only": false,
            "dry_run": true,
        },
    }})
}
