//! From what a take has seen to what the snapshot says about itself.

use crate::disk::Piece;
use crate::domain::facts::Disk;
use crate::domain::messages::CutTimes;
use crate::domain::policy::Round;
use crate::domain::{DomainFacts, DomainKind, Vif};
use crate::image::{
    self, DomainType, Downtime, Member, MemberImage, Name, RanOn, Timeline, TimelineRound,
};

/// The largest difference between two members' cuts, in ns, given when each
/// was, by one clock, in ns.
pub fn skew_ns(cuts: &[i128]) -> u64 {
    let latest = cuts.iter().max().copied().unwrap_or_default();
    let earliest = cuts.iter().min().copied().unwrap_or_default();
    u64::try_from(latest - earliest).unwrap_or(u64::MAX)
}

/// A member's phases of standing still, in ns. The first begins with the
/// request, when the guest still runs, so the sum is an upper bound.
pub fn downtime(times: &CutTimes) -> Downtime {
    Downtime {
        suspend_ns: times.suspended_ns.saturating_sub(times.requested_ns),
        last_pages_ns: times.pages_done_ns.saturating_sub(times.suspended_ns),
        device_state_ns: times.saved_ns.saturating_sub(times.pages_done_ns),
        disks_ns: times.disks_ns.saturating_sub(times.saved_ns),
        resume_ns: times
            .resumed_ns
            .saturating_sub(times.disks_ns.max(times.saved_ns)),
    }
}

/// When things happened that aren't one member's alone, or come after its worker
/// has said all; by the host's own clock, in ns.
#[derive(Debug, Clone, Copy, Default)]
pub struct Marks {
    /// The member hovered from here on.
    pub hover_ns: Option<u64>,
    /// Frames began to be held.
    pub held_ns: u64,
    /// They had been let go.
    pub released_ns: u64,
    /// Members were told to write out.
    pub finalise_ns: u64,
    /// The member's part was on disk.
    pub stored_ns: u64,
}

/// What `show --timeline` draws.
pub fn timeline(rounds: &[Round], times: &CutTimes, marks: &Marks) -> Timeline {
    let cut_ns = times.suspended_ns;
    let before = |at_ns: u64| cut_ns.saturating_sub(at_ns);
    let after = |at_ns: u64| at_ns.saturating_sub(cut_ns);
    let rounds = rounds.iter().map(|round| TimelineRound {
        before_ns: before(round.began_ns),
        duration_ns: round.duration_ns,
        pages: round.pages,
        count: 1,
    });
    Timeline {
        rounds: image::few_rounds(rounds.collect()),
        hover_ns: marks.hover_ns.map(before),
        held_ns: before(marks.held_ns),
        released_ns: after(marks.released_ns),
        finalise_ns: after(marks.finalise_ns),
        stored_ns: after(marks.stored_ns),
    }
}

/// One member's entry.
pub fn member(
    host: &Name,
    facts: &DomainFacts,
    rounds: &[Round],
    times: &CutTimes,
    (image, disks): (MemberImage, Vec<Piece>),
) -> Result<Member, image::Error> {
    let precopied: u64 = rounds.iter().map(|round| round.pages).sum();
    Ok(Member {
        name: Name::new(&facts.name)?,
        host: host.clone(),
        domid: facts.domid,
        uuid: facts.uuid.clone(),
        domain_type: match facts.kind {
            DomainKind::Pv => DomainType::Pv,
            DomainKind::Pvh => DomainType::Pvh,
            DomainKind::Hvm => DomainType::Hvm,
        },
        memory_kib: facts.memory_kib,
        vcpus: facts.vcpus,
        ran_on: Some(ran_on(facts, &disks, &image)),
        downtime: downtime(times),
        rounds: u32::try_from(rounds.len() + 1).unwrap_or(u32::MAX),
        pages_sent: precopied + times.final_pages,
        pages_final_dirty: times.final_pages,
        stream_bytes: times.stream_bytes,
        diverged: false,
        throttled_to: None,
        uncaptured_disks: match disks.is_empty() {
            true => facts.writable_disks(),
            // All of them, or the take was refused.
            false => Vec::new(),
        },
        read_only_disks: facts.read_only_disks(),
        disks,
        late_frames: 0,
        recorded: None,
        timeline: None,
        image,
    })
}

fn ran_on(facts: &DomainFacts, captured: &[Piece], image: &MemberImage) -> RanOn {
    let disks = facts.disks.iter();
    let disks = disks.filter(|disk| !captured.iter().any(|piece| piece.vdev == disk.vdev));
    let bridges = facts.vifs.iter().filter_map(Vif::plain_bridge);
    let mut bridges: Vec<_> = bridges.map(str::to_owned).collect();
    bridges.sort_unstable();
    bridges.dedup();
    RanOn {
        // What Xen shows beside that, it emulates anywhere.
        cpu_features: match (image.cpu_features, facts.host_cpu) {
            (Some(shown), Some(host)) => Some(shown.both(host)),
            _ => None,
        },
        bridges,
        disks: disks.filter_map(Disk::path).map(str::to_owned).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skew_is_between_the_first_and_the_last_not_neighbours() {
        assert_eq!(skew_ns(&[50, 10, 30]), 40);
        assert_eq!(skew_ns(&[50]), 0);
        assert_eq!(skew_ns(&[]), 0);
    }

    #[test]
    fn the_phases_add_up_to_the_downtime() {
        let times = CutTimes {
            requested_ns: 100,
            suspended_ns: 160,
            pages_done_ns: 180,
            saved_ns: 200,
            disks_ns: 207,
            resumed_ns: 222,
            final_pages: 9,
            stream_bytes: 0,
        };
        assert_eq!(downtime(&times).total_ns(), 122);
        assert_eq!(downtime(&times).disks_ns, 7);
    }
}
