//! A hold: one vif's outgoing frames wait in this dom0, none lost, in order.
//!
//! ```text
//! vifD.N ingress ── nft fwd, every protocol ──► vnehD.N (ifb) ── plug ──► back to the vif's
//!                                                                        normal way in
//! ```
//!
//! Remus does the same for IPv4 alone; ARP and IPv6 would slip by. The link
//! never goes down: that would purge the guest's neighbours and routes.
//!
//! Frames come back behind the hook that they left at, so they don't go round.
//! A hold is built open ([`Hold::prepare`]), so that blocking and releasing
//! are one netlink message each. It is kernel state that outlives this
//! process, so a [`HoldRecord`] of it is written down before it is built.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage, State};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcStats2};
use netlink_packet_route::RouteNetlinkMessage;
use serde::{Deserialize, Serialize};

use super::links;
use super::tap::Tap;
use super::{Error, Frame, Nft, Rtnl};

/// Names of our ifb devices start with this.
pub const IFB_PREFIX: &str = "vneh";

const TCA_OPTIONS: u16 = 2;
/// How long a released queue may take to run empty before it's torn down.
const DRAIN_MAX: Duration = Duration::from_secs(2);

/// How long nothing must have come through a vif for its redirect to go.
pub(super) const QUIET_MIN: Duration = Duration::from_millis(2);
/// How long to wait for that; frames flow meanwhile.
const QUIET_WAIT_MAX: Duration = Duration::from_millis(500);
pub(super) const LOOK_INTERVAL: Duration = Duration::from_micros(500);

/// `struct tc_plug_qopt` (linux/pkt_sched.h): what a plug qdisc can be told.
#[derive(Clone, Copy)]
enum Plug {
    Block = 0,
    ReleaseIndefinite = 2,
    Limit = 3,
}

/// All that is needed to take a hold down, also in another process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldRecord {
    /// The vif in dom0, such as `vif3.0`.
    pub vif: String,
    /// Our ifb device.
    pub ifb: String,
    /// Xen's number of the vif.
    #[serde(default)]
    pub devid: u32,
}

impl HoldRecord {
    /// The record of the hold for one vif of a domain.
    pub fn new(domid: u32, devid: u32, vif: &str) -> Self {
        Self {
            vif: vif.to_owned(),
            ifb: format!("{IFB_PREFIX}{domid}.{devid}"),
            devid,
        }
    }

    /// The record of the hold for the tap device through which the device model
    /// sends what an HVM guest gives to its emulated card, if there is one.
    pub fn of_emulated(domid: u32, devid: u32, vif: &str) -> Option<Self> {
        let vif = format!("{vif}-emu");
        index_of(&vif)?;
        Some(Self {
            vif,
            ifb: format!("{IFB_PREFIX}{domid}.{devid}e"),
            devid,
        })
    }

    /// Whether this can be a record of ours. Records are read back from a
    /// file, and taking a hold down deletes the devices that it names.
    pub fn is_plausible(&self) -> bool {
        let name_fits = |name: &str| !name.is_empty() && name.len() < libc::IFNAMSIZ;
        name_fits(&self.vif) && name_fits(&self.ifb) && self.ifb.starts_with(IFB_PREFIX)
    }

    /// Lets go of what is held and removes the device. The redirect must be
    /// gone already, with the [`Nft`] that it was made over. What is already
    /// gone is no error, so this can be repeated.
    pub fn remove(&self, rtnl: &mut Rtnl) -> Result<(), Error> {
        if let Some(ifb_index) = index_of(&self.ifb) {
            absent_is_fine(plug(rtnl, &self.ifb, ifb_index, Plug::ReleaseIndefinite, 0))?;
            wait_drained(rtnl, &self.ifb, ifb_index);
        }
        self.discard(rtnl)
    }

    /// Removes the device with all that is held in it, for a sender that has
    /// never been. What is already gone is no error.
    pub fn discard(&self, rtnl: &mut Rtnl) -> Result<(), Error> {
        let Some(ifb_index) = index_of(&self.ifb) else {
            return Ok(());
        };
        let mut link = LinkMessage::default();
        link.header.index = ifb_index;
        absent_is_fine(rtnl.ack(
            &format!("remove {}", self.ifb),
            RouteNetlinkMessage::DelLink(link),
            0,
        ))
    }
}

/// What the queue has counted since the hold was built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldCounters {
    /// Frames waiting.
    pub queued_frames: u32,
    /// Bytes waiting.
    pub queued_bytes: u32,
    /// Frames that found the queue full.
    pub dropped_frames: u32,
}

