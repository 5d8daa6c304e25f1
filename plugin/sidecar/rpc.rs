//! What daemons ask of each other, and what commands ask of the daemon:
//! JSON-RPC 2.0, one object a line, so that a trace can be read. Described for
//! other implementations in `plugin/docs/protocol.md`.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use jsonrpsee::core::client::{
    async_client::ClientBuilder, Client, ReceivedMessage, TransportReceiverT, TransportSenderT,
};
use jsonrpsee::core::RpcResult;
use jsonrpsee::proc_macros::rpc;
use jsonrpsee::types::ErrorObjectOwned;
use jsonrpsee::Methods;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::timeout;
use tokio_util::codec::{FramedRead, FramedWrite, LinesCodec, LinesCodecError};

use super::fit::Needs;
use super::lead::{TakeRequest, Taken, Told};
use super::tls::Fingerprint;
use super::wire::{News, Order};
use crate::cut::PROTOCOL;
use crate::image::{Name, Received, SnapshotId};

/// Longest line: a manifest of some two thousand members.
const LINE_BYTES_MAX: usize = 4 << 20;
/// Calls that one connection may have under way; more wait unread.
const CALLS_MAX: usize = 16;
/// How long answering a call may take, its way out included.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// How long a caller waits. That the other side is gone is known earlier.
pub(super) const CALL_MAX: Duration = Duration::from_secs(20);

/// What a daemon says of itself first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The versions of the protocol that it speaks, the best one first.
    pub protocols: Vec<u32>,
    /// Its version, for people.
    pub version: String,
    /// What it calls itself.
    pub host: Name,
}

impl Hello {
    /// Ours.
    pub(super) fn of(host: Name) -> Self {
        Self {
            protocols: vec![PROTOCOL],
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host,
        }
    }

    /// Whether we can work together; if not, why.
    pub(super) fn check(&self, expected: &Name) -> Result<(), String> {
        if self.host != *expected {
            return Err(format!(
                "it calls itself '{}': peers must call each other what they call themselves",
                self.host
            ));
        }
        if !self.protocols.contains(&PROTOCOL) {
            let theirs: Vec<String> = self.protocols.iter().map(u32::to_string).collect();
            return Err(format!(
                "its vned {} speaks version {} of the protocol and this one {PROTOCOL}: update one \
                 of them",
                self.version,
                theirs.join(", ")
            ));
        }
        Ok(())
    }
}

/// Names a restore on all hosts: made up at random by the one that leads it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ticket(pub Name);

/// A snapshot by its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRef {
    /// The VNE.
    pub vne: Name,
    /// Which of its snapshots.
    pub id: SnapshotId,
}

impl std::fmt::Display for SnapshotRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.vne, self.id)
    }
}

/// Where a member is to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The member.
    pub member: Name,
    /// The host.
    pub host: Name,
}

/// What to restore, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreOrder {
    /// The snapshot.
    pub snapshot: SnapshotRef,
    /// The store that it's in on this host.
    pub store: PathBuf,
    /// What it's called, if it's a copy.
    pub copy: Option<Name>,
    /// The members that are to run elsewhere than they did.
    pub on: Vec<Placement>,
    /// Leave the members paused.
    pub paused: bool,
}

/// Whether a host can run what it was asked about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fit {
    /// What is in the way; nothing if it can.
    pub problems: Vec<String>,
    /// The members that aren't in its store.
    pub lacks: Vec<Name>,
}

/// How far a host is with its part of a restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreState {
    /// Members that are built.
    pub built: Vec<Name>,
    /// Where it stands.
    pub stage: RestoreStage,
    /// How many frames are recorded of them, and are played back unless they are
    /// left paused.
    #[serde(default)]
    pub recorded: u64,
    /// What becomes of the frames that they send, recorded ones included.
    #[serde(default)]
    pub frames: RestoreFrames,
    /// What to tell the user.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// See [`RestoreState`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreStage {
    /// Members are being built, paused.
    Building,
    /// All are built, and wait.
    Built,
    /// All run, or are left paused as was asked for.
    Released,
    /// None is there; why, if it wasn't asked for.
    Gone(Option<String>),
}

/// Whether frames of restored members wait until all members, on all hosts, can
/// receive them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreFrames {
    /// They don't, or no longer.
    #[default]
    Flow,
    /// They wait, and not all members here can receive.
    Held,
    /// They wait, and all members here can receive, or were waited for long
    /// enough.
    Connected,
}

