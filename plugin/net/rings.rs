//! What is on its way between a vif's netback and its front end.
//!
//! netback's counters tell what it has taken and given, not what waits in the
//! shared rings and in its own queue: a frame that the guest has put into its ring,
//! or hasn't yet fetched, is in no counter. Linux tells the rings' indexes in
//! debugfs (drivers/net/xen-netback/xenbus.c, `io_ring_qN`; Debian builds it in).
//! The rings' meaning is that of Xen's public/io/ring.h and netif.h.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

const FOLDER: &str = "/sys/kernel/debug/xen-netback";
/// One queue's file takes less than 1 KiB.
const FILE_BYTES_MAX: u64 = 8 << 10;
/// More queues than netback gives a vif (one for each of dom0's processors).
const QUEUES_MAX: usize = 1024;
/// `NAPIF_STATE_SCHED`: the poll that takes the guest's frames is due or running.
const NAPI_SCHEDULED: u64 = 1;

/// The rings of one vif, open to be looked at again and again.
#[derive(Debug)]
pub struct Rings(Vec<File>);

/// What is on its way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OnTheWay {
    /// From the guest: ring slots whose frames netback hasn't passed on yet. A frame
    /// has one or some.
    pub untaken: u32,
    /// Whether netback is about to take more, or passing on what it has taken.
    pub taking: bool,
    /// To the guest: frames in netback's queue, and ring slots that it's just filling.
    pub waiting: u32,
    /// To the guest: ring slots that the guest hasn't read yet.
    pub unread: u32,
    /// How far it has read: moves on when it reads.
    pub read_to: u32,
}

impl Rings {
    /// `None` where the kernel doesn't tell: debugfs isn't mounted or is locked
    /// down, or the interface isn't netback's.
    pub fn open(vif: &str) -> Option<Self> {
        let folder = Path::new(FOLDER).join(vif);
        let mut files = Vec::new();
        for number in 0..QUEUES_MAX {
            match File::open(folder.join(format!("io_ring_q{number}"))) {
                Ok(file) => files.push(file),
                Err(_) => break,
            }
        }
        (!files.is_empty()).then_some(Self(files))
    }

    /// Looks at all queues. `None` when the vif has gone or the kernel tells it in
    /// another form.
    pub fn look(&mut self) -> Option<OnTheWay> {
        let mut sum = OnTheWay::default();
        for file in &mut self.0 {
            let mut text = String::new();
            file.rewind().ok()?;
            file.take(FILE_BYTES_MAX).read_to_string(&mut text).ok()?;
            sum.add(parse(&text)?);
        }
        Some(sum)
    }
}

impl OnTheWay {
    /// Of this and another queue together.
    pub fn add(&mut self, other: Self) {
        self.untaken = self.untaken.saturating_add(other.untaken);
        self.taking |= other.taking;
        self.waiting = self.waiting.saturating_add(other.waiting);
        self.unread = self.unread.saturating_add(other.unread);
        self.read_to = self.read_to.wrapping_add(other.read_to);
    }
}

/// One queue's file.
fn parse(text: &str) -> Option<OnTheWay> {
    let transmit = section(text, "TX: ", "RX: ")?;
    let receive = section(text, "RX: ", "NAPI ")?;
    let rest = text.get(text.find("NAPI state:")?..)?;

    let requested = number(transmit, "req prod")?;
    let taken = number(transmit, " cons")?;
    let fetched = number(rest, "TX queue len")?;
    let state = word(rest, "NAPI state:").map(|word| u64::from_str_radix(word, 16));
    let taking = state?.ok()? & NAPI_SCHEDULED != 0;
    // The indexes run freely and wrap. The guest writes some of them, and can
    // write anything: there are no more slots than this.
    let slots = number(transmit, "nr_ents")?;
    let untaken = requested.wrapping_sub(taken).min(slots);

    let slots = number(receive, "nr_ents")?;
    let given = number(receive, "rsp prod")?;
    let filling = number(receive, " cons")?.wrapping_sub(given).min(slots);
    // A guest asks to be woken by the next response when it has read all others.
    let wanted = number(section(receive, "rsp prod", "")?, " event")?;
    let unread = given.wrapping_add(1).wrapping_sub(wanted);
    let unread = match unread > slots {
        // It wants to be woken later: it has read them all.
        true if wanted.wrapping_sub(given) <= slots => 0,
        _ => unread.min(slots),
    };
    Some(OnTheWay {
        untaken: untaken.saturating_add(fetched),
        taking,
        waiting: number(section(rest, "Rx internal queue", "")?, " pkts")?.saturating_add(filling),
        unread,
        read_to: wanted,
    })
}

