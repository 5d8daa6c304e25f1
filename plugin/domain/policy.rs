//! The pre-copy policy: when a member has converged, how it hovers, when it
//! is cut. Pure: statistics and time in, a step out.
//!
//! libxenguest asks twice per round (`send_memory_live` in `xg_sr_save.c`):
//! before it sends the pages that a round found dirty, and after it has sent
//! them, before it looks for new ones. Hovering is waiting at the second
//! place: no page is in flight there, so a cut that comes meanwhile has only
//! what the guest dirtied since the last look left to copy.
//!
//! A look costs the guest a lot: Xen has to see each page's next write again, and
//! for PV guests throws all shadow page tables away (`sh_clean_dirty_bitmap`). So a
//! member hovers with few looks, just enough to know that it stays converged, and
//! makes those that shorten the cut when that is about to come: it approaches.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What the policy aims at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyConfig {
    /// A member has converged when copying what is dirty would take at most
    /// this long, in ns.
    pub last_copy_ns_max: u64,
    /// Shortest time from a round to the next look at the dirty pages while
    /// hovering, in ns.
    pub hover_ns_min: u64,
    /// Longest such time, in ns.
    pub hover_ns_max: u64,
}

impl PolicyConfig {
    /// Whether it's within what the options for it allow.
    pub fn is_sane(&self) -> bool {
        const MINUTE_NS: u64 = 60_000_000_000;
        self.last_copy_ns_max <= MINUTE_NS
            && (1_000_000..=MINUTE_NS).contains(&self.hover_ns_min)
            && (self.hover_ns_min..=MINUTE_NS).contains(&self.hover_ns_max)
    }
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            last_copy_ns_max: 50_000_000,
            hover_ns_min: 1_000_000_000,
            hover_ns_max: 10_000_000_000,
        }
    }
}

/// A later round says something about the speed of copying from this size on.
const SPEED_PAGES_MIN: u64 = 1024;
/// What part of the longest last copy is little enough not to try for less.
const SMALL: f64 = 0.1;
/// A round that has more than this part of the last one's pages has settled:
/// the guest dirties as fast as rounds follow each other.
const SHRINKS: f64 = 0.7;
/// A hovering member waits this many times as long as the rounds of a look took.
const HOVER_PER_ROUND: u64 = 9;
/// Rounds of an approach, at most: each has fewer pages than the one before.
const APPROACH_ROUNDS_MAX: u32 = 4;

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Send the next round at once.
    Continue,
    /// Stay between two rounds until this time, or until the cut is called.
    WaitUntil {
        /// `CLOCK_MONOTONIC` time in ns.
        time_ns: u64,
    },
    /// After [`Policy::approach`]: nothing is gained by another round.
    Near,
}

/// One finished round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Number, from 0: the one that sends all memory.
    pub iteration: u32,
    /// Pages that it sent.
    pub pages: u64,
    /// How long sending took, in ns.
    pub duration_ns: u64,
    /// When it began, `CLOCK_MONOTONIC` of its host in ns; 0 if that isn't
    /// known.
    #[serde(default)]
    pub began_ns: u64,
}

/// The state of one member's pre-copy.
#[derive(Debug)]
pub struct Policy {
    config: PolicyConfig,
    sending: Option<(u32, u64, u64)>,
    per_page_ns: f64,
    last_pages: u64,
    converged: bool,
    /// The last round was followed by a wait.
    has_waited: bool,
    /// How long rounds took since the last wait, in ns.
    awake_ns: u64,
    /// Rounds left to the approach.
    approach: Option<u32>,
}

impl Policy {
    /// A member of which nothing has been sent.
    pub fn new(config: PolicyConfig) -> Self {
        Self {
            config,
            sending: None,
            per_page_ns: 0.0,
            last_pages: 0,
            converged: false,
            has_waited: false,
            awake_ns: 0,
            approach: None,
        }
    }

    /// Whether what is left would be copied within the aim.
    pub fn converged(&self) -> bool {
        self.converged
    }

    /// The cut is about to come. From the next round on it's [`Step::Continue`] until
    /// it's [`Step::Near`].
    pub fn approach(&mut self) {
        self.approach.get_or_insert(APPROACH_ROUNDS_MAX);
    }

    /// A round with `pages` dirty pages is about to be sent.
    pub fn round_begins(&mut self, iteration: u32, pages: u64, now_ns: u64) {
        self.sending = Some((iteration, pages, now_ns));
    }

