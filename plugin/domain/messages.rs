//! What the engine and a worker say to each other: one JSON object a line,
//! over a socket that the worker inherits.

use std::io::{self, BufRead, Read, Write};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::policy::{PolicyConfig, Round};
use super::DomainFacts;
use crate::image::MemberImage;
use crate::net::{HoldRecord, Stopped};

/// Longest line. The longest message holds a domain's configuration: some
/// 10 KiB each for a few hundred devices.
const LINE_BYTES_MAX: u64 = 4 << 20;

/// What the engine tells a worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Begin pre-copy into this directory.
    Precopy {
        /// The member's directory in the snapshot that is being made.
        directory: PathBuf,
        /// When it has converged.
        policy: PolicyConfig,
        /// Bytes of the last pages to keep in memory at most.
        final_buffer_bytes: usize,
        /// Bytes of memory that it may take, if there is a limit.
        #[serde(default)]
        memory_bytes: Option<u64>,
        /// The holds of the member's vifs.
        holds: Vec<HoldRecord>,
        /// Whether its disks are captured while it stands still.
        #[serde(default)]
        disks: bool,
    },
    /// Send what got dirty since: the cut is about to come.
    Approach,
    /// Suspend, save the rest, resume: now.
    Cut,
    /// The disks have been captured, so that the guest may run; or couldn't be.
    Disks {
        /// Why not, as a sentence.
        why: Option<String>,
    },
    /// The cut is made and the network released: write it out.
    Finalise,
    /// Comes after that: what was captured of the disks is durable, or couldn't be made
    /// so.
    Settled {
        /// Why not, as a sentence.
        why: Option<String>,
    },
    /// Give up. The guest runs on.
    Abort,
}

/// What a worker tells the engine. Times are `CLOCK_MONOTONIC` in ns.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The domain exists and can be captured. Nothing was touched.
    Prepared {
        /// What it is.
        facts: Box<DomainFacts>,
        /// The hypervisor's version.
        xen_version: String,
    },
    /// A pre-copy round was sent.
    Round {
        /// Its figures.
        round: Round,
        /// Whether what is left is within the policy's aim.
        converged: bool,
    },
    /// After the order to approach: as little as there can be is left.
    Near,
    /// The member stands still: its cut.
    Stopped(Stopped),
    /// It was saved and runs again.
    Cut(CutTimes),
    /// Its part is durable, except for the rename.
    Stored(Box<MemberImage>),
    /// It failed. The guest runs.
    Failed {
        /// Why, as a sentence.
        why: String,
    },
}

/// When what happened to a member at its cut, `CLOCK_MONOTONIC` in ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CutTimes {
    /// The suspend request went out; the guest still ran.
    pub requested_ns: u64,
    /// The guest had stopped: the member's cut.
    pub suspended_ns: u64,
    /// Its last dirty page had been read.
    pub pages_done_ns: u64,
    /// All of it was in the stream, device state included.
    pub saved_ns: u64,
    /// Its disks had been captured; as `saved_ns` if it has none.
    #[serde(default)]
    pub disks_ns: u64,
    /// The guest had been set running again.
    pub resumed_ns: u64,
    /// Pages sent while it was suspended.
    pub final_pages: u64,
    /// Bytes of the member's stream, all rounds.
    pub stream_bytes: u64,
}

/// Writes one message.
pub fn send<T: Serialize>(mut to: impl Write, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// Reads one message; `None` at the end.
pub fn receive<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    from.take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a message that is cut off or too long",
        ));
    }
    Ok(Some(serde_json::from_slice(&line)?))
}
