//! Which snapshots a rule keeps.

use super::name::SnapshotId;

/// What to keep of a VNE's snapshots. One that any part wants kept is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// The newest ones, so many.
    pub last: u32,
    /// Those that were begun within so many seconds of now.
    pub within_s: u64,
    /// The newest one of each of the last so many days that have any, in UTC.
    pub daily: u32,
    /// The same with weeks, which begin on Monday.
    pub weekly: u32,
    /// The same with months.
    pub monthly: u32,
}

const DAY_S: u64 = 86_400;
/// 1970-01-01 was a Thursday.
const DAYS_TO_MONDAY: u64 = 3;

/// The number of the day, week or month in which a snapshot was begun.
type Period = fn(&SnapshotId) -> u64;

impl Rule {
    /// Whether it would keep none of any number of snapshots.
    pub fn is_empty(&self) -> bool {
        *self == Rule::default()
    }

    /// Which of the snapshots are to be kept at `now_s` (seconds since 1970, UTC);
    /// in their order. What is from the future is kept by `within_s`.
    pub fn keeps(&self, ids: &[SnapshotId], now_s: u64) -> Vec<bool> {
        let mut order: Vec<(usize, &SnapshotId)> = ids.iter().enumerate().collect();
        order.sort_by(|a, b| b.1.cmp(a.1));
        let mut keeps = vec![false; ids.len()];
        let mut keep = |at: usize| {
            if let Some(keep) = keeps.get_mut(at) {
                *keep = true;
            }
        };
        for &(at, _) in order.iter().take(self.last as usize) {
            keep(at);
        }
        let is_within = |id: &SnapshotId| id.seconds().saturating_add(self.within_s) >= now_s;
        let recent = order
            .iter()
            .filter(|(_, id)| self.within_s > 0 && is_within(id));
        recent.for_each(|&(at, _)| keep(at));
        let periods: [(u32, Period); 3] = [
            (self.daily, |id| id.seconds() / DAY_S),
            (self.weekly, |id| {
                (id.seconds() / DAY_S + DAYS_TO_MONDAY) / 7
            }),
            (self.monthly, SnapshotId::month),
        ];
        for (count, period) in periods {
            let mut seen = Vec::new();
            for &(at, id) in &order {
                let period = period(id);
                if seen.len() < count as usize && !seen.contains(&period) {
                    seen.push(period);
                    keep(at);
                }
            }
        }
        keeps
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// 2026-11-21T12:00:00Z, a Saturday.
    const NOW: u64 = 1_795_262_400;

    fn kept(rule: Rule, stamps: &[&str]) -> Vec<String> {
        let ids: Vec<SnapshotId> = stamps.iter().map(|stamp| stamp.parse().unwrap()).collect();
        let keeps = rule.keeps(&ids, NOW);
        let kept = ids.iter().zip(keeps).filter(|(_, keep)| *keep);
        kept.map(|(id, _)| id.to_string()).collect()
    }

    const STAMPS: [&str; 8] = [
        "20261001T000000Z",
        "20261102T080000Z",
        "20261115T235959Z",
        "20261116T000000Z",
        "20261120T110000Z",
        "20261120T120000Z",
        "20261121T020000Z",
        "20261121T020000Z-2",
    ];

    #[test]
    fn the_last_ones_are_the_newest_whatever_their_order() {
        let rule = Rule {
            last: 2,
            ..Rule::default()
        };
        assert_eq!(kept(rule, &STAMPS), STAMPS[6..]);
        let backwards: Vec<&str> = STAMPS.into_iter().rev().collect();
        assert_eq!(kept(rule, &backwards), backwards[..2]);
        assert_eq!(kept(rule, &[]), Vec::<String>::new());
    }

    #[test]
    fn within_counts_from_now() {
        let rule = Rule {
            within_s: DAY_S,
            ..Rule::default()
        };
        assert_eq!(kept(rule, &STAMPS), STAMPS[5..]);
    }

    #[test]
    fn of_each_day_week_and_month_the_newest_stays() {
        let daily = Rule {
            daily: 3,
            ..Rule::default()
        };
        let newest = ["20261116T000000Z", "20261120T120000Z", "20261121T020000Z-2"];
        assert_eq!(kept(daily, &STAMPS), newest);
        let weekly = Rule {
            weekly: 2,
            ..Rule::default()
        };
        // The 16th was a Monday.
        let newest = ["20261115T235959Z", "20261121T020000Z-2"];
        assert_eq!(kept(weekly, &STAMPS), newest);
        let monthly = Rule {
            monthly: 9,
            ..Rule::default()
        };
        let newest = ["20261001T000000Z", "20261121T020000Z-2"];
        assert_eq!(kept(monthly, &STAMPS), newest);
    }

    #[test]
    fn what_any_part_wants_stays() {
        let rule = Rule {
            last: 1,
            monthly: 2,
            ..Rule::default()
        };
        let both = ["20261001T000000Z", "20261121T020000Z-2"];
        assert_eq!(kept(rule, &STAMPS), both);
        assert!(Rule::default().is_empty() && !rule.is_empty());
        assert_eq!(kept(Rule::default(), &STAMPS), Vec::<String>::new());
    }
}