    /// The round has been sent.
    pub fn round_ends(&mut self, now_ns: u64) -> (Option<Round>, Step) {
        let round = self
            .sending
            .take()
            .map(|(iteration, pages, began_ns)| Round {
                iteration,
                pages,
                duration_ns: now_ns.saturating_sub(began_ns),
                began_ns,
            });
        let before = self.last_pages;
        if let Some(round) = round {
            self.learn(round);
        }
        let step = match (self.approach, round) {
            (Some(left), Some(round)) => self.step_nearer(left, round, before),
            (None, Some(round)) if self.converged && self.is_within_aim(round) => Step::WaitUntil {
                time_ns: now_ns.saturating_add(self.hover_ns()),
            },
            _ => Step::Continue,
        };
        self.has_waited = matches!(step, Step::WaitUntil { .. });
        if self.has_waited {
            self.awake_ns = 0;
        }
        (round, step)
    }

    fn learn(&mut self, round: Round) {
        // The best that was seen: a slow round says more about who else was
        // busy than about this member. Small ones are mostly fixed cost.
        if round.pages >= SPEED_PAGES_MIN || round.iteration == 0 {
            let per_page_ns = round.duration_ns as f64 / round.pages.max(1) as f64;
            self.per_page_ns = match round.iteration {
                0 => per_page_ns,
                _ => per_page_ns.min(self.per_page_ns),
            };
        }
        // How an approach goes changes nothing about a member's having converged.
        if round.iteration > 0 && self.approach.is_none() {
            if !self.converged {
                self.awake_ns = 0;
            }
            self.awake_ns = self.awake_ns.saturating_add(round.duration_ns);
            self.converged = self.has_converged(round);
        }
        self.last_pages = round.pages;
    }

    fn has_converged(&self, round: Round) -> bool {
        let shrinks = shrinks(round, self.last_pages);
        if self.converged {
            // What got dirty in a whole wait is more than a cut will find. The rounds
            // that follow it back to back tell.
            self.is_within_aim(round) || self.has_waited || shrinks
        } else {
            // While rounds still shrink a lot, the next one costs little and makes the
            // downtime shorter.
            self.is_within_aim(round) && (self.is_small(round) || !shrinks)
        }
    }

    fn copy_ns(&self, round: Round) -> f64 {
        round.pages as f64 * self.per_page_ns
    }

    fn is_within_aim(&self, round: Round) -> bool {
        self.copy_ns(round) <= self.config.last_copy_ns_max as f64
    }

    fn is_small(&self, round: Round) -> bool {
        self.copy_ns(round) <= self.config.last_copy_ns_max as f64 * SMALL
    }

    fn hover_ns(&self) -> u64 {
        let share = self.awake_ns.saturating_mul(HOVER_PER_ROUND);
        share.clamp(self.config.hover_ns_min, self.config.hover_ns_max)
    }

    /// The first round of an approach has what got dirty in all of the last wait: how
    /// it compares with the one before that wait says nothing.
    fn step_nearer(&mut self, left: u32, round: Round, before: u64) -> Step {
        self.approach = Some(left.saturating_sub(1));
        let first = left == APPROACH_ROUNDS_MAX;
        if left <= 1 || self.is_small(round) || (!first && !shrinks(round, before)) {
            return Step::Near;
        }
        Step::Continue
    }
}

/// Whether a round is a lot smaller than the one before.
fn shrinks(round: Round, before: u64) -> bool {
    (round.pages as f64) < before as f64 * SHRINKS
}

