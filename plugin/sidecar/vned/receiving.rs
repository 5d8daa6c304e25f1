//! A copy that a peer sends to this host: a thread that does what its calls say, one
//! after the other, for as long as its connection lasts.
//!
//! What takes a while isn't waited for by a call: it's begun, and the peer asks how
//! far it is.

use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::prelude::{Engine, BASE64_STANDARD};
use tokio::sync::{oneshot, Notify};

use super::super::error::Error;
use super::super::rpc::CopyState;
use super::lock;
use crate::image::{Incoming, IncomingLimits, Manifest, Name, Received, Store};
use crate::sentence::sentence;

/// How long one call waits for news.
const WAIT_MAX: Duration = Duration::from_millis(500);
/// A peer that says nothing for so long has its copy ended: it keeps packs from
/// being freed. What has arrived stays.
const SILENT_MAX: Duration = Duration::from_secs(60);

/// What a call wants done.
pub(super) enum Step {
    /// A member that comes next.
    Begin(Name),
    /// Bytes of one of its files.
    File {
        member: Name,
        file: String,
        offset: u64,
        data: String,
    },
    /// What its next guest frames are.
    Pages { member: Name, pages: String },
    /// Pages.
    Frame {
        member: Name,
        count: u32,
        data: String,
    },
    /// It has come to its end.
    End(Name),
    /// All members have.
    Finish,
}

type Answer = Result<String, String>;

struct Shared {
    state: Mutex<CopyState>,
    heard: Mutex<Instant>,
    news: Notify,
}

/// A connection's copy.
pub(super) struct Receiving {
    pub vne: Name,
    shared: Arc<Shared>,
    steps: Sender<(Step, Option<oneshot::Sender<Answer>>)>,
}

impl Receiving {
    /// Begins, in a thread of its own.
    pub fn start(root: PathBuf, here: Name, manifest: Manifest) -> Result<Self, Error> {
        let vne = manifest.vne.clone();
        let shared = Arc::new(Shared {
            state: Mutex::new(CopyState {
                busy: true,
                ..CopyState::default()
            }),
            heard: Mutex::new(Instant::now()),
            news: Notify::new(),
        });
        let (steps, to_do) = mpsc::channel();
        let mine = Arc::clone(&shared);
        std::thread::Builder::new()
            .name(String::from("receiving"))
            .spawn(move || {
                crate::priority::background();
                let what = format!("{}@{}", manifest.vne, manifest.id);
                match receive(&mine, &root, &here, manifest, &to_do) {
                    Ok(true) => log::info!("{what} has been copied here"),
                    Ok(false) => log::info!("the copy of {what} to here has broken off"),
                    Err(why) => {
                        log::warn!("the copy of {what} to here: {why}");
                        let mut state = lock(&mine.state);
                        state.busy = false;
                        state.failed = Some(why);
                    }
                }
                mine.news.notify_one();
            })
            .map_err(Error::start("start a thread"))?;
        Ok(Self { vne, shared, steps })
    }

    /// Has a step done, and waits for it.
    pub async fn step(&self, step: Step) -> Answer {
        *lock(&self.shared.heard) = Instant::now();
        let (answer, answered) = oneshot::channel();
        if self.steps.send((step, Some(answer))).is_err() {
            return Err(self.why_over());
        }
        answered.await.unwrap_or_else(|_| Err(self.why_over()))
    }

    /// Has a step begun that takes a while.
    pub fn begin(&self, step: Step) -> Answer {
        *lock(&self.shared.heard) = Instant::now();
        lock(&self.shared.state).busy = true;
        match self.steps.send((step, None)) {
            Ok(()) => Ok(String::new()),
            Err(_) => Err(self.why_over()),
        }
    }

    fn why_over(&self) -> String {
        let failed = lock(&self.shared.state).failed.clone();
        failed.unwrap_or_else(|| String::from("the copy is over"))
    }

    /// How far it is; waits a moment while it's busy.
    pub async fn state(&self) -> CopyState {
        *lock(&self.shared.heard) = Instant::now();
        if lock(&self.shared.state).busy {
            let _ = tokio::time::timeout(WAIT_MAX, self.shared.news.notified()).await;
        }
        lock(&self.shared.state).clone()
    }
}

/// `Ok(false)` if the peer has gone.
fn receive(
    shared: &Shared,
    root: &std::path::Path,
    here: &Name,
    manifest: Manifest,
    steps: &Receiver<(Step, Option<oneshot::Sender<Answer>>)>,
) -> Result<bool, String> {
    let said = |error: crate::image::Error| sentence(&error);
    let store = Store::open(root).map_err(said)?;
    let incoming = Incoming::begin(&store, here, manifest, IncomingLimits::default());
    let Some(mut incoming) = incoming.map_err(said)? else {
        let mut state = lock(&shared.state);
        (state.busy, state.wanted) = (false, Some(Vec::new()));
        // There is no end to be told of.
        state.done = Some(Received::default());
        return Ok(true);
    };
    let tell = |incoming: &Incoming| {
        let mut state = lock(&shared.state);
        state.wanted = Some(incoming.wanted());
        state.arrived_bytes = incoming.arrived_bytes();
        state.busy = false;
        shared.news.notify_one();
    };
    tell(&incoming);
    loop {
        let (step, answer) = match steps.recv_timeout(Duration::from_secs(1)) {
            Ok(step) => step,
            Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(false),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                match lock(&shared.heard).elapsed() > SILENT_MAX {
                    true => return Err(String::from("its sender has fallen silent")),
                    false => continue,
                }
            }
        };
        let done = match step {
            Step::Finish => {
                let received = incoming.finish().map_err(said)?;
                let mut state = lock(&shared.state);
                (state.busy, state.done) = (false, Some(received));
                return Ok(true);
            }
            step => take(&mut incoming, step),
        };
        match (done, answer) {
            (Ok(text), Some(answer)) => {
                // Who asked may have gone.
                let _ = answer.send(Ok(text));
            }
            (Ok(_), None) => tell(&incoming),
            (Err(why), answer) => {
                answer.map(|answer| answer.send(Err(why.clone())));
                return Err(why);
            }
        }
    }
}

/// Does a step.
fn take(incoming: &mut Incoming, step: Step) -> Answer {
    let said = |error: crate::image::Error| sentence(&error);
    let bytes = |text: &str| {
        let bytes = BASE64_STANDARD.decode(text);
        bytes.map_err(|error| format!("what arrives is no Base64: {error}"))
    };
    match step {
        Step::Begin(member) => incoming.begin_member(&member).map_err(said)?,
        Step::File {
            member,
            file,
            offset,
            data,
        } => {
            let data = bytes(&data)?;
            incoming.file(&member, &file, offset, &data).map_err(said)?;
        }
        Step::Pages { member, pages } => {
            let lacking = incoming.batch(&member, &bytes(&pages)?).map_err(said)?;
            return Ok(BASE64_STANDARD.encode(lacking));
        }
        Step::Frame {
            member,
            count,
            data,
        } => {
            let data = bytes(&data)?;
            incoming.frame(&member, &data, count).map_err(said)?;
        }
        Step::End(member) => incoming.end_member(&member).map_err(said)?,
        Step::Finish => {}
    }
    Ok(String::new())
}