/// How a restore was decided, as its leader says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreOutcome {
    /// It goes on.
    Open,
    /// All is built everywhere: set yours running, or leave them paused.
    Released {
        /// Which of the two.
        paused: bool,
    },
    /// Nothing comes of it.
    Unknown,
}

/// How far a host is with a copy that is sent to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyState {
    /// What was asked for last isn't done.
    pub busy: bool,
    /// The members that haven't arrived whole, once it has looked.
    pub wanted: Option<Vec<Name>>,
    /// Bytes of the member at hand that an earlier copy has left.
    #[serde(default)]
    pub arrived_bytes: u64,
    /// All is there.
    #[serde(default)]
    pub done: Option<Received>,
    /// Nothing comes of it, and why.
    #[serde(default)]
    pub failed: Option<String>,
}

/// What a peer may ask. Each call is about a VNE for which this host lists the
/// peer, or is refused in the same words whether there is such a VNE or not.
#[rpc(client, server, namespace = "peer")]
pub trait Peer {
    /// The first call of a connection.
    #[method(name = "hello", param_kind = map)]
    async fn hello(&self, hello: Hello) -> RpcResult<Hello>;

    /// `CLOCK_MONOTONIC` in ns.
    #[method(name = "clock")]
    async fn clock(&self) -> RpcResult<u64>;

    /// An order of the cut protocol. It's taken in; the answer comes as news.
    #[method(name = "order", param_kind = map)]
    async fn order(&self, order: Order) -> RpcResult<()>;

    /// News of the cut protocol.
    #[method(name = "news", param_kind = map)]
    async fn news(&self, news: News) -> RpcResult<()>;

    /// Build the members that this host has of a snapshot, paused; and whether
    /// they'll be left so.
    #[method(name = "build", param_kind = map)]
    async fn build(
        &self,
        ticket: Ticket,
        snapshot: SnapshotRef,
        paused: Option<bool>,
    ) -> RpcResult<()>;

    /// The same, of a copy under another name: the members are called COPY-MEMBER and
    /// are on the network of the VNE that is called like the copy.
    #[method(name = "build_copy", param_kind = map)]
    async fn build_copy(
        &self,
        ticket: Ticket,
        snapshot: SnapshotRef,
        copy: Name,
        paused: bool,
    ) -> RpcResult<()>;

    /// Build these members, wherever they ran.
    #[method(name = "build_members", param_kind = map)]
    async fn build_members(
        &self,
        ticket: Ticket,
        snapshot: SnapshotRef,
        members: Vec<Name>,
        copy: Option<Name>,
        paused: bool,
    ) -> RpcResult<()>;

    /// Whether members, or their copies, can run here. Nothing is touched.
    #[method(name = "fit", param_kind = map)]
    async fn fit(
        &self,
        snapshot: SnapshotRef,
        members: Vec<Name>,
        copy: Option<Name>,
        needs: Needs,
    ) -> RpcResult<Fit>;

    /// Copy what you have of a snapshot to another host. It's begun; not to be asked for
    /// it for a while means to give it up.
    #[method(name = "send", param_kind = map)]
    async fn send(&self, snapshot: SnapshotRef, host: Name) -> RpcResult<JobId>;

    /// How far that is.
    #[method(name = "sent", param_kind = map)]
    async fn sent(&self, job: JobId) -> RpcResult<Watched>;

    /// How far that is. Not to be asked for a while means to give it up.
    #[method(name = "built", param_kind = map)]
    async fn built(&self, ticket: Ticket) -> RpcResult<RestoreState>;

    /// Let them run, or leave them paused for good.
    #[method(name = "release", param_kind = map)]
    async fn release(&self, ticket: Ticket, paused: bool) -> RpcResult<()>;

    /// Let their frames go: all members, on all hosts, can receive.
    #[method(name = "flow", param_kind = map)]
    async fn flow(&self, ticket: Ticket) -> RpcResult<()>;

    /// Destroy what was built.
    #[method(name = "discard", param_kind = map)]
    async fn discard(&self, ticket: Ticket) -> RpcResult<()>;

    /// How a restore that you lead was decided.
    #[method(name = "outcome", param_kind = map)]
    async fn outcome(&self, ticket: Ticket) -> RpcResult<RestoreOutcome>;

    /// Delete a snapshot. Whether there was one.
    #[method(name = "remove", param_kind = map)]
    async fn remove(&self, snapshot: SnapshotRef) -> RpcResult<bool>;

    /// Take in a copy of a snapshot, whose manifest this is: one a connection. It's
    /// begun; `copy_state` says which members are wanted.
    #[method(name = "copy_begin", param_kind = map)]
    async fn copy_begin(&self, snapshot: SnapshotRef, manifest: serde_json::Value)
        -> RpcResult<()>;