/// The policy's config in the units of the command line.
impl PolicyConfig {
    /// With another aim for the last copy.
    pub fn with_last_copy(mut self, aim: Duration) -> Self {
        self.last_copy_ns_max = u64::try_from(aim.as_nanos()).unwrap_or(u64::MAX);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn round(policy: &mut Policy, now: &mut u64, iteration: u32, pages: u64) -> Step {
        policy.round_begins(iteration, pages, *now);
        *now += pages * 10_000;
        let (_, step) = policy.round_ends(*now);
        if let Step::WaitUntil { time_ns } = step {
            *now = time_ns;
        }
        step
    }

    #[test]
    fn the_first_round_alone_never_counts_as_converged() {
        let mut policy = Policy::new(PolicyConfig::default());
        let mut now = 0;
        assert_eq!(round(&mut policy, &mut now, 0, 100), Step::Continue);
        assert!(!policy.converged());
    }

    #[test]
    fn hovers_when_little_is_left_and_goes_on_when_much_is() {
        let mut policy = Policy::new(PolicyConfig::default());
        let mut now = 0;
        round(&mut policy, &mut now, 0, 65_536);
        // 10 us a page: 20,000 pages take 200 ms.
        assert_eq!(round(&mut policy, &mut now, 1, 20_000), Step::Continue);
        assert!(matches!(
            round(&mut policy, &mut now, 2, 100),
            Step::WaitUntil { .. }
        ));
        assert!(policy.converged());
        // Of a whole wait.
        assert_eq!(round(&mut policy, &mut now, 3, 20_000), Step::Continue);
        assert!(policy.converged());
        // And no less in the time of one round.
        assert_eq!(round(&mut policy, &mut now, 4, 20_000), Step::Continue);
        assert!(!policy.converged());
    }

    #[test]
    fn stays_converged_while_it_sends_what_got_dirty_in_a_wait() {
        let mut now = 0;
        let mut policy = hovering(&mut now, 100);
        for (iteration, pages) in [(3, 20_000), (4, 10_000)] {
            assert_eq!(
                round(&mut policy, &mut now, iteration, pages),
                Step::Continue
            );
            assert!(policy.converged());
        }
        // 340 ms of rounds altogether.
        policy.round_begins(5, 4_000, now);
        now += 40 * MS;
        let time_ns = now + 9 * 340 * MS;
        assert_eq!(policy.round_ends(now).1, Step::WaitUntil { time_ns });
        assert!(policy.converged());
    }

    #[test]
    fn goes_on_while_rounds_shrink_although_the_aim_is_reached() {
        let mut policy = Policy::new(PolicyConfig::default());
        let mut now = 0;
        round(&mut policy, &mut now, 0, 65_536);
        // 40 ms, 20 ms, 16 ms: the aim is 50.
        assert_eq!(round(&mut policy, &mut now, 1, 4_000), Step::Continue);
        assert_eq!(round(&mut policy, &mut now, 2, 2_000), Step::Continue);
        assert_ne!(round(&mut policy, &mut now, 3, 1_600), Step::Continue);
        // Within the aim it stays converged, whichever way it goes.
        assert_ne!(round(&mut policy, &mut now, 4, 4_000), Step::Continue);
        assert_ne!(round(&mut policy, &mut now, 5, 1_000), Step::Continue);
    }

    #[test]
    fn a_slow_first_round_is_not_held_against_a_member_for_ever() {
        let mut policy = Policy::new(PolicyConfig::default());
        policy.round_begins(0, 1_000, 0);
        // 1 ms a page: 2,000 pages would take 2 s.
        policy.round_ends(1_000 * MS);
        let mut now = 1_000 * MS;
        // They take 20 ms.
        round(&mut policy, &mut now, 1, 2_000);
        round(&mut policy, &mut now, 2, 2_000);
        assert!(policy.converged());
    }

    /// Converged at once, as all rounds are alike.
    fn hovering(now: &mut u64, pages: u64) -> Policy {
        let mut policy = Policy::new(PolicyConfig::default());
        round(&mut policy, now, 0, 65_536);
        round(&mut policy, now, 1, pages);
        round(&mut policy, now, 2, pages);
        assert!(policy.converged());
        policy
    }

    #[test]
    fn looks_while_hovering_take_a_tenth_of_the_time_at_most() {
        let mut now = 0;
        let mut policy = hovering(&mut now, 1);
        let config = PolicyConfig::default();
        for (pages, waits_ns) in [
            (1, config.hover_ns_min),
            // Slower than it was ever seen before, so that it stays converged.
            (2, 9 * 300 * MS),
            (3, config.hover_ns_max),
        ] {
            let took_ns = [0, MS, 300 * MS, 60_000 * MS][pages as usize];
            policy.round_begins(3, pages, now);
            now += took_ns;
            let (_, step) = policy.round_ends(now);
            let time_ns = now + waits_ns;
            assert_eq!(step, Step::WaitUntil { time_ns });
            now = time_ns;
        }
    }

    #[test]
    fn approaches_in_one_round_when_little_is_left() {
        let mut now = 0;
        let mut policy = hovering(&mut now, 1);
        policy.approach();
        assert_eq!(round(&mut policy, &mut now, 3, 100), Step::Near);
    }

    #[test]
    fn stays_converged_however_its_approach_goes() {
        let mut now = 0;
        let mut policy = hovering(&mut now, 1);
        policy.approach();
        round(&mut policy, &mut now, 3, 20_000);
        assert!(policy.converged());
    }

    #[test]
    fn approaches_for_as_long_as_rounds_shrink_and_not_for_ever() {
        let rounds = |of: &[u64]| {
            let mut now = 0;
            let mut policy = hovering(&mut now, 3_000);
            policy.approach();
            let steps = of.iter().map(|pages| {
                // Ordered again: nothing changes.
                policy.approach();
                round(&mut policy, &mut now, 3, *pages)
            });
            steps.take_while(|step| *step == Step::Continue).count() + 1
        };
        // The first one may be as large as those before.
        assert_eq!(rounds(&[3_000, 1_000, 900, 1]), 3);
        assert_eq!(rounds(&[3_000, 3_000, 1]), 2);
        assert_eq!(rounds(&[20_000, 10_000, 5_000, 2_500, 1_200]), 4);
    }
}
