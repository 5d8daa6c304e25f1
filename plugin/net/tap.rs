//! A look at the frames that leave a hold.
//!
//! A packet socket on the hold's ifb sees each frame when it's let go, in order:
//! the first ones are those that were waiting when the member was cut.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::frames::{Frame, FRAME_BYTES_MAX, OFFLOAD_BYTES};
use super::Error;

/// `ETH_P_ALL`, as it's on the wire.
const ALL_PROTOCOLS: u16 = (libc::ETH_P_ALL as u16).to_be();
/// The frames share their memory with those in the hold, and a hold has a limit:
/// this is only not to be the smaller one.
const BUFFER_BYTES: libc::c_int = 1 << 30;
const ADDRESSES_BYTES: usize = 12;
const TAG_BYTES: usize = 4;

// linux/if_packet.h
const PACKET_AUXDATA: libc::c_int = 8;
const PACKET_VNET_HDR: libc::c_int = 15;
const TP_STATUS_VLAN_VALID: u32 = 1 << 4;
const TP_STATUS_VLAN_TPID_VALID: u32 = 1 << 6;

/// A packet socket on one interface.
#[derive(Debug)]
pub struct Tap {
    socket: OwnedFd,
    interface: u32,
}

/// `struct tpacket_auxdata` (linux/if_packet.h).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Auxdata {
    status: u32,
    length: u32,
    captured: u32,
    mac: u16,
    net: u16,
    vlan_tci: u16,
    vlan_tpid: u16,
}

/// `struct tpacket_stats` (linux/if_packet.h).
#[repr(C)]
#[derive(Default)]
struct Statistics {
    packets: u32,
    drops: u32,
}

impl Tap {
    /// A socket that doesn't listen yet.
    pub fn open(interface: u32) -> Result<Self, Error> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: the call takes numbers only.
        let socket = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if socket < 0 {
            return Err(Error::Socket(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        set(&socket, libc::SOL_PACKET, PACKET_VNET_HDR, 1)?;
        set(&socket, libc::SOL_PACKET, PACKET_AUXDATA, 1)?;
        set(
            &socket,
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            BUFFER_BYTES,
        )?;
        Ok(Self { socket, interface })
    }

    /// From here on it sees what passes.
    pub fn listen(&self) -> Result<(), Error> {
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: ALL_PROTOCOLS,
            sll_ifindex: self.interface as libc::c_int,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the address is a sockaddr_ll that outlives the call, passed
        // with its size.
        let bound = unsafe {
            libc::bind(
                self.socket.as_raw_fd(),
                std::ptr::from_ref(&address).cast(),
                std::mem::size_of_val(&address) as libc::socklen_t,
            )
        };
        match bound {
            0 => Ok(()),
            _ => Err(Error::Socket(io::Error::last_os_error())),
        }
    }

    /// It has seen enough: from here on its buffer is full after a few frames. Closing
    /// it takes the kernel some time, and so does giving it a filter; this doesn't.
    pub fn see_nothing(&self) -> Result<(), Error> {
        set(&self.socket, libc::SOL_SOCKET, libc::SO_RCVBUF, 0)
    }

    /// Forgets what it has seen.
    pub fn forget(&self) -> Result<(), Error> {
        let mut buffer = buffer();
        while self.receive(&mut buffer)?.is_some() {}
        Ok(())
    }

    /// The first `count` frames that it has seen, or is going to see before
    /// `deadline`.
    pub fn first(&self, count: usize, devid: u32, deadline: Instant) -> Result<Vec<Frame>, Error> {
        let mut buffer = buffer();
        let mut frames = Vec::new();
        while frames.len() < count {
            match self.receive(&mut buffer)? {
                Some(Seen {
                    outgoing: false, ..
                }) => {}
                Some(seen) => frames.push(seen.frame(devid, &buffer)?),
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                None => {
                    return Err(Error::Missed {
                        missing: count - frames.len(),
                        of: count,
                    })
                }
            }
        }
        let dropped = self.statistics()?.drops;
        if dropped > 0 {
            // Some of those that were read may be later ones.
            return Err(Error::Missed {
                missing: dropped as usize,
                of: count,
            });
        }
        Ok(frames)
    }

    fn statistics(&self) -> Result<Statistics, Error> {
        let mut found = Statistics::default();
        let mut length = std::mem::size_of_val(&found) as libc::socklen_t;
        // SAFETY: the value is a struct of plain numbers that outlives the call,
        // and length is its size.
        let got = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                std::ptr::from_mut(&mut found).cast(),
                &mut length,
            )
        };
        match got {
            0 => Ok(found),
            _ => Err(Error::Socket(io::Error::last_os_error())),
        }
    }

