//! System calls that the standard library doesn't have, each wrapped once.

use std::ffi::CString;
use std::fs::File;
use std::io::Error;
use std::mem;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Mounts a file system; one that's mounted already is fine.
pub fn mount(kind: &str, target: &str) -> Result<(), String> {
    let name = text(kind)?;
    let place = text(target)?;
    // SAFETY: both texts are NUL-terminated and live through the call.
    let result = unsafe {
        libc::mount(
            name.as_ptr(),
            place.as_ptr(),
            name.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    let error = Error::last_os_error();
    if result == 0 || error.raw_os_error() == Some(libc::EBUSY) {
        return Ok(());
    }
    Err(format!("cannot mount {kind} on {target}: {error}"))
}

/// Loads a kernel module; one that's loaded already is fine.
pub fn load_module(path: &std::path::Path) -> Result<(), String> {
    let file =
        File::open(path).map_err(|error| format!("cannot open {}: {error}", path.display()))?;
    let options = text("")?;
    // SAFETY: the descriptor is open and the text NUL-terminated.
    let result = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            options.as_ptr(),
            0,
        )
    };
    let error = Error::last_os_error();
    if result == 0 || error.raw_os_error() == Some(libc::EEXIST) {
        return Ok(());
    }
    Err(format!("cannot load {}: {error}", path.display()))
}

/// Gives an interface an address and switches it on.
pub fn configure(interface: &str, ip: Ipv4Addr, prefix: u32) -> Result<(), String> {
    let socket = UdpSocket::bind("0.0.0.0:0")
        .map_err(|error| format!("cannot open a socket for {interface}: {error}"))?;
    let mask = Ipv4Addr::from(u32::MAX.checked_shl(32 - prefix.min(32)).unwrap_or(0));
    let mut request = interface_request(interface)?;
    request.ifr_ifru.ifru_addr = address(ip);
    interface_call(&socket, libc::SIOCSIFADDR, &mut request, interface)?;
    request.ifr_ifru.ifru_netmask = address(mask);
    interface_call(&socket, libc::SIOCSIFNETMASK, &mut request, interface)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    interface_call(&socket, libc::SIOCSIFFLAGS, &mut request, interface)
}

/// Waits for any child to end; its number and status.
pub fn wait_any() -> Option<(i32, i32)> {
    let mut status = 0;
    // SAFETY: the status is ours.
    let child = unsafe { libc::waitpid(-1, &mut status, 0) };
    (child > 0).then_some((child, status))
}

/// Ends this machine. Only a guest calls this, by the name that its kernel
/// knows; there's nothing to write back.
pub fn power_off() -> Result<(), String> {
    // SAFETY: no memory is involved.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    Err(format!("cannot power off: {}", Error::last_os_error()))
}

/// Asks the kernel to note when each datagram of a socket arrived.
pub fn timestamp_arrivals(socket: &UdpSocket) -> Result<(), String> {
    set_option(socket, libc::SO_TIMESTAMPNS, 1)?;
    room_for_bursts(socket)
}

/// Gives a socket room for what comes at once after a pause: by default that's some
/// fifty small datagrams, and the kernel drops the others.
pub fn room_for_bursts(socket: &UdpSocket) -> Result<(), String> {
    let room = 4 << 20;
    // Only root gets that much; others get what the kernel grants.
    set_option(socket, libc::SO_RCVBUFFORCE, room)
        .or_else(|_| set_option(socket, libc::SO_RCVBUF, room))
}

/// Receives a datagram: its length, and when it arrived by the wall clock.
pub fn receive_stamped(socket: &UdpSocket, buffer: &mut [u8]) -> Option<(usize, u64)> {
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    let mut control = [0u64; 16];
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = mem::size_of_val(&control);
    // SAFETY: all pointers in the message are to live buffers of these lengths.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, 0) };
    let count = usize::try_from(count).ok()?;
    // SAFETY: the message was filled in by the kernel and its buffers live.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&message) };
    while !header.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return headers inside the buffer.
        let (level, kind) = unsafe { ((*header).cmsg_level, (*header).cmsg_type) };
        if level == libc::SOL_SOCKET && kind == libc::SO_TIMESTAMPNS {
            // SAFETY: a control message of this type carries a timespec, not
            // necessarily aligned.
            let time: libc::timespec = unsafe {
                libc::CMSG_DATA(header)
                    .cast::<libc::timespec>()
                    .read_unaligned()
            };
            let ns = time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64;
            return Some((count, ns));
        }
        // SAFETY: as above.
        header = unsafe { libc::CMSG_NXTHDR(&message, header) };
    }
    None
}

