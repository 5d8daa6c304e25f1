//! When things happened to a member of a snapshot, for people who want to see
//! where the time went. Nothing else depends on it.

use serde::{Deserialize, Serialize};

/// Most rounds in a manifest: it goes from host to host, and a member that
/// hovers for minutes has had thousands.
pub const ROUNDS_MAX: usize = 64;

/// A member's take. All times are in ns from the member's own cut, that is the
/// moment at which it stood still: so they need no clock but that of its host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// Rounds of pre-copy, the oldest first, at most [`ROUNDS_MAX`].
    pub rounds: Vec<TimelineRound>,
    /// How long before its cut it began to hover, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hover_ns: Option<u64>,
    /// How long before its cut its frames began to be held.
    pub held_ns: u64,
    /// How long after its cut they had all been let go.
    pub released_ns: u64,
    /// How long after its cut it was told to write out what it had in memory.
    pub finalise_ns: u64,
    /// How long after its cut its part was on disk.
    pub stored_ns: u64,
}

/// One round of pre-copy, or several that followed each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineRound {
    /// How long before the member's cut it began.
    pub before_ns: u64,
    /// How long it took; of several, from the first one's begin to the last
    /// one's end.
    pub duration_ns: u64,
    /// Pages that it sent: those that were dirty when it began.
    pub pages: u64,
    /// How many rounds this was.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub count: u32,
}

fn one() -> u32 {
    1
}

fn is_one(count: &u32) -> bool {
    *count == 1
}

impl TimelineRound {
    /// This one and the next.
    fn with(self, next: Self) -> Self {
        let end_before_ns = next.before_ns.saturating_sub(next.duration_ns);
        Self {
            before_ns: self.before_ns,
            duration_ns: self.before_ns.saturating_sub(end_before_ns),
            pages: self.pages.saturating_add(next.pages),
            count: self.count.saturating_add(next.count),
        }
    }

    /// Pages of one of its rounds, on average.
    pub fn pages_each(&self) -> u64 {
        self.pages / u64::from(self.count.max(1))
    }
}

/// Puts neighbours together until there are few enough. The first rounds are
/// each of its own kind, and so are those right before the cut; what there may
/// be thousands of is hovering between them.
pub fn few(mut rounds: Vec<TimelineRound>) -> Vec<TimelineRound> {
    const KEPT: usize = ROUNDS_MAX / 4;
    while rounds.len() > ROUNDS_MAX {
        let last = rounds.split_off(rounds.len() - KEPT);
        let middle = rounds.split_off(KEPT);
        let pairs = middle.chunks(2);
        rounds.extend(pairs.filter_map(|pair| pair.iter().copied().reduce(TimelineRound::with)));
        rounds.extend(last);
    }
    rounds
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds of 4 ms every 10 ms, the last one 10 ms before the cut.
    fn rounds(count: u64) -> Vec<TimelineRound> {
        (0..count)
            .map(|number| TimelineRound {
                before_ns: (count - number) * 10_000_000,
                duration_ns: 4_000_000,
                pages: 100 + number % 7,
                count: 1,
            })
            .collect()
    }

    #[test]
    fn a_few_rounds_stay_as_they_are() {
        assert_eq!(few(rounds(64)), rounds(64));
        assert_eq!(few(Vec::new()), []);
    }

    #[test]
    fn many_become_few_and_none_of_what_they_sent_is_lost() {
        for count in [65, 100, 3_001, 50_000] {
            let all = rounds(count);
            let merged = few(all.clone());
            assert!(merged.len() <= ROUNDS_MAX, "{count}: {}", merged.len());
            let pages = |rounds: &[TimelineRound]| rounds.iter().map(|r| r.pages).sum::<u64>();
            assert_eq!(pages(&merged), pages(&all));
            let counted: u64 = merged.iter().map(|round| u64::from(round.count)).sum();
            assert_eq!(counted, count);
            // The first and the last ones are still themselves.
            assert_eq!(merged[..16], all[..16]);
            assert_eq!(merged[merged.len() - 16..], all[all.len() - 16..]);
            // None overlaps the next.
            for pair in merged.windows(2) {
                assert!(pair[0].before_ns - pair[0].duration_ns >= pair[1].before_ns);
            }
        }
    }
}
