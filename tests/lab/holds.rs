//! What a hold promises, without a guest: a veth pair is the vif, a second one
//! leads out of the bridge that both are on.
//!
//! `holds [ipv4-only]`: with that word frames get to the hold by a redirect for
//! IPv4 alone, as Remus has it; then this has to fail.
//!
//! Runs in a dom0, as the development kernel may have no `plug`.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use xl_vne::net::{frames, Hold, HoldRecord, Nft, Rtnl, Watched};
use xl_vne::sentence;

type Result<T> = std::result::Result<T, String>;

/// The guest's end, the vif; a listener's end, and its port.
const LINKS: [&str; 4] = ["vht-g", "vht-v", "vht-o", "vht-p"];
const BRIDGE: &str = "vht-br";
const LIMIT_BYTES: u32 = 256 << 10;
const FRAME_BYTES: usize = 100;
/// IPv4, ARP, IPv6, a VLAN, and what nobody knows.
const PROTOCOLS: [u16; 5] = [0x0800, 0x0806, 0x86dd, 0x8100, 0x88b5];
const DESTINATION: [u8; 6] = [2, 0, 0, 0, 0, 2];
const SOURCE: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn main() -> ExitCode {
    let ipv4_only = std::env::args()
        .nth(1)
        .is_some_and(|word| word == "ipv4-only");
    let told = build().and_then(|()| check(ipv4_only));
    tear_down();
    match told {
        Ok(told) => {
            println!("{told}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("holds: {error}");
            ExitCode::FAILURE
        }
    }
}

fn ip(line: &str) -> Result<()> {
    run("ip", line)
}

fn run(program: &str, line: &str) -> Result<()> {
    let output = Command::new(program).args(line.split(' ')).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{program} {line}: {}",
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

fn build() -> Result<()> {
    let [guest, vif, out, port] = LINKS;
    ip(&format!(
        "link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
    ))?;
    ip(&format!("link add {guest} type veth peer name {vif}"))?;
    ip(&format!("link add {out} type veth peer name {port}"))?;
    for link in [vif, port] {
        ip(&format!("link set {link} master {BRIDGE}"))?;
    }
    for link in [guest, vif, out, port, BRIDGE] {
        // Else the kernels' own would come in between.
        ip(&format!("link set {link} addrgenmode none"))?;
        ip(&format!("link set {link} up"))?;
    }
    Ok(())
}

fn tear_down() {
    // What is gone is gone.
    for link in [LINKS[0], LINKS[2], BRIDGE] {
        let _ = ip(&format!("link delete {link}"));
    }
}

fn check(ipv4_only: bool) -> Result<String> {
    let [guest, vif, out, _] = LINKS;
    let say = |error| sentence(&error);
    let (sender, listener) = (Raw::open(guest)?, Raw::open(out)?);
    let mut rtnl = Rtnl::open().map_err(say)?;
    let mut nft = Nft::open().map_err(say)?;
    let record = HoldRecord::new(0, 99, vif);
    let hold = Hold::prepare(&mut rtnl, &mut nft, &record, LIMIT_BYTES).map_err(say)?;
    if ipv4_only {
        nft.remove(&record.ifb).map_err(say)?;
        let table = format!("netdev {}", record.ifb);
        run("nft", &format!("add table {table}"))?;
        run(
            "nft",
            &format!(
                "add chain {table} hold {{ type filter hook ingress device {vif} priority 0 ; }}"
            ),
        )?;
        run(
            "nft",
            &format!(
                "add rule {table} hold meta protocol ip fwd to {}",
                record.ifb
            ),
        )?;
    }
    let result = through(&hold, &mut rtnl, &sender, &listener, &record);
    if ipv4_only {
        run("nft", &format!("delete table netdev {}", record.ifb))?;
    }
    let told = result.and_then(|told| {
        overflow(&hold, &mut rtnl, &sender)?;
        Ok(told)
    });
    // The vif vanishes under it, as when a guest is destroyed.
    hold.block(&mut rtnl).map_err(say)?;
    ip(&format!("link delete {guest}"))?;
    hold.release(&mut rtnl).map_err(say)?;
    drop(nft);
    hold.remove(&mut rtnl).map_err(say)?;
    match ip(&format!("link show {}", record.ifb)) {
        Ok(()) => Err(format!("{} is left", record.ifb)),
        Err(_) => told,
    }
}

/// Frames of all protocols pass an open hold, wait in a blocked one, and come out
/// of it in order; what is recorded is what was sent.
fn through(
    hold: &Hold,
    rtnl: &mut Rtnl,
    sender: &Raw,
    listener: &Raw,
    record: &HoldRecord,
) -> Result<String> {
    let say = |error| sentence(&error);
    let first: Vec<_> = (0..10).map(frame).collect();
    send_all(sender, &first)?;
    expect(listener, &first, "an open hold")?;

    hold.block(rtnl).map_err(say)?;
    hold.begin_record().map_err(say)?;
    let held: Vec<_> = (10..60).map(frame).collect();
    send_all(sender, &held)?;
    std::thread::sleep(Duration::from_millis(100));
    if let Some(seen) = listener.receive()? {
        let protocol = u16::from_be_bytes([seen[12], seen[13]]);
        return Err(format!("a frame of protocol {protocol:04x} wasn't held"));
    }
    let mut watched = Watched::open(std::slice::from_ref(record)).map_err(say)?;
    let queued = watched.stopped().map_err(say)?.queued;
    if queued != [held.len() as u32] {
        return Err(format!("{queued:?} frames wait, and not {}", held.len()));
    }
    // What comes later goes out as well, and isn't recorded.
    let later: Vec<_> = (60..70).map(frame).collect();
    send_all(sender, &later)?;
    hold.release(rtnl).map_err(say)?;
    let deadline = Instant::now() + Duration::from_secs(2);
    let recorded = hold.recorded(held.len() as u32, deadline).map_err(say)?;
    let bytes: Vec<_> = recorded.iter().map(|frame| frame.bytes.clone()).collect();
    if bytes != held {
        return Err(String::from("what was recorded isn't what was sent"));
    }
    expect(listener, &[held.clone(), later].concat(), "a released hold")?;
    let file = frames::encode(&recorded);
    if frames::decode(&file).map_err(say)? != recorded {
        return Err(String::from("the file isn't what was recorded"));
    }
    Ok(format!(
        "{} frames of {} protocols were held, recorded, and let go in order",
        held.len(),
        PROTOCOLS.len()
    ))
}

fn overflow(hold: &Hold, rtnl: &mut Rtnl, sender: &Raw) -> Result<()> {
    let say = |error| sentence(&error);
    hold.block(rtnl).map_err(say)?;
    // A tag that stands beside its frame doesn't count.
    let more = LIMIT_BYTES as usize / (FRAME_BYTES - 4) + 10;
    send_all(sender, &(0..more).map(frame).collect::<Vec<_>>())?;
    std::thread::sleep(Duration::from_millis(100));
    let counters = hold.counters(rtnl).map_err(say)?;
    hold.release(rtnl).map_err(say)?;
    match hold.check_overflow(counters) {
        Err(_) => Ok(()),
        Ok(()) => Err(format!("{counters:?} is no overflow")),
    }
}

fn frame(number: usize) -> Vec<u8> {
    let protocol = PROTOCOLS[number % PROTOCOLS.len()];
    let mut frame = [&DESTINATION[..], &SOURCE, &protocol.to_be_bytes()].concat();
    if protocol == 0x8100 {
        frame.extend([0, 7, 0x88, 0xb5]);
    }
    frame.extend(number.to_be_bytes());
    frame.resize(FRAME_BYTES, 0);
    frame
}

fn send_all(sender: &Raw, frames: &[Vec<u8>]) -> Result<()> {
    frames.iter().try_for_each(|frame| sender.send(frame))
}

/// These come, in this order, and nothing else.
fn expect(listener: &Raw, frames: &[Vec<u8>], what: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut seen = Vec::new();
    while seen.len() < frames.len() && Instant::now() < deadline {
        match listener.receive()? {
            Some(frame) => seen.push(frame),
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    match seen == frames {
        true => Ok(()),
        false => Err(format!(
            "{} of {} frames came out of {what}, or in another order",
            seen.len(),
            frames.len()
        )),
    }
}

/// A packet socket for frames as they are.
struct Raw(OwnedFd);

impl Raw {
    fn open(interface: &str) -> Result<Self> {
        let failed = |what: &str| format!("{what}: {}", std::io::Error::last_os_error());
        let name = std::ffi::CString::new(interface).map_err(|error| error.to_string())?;
        // SAFETY: the name is NUL-terminated and outlives the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: the call takes numbers only.
        let socket = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                i32::from(protocol),
            )
        };
        if socket < 0 {
            return Err(failed("a packet socket"));
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        // What is held counts as not sent yet.
        let bytes: libc::c_int = 64 << 20;
        // SAFETY: the value is an int that outlives the call, passed with its size.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_SNDBUFFORCE,
                std::ptr::from_ref(&bytes).cast(),
                std::mem::size_of_val(&bytes) as libc::socklen_t,
            )
        };
        if set != 0 {
            return Err(failed("SO_SNDBUFFORCE"));
        }
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: protocol,
            sll_ifindex: index as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the address is a sockaddr_ll that outlives the call, passed
        // with its size.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                std::ptr::from_ref(&address).cast(),
                std::mem::size_of_val(&address) as libc::socklen_t,
            )
        };
        match bound {
            0 => Ok(Self(socket)),
            _ => Err(failed(interface)),
        }
    }

    fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: the buffer outlives the call and has the length given.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        match usize::try_from(sent) {
            Ok(length) if length == frame.len() => Ok(()),
            _ => Err(format!("send: {}", std::io::Error::last_os_error())),
        }
    }

    /// The next of our frames, if there is one. VLAN tags are beside a frame here:
    /// as it was sent, it has one.
    fn receive(&self) -> Result<Option<Vec<u8>>> {
        let mut buffer = [0u8; 2048];
        loop {
            // SAFETY: the buffer outlives the call and has the length given.
            let got = unsafe {
                libc::recv(
                    self.0.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    0,
                )
            };
            let Ok(length) = usize::try_from(got) else {
                let error = std::io::Error::last_os_error();
                return match error.kind() {
                    std::io::ErrorKind::WouldBlock => Ok(None),
                    _ => Err(format!("receive: {error}")),
                };
            };
            let frame = &buffer[..length];
            if length < 12 || frame[..6] != DESTINATION {
                continue;
            }
            let mut frame = frame.to_vec();
            if length == FRAME_BYTES - 4 {
                frame.splice(12..12, [0x81, 0, 0, 7]);
            }
            return Ok(Some(frame));
        }
    }
}
