//! The cut protocol: how all members of a VNE come to be captured at one
//! consistent point. No I/O, no clock, no threads: events and time in, actions
//! out.
//!
//! ```text
//!  engine                              coordinator                           engine
//!  ──────                              ───────────                           ──────
//!  Prepared(m), each        ─►  PREPARE ─► Arm: journal, guard, holds built open
//!  Armed                    ─►  PRECOPY ─► StartPrecopy
//!  Round(m, converged)      ─►     …       (until all have converged, or the bound)
//!                               HOLD    ─► Block: every member's frames wait
//!  Blocked                  ─►  DRAIN   ─► (a pause: what was on its way arrives)
//!  time                     ─►  CUT     ─► Cut: all members at once
//!  Cut(m), each             ─►  RELEASE ─► Release: frames go, in order
//!  Released                 ─►  FINALISE ► Finalise: spill, hash, fsync
//!  Stored(m), each          ─►  COMMIT  ─► Commit: the manifest, the rename
//!  Committed                ─►  DONE
//!  anything else            ─►  FAILED  ─► Abort, once
//! ```
//!
//! Why the cut is consistent: from Block to Release no frame leaves any
//! member, so nothing that was sent after its sender's cut can have been seen
//! before its receiver's. The invariants, each of them a test below:
//!
//! - Cut is never asked for before Block has been confirmed;
//! - Release never before every member has been cut, except in Abort;
//! - Commit never before every part is stored;
//! - every phase in which guests or frames wait has a deadline;
//! - a failure leads to exactly one Abort, and nothing follows it.

mod coordinator;

pub use coordinator::{Action, Coordinator, Input, Limits, OnDivergence};

use serde::{Deserialize, Serialize};

/// Where a take stands. Code, logs, progress and documents use these names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Looking, checking, building: no guest notices.
    Prepare,
    /// Copying memory while the guests run.
    Precopy,
    /// Stopping the members' frames.
    Hold,
    /// Letting arrive what was already on its way.
    Drain,
    /// Suspend, last pages, resume.
    Cut,
    /// Letting the frames go.
    Release,
    /// Making the parts durable while the guests run.
    Finalise,
    /// Making the snapshot exist.
    Commit,
    /// It exists.
    Done,
    /// It doesn't, and nothing is left of it.
    Failed,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Prepare => "prepare",
            Self::Precopy => "precopy",
            Self::Hold => "hold",
            Self::Drain => "drain",
            Self::Cut => "cut",
            Self::Release => "release",
            Self::Finalise => "finalise",
            Self::Commit => "commit",
            Self::Done => "done",
            Self::Failed => "failed",
        })
    }
}
