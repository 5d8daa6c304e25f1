//! Members' vifs, watched while they are cut.

use std::time::{Duration, Instant};

use netlink_packet_route::link::{LinkAttribute, LinkMessage, Stats64};
use netlink_packet_route::RouteNetlinkMessage;
use serde::{Deserialize, Serialize};

use super::hold::{counters, require_index, HoldRecord, LOOK_INTERVAL, QUIET_MIN};
use super::rings::{OnTheWay, Rings};
use super::{Error, Rtnl};

/// How long to wait for netback to take what a stopped member had sent: it does as
/// soon as it has a processor.
const TAKEN_MAX: Duration = Duration::from_millis(250);

/// A member's network at its cut.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    /// How many frames waited in each of its holds: what it had sent by then, and
    /// nobody had seen.
    pub queued: Vec<u32>,
    /// How many frames it had sent since its vifs exist.
    pub sent: u64,
    /// How many it had been given, less those that it hadn't read (counted in slots
    /// of its rings, of which a frame has one or some).
    pub given: u64,
}

/// A member's holds and vifs, to be looked at when there is no time to lose.
#[derive(Debug)]
pub struct Watched {
    rtnl: Rtnl,
    ifbs: Vec<(String, u32)>,
    vifs: Vec<Vif>,
}

#[derive(Debug)]
struct Vif {
    name: String,
    index: u32,
    rings: Option<Rings>,
    /// When it was found.
    first: Option<OnTheWay>,
    /// Its guest reads nothing.
    is_down: bool,
}

impl Vif {
    /// What is on its way, if that can be seen. A guest that had left frames in a ring
    /// long ago and has read none since has the card down: it isn't waited for.
    fn look(&mut self) -> Option<OnTheWay> {
        let seen = self.rings.as_mut()?.look()?;
        let down = |first: OnTheWay| first.unread > 0 && first.read_to == seen.read_to;
        self.is_down = self.first.is_some_and(down);
        match self.is_down {
            true => Some(OnTheWay {
                unread: 0,
                waiting: 0,
                ..seen
            }),
            false => Some(seen),
        }
    }
}

impl Watched {
    /// Finds them, so that looking takes one message each.
    pub fn open(records: &[HoldRecord]) -> Result<Self, Error> {
        let mut watched = Self {
            rtnl: Rtnl::open()?,
            ifbs: Vec::new(),
            vifs: Vec::new(),
        };
        for record in records {
            let ifb = require_index(&record.ifb)?;
            watched.ifbs.push((record.ifb.clone(), ifb));
            let mut rings = Rings::open(&record.vif);
            let vif = Vif {
                name: record.vif.clone(),
                index: require_index(&record.vif)?,
                first: rings.as_mut().and_then(Rings::look),
                rings,
                is_down: false,
            };
            if vif.rings.is_none() {
                log::debug!("{}: its rings can't be seen (is debugfs there?)", vif.name);
            }
            watched.vifs.push(vif);
        }
        Ok(watched)
    }

    /// Looks at a member that has just stopped, as soon as netback has taken from
    /// its rings what it had left there. Where these can't be seen, nothing must have
    /// come for a moment; whether more comes later is for the caller to see.
    pub fn stopped(&mut self) -> Result<Stopped, Error> {
        let start = Instant::now();
        let (mut sent, mut since) = (self.taken()?, start);
        while start.elapsed() < TAKEN_MAX {
            let (on_the_way, all_seen) = self.on_the_way();
            let is_taken = on_the_way.untaken == 0 && !on_the_way.taking;
            if is_taken && (all_seen || since.elapsed() >= QUIET_MIN) {
                break;
            }
            std::thread::sleep(LOOK_INTERVAL);
            let now = self.taken()?;
            if now != sent {
                (sent, since) = (now, Instant::now());
            }
        }
        let mut queued = Vec::new();
        for (ifb, index) in &self.ifbs {
            queued.push(counters(&mut self.rtnl, ifb, *index)?.queued_frames);
        }
        let unread = self.on_the_way().0.unread;
        Ok(Stopped {
            queued,
            sent: self.taken()?,
            given: self.handed()?.saturating_sub(u64::from(unread)),
        })
    }

