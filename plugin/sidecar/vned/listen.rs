//! Who may come in: root by the socket, and peers whose certificates are known.

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::super::error::Error;
use super::super::peers::tune;
use super::super::rpc;
use super::super::tls::{explain, peer_fingerprint, server_config, PROTOCOL};
use super::service::Service;
use super::{lock, Daemon};
use crate::image::Name;
use crate::sentence::sentence;

/// How long somebody may take to show a certificate.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Handshakes under way from one address, and in all: nobody can keep others
/// from coming in, nor use up the daemon's descriptors.
const HANDSHAKES_EACH_MAX: usize = 8;
const HANDSHAKES_MAX: usize = 256;
/// Connections that one peer may have: the old ones of a host that lost power
/// end by themselves after a while.
const CONNECTIONS_EACH_MAX: usize = 8;
/// When the port can't be had.
const RETRY: Duration = Duration::from_secs(5);
/// Lines about strangers, at most one in so long.
const REFUSALS_INTERVAL: Duration = Duration::from_secs(1);

/// The socket for commands. What an earlier daemon left is replaced: the caller
/// has made sure that it's gone.
pub(super) fn commands(path: &Path) -> Result<UnixListener, Error> {
    let cannot = |error: std::io::Error| Error::Failed(format!("{}: {error}", path.display()));
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(cannot(error)),
        _ => {}
    }
    // In a folder that only root may enter.
    let socket = UnixListener::bind(path).map_err(cannot)?;
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, private).map_err(cannot)?;
    Ok(socket)
}

/// What somebody takes of a limit, until it's dropped.
struct Place<K: Eq + std::hash::Hash> {
    taken: Arc<Mutex<HashMap<K, usize>>>,
    key: K,
}

impl<K: Eq + std::hash::Hash + Clone> Place<K> {
    fn take(
        taken: &Arc<Mutex<HashMap<K, usize>>>,
        key: &K,
        each: usize,
        all: usize,
    ) -> Option<Self> {
        let mut places = lock(taken);
        let sum: usize = places.values().sum();
        let ours = places.get(key).copied().unwrap_or_default();
        if ours >= each || sum >= all {
            return None;
        }
        places.insert(key.clone(), ours + 1);
        Some(Self {
            taken: Arc::clone(taken),
            key: key.clone(),
        })
    }
}

impl<K: Eq + std::hash::Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut places = lock(&self.taken);
        if let Some(count) = places.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                places.remove(&self.key);
            }
        }
    }
}

/// Tells of strangers without letting them fill the log.
#[derive(Default)]
struct Refusals {
    last: Mutex<Option<Instant>>,
    untold: AtomicU64,
}

impl Refusals {
    fn tell(&self, who: IpAddr, why: &str) {
        let mut last = lock(&self.last);
        if last.is_some_and(|at| at.elapsed() < REFUSALS_INTERVAL) {
            self.untold.fetch_add(1, Ordering::Relaxed);
            return;
        }
        *last = Some(Instant::now());
        match self.untold.swap(0, Ordering::Relaxed) {
            0 => log::warn!("refused {who}: {why}"),
            more => log::warn!("refused {who}: {why} (and {more} more)"),
        }
    }
}

/// The port's limits, and what was refused.
#[derive(Default)]
struct Gate {
    handshakes: Arc<Mutex<HashMap<IpAddr, usize>>>,
    connections: Arc<Mutex<HashMap<Name, usize>>>,
    refusals: Refusals,
}

/// Listens for peers where the configuration says so, and follows it.
pub(super) async fn peers(daemon: Arc<Daemon>) {
    let gate = Arc::new(Gate::default());
    let mut open: Option<(String, TcpListener)> = None;
    loop {
        let reloaded = daemon.reloaded.notified();
        let wanted = daemon.setup(|setup| {
            let known = setup.identity.is_some();
            setup.conf.listen.clone().filter(|_| known)
        });
        let Some(wanted) = wanted else {
            log::info!("no peers: there is no 'listen' in vne.conf, or no identity");
            open = None;
            reloaded.await;
            continue;
        };
        if open.as_ref().is_none_or(|(address, _)| *address != wanted) {
            // First, in case that it's another form of the same address.
            drop(open.take());
            match TcpListener::bind(&wanted).await {
                Ok(listener) => {
                    log::info!("listening for peers at {wanted}");
                    open = Some((wanted, listener));
                }
                Err(error) => {
                    log::error!("{wanted}: {error}");
                    let _ = timeout(RETRY, reloaded).await;
                    continue;
                }
            }
        }
        if let Some((address, listener)) = &open {
            tokio::select! {
                () = accept(&daemon, &gate, listener, address) => {}
                () = reloaded => {}
            }
        }
    }
}