/// A hold that has been built.
#[derive(Debug)]
pub struct Hold {
    record: HoldRecord,
    ifb_index: u32,
    limit_bytes: u32,
    /// Sees what leaves it.
    tap: Tap,
}

impl Hold {
    /// Builds the hold open: frames take the way through it, and none waits.
    pub fn prepare(
        rtnl: &mut Rtnl,
        nft: &mut Nft,
        record: &HoldRecord,
        limit_bytes: u32,
    ) -> Result<Self, Error> {
        require_index(&record.vif)?;
        match Self::build(rtnl, nft, record, limit_bytes) {
            Ok(hold) => Ok(hold),
            Err(error) => {
                if let Err(undo) = record.remove(rtnl) {
                    log::warn!("{}: {undo}", record.vif);
                }
                Err(error)
            }
        }
    }

    fn build(
        rtnl: &mut Rtnl,
        nft: &mut Nft,
        record: &HoldRecord,
        limit_bytes: u32,
    ) -> Result<Self, Error> {
        let ifb = &record.ifb;
        let mut link = LinkMessage::default();
        link.attributes.push(LinkAttribute::IfName(ifb.clone()));
        link.attributes
            .push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)]));
        rtnl.ack(
            &format!("create {ifb} (is the kernel module 'ifb' there?)"),
            RouteNetlinkMessage::NewLink(link),
            NLM_F_CREATE | NLM_F_EXCL,
        )?;
        let ifb_index = require_index(ifb)?;
        // What this host itself sends to it unasked would wait, and be recorded,
        // among the guest's frames.
        links::keep_out(rtnl, ifb, ifb_index)?;
        links::start(rtnl, ifb, ifb_index)?;

        // Open before the first frame comes: a new plug holds.
        rtnl.ack(
            &format!("add a plug qdisc to {ifb} (is the kernel module 'sch_plug' there?)"),
            RouteNetlinkMessage::NewQueueDiscipline(plug_message(
                ifb_index,
                Plug::Limit,
                limit_bytes,
            )),
            NLM_F_CREATE | NLM_F_EXCL,
        )?;
        plug(rtnl, ifb, ifb_index, Plug::ReleaseIndefinite, 0)?;

        nft.redirect(ifb, &record.vif, ifb_index)?;
        Ok(Self {
            record: record.clone(),
            ifb_index,
            limit_bytes,
            tap: Tap::open(ifb_index)?,
        })
    }

    /// What it was built from.
    pub fn record(&self) -> HoldRecord {
        self.record.clone()
    }

    /// The vif whose frames this holds.
    pub fn vif(&self) -> &str {
        &self.record.vif
    }

    /// From here on frames wait. One netlink message.
    pub fn block(&self, rtnl: &mut Rtnl) -> Result<(), Error> {
        plug(rtnl, &self.record.ifb, self.ifb_index, Plug::Block, 0)?;
        self.tap.listen()
    }

    /// What has left it until now left before it was blocked, perhaps on another
    /// processor: it isn't what is recorded.
    pub fn begin_record(&self) -> Result<(), Error> {
        self.tap.forget()
    }

    /// The first `count` frames that left it since [`Hold::begin_record`]; it was
    /// released, so they have or soon will.
    pub fn recorded(&self, count: u32, deadline: Instant) -> Result<Vec<Frame>, Error> {
        let frames = self.tap.first(count as usize, self.record.devid, deadline);
        self.tap.see_nothing()?;
        frames
    }

    /// Lets all waiting frames go, in order, and later ones pass.
    pub fn release(&self, rtnl: &mut Rtnl) -> Result<(), Error> {
        plug(
            rtnl,
            &self.record.ifb,
            self.ifb_index,
            Plug::ReleaseIndefinite,
            0,
        )
    }

    /// What waits, and what was lost.
    pub fn counters(&self, rtnl: &mut Rtnl) -> Result<HoldCounters, Error> {
        counters(rtnl, &self.record.ifb, self.ifb_index)
    }

    /// Fails if the queue ever overflowed: frames were lost, so the cut isn't
    /// what it promises.
    pub fn check_overflow(&self, counters: HoldCounters) -> Result<(), Error> {
        if counters.dropped_frames == 0 {
            return Ok(());
        }
        Err(Error::Overflow {
            vif: self.record.vif.clone(),
            limit_bytes: self.limit_bytes,
            dropped: counters.dropped_frames,
        })
    }

    /// Releases and removes the hold, after its redirect.
    pub fn remove(self, rtnl: &mut Rtnl) -> Result<(), Error> {
        self.record.remove(rtnl)
    }

    /// Removes the hold with all that is in it, after its redirect.
    pub fn discard(self, rtnl: &mut Rtnl) -> Result<(), Error> {
        self.record.discard(rtnl)
    }
}

