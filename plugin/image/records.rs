//! The records file: all of a stream that isn't pages.
//!
//! Layout in `plugin/docs/snapshot-format.md`, "records".

use crate::stream::{Guest, Place, XcHeader, RECORD_BYTES_MAX};

const RECORDS_MAGIC: [u8; 8] = *b"xlvneREC";
const VERSION: u32 = 1;

/// A record as it stood in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub place: Place,
    pub record_type: u32,
    pub body: Vec<u8>,
}

/// The headers of both levels and the records, by place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Records {
    pub legacy: bool,
    pub header: XcHeader,
    pub records: Vec<Record>,
}

impl Records {
    /// The bytes of the file.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = RECORDS_MAGIC.to_vec();
        for number in [
            VERSION,
            self.records.len() as u32,
            u32::from(self.legacy),
            self.header.version,
            self.header.guest as u32,
            self.header.xen_major,
            self.header.xen_minor,
            0,
        ] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for record in &self.records {
            let length = record.body.len() as u32; // within RECORD_BYTES_MAX
            for number in [record.place as u32, record.record_type, length, 0] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
            bytes.extend_from_slice(&record.body);
        }
        bytes
    }

    /// Reads and checks the bytes of a file; `Err` says what is wrong.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut rest = bytes
            .strip_prefix(&RECORDS_MAGIC)
            .ok_or("it is no records file")?;
        let [version, count, legacy, xc_version, guest, xen_major, xen_minor, reserved] =
            take_words(&mut rest)?;
        if version != VERSION || reserved != 0 || legacy > 1 {
            return Err("it is no records file of version 1".to_owned());
        }
        let guest = Guest::from_number(guest).ok_or("its guest type is unknown")?;
        let mut records = Vec::new();
        for _ in 0..count {
            records.push(take_record(&mut rest)?);
        }
        if !rest.is_empty() {
            return Err("something follows its last record".to_owned());
        }
        if !records.is_sorted_by_key(|record| record.place) {
            return Err("its records are out of order".to_owned());
        }
        Ok(Records {
            legacy: legacy == 1,
            header: XcHeader {
                version: xc_version,
                guest,
                xen_major,
                xen_minor,
            },
            records,
        })
    }
}

fn take_record(rest: &mut &[u8]) -> Result<Record, String> {
    let [place, record_type, length, reserved] = take_words(rest)?;
    let place = Place::from_number(place).ok_or("a record has no place")?;
    let length = length as usize;
    if reserved != 0 || length > RECORD_BYTES_MAX {
        return Err("a record's header is impossible".to_owned());
    }
    let (body, after) = rest.split_at_checked(length).ok_or("it is cut short")?;
    *rest = after;
    Ok(Record {
        place,
        record_type,
        body: body.to_vec(),
    })
}

fn take_words<const N: usize>(rest: &mut &[u8]) -> Result<[u32; N], String> {
    let mut numbers = [0; N];
    for number in &mut numbers {
        let (word, after) = rest.split_first_chunk::<4>().ok_or("it is cut short")?;
        *number = u32::from_le_bytes(*word);
        *rest = after;
    }
    Ok(numbers)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample() -> Records {
        let record = |place, record_type, length| Record {
            place,
            record_type,
            body: vec![3; length],
        };
        Records {
            legacy: false,
            header: XcHeader {
                version: 3,
                guest: Guest::Hvm,
                xen_major: 4,
                xen_minor: 17,
            },
            records: vec![
                record(Place::XcBefore, 0x10, 0),
                record(Place::XcAfter, 9, 13),
                record(Place::XlAfter, 0x8000_0001, 8),
            ],
        }
    }

    #[test]
    fn what_is_encoded_comes_back() {
        assert_eq!(Records::decode(&sample().encode()).unwrap(), sample());
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let mut records = sample();
        records.records.remove(0);
        let expected = [
            &b"xlvneREC\x01\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\x02\0\0\0\x04\0\0\0\x11\0\0\0\0\0\0\0"[..],
            b"\x02\0\0\0\x09\0\0\0\x0d\0\0\0\0\0\0\0\x03\x03\x03\x03\x03\x03\x03\x03\x03\x03\x03\x03\x03",
            b"\x03\0\0\0\x01\0\0\x80\x08\0\0\0\0\0\0\0\x03\x03\x03\x03\x03\x03\x03\x03",
        ];
        assert_eq!(records.encode(), expected.concat());
    }

    #[test]
    fn no_mutilated_file_is_a_panic() {
        let good = sample().encode();
        for length in 0..good.len() {
            assert!(Records::decode(&good[..length]).is_err());
        }
        for at in 0..good.len() {
            for value in [0, 2, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = Records::decode(&bad);
            }
        }
        let longer = [&good[..], &[0]].concat();
        assert!(Records::decode(&longer).is_err());
    }

    #[test]
    fn records_out_of_order_are_refused() {
        let mut bad = sample();
        bad.records.reverse();
        assert!(Records::decode(&bad.encode()).is_err());
    }
}
