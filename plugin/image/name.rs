//! Names that become directories, and the times in them.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::error::Error;

/// Bytes in a [`Name`], at most: well below the 255 of a file name, with room
/// for what is put around it.
pub const NAME_BYTES_MAX: usize = 64;

/// The name of a VNE or of a member, safe as one component of a path: a letter
/// or digit, then letters, digits and `._+-`, at most [`NAME_BYTES_MAX`] bytes,
/// without `..`.
///
/// Xen allows more in a domain's name; such a domain can't be a member and is
/// refused before anything is touched.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// Checks `text`.
    ///
    /// # Errors
    ///
    /// [`Error::BadName`], saying what is wrong with it.
    pub fn new(text: &str) -> Result<Self, Error> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._+-".contains(&byte);
        let problem = if text.is_empty() {
            "it is empty"
        } else if text.len() > NAME_BYTES_MAX {
            "it is longer than 64 characters"
        } else if !text.bytes().all(allowed) {
            "only letters, digits and . _ + - may be in it"
        } else if !text.starts_with(|first: char| first.is_ascii_alphanumeric()) {
            "it must begin with a letter or digit"
        } else if text.contains("..") {
            "two dots in a row are not allowed"
        } else {
            return Ok(Name(text.to_owned()));
        };
        Err(Error::BadName {
            name: text.to_owned(),
            problem,
        })
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Name::new(text)
    }
}

impl TryFrom<String> for Name {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        Name::new(&text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

/// Tells one store from all others: 16 hex digits, made up at random.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StoreId(String);

impl StoreId {
    /// One that no store has.
    pub(super) fn random() -> std::io::Result<Self> {
        Ok(Self(format!("{:016x}", crate::random::number()?)))
    }
}

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl TryFrom<String> for StoreId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if text.len() == 16 && text.bytes().all(hex) {
            Ok(Self(text))
        } else {
            Err("16 hex digits are expected")
        }
    }
}

impl From<StoreId> for String {
    fn from(id: StoreId) -> String {
        id.0
    }
}

/// The name of a snapshot among those of its VNE: the time in UTC, as in
/// `20261121T023652Z`, with `-2`, `-3` … for further ones of the same second.
///
/// Ordered by age.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId {
    /// `20261121T023652Z`.
    stamp: String,
    /// 1 for the first one of that second.
    nth: u32,
}

impl SnapshotId {
    /// When the snapshot was begun: RFC 3339, UTC.
    pub fn created(&self) -> String {
        let part = |from, to| self.stamp.get(from..to).unwrap_or_default();
        format!(
            "{}-{}-{}T{}:{}:{}Z",
            part(0, 4),
            part(4, 6),
            part(6, 8),
            part(9, 11),
            part(11, 13),
            part(13, 15)
        )
    }

    /// When it was begun: seconds since 1970, UTC, as the stamp says it.
    pub fn seconds(&self) -> u64 {
        let days: u64 = (1970..self.number(0, 4)).map(days_of_year).sum();
        let months = 1..self.number(4, 6).min(12);
        let days_before = months.map(|month| days_of_month(self.number(0, 4), month));
        let days = days + days_before.sum::<u64>() + self.number(6, 8).saturating_sub(1);
        days * 86_400 + self.number(9, 11) * 3600 + self.number(11, 13) * 60 + self.number(13, 15)
    }

    /// Its month, counted so that a later one is larger.
    pub(crate) fn month(&self) -> u64 {
        self.number(0, 6)
    }

    fn number(&self, from: usize, to: usize) -> u64 {
        let digits = self.stamp.get(from..to).unwrap_or_default();
        digits.parse().unwrap_or(0) // they are digits
    }

    /// The name of the `nth` (from 1) snapshot made at `time`.
    pub(crate) fn at(time: SystemTime, nth: u32) -> Self {
        let c = Civil::of(time);
        SnapshotId {
            stamp: format!(
                "{:04}{:02}{:02}T{:02}{:02}{:02}Z",
                c.year, c.month, c.day, c.hour, c.minute, c.second
            ),
            nth,
        }
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.nth {
            0 | 1 => f.pad(&self.stamp),
            nth => f.pad(&format!("{}-{nth}", self.stamp)),
        }
    }
}

