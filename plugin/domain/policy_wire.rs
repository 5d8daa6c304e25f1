//! The worker's end of the socket to the interposed save helper. The C twin
//! is `c-shim/policy_wire.h`; both are built together.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    recv, send, socketpair, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
};

/// Environment variable with the number of the helper's end.
pub const FD_ENV: &str = "VNE_POLICY_FD";

/// Environment variable with the number of the helper's end of the rendezvous.
pub const RENDEZVOUS_FD_ENV: &str = "VNE_RENDEZVOUS_FD";

const MESSAGE_BYTES: usize = 40;

/// What the pre-copy loop does next (`XGS_POLICY_*` in `xenguest.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// One more round.
    Continue = 0,
    /// Suspend the guest and send what is left.
    StopAndCopy = 1,
    /// Give up; the guest runs on.
    Abort = -1,
}

/// What the helper says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// It waits for a decision.
    Ask {
        /// Rounds finished so far.
        iteration: u32,
        /// Pages that the coming round will send; `None` between rounds.
        dirty_pages: Option<u64>,
    },
    /// The suspend request goes out now.
    Suspending,
    /// The guest has stopped, or it would not.
    Suspended {
        /// Whether it has stopped.
        stopped: bool,
    },
    /// The memory stream is complete, or broke off.
    Saved {
        /// `errno` of the failure, if it failed.
        failed_errno: Option<i32>,
    },
}

/// A message with the helper's own `CLOCK_MONOTONIC` time in ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// When it happened.
    pub time_ns: u64,
    /// What happened.
    pub said: Said,
}

/// The worker's end.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Makes the pair: ours, and the one for the helper to inherit.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // The one descriptor that is meant to reach the helper.
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
        Ok((Self(ours), theirs))
    }

    /// The next message; `None` when the helper is gone.
    pub fn receive(&self) -> io::Result<Option<Message>> {
        let mut bytes = [0; MESSAGE_BYTES];
        let (_, length) = recv(&self.0, &mut bytes[..], RecvFlags::TRUNC)?;
        if length == 0 {
            return Ok(None);
        }
        if length != MESSAGE_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a message of {length} bytes from the save helper"),
            ));
        }
        decode(&bytes).map(Some)
    }

    /// Answers [`Said::Ask`].
    pub fn answer(&self, decision: Decision) -> io::Result<()> {
        send(
            &self.0,
            &(decision as i32).to_ne_bytes(),
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn decode(bytes: &[u8; MESSAGE_BYTES]) -> io::Result<Message> {
    let u32_at =
        |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let u64_at = |at: usize| {
        let mut value = [0; 8];
        value.copy_from_slice(&bytes[at..at + 8]);
        u64::from_ne_bytes(value)
    };
    let result = u32_at(32) as i32;
    let said = match u32_at(0) {
        1 => Said::Ask {
            iteration: u32_at(4),
            dirty_pages: u64::try_from(u64_at(8) as i64).ok(),
        },
        2 => Said::Suspending,
        3 => Said::Suspended {
            stopped: result != 0,
        },
        4 => Said::Saved {
            failed_errno: (result != 0).then(|| u32_at(36) as i32),
        },
        kind => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a message of kind {kind} from the save helper"),
            ))
        }
    };
    Ok(Message {
        time_ns: u64_at(24),
        said,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_dirty_count_is_none_not_a_huge_number() -> io::Result<()> {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[0] = 1;
        bytes[8..16].copy_from_slice(&(-1i64).to_ne_bytes());
        let expected = Said::Ask {
            iteration: 0,
            dirty_pages: None,
        };
        assert_eq!(decode(&bytes)?.said, expected);
        Ok(())
    }

    #[test]
    fn a_helper_that_is_gone_is_none_not_an_error() -> io::Result<()> {
        let (ours, theirs) = Socket::pair()?;
        drop(theirs);
        assert_eq!(ours.receive()?, None);
        Ok(())
    }
}
