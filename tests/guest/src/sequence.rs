//! What a receiver can tell about numbered datagrams.

use std::collections::BTreeSet;

use crate::json::Json;

/// Missing numbers that are remembered, to tell late from twice.
const MISSING_MAX: usize = 65_536;

/// The account of one sender's numbers, which start at 0 or at the first one
/// seen, and are never taken up anew.
#[derive(Default)]
pub struct Sequence {
    next: Option<u64>,
    missing: BTreeSet<u64>,
    /// Missing numbers beyond what is remembered.
    forgotten: u64,
    /// Datagrams that came in.
    pub received: u64,
    duplicate: u64,
    reordered: u64,
}

impl Sequence {
    /// Expects the number 0 first.
    pub fn from_zero() -> Self {
        Sequence {
            next: Some(0),
            ..Sequence::default()
        }
    }

    /// Takes note of a datagram.
    pub fn take(&mut self, number: u64) {
        self.received += 1;
        let next = self.next.unwrap_or(number);
        if number >= next {
            for lost in next..number {
                if self.missing.len() < MISSING_MAX {
                    self.missing.insert(lost);
                } else {
                    self.forgotten += number - lost;
                    break;
                }
            }
            self.next = Some(number + 1);
        } else if self.missing.remove(&number) {
            self.reordered += 1;
        } else {
            self.duplicate += 1;
        }
    }

    /// Takes note of a datagram that may be here already.
    pub fn take_again(&mut self, number: u64) {
        let is_new = self.next.is_none_or(|next| number >= next);
        if is_new || self.missing.contains(&number) {
            self.take(number);
        }
    }

    /// Adds the account to an object.
    pub fn tell(&self, json: &mut Json) {
        json.number("received", self.received)
            .maybe("last", self.next.and_then(|next| next.checked_sub(1)))
            .number("missing", self.missing.len() as u64 + self.forgotten)
            .number("duplicate", self.duplicate)
            .number("reordered", self.reordered);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(numbers: &[u64], from_zero: bool) -> String {
        let mut sequence = if from_zero {
            Sequence::from_zero()
        } else {
            Sequence::default()
        };
        for number in numbers {
            sequence.take(*number);
        }
        let mut json = Json::new();
        sequence.tell(&mut json);
        json.finish()
    }

    #[test]
    fn late_twice_and_never_are_told_apart() {
        assert_eq!(
            account(&[0, 1, 4, 3, 3, 5], true),
            r#"{"received":6,"last":5,"missing":1,"duplicate":1,"reordered":1}"#
        );
    }

    #[test]
    fn what_is_said_again_counts_once() {
        let mut sequence = Sequence::from_zero();
        for number in [0, 1] {
            sequence.take(number);
            sequence.take_again(number);
        }
        sequence.take_again(2);
        let mut json = Json::new();
        sequence.tell(&mut json);
        assert_eq!(
            json.finish(),
            r#"{"received":3,"last":2,"missing":0,"duplicate":0,"reordered":0}"#
        );
    }

    #[test]
    fn a_late_listener_misses_nothing_but_a_first_one_does() {
        assert!(account(&[7, 8], false).contains(r#""missing":0"#));
        assert!(account(&[7, 8], true).contains(r#""missing":7"#));
    }

    #[test]
    fn a_huge_hole_is_counted_without_being_remembered() {
        let text = account(&[0, 1_000_000_001], true);
        assert!(text.contains(r#""missing":1000000000"#), "{text}");
    }
}
