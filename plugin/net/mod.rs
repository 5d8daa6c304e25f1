//! The members' network: holding their frames back while a cut is made, recording
//! those that had been sent and not received, playing them back when the members
//! are restored; and a VNE's own bridges and the ways between them.

pub mod announce;
pub mod frames;
pub mod hold;
mod links;
mod nft;
pub mod overlay;
mod play;
mod rings;
mod rtnl;
mod tap;
#[cfg(test)]
mod tests;
mod watched;

pub use frames::Frame;
pub use hold::{Hold, HoldCounters, HoldRecord};
pub use nft::Nft;
pub use play::{Player, BACKLOG_MAX};
pub use rtnl::Rtnl;
pub use watched::{drain, Stopped, Watched};

/// What can go wrong between us and the kernel's network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The netlink socket itself failed.
    #[error("netlink")]
    Socket(#[source] std::io::Error),
    /// The kernel sent something that isn't an answer to what was asked.
    #[error("netlink: unexpected answer to {0}")]
    Answer(String),
    /// The kernel refused one request.
    #[error("cannot {what}")]
    Refused {
        /// The request, as an admin would say it.
        what: String,
        /// The kernel's reason.
        #[source]
        source: std::io::Error,
    },
    /// An interface has a name that a VNE's network needs, and isn't its.
    #[error("the interface {interface} is in the way of VNE '{vne}' and none of xl-vne's; rename or remove it (ip link)")]
    Foreign {
        /// The interface.
        interface: String,
        /// The VNE.
        vne: String,
    },
    /// Frames of two networks couldn't be told apart.
    #[error("VNE '{vne}' would have the VNI {vni} at port {port}, which is that of {interface}; say vni = NUMBER in the description of one of them, on all its hosts")]
    VniTaken {
        /// The VNE.
        vne: String,
        /// The VNI.
        vni: u32,
        /// The UDP port.
        port: u16,
        /// The VXLAN device that has it.
        interface: String,
    },
    /// One VXLAN device can't reach all peers.
    #[error("some peers of VNE '{vne}' are reached by IPv4 and some by IPv6; give addresses of one kind for all")]
    MixedPeers {
        /// The VNE.
        vne: String,
    },
    /// Held frames were dropped: the queue was too small.
    #[error("{vif}: the hold queue of {limit_bytes} bytes overflowed, {dropped} frames dropped")]
    Overflow {
        /// Interface whose frames were held.
        vif: String,
        /// Size of the queue.
        limit_bytes: u32,
        /// Frames lost to it.
        dropped: u32,
    },
    /// Frames that were held couldn't be recorded.
    #[error("{missing} of {of} held frames weren't seen when they were let go")]
    Missed {
        /// So many.
        missing: usize,
        /// Of these.
        of: usize,
    },
    /// A file isn't what [`frames::encode`] writes.
    #[error("recorded frames: what stands at byte {at} makes no sense")]
    Recorded {
        /// Where the block is that can't be read.
        at: usize,
    },
    /// Frames were played back, and not just those wait now.
    #[error(
        "{vif}: {played} recorded frames were played back and {queued} wait ('restore --paused' \
         goes without them)"
    )]
    PlayedBack {
        /// Interface on which they came in.
        vif: String,
        /// Frames that should wait.
        played: usize,
        /// Frames that do.
        queued: u32,
    },
}

impl Error {
    /// The kernel says that the object isn't there (any more).
    pub fn is_absent(&self) -> bool {
        let Error::Refused { source, .. } = self else {
            return false;
        };
        matches!(source.raw_os_error(), Some(libc::ENODEV | libc::ENOENT))
    }
}