/// Lets peers in.
async fn accept(daemon: &Arc<Daemon>, gate: &Arc<Gate>, listener: &TcpListener, address: &str) {
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                log::warn!("{address}: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let ip = from.ip().to_canonical();
        let place = Place::take(&gate.handshakes, &ip, HANDSHAKES_EACH_MAX, HANDSHAKES_MAX);
        let Some(place) = place else {
            gate.refusals
                .tell(ip, "too many connections without a certificate");
            continue;
        };
        let (daemon, gate) = (Arc::clone(daemon), Arc::clone(gate));
        tokio::spawn(async move {
            match let_in(&daemon, &gate, stream, place).await {
                Ok(()) => {}
                Err(why) => gate.refusals.tell(ip, &why),
            }
        });
    }
}

/// `Err` says why somebody wasn't let in.
async fn let_in(
    daemon: &Arc<Daemon>,
    gate: &Arc<Gate>,
    stream: TcpStream,
    place: Place<IpAddr>,
) -> Result<(), String> {
    tune(&stream).map_err(|error| error.to_string())?;
    let trusting = Arc::clone(daemon);
    let identity = daemon.setup(|setup| setup.identity.clone());
    let identity = identity.ok_or("this host has no identity")?;
    let config = server_config(
        &identity,
        Arc::new(move |fingerprint| {
            trusting.setup(|setup| setup.conf.peer_by(fingerprint).is_some())
        }),
    )
    .map_err(|error| sentence(&error))?;
    let handshake = timeout(HANDSHAKE_MAX, TlsAcceptor::from(config).accept(stream));
    let stream = match handshake.await {
        Ok(done) => done.map_err(|error| explain(&error))?,
        Err(_) => return Err(String::from("no certificate within 5 s")),
    };
    let connection = stream.get_ref().1;
    if connection.alpn_protocol() != Some(PROTOCOL) {
        return Err(String::from("it doesn't say which protocol it speaks"));
    }
    let fingerprint = peer_fingerprint(connection.peer_certificates());
    let fingerprint = fingerprint.ok_or("it has no certificate")?;
    let peer = daemon.setup(|setup| setup.conf.peer_by(&fingerprint).cloned());
    let peer = peer.ok_or_else(|| format!("nobody here has the fingerprint {fingerprint}"))?;
    let each = CONNECTIONS_EACH_MAX;
    let _connection = Place::take(&gate.connections, &peer.name, each, usize::MAX)
        .ok_or_else(|| format!("peer '{}' has too many connections", peer.name))?;
    drop(place);
    let methods = Service::methods(daemon, &peer.name, fingerprint);
    let serving = rpc::serve(stream, methods);
    tokio::pin!(serving);
    loop {
        // First, so that a removal between the two isn't missed.
        let reloaded = daemon.reloaded.notified();
        let still = daemon.setup(|setup| {
            let now = setup.conf.peer_by(&fingerprint);
            now.is_some_and(|now| now.name == peer.name)
        });
        if !still {
            log::warn!("'{}' is no peer any more: cut off", peer.name);
            return Ok(());
        }
        tokio::select! {
            ended = &mut serving => {
                tell_end(&peer.name, ended);
                return Ok(());
            }
            () = reloaded => {}
        }
    }
}

/// A peer isn't a stranger: what is said of it isn't counted among refusals,
/// where it could keep one from being told.
fn tell_end(peer: &Name, ended: std::io::Result<()>) {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match ended {
        Ok(()) => log::debug!("peer '{peer}' has hung up"),
        // As when it was killed: it comes again.
        Err(error) if matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe) => {
            log::debug!("peer '{peer}' has gone: {error}");
        }
        Err(error) => log::warn!("peer '{peer}': {error}"),
    }
}