impl FromStr for SnapshotId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::BadId {
            id: text.to_owned(),
        };
        let (stamp, nth) = match text.split_once('-') {
            None => (text, 1),
            Some((stamp, nth)) => (stamp, nth.parse().map_err(|_| bad())?),
        };
        let shape_fits = stamp.len() == 16
            && stamp.bytes().enumerate().all(|(at, byte)| match at {
                8 => byte == b'T',
                15 => byte == b'Z',
                _ => byte.is_ascii_digit(),
            });
        let id = SnapshotId {
            stamp: stamp.to_owned(),
            nth,
        };
        // One spelling each: no "-1", "-02", "-+2".
        if !shape_fits || id.to_string() != text {
            return Err(bad());
        }
        Ok(id)
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> String {
        id.to_string()
    }
}

/// A time in the Gregorian calendar, UTC.
struct Civil {
    year: u64,
    month: u64,
    day: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

/// 9999-12-31T23:59:59Z: later years have no four digits.
const LAST_SECOND: u64 = 253_402_300_799;

impl Civil {
    /// A clock before 1970 or after 9999 is taken for the nearest of the two.
    fn of(time: SystemTime) -> Self {
        let seconds = time
            .duration_since(UNIX_EPOCH)
            .unwrap_or(Duration::ZERO)
            .as_secs()
            .min(LAST_SECOND);
        let mut days = seconds / 86_400;
        let mut year = 1970;
        while days >= days_of_year(year) {
            days -= days_of_year(year);
            year += 1;
        }
        let mut month = 1;
        while days >= days_of_month(year, month) {
            days -= days_of_month(year, month);
            month += 1;
        }
        Civil {
            year,
            month,
            day: days + 1,
            hour: seconds / 3600 % 24,
            minute: seconds / 60 % 60,
            second: seconds % 60,
        }
    }
}

fn is_leap(year: u64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_of_year(year: u64) -> u64 {
    365 + u64::from(is_leap(year))
}

fn days_of_month(year: u64, month: u64) -> u64 {
    match month {
        2 => 28 + u64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_directory() {
        for bad in [
            "",
            ".",
            "..",
            "a..b",
            "/",
            "a/b",
            "../x",
            ".hidden",
            "-n",
            "_x",
            "+x",
            "a b",
            "a\0b",
            "a\nb",
            "é",
            "x\u{202e}y",
        ] {
            assert!(Name::new(bad).is_err(), "{bad:?}");
        }
        assert!(Name::new(&"x".repeat(65)).is_err());
        for good in ["a", "0", "web-1", "db.example", "a_b+c", &"x".repeat(64)] {
            assert_eq!(Name::new(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn a_manifest_cannot_smuggle_a_bad_name_in() {
        assert!(serde_json::from_str::<Name>("\"../etc\"").is_err());
        assert!(serde_json::from_str::<SnapshotId>("\"../etc\"").is_err());
    }

    #[test]
    fn times_are_right_around_leap_days_and_ends_of_years() {
        let cases = [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_795_228_612, "2026-11-21T02:36:52Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (LAST_SECOND, "9999-12-31T23:59:59Z"),
            (LAST_SECOND + 1, "9999-12-31T23:59:59Z"),
        ];
        for (seconds, text) in cases {
            let time = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(SnapshotId::at(time, 2).created(), text);
            assert_eq!(SnapshotId::at(time, 2).seconds(), seconds.min(LAST_SECOND));
        }
    }

    #[test]
    fn snapshots_of_one_second_are_ordered_by_number_and_not_by_spelling() {
        let time = UNIX_EPOCH + Duration::from_secs(1_795_228_612);
        let ids: Vec<_> = [1, 2, 10].map(|nth| SnapshotId::at(time, nth)).to_vec();
        assert!(ids.is_sorted());
        let texts: Vec<_> = ids.iter().map(ToString::to_string).collect();
        let expected = [
            "20261121T023652Z",
            "20261121T023652Z-2",
            "20261121T023652Z-10",
        ];
        assert_eq!(texts, expected);
        for id in ids {
            assert_eq!(id.to_string().parse::<SnapshotId>().unwrap(), id);
        }
    }

    #[test]
    fn other_spellings_of_a_snapshot_are_refused() {
        for bad in [
            "",
            "20261121T023652",
            "20261121T023652Z-",
            "20261121T023652Z-1",
            "20261121T023652Z-02",
            "20261121T023652Z-+2",
            "20261121T023652Z-0",
            "2026112xT023652Z",
            "20261121 023652Z",
            "20261121T023652Z-2-3",
            "20261121T023652Z/..",
            "20261121T023652Z-99999999999",
        ] {
            assert!(bad.parse::<SnapshotId>().is_err(), "{bad:?}");
        }
    }
}