    /// How far that is.
    #[method(name = "copy_state")]
    async fn copy_state(&self) -> RpcResult<CopyState>;

    /// This member comes next. It's begun.
    #[method(name = "copy_member", param_kind = map)]
    async fn copy_member(&self, member: Name) -> RpcResult<()>;

    /// Bytes of one of its files, in Base64.
    #[method(name = "copy_file", param_kind = map)]
    async fn copy_file(
        &self,
        member: Name,
        file: String,
        offset: u64,
        data: String,
    ) -> RpcResult<()>;

    /// What its next guest frames are, in Base64; which pages are lacking, likewise.
    #[method(name = "copy_pages", param_kind = map)]
    async fn copy_pages(&self, member: Name, pages: String) -> RpcResult<String>;

    /// So many pages: a zstd frame in Base64.
    #[method(name = "copy_frame", param_kind = map)]
    async fn copy_frame(&self, member: Name, count: u32, data: String) -> RpcResult<()>;

    /// The member has come to its end. It's begun.
    #[method(name = "copy_member_end", param_kind = map)]
    async fn copy_member_end(&self, member: Name) -> RpcResult<()>;

    /// All have: make it a snapshot. It's begun.
    #[method(name = "copy_end")]
    async fn copy_end(&self) -> RpcResult<()>;
}

/// How far a copy is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyProgress {
    /// Bytes of pages that the members have, all in all.
    pub total_bytes: u64,
    /// Of these, those that the other host has now.
    pub done_bytes: u64,
    /// Pages that it lacked.
    pub sent_pages: u64,
    /// Bytes that were sent, compressed.
    pub sent_bytes: u64,
}

/// What a copy came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyDone {
    /// The members that were copied; none if all were there.
    pub members: Vec<Name>,
    /// Their pages with contents.
    pub pages: u64,
    /// Of these, those that the other host lacked.
    pub pages_sent: u64,
    /// Bytes that were sent, compressed.
    pub sent_bytes: u64,
    /// How long it took, in ns.
    pub duration_ns: u64,
}

/// What a job tells while it works.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobTold {
    /// A take.
    Take(Told),
    /// A restore: these members are being built.
    Building(Vec<String>),
    /// One is built, paused.
    Built(String),
    /// All run.
    Released {
        /// Recorded frames that were played back.
        played: u64,
    },
    /// A copy goes on.
    Copying(CopyProgress),
    /// Something that the user should know.
    Warning(String),
}

/// How a job ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobDone {
    /// A take.
    Take(Taken),
    /// A restore.
    Restore,
    /// A copy.
    Copied(CopyDone),
    /// It came to nothing, and why.
    Failed(String),
}

/// What a job has told since it was last asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Watched {
    /// In order.
    pub told: Vec<JobTold>,
    /// How it ended, once it has.
    pub done: Option<JobDone>,
}

/// A job of the daemon's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct JobId(pub u64);

/// A part of a snapshot that waits to hear whether that exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InDoubt {
    /// The snapshot.
    pub snapshot: String,
    /// The host that knows.
    pub leader: String,
}

/// A peer, tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerTest {
    /// Its name.
    pub name: Name,
    /// Where it was looked for.
    pub address: String,
    /// Its vned's version, if it can be worked with.
    pub version: Option<String>,
    /// Why it can't.
    pub error: Option<String>,
    /// How long a call takes, in ns.
    pub round_trip_ns: u64,
}

/// How the daemon is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Its version.
    pub version: String,
    /// This host's name.
    pub host: Name,
    /// Where it listens for peers, if it does.
    pub listen: Option<String>,
    /// What peers know this host by.
    pub fingerprint: Option<Fingerprint>,
    /// Parts that wait for their outcome.
    pub in_doubt: Vec<InDoubt>,
}

/// What root on this host may ask.
#[rpc(client, server, namespace = "admin")]
pub trait Admin {
    /// Take a snapshot that this host leads.
    #[method(name = "take", param_kind = map)]
    async fn take(&self, request: TakeRequest) -> RpcResult<JobId>;

    /// Restore a snapshot, led by this host.
    #[method(name = "restore", param_kind = map)]
    async fn restore(&self, order: RestoreOrder) -> RpcResult<JobId>;

    /// What a job has told, waiting a moment for something to be told. A job
    /// that nobody watches any more is given up.
    #[method(name = "watch", param_kind = map)]
    async fn watch(&self, job: JobId) -> RpcResult<Watched>;

    /// Give a job up.
    #[method(name = "interrupt", param_kind = map)]
    async fn interrupt(&self, job: JobId) -> RpcResult<()>;

