//! The way to other hosts: one connection to each, made when it's needed and
//! made anew when it breaks. What can't be sent now is lost: the protocol says
//! it again.

use std::collections::HashMap;
use std::net::ToSocketAddrs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jsonrpsee::core::client::{Client, Error as RpcError};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::{Mutex as AsyncMutex, Semaphore};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::conf::Peer;
use super::lead::{Link, Offset};
use super::rpc::{self, explain, Hello, PeerClient, CALL_MAX};
use super::tls::{self, client_config, Identity};
use super::wire::{Attached, News, Order};
use crate::clock::now_ns;
use crate::cut::{self, FromHost, Reply};
use crate::image::Name;
use crate::sentence::sentence;

/// Connecting and the first words, each.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// What isn't acknowledged for so long is on a connection that is dead: as with
/// a call, so that a link that comes back is used soon.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(4);
/// Messages to one host that wait for a connection; more are lost.
const WAITING_MAX: usize = 256;
/// Between the first looks at a peer's clock in a take, and how many.
const CLOCK_INTERVAL: Duration = Duration::from_millis(50);
const CLOCK_LOOKS: u32 = 10;
/// Between the others: a cut should seldom meet one.
const CLOCK_INTERVAL_LATER: Duration = Duration::from_secs(3);
/// How far two clocks may drift apart: as fast as NTP ever slews one, both ways.
const DRIFT_PER_NS: f64 = 0.001;

/// A peer that this host may have a connection to.
pub(super) struct Remote {
    /// Whom, and where.
    pub peer: Peer,
    here: Name,
    identity: Identity,
    runtime: Handle,
    client: AsyncMutex<Option<Arc<Client>>>,
    waiting: Semaphore,
    /// The best comparison of clocks on this connection, and when it was made.
    clock: Mutex<Option<(Instant, Offset)>>,
    /// Why there is no connection.
    trouble: Mutex<Option<String>>,
}

impl Remote {
    /// Connects to nobody yet.
    pub fn new(peer: Peer, here: Name, identity: Identity, runtime: Handle) -> Arc<Self> {
        Arc::new(Self {
            peer,
            here,
            identity,
            runtime,
            client: AsyncMutex::new(None),
            waiting: Semaphore::new(WAITING_MAX),
            clock: Mutex::new(None),
            trouble: Mutex::new(None),
        })
    }

    /// Whether it's the same peer, and we are the same to it.
    pub fn is(&self, peer: &Peer, here: &Name, identity: &Identity) -> bool {
        self.peer == *peer
            && self.here == *here
            && self.identity.fingerprint() == identity.fingerprint()
    }

    /// The connection, made if there is none.
    pub async fn client(&self) -> Result<Arc<Client>, String> {
        let mut client = self.client.lock().await;
        if let Some(client) = client.as_ref().filter(|client| client.is_connected()) {
            return Ok(Arc::clone(client));
        }
        let made = self.connect().await;
        let trouble = made.as_ref().err().cloned();
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
        let made = Arc::new(made?);
        // The host may have been started anew, and its clock with it.
        *self.clock.lock().unwrap_or_else(PoisonError::into_inner) = None;
        *client = Some(Arc::clone(&made));
        Ok(made)
    }

    /// A connection beside that one, for what sends much.
    pub async fn connect_apart(&self) -> Result<Client, String> {
        self.connect().await
    }

