//! The cut protocol: how all members of a VNE, on any number of hosts, come to
//! be captured at one consistent point. No I/O, no clock, no threads: events
//! and time in, actions out.
//!
//! One [`Coordinator`] leads a take; one [`Host`] acts for it in each dom0 that
//! has members, the coordinator's own included. A command on one host runs both
//! in one process.
//!
//! ```text
//!  coordinator            every host                        its members
//!  ───────────            ──────────                        ───────────
//!  PREPARE   ─ prepare ─► lock, look, build holds open
//!            ◄─ prepared (session)
//!  PRECOPY   ─ precopy ─► start ──────────────────────────► pre-copy, then hover
//!            ◄─ converged, each time that it changes
//!            ─ throttle ► (if some don't, and that was asked for) ► slow down
//!  APPROACH  ─ approach ► ────────────────────────────────► copy what got dirty since
//!            ◄─ near, unless that takes too long
//!  HOLD      ─ hold ────► block all holds; the deadline runs
//!            ◄─ held
//!  DRAIN     (a pause: what was on its way arrives)
//!  CUT       ─ cut ─────► ────────────────────────────────► suspend
//!            ◄─ cut, when all stand still                    last pages, resume
//!  RELEASE   ─ release ─► let the frames go
//!            ◄─ released, if they were held all the time, when all members run
//!  FINALISE  ─ finalise ► ────────────────────────────────► write out, sync
//!            ◄─ stored: all of it is durable, and so is that it waits
//!  COMMIT    decide: the manifest is durable. The snapshot exists.
//!            ─ commit ──► make it visible
//!            ◄─ committed
//!  DONE
//!  anything else: ABORT ─ abort ─► undo ─ aborted ─► FAILED
//! ```
//!
//! # Invariants
//!
//! Each is checked after every step by the simulator (`tests/sim`), which also
//! shows that leaving out what ensures it gets noticed (the `Mutant` that the
//! feature `mutants` compiles in).
//!
//! - **No orphan.** Of a snapshot that exists, no member has received a frame
//!   that its sender sent after its own cut. From the last `held` to the first
//!   `release` no frame leaves any member, and every cut lies between. A host
//!   that had to let frames go by itself never says `released`, so that the
//!   snapshot can't come to exist.
//! - **Nobody stays suspended, nothing stays held.** A host doesn't wait for
//!   its coordinator: from its `hold` on a deadline of its own runs, and when
//!   nothing is heard for the lease, it undoes what it did.
//! - **Listed if and only if whole.** The coordinator decides when every host
//!   has said `stored`. A host that has said so keeps its part, unlisted, until
//!   it hears how it was decided, and asks until then. What a coordinator
//!   doesn't know to be committed is aborted (presumed abort).
//! - **One cut at a time.** A member is locked by one take from prepare to the
//!   end of the take on its host.
//!
//! # What the network may do
//!
//! Lose, repeat, delay and reorder messages. Orders are repeated until they are
//! answered, and answered again when they come again. A host makes up a session
//! for each take that it prepares, and hears only orders that name it: what was
//! delayed since before it started anew means nothing to it.
//!
//! # Versions
//!
//! Hosts greet each other with the versions that they know before anything else,
//! and don't work together without a common one; the machines never see another
//! than [`PROTOCOL`]. A message or field may be added within a version if a host
//! that ignores it is still right; anything else is a new one.

mod coordinator;
mod host;
mod messages;
#[cfg(test)]
mod tests;
pub mod unattended;

pub use coordinator::{Action, Coordinator, Input, Limits, OnDivergence};
pub use host::{Host, HostAction, HostInput, HostLimits};
pub use messages::{FromHost, Order, Reply, Session, TakeId, ToHost, PROTOCOL};

use serde::{Deserialize, Serialize};

/// Where a take stands. Code, logs, progress and documents use these names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Looking, checking, building: no guest notices.
    Prepare,
    /// Copying memory while the guests run.
    Precopy,
    /// Copying what got dirty while members hovered.
    Approach,
    /// Stopping the members' frames.
    Hold,
    /// Letting arrive what was already on its way.
    Drain,
    /// Suspending the members.
    Cut,
    /// Letting the frames go, and the members run.
    Release,
    /// Making the parts durable while the guests run.
    Finalise,
    /// Making the snapshot exist.
    Commit,
    /// It exists.
    Done,
    /// Undoing.
    Abort,
    /// It doesn't exist, and nothing is left of it.
    Failed,
}

impl Phase {
    /// Whether frames are held, or about to be released.
    pub fn holds(self) -> bool {
        (Self::Hold..=Self::Release).contains(&self)
    }

    /// Whether nothing more will happen.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed)
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Prepare => "prepare",
            Self::Precopy => "precopy",
            Self::Approach => "approach",
            Self::Hold => "hold",
            Self::Drain => "drain",
            Self::Cut => "cut",
            Self::Release => "release",
            Self::Finalise => "finalise",
            Self::Commit => "commit",
            Self::Done => "done",
            Self::Abort => "abort",
            Self::Failed => "failed",
        })
    }
}

/// A way to break the protocol, for showing that the simulator notices.
#[cfg(feature = "mutants")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// Cut without holding frames.
    SkipHold,
    /// Release when the first host has cut.
    ReleaseEarly,
    /// Decide when the first host has stored its part.
    CommitEarly,
    /// A host past its deadline waits on for its coordinator.
    ResumeNever,
    /// A host that let frames go by itself goes on as if it hadn't.
    ForgetRelease,
    /// A host aborts what it has said to have stored when it hears nothing.
    GuessOutcome,
}

#[cfg(feature = "mutants")]
impl Mutant {
    /// All of them, with the names that `--mutant` takes.
    pub const ALL: [(&'static str, Self); 6] = [
        ("skip-hold", Self::SkipHold),
        ("release-early", Self::ReleaseEarly),
        ("commit-early", Self::CommitEarly),
        ("resume-never", Self::ResumeNever),
        ("forget-release", Self::ForgetRelease),
        ("guess-outcome", Self::GuessOutcome),
    ];
}

/// Whether the machine was built broken in this way. Never, in a product.
macro_rules! mutated {
    ($machine:expr, $mutant:ident) => {{
        #[cfg(feature = "mutants")]
        let broken = $machine.mutant == Some($crate::cut::Mutant::$mutant);
        #[cfg(not(feature = "mutants"))]
        let broken = false;
        broken
    }};
}
use mutated;
