//! What can go wrong in the sidecar.

use super::journal;
use crate::image;
use crate::net;
use crate::sentence::sentence;

/// Why there is no snapshot, or no restored VNE.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Refused or failed; the guests run.
    #[error("{0}")]
    Failed(String),
    /// The same member was named more than once.
    #[error("member '{0}' is named twice")]
    Twice(String),
    /// There is nothing to capture.
    #[error("VNE '{0}' has no members")]
    NoMembers(String),
    /// The journal can't be used, or a member is in another take.
    #[error(transparent)]
    Journal(#[from] journal::Error),
    /// The image store can't be used.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// A process or thread can't be started.
    #[error("cannot {what}")]
    Start {
        /// What, as a verb phrase.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// For `map_err`.
    pub(super) fn start(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Start { what, source }
    }
}

impl From<net::Error> for Error {
    fn from(error: net::Error) -> Self {
        Self::Failed(sentence(&error))
    }
}
