//! A blocking rtnetlink socket: one request, its answers, its error as a
//! sentence. The messages themselves are `netlink-packet-route`'s.

use netlink_packet_core::{
    NetlinkMessage, NetlinkPayload, NLM_F_ACK, NLM_F_DUMP, NLM_F_ECHO, NLM_F_REQUEST,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{protocols::NETLINK_ROUTE, Socket, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use super::Error;

/// A dump of this many bytes would be tens of thousands of interfaces.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// The kernel answers at once; this only bounds a wait that should not be.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(5);

/// A socket to one of the kernel's netlink families, with every wait bounded.
pub(super) fn connect(protocol: isize) -> Result<Socket, Error> {
    let mut socket = Socket::new(protocol).map_err(Error::Socket)?;
    socket.bind_auto().map_err(Error::Socket)?;
    socket
        .connect(&SocketAddr::new(0, 0))
        .map_err(Error::Socket)?;
    bound_waits(socket.as_raw_fd())?;
    Ok(socket)
}

fn bound_waits(socket: RawFd) -> Result<(), Error> {
    let wait = libc::timeval {
        tv_sec: ANSWER_WAIT_MAX.as_secs() as libc::time_t,
        tv_usec: 0,
    };
    // SAFETY: the descriptor is an open socket's, and the option's value is a
    // timeval that outlives the call, passed with its size.
    let r = unsafe {
        libc::setsockopt(
            socket,
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            std::ptr::from_ref(&wait).cast(),
            std::mem::size_of_val(&wait) as libc::socklen_t,
        )
    };
    match r {
        0 => Ok(()),
        _ => Err(Error::Socket(std::io::Error::last_os_error())),
    }
}

/// A connection to the kernel's routing and traffic control tables.
#[derive(Debug)]
pub struct Rtnl {
    socket: Socket,
    sequence: u32,
    /// After how many requests its process would have been killed.
    #[cfg(test)]
    pub(super) requests_left: Option<u32>,
}

impl Rtnl {
    /// Opens the socket.
    pub fn open() -> Result<Self, Error> {
        Ok(Self {
            socket: connect(NETLINK_ROUTE)?,
            sequence: 0,
            #[cfg(test)]
            requests_left: None,
        })
    }

    /// Sends one request and waits for the kernel's acknowledgement. `what`
    /// completes "cannot …".
    pub fn ack(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), Error> {
        self.talk(what, message, flags | NLM_F_ACK).map(|_| ())
    }

    /// Sends one request for a single object and returns it, as soon as a few
    /// system calls take.
    pub fn get(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
    ) -> Result<RouteNetlinkMessage, Error> {
        let found = self.talk(what, message, NLM_F_ACK | NLM_F_ECHO)?;
        let first = found.into_iter().next();
        first.ok_or_else(|| Error::Answer(what.to_owned()))
    }

    /// Sends one request and collects everything that it lists.
    pub fn dump(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        self.talk(what, message, NLM_F_DUMP)
    }

    fn talk(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        #[cfg(test)]
        if let Some(left) = &mut self.requests_left {
            *left = left
                .checked_sub(1)
                .ok_or_else(|| Error::Answer(format!("{what}: killed")))?;
        }
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags | NLM_F_REQUEST;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.header.length as usize];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map_err(Error::Socket)?;
        self.answers(what)
    }

    fn answers(&mut self, what: &str) -> Result<Vec<RouteNetlinkMessage>, Error> {
        let mut found = Vec::new();
        let mut total = 0;
        loop {
            let (bytes, _) = self.socket.recv_from_full().map_err(Error::Socket)?;
            total += bytes.len();
            if bytes.is_empty() || total > ANSWER_BYTES_MAX {
                return Err(Error::Answer(what.to_owned()));
            }
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| Error::Answer(format!("{what}: {error}")))?;
                let length = (message.header.length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    // Left over from a request that timed out.
                    continue;
                }
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(error) => {
                        let Some(code) = error.code else {
                            return Ok(found);
                        };
                        return Err(Error::Refused {
                            what: what.to_owned(),
                            source: std::io::Error::from_raw_os_error(code.get().saturating_abs()),
                        });
                    }
                    NetlinkPayload::InnerMessage(inner) => found.push(inner),
                    _ => {}
                }
            }
        }
    }
}