fn absent_is_fine(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(error) if error.is_absent() => Ok(()),
        other => other,
    }
}

fn index_of(name: &str) -> Option<u32> {
    let name = std::ffi::CString::new(name).ok()?;
    // SAFETY: the argument is a NUL-terminated string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}

pub(super) fn require_index(name: &str) -> Result<u32, Error> {
    index_of(name).ok_or_else(|| Error::Refused {
        what: format!("find the interface {name}"),
        source: std::io::Error::from_raw_os_error(libc::ENODEV),
    })
}

fn plug(rtnl: &mut Rtnl, ifb: &str, index: u32, action: Plug, limit: u32) -> Result<(), Error> {
    let what = match action {
        Plug::Block => "hold frames in",
        Plug::ReleaseIndefinite => "release the frames in",
        Plug::Limit => "set the size of",
    };
    rtnl.ack(
        &format!("{what} {ifb}"),
        RouteNetlinkMessage::NewQueueDiscipline(plug_message(index, action, limit)),
        0,
    )
}

fn plug_message(index: u32, action: Plug, limit_bytes: u32) -> TcMessage {
    let mut options = [0; 8];
    options[..4].copy_from_slice(&(action as i32).to_ne_bytes());
    options[4..].copy_from_slice(&limit_bytes.to_ne_bytes());
    let mut message = TcMessage::with_index(index as i32);
    message.header.parent = TcHandle::ROOT;
    message.attributes = vec![
        TcAttribute::Kind("plug".to_owned()),
        // Raw, not nested: the library has no type for this qdisc.
        TcAttribute::Other(DefaultNla::new(TCA_OPTIONS, options.to_vec())),
    ];
    message
}

pub(super) fn counters(rtnl: &mut Rtnl, ifb: &str, index: u32) -> Result<HoldCounters, Error> {
    let what = format!("count the frames in {ifb}");
    let mut request = TcMessage::with_index(index as i32);
    request.header.parent = TcHandle::ROOT;
    let found = rtnl.get(&what, RouteNetlinkMessage::GetQueueDiscipline(request))?;
    let RouteNetlinkMessage::NewQueueDiscipline(qdisc) = found else {
        return Err(Error::Answer(what));
    };
    let mut attributes = qdisc.attributes.into_iter();
    let queue = attributes.find_map(|attribute| match attribute {
        TcAttribute::Stats2(stats) => stats.into_iter().find_map(|stat| match stat {
            TcStats2::Queue(queue) => Some(queue),
            _ => None,
        }),
        _ => None,
    });
    queue
        .map(|queue| HoldCounters {
            queued_frames: queue.qlen,
            queued_bytes: queue.backlog,
            dropped_frames: queue.drops,
        })
        .ok_or_else(|| Error::Answer(format!("the counters of {ifb}")))
}

/// Waits until holds that are blocked have handed on all that had left them before,
/// or until `deadline`: an ifb does so in a softirq, which may have to wait for a
/// processor.
pub fn wait_handed_on(holds: &[Hold], rtnl: &mut Rtnl, deadline: Instant) -> Result<(), Error> {
    loop {
        let traffic = traffic(rtnl)?;
        let inside = |hold: &Hold| traffic.get(&hold.ifb_index).map_or(0, |seen| seen.inside);
        if holds.iter().all(|hold| inside(hold) == 0) || Instant::now() >= deadline {
            return Ok(());
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// Removes the redirects of `holds`, which are released.
///
/// A frame that comes right after the redirect has gone could overtake one that
/// is still on its way through the ifb, which a tasklet hands on after the batch
/// that it came in. So each redirect goes when its vif has been quiet for a
/// moment; one that never is loses its redirect all the same.
pub fn remove_redirects(holds: &[Hold], rtnl: &mut Rtnl, mut nft: Nft) {
    let start = Instant::now();
    let mut waiting: Vec<_> = holds.iter().map(|hold| (hold, None, start)).collect();
    while !waiting.is_empty() && start.elapsed() < QUIET_WAIT_MAX {
        let traffic = match traffic(rtnl) {
            Ok(traffic) => traffic,
            Err(error) => {
                log::debug!("{error}");
                break;
            }
        };
        let now = Instant::now();
        waiting.retain_mut(|(hold, before, quiet_since)| {
            let Some(seen) = traffic.get(&hold.ifb_index).copied() else {
                return false;
            };
            if Some(seen.taken) != *before || seen.inside > 0 {
                *before = Some(seen.taken);
                *quiet_since = now;
            }
            if now.duration_since(*quiet_since) < QUIET_MIN {
                return true;
            }
            if let Err(error) = nft.remove(&hold.record.ifb) {
                log::debug!("{error}");
            }
            false
        });
        std::thread::sleep(LOOK_INTERVAL);
    }
    for (hold, ..) in waiting {
        log::info!("{}: never quiet, frames may change places", hold.vif());
    }
    // Those that are left go with the socket that owns them.
    drop(nft);
}

/// Deleting a device drops what is in it, so it has to be empty first: the
/// plug, and the ifb's own queue behind it.
fn wait_drained(rtnl: &mut Rtnl, ifb: &str, index: u32) {
    let start = Instant::now();
    while start.elapsed() < DRAIN_MAX {
        let plug = counters(rtnl, ifb, index).map(|counters| counters.queued_frames);
        let behind = traffic(rtnl).map(|all| all.get(&index).map_or(0, |seen| seen.inside));
        match (plug, behind) {
            (Ok(0), Ok(0)) => return,
            (Ok(_), Ok(_)) => std::thread::sleep(LOOK_INTERVAL),
            (Err(error), _) | (_, Err(error)) => {
                log::debug!("{ifb}: {error}");
                return;
            }
        }
    }
    log::warn!(
        "{ifb}: frames are still in it after {} s",
        DRAIN_MAX.as_secs()
    );
}

/// Whether netback has connected a vif's front end. The link is up some
/// milliseconds before that, and frames to the guest are dropped meanwhile. True
/// where the kernel doesn't tell.
pub fn has_front_end(domid: u32, devid: u32) -> bool {
    let path = format!("/sys/bus/xen-backend/devices/vif-{domid}-{devid}/state");
    std::fs::read_to_string(path).map_or(true, |state| state.trim_end() == "Connected")
}

/// Those of these interfaces whose links are down: a vif's is up, and its bridge
/// passes its frames on, when its front end takes frames. One that is gone isn't
/// waited for.
pub fn links_down<'a>(rtnl: &mut Rtnl, vifs: &[&'a str]) -> Result<Vec<&'a str>, Error> {
    let links = rtnl.dump(
        "list interfaces",
        RouteNetlinkMessage::GetLink(LinkMessage::default()),
    )?;
    let mut down = Vec::new();
    for message in links {
        let RouteNetlinkMessage::NewLink(link) = message else {
            continue;
        };
        // Not the carrier: that is told a moment before all who care have heard.
        let is_up =
            |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::OperState(State::Up));
        if link.attributes.iter().any(is_up) {
            continue;
        }
        let named = link
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => vifs.iter().find(|vif| *vif == name),
                _ => None,
            });
        down.extend(named);
    }
    Ok(down)
}