    /// Why it couldn't be reached the last time.
    pub fn trouble(&self) -> Option<String> {
        let trouble = self.trouble.lock();
        trouble.unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn connect(&self) -> Result<Client, String> {
        let address = self.peer.address.clone();
        let resolved = self
            .runtime
            .spawn_blocking(move || address.to_socket_addrs().map(|found| found.collect()));
        let late = || format!("{} doesn't answer", self.peer.address);
        let addresses: Vec<_> = match timeout(CONNECT_MAX, resolved).await {
            Ok(Ok(Ok(addresses))) => addresses,
            Ok(Ok(Err(error))) => return Err(format!("{}: {error}", self.peer.address)),
            _ => return Err(late()),
        };
        let connecting = timeout(CONNECT_MAX, TcpStream::connect(addresses.as_slice()));
        let stream = connecting.await.map_err(|_| late())?;
        let stream = stream.map_err(|error| format!("{}: {error}", self.peer.address))?;
        tune(&stream).map_err(|error| format!("{}: {error}", self.peer.address))?;
        let config = client_config(&self.identity, self.peer.fingerprint)
            .map_err(|error| sentence(&error))?;
        // Not looked at: who it is shows the certificate.
        let name =
            rustls::pki_types::ServerName::try_from("vned").map_err(|error| error.to_string())?;
        let greeting = timeout(
            CONNECT_MAX,
            TlsConnector::from(config).connect(name, stream),
        );
        let stream = greeting
            .await
            .map_err(|_| late())?
            .map_err(|error| format!("{}: {}", self.peer.address, tls::explain(&error)))?;
        let client = rpc::client(stream, CALL_MAX);
        // What it says first also shows that it has accepted us.
        let hello = timeout(CONNECT_MAX, client.hello(Hello::of(self.here.clone())));
        let hello = hello.await.map_err(|_| late())?;
        let hello = hello.map_err(|error| match error {
            RpcError::RestartNeeded(_) => String::from(
                "it refuses this host (is it a peer there, with the fingerprint that \
                 'xl vne-snapshot peer id' shows here?)",
            ),
            other => explain(&other),
        })?;
        hello.check(&self.peer.name)?;
        Ok(client)
    }

    /// A connection on which nothing is answered is of no use.
    async fn drop_if_dead(&self, used: &Arc<Client>, error: &RpcError) {
        if matches!(error, RpcError::Call(_)) {
            return;
        }
        let mut client = self.client.lock().await;
        if client
            .as_ref()
            .is_some_and(|client| Arc::ptr_eq(client, used))
        {
            *client = None;
        }
    }

    /// Sends an order, without waiting for anything.
    pub fn order(self: &Arc<Self>, order: Order) {
        self.send(|client| async move { client.order(order).await });
    }

    /// The same, and tells if it isn't even taken in.
    fn order_or(self: &Arc<Self>, order: Order, refused: impl FnOnce(String) + Send + 'static) {
        self.send(|client| async move {
            let answer = client.order(order).await;
            if let Err(RpcError::Call(why)) = &answer {
                refused(why.message().to_owned());
            }
            answer
        });
    }

    /// Sends news, without waiting for anything.
    pub fn tell(self: &Arc<Self>, news: News) {
        self.send(|client| async move { client.news(news).await });
    }

    fn send<F>(self: &Arc<Self>, call: impl FnOnce(Arc<Client>) -> F + Send + 'static)
    where
        F: std::future::Future<Output = Result<(), RpcError>> + Send,
    {
        let remote = Arc::clone(self);
        self.runtime.spawn(async move {
            let Ok(_permit) = remote.waiting.try_acquire() else {
                log::debug!("{}: too much waits to be sent", remote.peer.name);
                return;
            };
            let client = match remote.client().await {
                Ok(client) => client,
                Err(why) => {
                    log::info!("{}: {why}", remote.peer.name);
                    return;
                }
            };
            if let Err(error) = call(Arc::clone(&client)).await {
                log::info!("{}: {}", remote.peer.name, explain(&error));
                remote.drop_if_dead(&client, &error).await;
            }
        });
    }

    /// Makes a call and waits for its answer.
    pub async fn call<T, F>(
        self: &Arc<Self>,
        call: impl FnOnce(Arc<Client>) -> F,
    ) -> Result<T, String>
    where
        F: std::future::Future<Output = Result<T, RpcError>>,
    {
        let client = self.client().await?;
        match call(Arc::clone(&client)).await {
            Ok(answer) => Ok(answer),
            Err(error) => {
                self.drop_if_dead(&client, &error).await;
                Err(explain(&error))
            }
        }
    }

    /// Compares the clocks once: Cristian's algorithm. Returns how long it took.
    pub async fn look_at_clock(self: &Arc<Self>) -> Result<Duration, String> {
        let before = now_ns();
        let theirs = self.call(|client| async move { client.clock().await });
        let theirs = theirs.await?;
        let after = now_ns();
        let offset = Offset {
            ahead_ns: i128::from(theirs) - (i128::from(before) + i128::from(after)) / 2,
            error_ns: (after - before).div_ceil(2),
        };
        let mut best = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        if best.is_none_or(|known| drifted(known).error_ns > offset.error_ns) {
            *best = Some((Instant::now(), offset));
        }
        Ok(Duration::from_nanos(after - before))
    }
}

/// What is known after a while: clocks drift.
fn drifted((at, offset): (Instant, Offset)) -> Offset {
    let drift_ns = at.elapsed().as_nanos() as f64 * DRIFT_PER_NS;
    Offset {
        error_ns: offset.error_ns.saturating_add(drift_ns as u64),
        ..offset
    }
}

/// A dead connection is noticed, and small messages go at once.
pub(super) fn tune(stream: &TcpStream) -> std::io::Result<()> {
    use rustix::net::sockopt;
    let wait = u32::try_from(UNACKNOWLEDGED_MAX.as_millis()).unwrap_or(u32::MAX);
    stream.set_nodelay(true)?;
    sockopt::set_tcp_user_timeout(stream, wait)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(5))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    Ok(())
}

/// A take's way to another host. While it lives, the clocks are compared.
pub(super) struct RemoteLink {
    remote: Arc<Remote>,
    refused: Arc<dyn Fn(News) + Send + Sync>,
    watch: tokio::task::JoinHandle<()>,
}

impl RemoteLink {
    /// For one take, whose leader hears by `refused` when the host has no part
    /// in it: that host then has no side of the take that could say so.
    pub fn new(remote: Arc<Remote>, refused: impl Fn(News) + Send + Sync + 'static) -> Self {
        let watched = Arc::clone(&remote);
        let watch = remote.runtime.spawn(async move {
            for look in 0_u32.. {
                if let Err(why) = watched.look_at_clock().await {
                    log::debug!("{}: {why}", watched.peer.name);
                }
                let first = look < CLOCK_LOOKS;
                let interval = if first {
                    CLOCK_INTERVAL
                } else {
                    CLOCK_INTERVAL_LATER
                };
                tokio::time::sleep(interval).await;
            }
        });
        Self {
            remote,
            refused: Arc::new(refused),
            watch,
        }
    }
}

impl Link for RemoteLink {
    fn order(&self, order: Order) {
        let message = order.message;
        if message.order != cut::Order::Prepare {
            self.remote.order(order);
            return;
        }
        let refused = Arc::clone(&self.refused);
        self.remote.order_or(order, move |why| {
            refused(News::Said {
                message: FromHost {
                    take: message.take,
                    session: None,
                    reply: Reply::Failed(why),
                },
                attached: Attached::Nothing,
            });
        });
    }

    fn offset(&self) -> Offset {
        let best = self.remote.clock.lock();
        let unknown = Offset {
            ahead_ns: 0,
            error_ns: Offset::UNKNOWN_NS,
        };
        best.unwrap_or_else(PoisonError::into_inner)
            .map_or(unknown, drifted)
    }
}

impl Drop for RemoteLink {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

/// All peers.
pub(super) type Remotes = HashMap<Name, Arc<Remote>>;
