//! Playing frames back: they come in on a vif as if its guest had sent them.
//!
//! ```text
//!  write() ──► vnepD.N (tap) ingress ── tc, bpf_redirect ──► vifD.N ingress ──► …
//! ```
//!
//! A tap device hands on what is written to it as received: with its checksum
//! and segmentation as the sender left them, of any length, with any VLAN tag. What
//! the host itself sends to the new device goes the other way, to a reader that
//! doesn't exist, and so not among the frames. The device ends with the process
//! at the latest.
//!
//! tc hands them over, since nftables' `fwd` can only send a frame out by a
//! device. Its qdisc is the tap's: one on the *vif* would lose frames to the
//! guest, see `nft.rs`. What it does there is four instructions of BPF: `mirred`
//! drops what is for a device without a carrier, and a vif has none before its
//! front end is connected.
//!
//! Numbers are those of `linux/bpf.h`.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use netlink_packet_route::RouteNetlinkMessage;

use super::frames::{Frame, FRAME_BYTES_MAX};
use super::hold::require_index;
use super::{Error, Rtnl};

/// Names of our tap devices start with this.
const TAP_PREFIX: &str = "vnep";
const PRIORITY: u32 = 1;
/// Frames on their way into a vif; far below `net.core.netdev_max_backlog`.
pub const BACKLOG_MAX: usize = 128;

const PROG_LOAD: libc::c_long = 5;
const PROG_TYPE_SCHED_CLS: u32 = 3;
const HELPER_REDIRECT: i32 = 23;
const REDIRECT_INGRESS: i32 = 1;

/// `struct bpf_insn`.
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the lower four bits, source in the upper.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// The part of `union bpf_attr` that loading a program needs.
#[repr(C)]
struct LoadProgram {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

/// The way into one vif. It's closed when dropped.
pub struct Player {
    tap: File,
    vif: String,
}

impl Player {
    /// Opens the way into `vif`, the interface of this device of a domain.
    pub fn open(rtnl: &mut Rtnl, domid: u32, devid: u32, vif: &str) -> Result<Self, Error> {
        let vif_index = require_index(vif)?;
        let name = format!("{TAP_PREFIX}{domid}.{devid}");
        let tap = make_tap(&name).map_err(|source| Error::Refused {
            what: format!("create {name} (is the kernel module 'tun' there?)"),
            source,
        })?;
        let tap_index = require_index(&name)?;
        let mut link = LinkMessage::default();
        link.header.index = tap_index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        rtnl.ack(
            &format!("bring {name} up"),
            RouteNetlinkMessage::SetLink(link),
            0,
        )?;
        rtnl.ack(
            &format!("add an ingress qdisc to {name} (is the kernel module 'sch_ingress' there?)"),
            RouteNetlinkMessage::NewQueueDiscipline(ingress(tap_index)),
            NLM_F_CREATE | NLM_F_EXCL,
        )?;
        let what = format!("redirect {name} to {vif} (is the kernel module 'cls_bpf' there?)");
        let program = load(&redirect(vif_index)).map_err(|source| Error::Refused {
            what: what.clone(),
            source,
        })?;
        rtnl.ack(
            &what,
            RouteNetlinkMessage::NewTrafficFilter(filter(tap_index, &program)),
            NLM_F_CREATE | NLM_F_EXCL,
        )?;
        Ok(Self {
            tap,
            vif: vif.to_owned(),
        })
    }

    /// Has one frame come in. A moment later it's where the vif's own frames
    /// go; until then the kernel has room for [`BACKLOG_MAX`].
    pub fn play(&mut self, frame: &Frame) -> Result<(), Error> {
        let cannot = |source| Error::Refused {
            what: format!(
                "play a frame of {} bytes to {}",
                frame.bytes.len(),
                self.vif
            ),
            source,
        };
        if frame.bytes.len() > FRAME_BYTES_MAX {
            return Err(cannot(std::io::ErrorKind::InvalidData.into()));
        }
        let message = [frame.offload.as_slice(), &frame.bytes].concat();
        let written = self.tap.write(&message).map_err(cannot)?;
        if written == message.len() {
            Ok(())
        } else {
            Err(cannot(std::io::ErrorKind::WriteZero.into()))
        }
    }
}

/// A new tap device. It's there for as long as the file is open.
fn make_tap(name: &str) -> std::io::Result<File> {
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    set_tap_name(tap.as_fd(), name)?;
    Ok(tap)
}

fn set_tap_name(tap: BorrowedFd<'_>, name: &str) -> std::io::Result<()> {
    if name.len() >= libc::IFNAMSIZ {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: flags as libc::c_short,
        },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: the descriptor is open, and the request is an ifreq with a name
    // that ends with a NUL; the kernel reads and writes no more than that.
    match unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &mut request) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The hook for what comes in.
fn ingress(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index as i32);
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = handle(0);
    message.attributes = vec![TcAttribute::Kind(String::from("ingress"))];
    message
}

/// A program that has a frame come in on a device: `return
/// bpf_redirect(index, BPF_F_INGRESS)`.
fn redirect(index: u32) -> [Instruction; 4] {
    let instruction = |code, registers, immediate| Instruction {
        code,
        registers,
        offset: 0,
        immediate,
    };
    const MOV64_IMMEDIATE: u8 = 0xb7;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    [
        instruction(MOV64_IMMEDIATE, 1, index as i32),
        instruction(MOV64_IMMEDIATE, 2, REDIRECT_INGRESS),
        instruction(CALL, 0, HELPER_REDIRECT),
        instruction(EXIT, 0, 0),
    ]
}

fn load(program: &[Instruction]) -> std::io::Result<OwnedFd> {
    let license = c"LGPL-2.1-only";
    let request = LoadProgram {
        kind: PROG_TYPE_SCHED_CLS,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: the request is as long as is said, and the program and its licence, a
    // string that ends with a NUL, outlive the call, which only reads them.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            PROG_LOAD,
            std::ptr::from_ref(&request),
            std::mem::size_of_val(&request),
        )
    };
    match i32::try_from(fd) {
        // SAFETY: a new descriptor that nobody else knows. The kernel closes it
        // at an exec.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Has a program decide about all that comes in on a device.
fn filter(index: u32, program: &OwnedFd) -> TcMessage {
    let mut message = TcMessage::with_index(index as i32);
    message.header.parent = handle(0);
    let every_protocol = (libc::ETH_P_ALL as u16).to_be();
    message.header.info = PRIORITY << 16 | u32::from(every_protocol);
    let options = [
        TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32),
        TcFilterBpfOption::ProgName(String::from("vne-play")),
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    message.attributes = vec![
        TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
        TcAttribute::Options(options.into_iter().map(TcOption::Bpf).collect()),
    ];
    message
}

/// Of an ingress qdisc, and what is below it.
fn handle(minor: u16) -> TcHandle {
    TcHandle {
        major: u16::MAX,
        minor,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_what_the_kernel_reads() {
        assert_eq!(std::mem::size_of::<Instruction>(), 8);
        assert_eq!(std::mem::size_of::<LoadProgram>(), 48);
        let [to, how, call, exit] = redirect(7);
        assert_eq!((to.registers, to.immediate), (1, 7));
        assert_eq!((how.registers, how.immediate), (2, 1));
        assert_eq!((call.immediate, exit.code), (23, 0x95));
    }
}