/// What stands from `from` to the next `to`, which is nothing for the text's end.
fn section<'a>(text: &'a str, from: &str, to: &str) -> Option<&'a str> {
    let text = text.get(text.find(from)?..)?;
    match to {
        "" => Some(text),
        to => text.get(..text.find(to)?),
    }
}

fn word<'a>(text: &'a str, after: &str) -> Option<&'a str> {
    let rest = text.get(text.find(after)? + after.len()..)?;
    rest.split_whitespace().next()
}

fn number(text: &str, after: &str) -> Option<u32> {
    word(text, after)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(taken: u32, state: &str, event: u32, pkts: u32) -> String {
        format!(
            "Queue 0\nTX: nr_ents 256\nreq prod 23 (1) cons {taken} (0) event 23 (1)\n\
             rsp prod 22 (base) pvt 22 (0) event 23 (1)\n\
             pending prod 278 pending cons 22 nr_pending_reqs 0\n\
             dealloc prod 9 dealloc cons 9 dealloc_queue 0\n\n\
             RX: nr_ents 256\nreq prod 279 (256) cons 23 (0) event 24 (1)\n\
             rsp prod 23 (base) pvt 23 (0) event {event} (1)\n\n\
             NAPI state: {state} NAPI weight: 64 TX queue len 0\n\
             Credit timer_pending: 0, credit: 18446744073709551615, usec: 0\n\
             remaining: 18446744073709551615, expires: 0, now: 4294920105\n\n\
             Rx internal queue: len 0 max 524288 pkts {pkts} running\n"
        )
    }

    fn parsed(text: &str) -> Option<(u32, u32, u32)> {
        parse(text).map(|queue| (queue.untaken, queue.waiting, queue.unread))
    }

    #[test]
    fn an_idle_vif_has_nothing_on_the_way() {
        assert_eq!(parsed(&file(23, "10", 24, 0)), Some((0, 0, 0)));
    }

    #[test]
    fn what_neither_side_has_taken_is_seen() {
        assert_eq!(parsed(&file(22, "10", 24, 0)), Some((1, 0, 0)));
        assert!(parse(&file(23, "11", 24, 0)).is_some_and(|queue| queue.taking));
        assert_eq!(parsed(&file(23, "10", 22, 7)), Some((0, 7, 2)));
        let filling = file(23, "10", 24, 1).replace("cons 23 (0) event 24", "cons 25 (2) event 24");
        assert_eq!(parsed(&filling), Some((0, 3, 0)));
    }

    #[test]
    fn a_guest_that_lies_about_its_ring_is_believed_within_bounds() {
        assert_eq!(parsed(&file(4_000_000_000, "10", 24, 0)), Some((256, 0, 0)));
        assert_eq!(parsed(&file(23, "10", 90, 0)), Some((0, 0, 0)));
        assert_eq!(parsed(&file(23, "10", 3_000_000_000, 0)), Some((0, 0, 256)));
    }

    #[test]
    fn another_form_is_no_answer() {
        assert_eq!(parse(""), None);
        assert_eq!(parse("Queue 0\nNAPI state: 10"), None);
    }
}
