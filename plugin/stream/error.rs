//! What can be wrong with a stream.

use std::fmt;
use std::io;

use super::format::record_name;

/// Which of the two nested streams a record belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// The outer stream, written by libxl.
    Xl,
    /// The stream inside it, written by libxc's save helper.
    Xc,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Xl => "libxl",
            Level::Xc => "libxc",
        })
    }
}

/// Why a stream can't be read or written.
///
/// `offset` is in bytes from where reading began: the start of the libxl
/// header, or of the xl save file for its header.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source failed; not the stream's fault.
    #[error("cannot read the stream at byte {offset}")]
    Read {
        /// How far reading came.
        offset: u64,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },

    /// The destination failed, for example because the disk is full.
    #[error("cannot write the stream")]
    Write {
        /// What the operating system said.
        #[source]
        source: io::Error,
    },

    /// The stream ends too early.
    #[error("the stream ends at byte {offset}, inside {what}")]
    Truncated {
        /// How many bytes there were.
        offset: u64,
        /// What was being read.
        what: &'static str,
    },

    /// A header is not what it should be.
    #[error("the {what} at byte {offset} is wrong: {problem}")]
    Header {
        /// Which header.
        what: &'static str,
        /// Where it begins.
        offset: u64,
        /// What is wrong with it.
        problem: String,
    },

    /// A record has the wrong form, the wrong place, or a meaning that isn't
    /// known.
    #[error("the {level} record {} at byte {offset} is wrong: {problem}", record_name(*.level, *.record_type))]
    Record {
        /// In which of the two streams.
        level: Level,
        /// The record's type number.
        record_type: u32,
        /// Where its header begins.
        offset: u64,
        /// What is wrong with it.
        problem: String,
    },

    /// What was handed to the writer can't become a valid stream.
    #[error("cannot build a stream: {problem}")]
    Unwritable {
        /// Why not.
        problem: String,
    },
}

/// Why ingesting stopped: the stream was bad, or the sink couldn't take it.
#[derive(Debug, thiserror::Error)]
pub enum IngestError<E: std::error::Error + 'static> {
    /// The stream, or reading it.
    #[error(transparent)]
    Stream(#[from] Error),
    /// The sink.
    #[error(transparent)]
    Sink(E),
}