    /// One frame into `buffer`, if there is one.
    fn receive(&self, buffer: &mut [u8]) -> Result<Option<Seen>, Error> {
        // SAFETY: both are structs of plain numbers, for which zero is a value.
        let (mut address, mut message) = unsafe {
            (
                std::mem::zeroed::<libc::sockaddr_ll>(),
                std::mem::zeroed::<libc::msghdr>(),
            )
        };
        let mut data = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        // As u64, for the alignment of a cmsghdr.
        let mut control = [0u64; 16];
        message.msg_name = std::ptr::from_mut(&mut address).cast();
        message.msg_namelen = std::mem::size_of_val(&address) as libc::socklen_t;
        message.msg_iov = &mut data;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = std::mem::size_of_val(&control);
        // SAFETY: all that the message points to outlives the call and has the
        // lengths that are given with it.
        let got = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &mut message, 0) };
        let Ok(length) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EAGAIN) => Ok(None),
                Some(libc::EINTR) => self.receive(buffer),
                _ => Err(Error::Socket(error)),
            };
        };
        if length < OFFLOAD_BYTES + ADDRESSES_BYTES || message.msg_flags & libc::MSG_TRUNC != 0 {
            return Err(Error::Answer(format!("a frame of {length} bytes")));
        }
        Ok(Some(Seen {
            length,
            outgoing: address.sll_pkttype == libc::PACKET_OUTGOING,
            vlan: vlan(&message),
        }))
    }
}

fn buffer() -> Vec<u8> {
    vec![0; OFFLOAD_BYTES + FRAME_BYTES_MAX]
}

/// What was received beside the bytes.
struct Seen {
    length: usize,
    outgoing: bool,
    /// The tag that the kernel keeps beside a frame, as on the wire.
    vlan: Option<[u8; TAG_BYTES]>,
}

impl Seen {
    fn frame(&self, devid: u32, buffer: &[u8]) -> Result<Frame, Error> {
        let bad = || Error::Answer(format!("a frame of {} bytes", self.length));
        let received = buffer.get(..self.length).ok_or_else(bad)?;
        let (offload, bytes) = received.split_at_checked(OFFLOAD_BYTES).ok_or_else(bad)?;
        let mut offload: [u8; OFFLOAD_BYTES] = offload.try_into().map_err(|_| bad())?;
        let mut bytes = bytes.to_vec();
        if let Some(tag) = self.vlan {
            bytes.splice(ADDRESSES_BYTES..ADDRESSES_BYTES, tag);
            move_by_tag(&mut offload);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| now.as_nanos());
        Ok(Frame {
            devid,
            at_ns: u64::try_from(now).unwrap_or(u64::MAX),
            offload,
            bytes,
        })
    }
}

/// Headers are that much longer, where they are counted from the frame's start.
fn move_by_tag(offload: &mut [u8; OFFLOAD_BYTES]) {
    const NEEDS_CHECKSUM: u8 = 1;
    let [flags, kind, length_0, length_1, _, _, start_0, start_1, ..] = offload;
    let add = |low: &mut u8, high: &mut u8| {
        let moved = u16::from_ne_bytes([*low, *high]).saturating_add(TAG_BYTES as u16);
        [*low, *high] = moved.to_ne_bytes();
    };
    if *flags & NEEDS_CHECKSUM != 0 {
        add(start_0, start_1);
    }
    if *kind != 0 {
        add(length_0, length_1);
    }
}

fn vlan(message: &libc::msghdr) -> Option<[u8; TAG_BYTES]> {
    // SAFETY: the kernel has filled in the message, whose control buffer is
    // alive and aligned; CMSG_FIRSTHDR gives null or a header inside of it, and
    // the data behind that is as long as it says, which is compared.
    let auxdata = unsafe {
        let header = libc::CMSG_FIRSTHDR(message);
        let header = header.as_ref()?;
        let expected = libc::CMSG_LEN(std::mem::size_of::<Auxdata>() as u32) as usize;
        if header.cmsg_level != libc::SOL_PACKET
            || header.cmsg_type != PACKET_AUXDATA
            || header.cmsg_len < expected
        {
            return None;
        }
        libc::CMSG_DATA(header).cast::<Auxdata>().read_unaligned()
    };
    if auxdata.status & TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let protocol = match auxdata.status & TP_STATUS_VLAN_TPID_VALID {
        0 => libc::ETH_P_8021Q as u16,
        _ => auxdata.vlan_tpid,
    };
    let [a, b] = protocol.to_be_bytes();
    let [c, d] = auxdata.vlan_tci.to_be_bytes();
    Some([a, b, c, d])
}

fn set<T>(
    socket: &OwnedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: T,
) -> Result<(), Error> {
    // SAFETY: the value and what it may point to outlive the call, and it's passed
    // with its size; a kernel that expects another type refuses that.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(&value).cast(),
            std::mem::size_of_val(&value) as libc::socklen_t,
        )
    };
    match set {
        0 => Ok(()),
        _ => Err(Error::Socket(io::Error::last_os_error())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_that_stood_beside_the_frame_gets_back_into_it() {
        let mut buffer = vec![0; OFFLOAD_BYTES + 60];
        let offload = [1u8, 1, 66, 0, 168, 5, 34, 0, 16, 0];
        buffer[..OFFLOAD_BYTES].copy_from_slice(&offload);
        buffer[OFFLOAD_BYTES + ADDRESSES_BYTES] = 8;
        let seen = Seen {
            length: buffer.len(),
            outgoing: true,
            vlan: Some([0x81, 0, 0, 7]),
        };
        let frame = seen.frame(2, &buffer);
        assert!(frame.is_ok_and(|frame| {
            frame.bytes.len() == 64
                && frame.bytes[12..17] == [0x81, 0, 0, 7, 8]
                && frame.offload == [1, 1, 70, 0, 168, 5, 38, 0, 16, 0]
        }));
    }
}