    /// How many frames the guest has sent, through all its vifs, since these exist:
    /// also those that are still in its rings.
    pub fn sent(&mut self) -> Result<u64, Error> {
        let untaken = u64::from(self.on_the_way().0.untaken);
        Ok(self.taken()?.saturating_add(untaken))
    }

    /// How many frames have been sent to the guest, through all its vifs, since these
    /// exist: also those that wait for it.
    pub fn given(&mut self) -> Result<u64, Error> {
        let waiting = self.waiting();
        Ok(self.handed()?.saturating_add(u64::from(waiting)))
    }

    /// What comes for the guest: how much has come so far, and whether all of it has
    /// been read, as far as can be seen.
    fn arrived(&mut self) -> Result<(u64, bool), Error> {
        let is_read = self.on_the_way().0.unread == 0 && self.waiting() == 0;
        Ok((self.handed()?, is_read))
    }

    /// The rings of all vifs, and whether they could all be seen.
    fn on_the_way(&mut self) -> (OnTheWay, bool) {
        let mut sum = OnTheWay::default();
        let mut all_seen = true;
        for vif in &mut self.vifs {
            match vif.look() {
                Some(seen) => sum.add(seen),
                None => all_seen = false,
            }
        }
        (sum, all_seen)
    }

    /// How many frames wait for the guest to have room for them.
    fn waiting(&mut self) -> u32 {
        let mut sum = self.on_the_way().0.waiting;
        for vif in self.vifs.iter().filter(|vif| !vif.is_down) {
            // Some queues can't be looked at: those that never hold anything.
            let queue = counters(&mut self.rtnl, &vif.name, vif.index);
            sum = sum.saturating_add(queue.map_or(0, |queue| queue.queued_frames));
        }
        sum
    }

    fn taken(&mut self) -> Result<u64, Error> {
        self.sum(|stats| stats.rx_packets)
    }

    fn handed(&mut self) -> Result<u64, Error> {
        self.sum(|stats| stats.tx_packets)
    }

    fn sum(&mut self, of: impl Fn(&Stats64) -> u64) -> Result<u64, Error> {
        let mut sum = 0u64;
        for vif in &self.vifs {
            let mut request = LinkMessage::default();
            request.header.index = vif.index;
            let what = format!("look at {}", vif.name);
            let found = self
                .rtnl
                .get(&what, RouteNetlinkMessage::GetLink(request))?;
            let RouteNetlinkMessage::NewLink(link) = found else {
                return Err(Error::Answer(what));
            };
            let mut attributes = link.attributes.iter();
            let count = attributes.find_map(|attribute| match attribute {
                LinkAttribute::Stats64(stats) => Some(of(stats)),
                _ => None,
            });
            sum = sum.saturating_add(count.unwrap_or_default());
        }
        Ok(sum)
    }
}

/// Waits until the members have read what was sent to them before all was held: true
/// if they have within `read_max`.
///
/// That's when each has had read all there was, at one moment or another: what comes
/// later is from outside. What is still on the wire between hosts shows when it
/// arrives, so nothing must have come for a moment; outsiders may never stop, so that
/// is waited for only until `quiet_max`.
pub fn drain(
    members: &mut [&mut Watched],
    quiet_max: Duration,
    read_max: Duration,
) -> Result<bool, Error> {
    let start = Instant::now();
    let mut has_read = vec![false; members.len()];
    let (mut before, mut since) = (Vec::new(), start);
    loop {
        let mut counts = Vec::new();
        for (member, has_read) in members.iter_mut().zip(&mut has_read) {
            let (count, is_read) = member.arrived()?;
            counts.push(count);
            *has_read |= is_read;
        }
        if counts != before {
            (before, since) = (counts, Instant::now());
        }
        let all_read = has_read.iter().all(|has_read| *has_read);
        if all_read && (since.elapsed() >= QUIET_MIN || start.elapsed() >= quiet_max) {
            return Ok(true);
        }
        if start.elapsed() >= read_max {
            return Ok(false);
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}