    /// Delete a snapshot on these other hosts.
    #[method(name = "remove", param_kind = map)]
    async fn remove(&self, snapshot: SnapshotRef, hosts: Vec<Name>) -> RpcResult<()>;

    /// Copy what a store has of a snapshot to another host.
    #[method(name = "copy", param_kind = map)]
    async fn copy(&self, snapshot: SnapshotRef, store: PathBuf, host: Name) -> RpcResult<JobId>;

    /// How the daemon is.
    #[method(name = "status")]
    async fn status(&self) -> RpcResult<DaemonStatus>;

    /// Read the configuration again.
    #[method(name = "reload")]
    async fn reload(&self) -> RpcResult<()>;

    /// Try to reach a peer, or all.
    #[method(name = "test_peers", param_kind = map)]
    async fn test_peers(&self, name: Option<Name>) -> RpcResult<Vec<PeerTest>>;
}

/// A refusal, as the other side hears it.
pub(super) fn refusal(why: impl Into<String>) -> ErrorObjectOwned {
    ErrorObjectOwned::owned(1, why, None::<()>)
}

/// What a failed call means to a user.
pub(super) fn explain(error: &jsonrpsee::core::client::Error) -> String {
    use jsonrpsee::core::client::Error;
    match error {
        Error::Call(refused) => refused.message().to_owned(),
        Error::RequestTimeout => String::from("it doesn't answer in time"),
        Error::RestartNeeded(cause) => format!("the connection broke: {cause}"),
        other => other.to_string(),
    }
}

/// Answers what comes in on a connection, until it ends.
pub(super) async fn serve<S>(stream: S, methods: Methods) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (from, to) = tokio::io::split(stream);
    let codec = || LinesCodec::new_with_max_length(LINE_BYTES_MAX);
    let mut lines = FramedRead::new(from, codec());
    let answers = Arc::new(Mutex::new(FramedWrite::new(to, codec())));
    let calls = Arc::new(Semaphore::new(CALLS_MAX));
    while let Some(line) = lines.next().await {
        let line = line.map_err(|error| match error {
            LinesCodecError::Io(error) => error,
            LinesCodecError::MaxLineLengthExceeded => io::Error::other("a line that is too long"),
        })?;
        let Ok(permit) = Arc::clone(&calls).acquire_owned().await else {
            return Ok(());
        };
        let (methods, answers) = (methods.clone(), Arc::clone(&answers));
        tokio::spawn(async move {
            let answered = timeout(ANSWER_MAX, async {
                // What is no request has no number to be answered under.
                if let Ok((answer, _)) = methods.raw_json_request(&line, 1).await {
                    let _ = answers.lock().await.send(answer.get()).await;
                }
            });
            if answered.await.is_err() {
                log::warn!("a call wasn't answered within {ANSWER_MAX:?}");
            }
            drop(permit);
        });
    }
    Ok(())
}

/// The calling side of a connection.
pub(super) fn client<S>(stream: S, call_max: Duration) -> Client
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (from, to) = tokio::io::split(stream);
    let codec = || LinesCodec::new_with_max_length(LINE_BYTES_MAX);
    ClientBuilder::new()
        .request_timeout(call_max)
        .max_concurrent_requests(2 * CALLS_MAX)
        .build_with_tokio(
            Sender(FramedWrite::new(to, codec())),
            Receiver(FramedRead::new(from, codec())),
        )
}

struct Sender<S>(FramedWrite<WriteHalf<S>, LinesCodec>);
struct Receiver<S>(FramedRead<ReadHalf<S>, LinesCodec>);

impl<S: AsyncWrite + Send + 'static> TransportSenderT for Sender<S> {
    type Error = LinesCodecError;

    async fn send(&mut self, message: String) -> Result<(), Self::Error> {
        self.0.send(message).await
    }
}

impl<S: AsyncRead + Send + 'static> TransportReceiverT for Receiver<S> {
    type Error = LinesCodecError;

    async fn receive(&mut self) -> Result<ReceivedMessage, Self::Error> {
        use io::ErrorKind::UnexpectedEof;
        match self.0.next().await {
            Some(Ok(line)) => Ok(ReceivedMessage::Text(line)),
            // The TLS library has more words for it, and a link.
            Some(Err(LinesCodecError::Io(error))) if error.kind() == UnexpectedEof => {
                Err(io::Error::from(UnexpectedEof).into())
            }
            Some(Err(error)) => Err(error),
            None => Err(io::Error::from(UnexpectedEof).into()),
        }
    }
}