/// What an interface has seen.
#[derive(Debug, Clone, Copy)]
struct Traffic {
    /// Frames that an ifb was given, since it exists.
    taken: u64,
    /// Those of them that it hasn't handed on. An ifb counts as received what
    /// it is given to send, as sent what it hands on, and as received and
    /// dropped what the host itself sends to it (IPv6 does, unasked).
    inside: u64,
}

/// All interfaces' traffic, by index.
fn traffic(rtnl: &mut Rtnl) -> Result<HashMap<u32, Traffic>, Error> {
    let links = rtnl.dump(
        "list interfaces",
        RouteNetlinkMessage::GetLink(LinkMessage::default()),
    )?;
    let seen = links.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewLink(link) => {
            let index = link.header.index;
            link.attributes
                .into_iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::Stats64(stats) => {
                        let gone = stats.tx_packets + stats.tx_dropped + stats.rx_dropped;
                        let traffic = Traffic {
                            taken: stats.rx_packets,
                            inside: stats.rx_packets.saturating_sub(gone),
                        };
                        Some((index, traffic))
                    }
                    _ => None,
                })
        }
        _ => None,
    });
    Ok(seen.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::Emitable;

    fn bytes(message: &TcMessage) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    #[test]
    fn plug_options_are_the_kernels_struct() {
        let bytes = bytes(&plug_message(9, Plug::Limit, 0x0102_0304));
        let tail = &bytes[bytes.len() - 12..];
        assert_eq!(tail, &[12, 0, 2, 0, 3, 0, 0, 0, 4, 3, 2, 1]);
    }

    #[test]
    fn a_record_from_a_file_cannot_name_a_device_that_is_not_ours() {
        let record = HoldRecord::new(3, 0, "vif3.0");
        assert!(record.is_plausible());
        for ifb in ["eth0", "", "vneh-much-too-long-a-name"] {
            let record = HoldRecord {
                ifb: ifb.to_owned(),
                ..record.clone()
            };
            assert!(!record.is_plausible(), "{ifb}");
        }
    }
}