/// Calls a function on SIGINT, SIGTERM and SIGHUP.
pub fn on_interrupt(handler: extern "C" fn(libc::c_int)) -> Result<(), String> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only sets a flag.
        let old = unsafe { libc::signal(signal, handler as libc::sighandler_t) };
        if old == libc::SIG_ERR {
            return Err(format!(
                "cannot handle signal {signal}: {}",
                Error::last_os_error()
            ));
        }
    }
    Ok(())
}

/// Has the kernel refuse a datagram that doesn't fit, and mark the others so that
/// nobody else breaks them up.
pub fn never_fragment(socket: &UdpSocket) -> Result<(), String> {
    set_option_of(
        socket,
        libc::IPPROTO_IP,
        libc::IP_MTU_DISCOVER,
        libc::IP_PMTUDISC_DO,
    )
}

/// Sees all frames of one interface, in both directions.
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Starts seeing them; a wait for one ends after 100 ms.
    pub fn open(interface: &str) -> Result<Self, String> {
        let failed = || format!("cannot listen to {interface}: {}", Error::last_os_error());
        // No protocol yet: until it's bound, it would see all interfaces' frames.
        // SAFETY: no memory is involved.
        let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
        if socket < 0 {
            return Err(failed());
        }
        // SAFETY: the descriptor was just opened and is nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let name = text(interface)?;
        // SAFETY: all-zero is a valid sockaddr_ll.
        let mut place: libc::sockaddr_ll = unsafe { mem::zeroed() };
        place.sll_family = libc::AF_PACKET as libc::c_ushort;
        place.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: the name is NUL-terminated and lives through the call.
        place.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) } as libc::c_int;
        if place.sll_ifindex == 0 {
            return Err(failed());
        }
        // SAFETY: the address is ours and as long as said.
        let result = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const place).cast(),
                mem::size_of_val(&place) as libc::socklen_t,
            )
        };
        if result != 0 {
            return Err(failed());
        }
        let wait = libc::timeval {
            tv_sec: 0,
            tv_usec: 100_000,
        };
        // SAFETY: the value is ours and as long as said.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const wait).cast(),
                mem::size_of_val(&wait) as libc::socklen_t,
            )
        };
        match result {
            0 => Ok(Self(socket)),
            _ => Err(failed()),
        }
    }

    /// The next frame's length, if one comes.
    pub fn receive(&self, buffer: &mut [u8]) -> Option<usize> {
        // SAFETY: the buffer is ours and as long as said.
        let count = unsafe {
            libc::recv(
                self.0.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
            )
        };
        usize::try_from(count).ok()
    }
}

fn set_option(socket: &UdpSocket, option: libc::c_int, value: libc::c_int) -> Result<(), String> {
    set_option_of(socket, libc::SOL_SOCKET, option, value)
}

fn set_option_of(
    socket: &UdpSocket,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> Result<(), String> {
    // SAFETY: the value is ours and as long as said.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            mem::size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(format!(
        "cannot set a socket's option: {}",
        Error::last_os_error()
    ))
}

fn interface_request(name: &str) -> Result<libc::ifreq, String> {
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(format!("{name} is too long for an interface's name"));
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte as libc::c_char;
    }
    Ok(request)
}

fn interface_call(
    socket: &UdpSocket,
    call: libc::c_ulong,
    request: &mut libc::ifreq,
    name: &str,
) -> Result<(), String> {
    // SAFETY: the request is ours, and of the type that these calls take.
    if unsafe { libc::ioctl(socket.as_raw_fd(), call as _, request) } == 0 {
        return Ok(());
    }
    Err(format!("cannot set up {name}: {}", Error::last_os_error()))
}

fn address(ip: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: all-zero is a valid sockaddr.
    let mut address: libc::sockaddr = unsafe { mem::zeroed() };
    address.sa_family = libc::AF_INET as libc::sa_family_t;
    // As in sockaddr_in: two bytes of port, then the address.
    for (slot, byte) in address.sa_data.iter_mut().skip(2).zip(ip.octets()) {
        *slot = byte as libc::c_char;
    }
    address
}

fn text(value: &str) -> Result<CString, String> {
    CString::new(value).map_err(|_| format!("{value:?} has a NUL in it"))
}
