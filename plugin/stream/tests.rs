//! Reader and writer against streams from the test encoder.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::testenc::{self, page, Enc, Entry};
use super::*;

/// Remembers everything it is told.
#[derive(Debug, Default, PartialEq)]
struct Notes {
    legacy: Option<bool>,
    header: Option<XcHeader>,
    records: Vec<(Place, u32, Vec<u8>)>,
    pages: Vec<Entry>,
    verified: usize,
    ended: bool,
}

impl Sink for Notes {
    type Error = std::convert::Infallible;

    fn xl_header(&mut self, legacy: bool) -> Result<(), Self::Error> {
        self.legacy = Some(legacy);
        Ok(())
    }
    fn xc_header(&mut self, header: &XcHeader) -> Result<(), Self::Error> {
        self.header = Some(*header);
        Ok(())
    }
    fn record(&mut self, place: Place, kind: u32, body: &[u8]) -> Result<(), Self::Error> {
        self.records.push((place, kind, body.to_vec()));
        Ok(())
    }
    fn page(&mut self, pfn: u64, kind: PageType, data: Option<&Page>) -> Result<(), Self::Error> {
        self.pages.push((pfn, kind.bits(), data.copied()));
        Ok(())
    }
    fn verify_page(&mut self, _: u64, _: PageType, _: Option<&Page>) -> Result<(), Self::Error> {
        self.verified += 1;
        Ok(())
    }
    fn end(&mut self) -> Result<(), Self::Error> {
        self.ended = true;
        Ok(())
    }
}

fn ingest(bytes: &[u8]) -> Result<(Notes, Summary), Error> {
    let mut notes = Notes::default();
    match Ingest::new(bytes).run(&mut notes) {
        Ok(summary) => Ok((notes, summary)),
        Err(IngestError::Stream(error)) => Err(error),
        Err(IngestError::Sink(never)) => match never {},
    }
}

fn problem(bytes: &[u8]) -> String {
    match ingest(bytes) {
        Ok(_) => panic!("it was accepted"),
        Err(error) => error.to_string(),
    }
}

/// Three pages: small enough to cut at every byte.
fn small_stream() -> Vec<u8> {
    testenc::pvh_stream(&[vec![(0, 0, Some(page(1))), (1, 0xf, None)]])
}

#[test]
fn records_keep_their_place_and_bytes() {
    let rounds = vec![vec![(0, 0, Some(page(1)))], vec![(9, 0, Some(page(2)))]];
    let (notes, summary) = ingest(&testenc::hvm_stream(&rounds)).unwrap();
    let places: Vec<_> = notes
        .records
        .iter()
        .map(|r| (r.0, r.1, r.2.len()))
        .collect();
    assert_eq!(
        places,
        [
            (Place::XlBefore, 0x8000_0001, 8),
            (Place::XcBefore, 0x11, 24),
            (Place::XcBefore, 0x12, 32),
            (Place::XcBefore, 0x10, 0),
            (Place::XcAfter, 0x08, 24),
            (Place::XcAfter, 0x09, 1001),
            (Place::XcAfter, 0x0a, 40),
            (Place::XcAfter, 0x8000_0077, 5),
            (Place::XlAfter, 2, 24),
            (Place::XlAfter, 3, 21),
        ]
    );
    assert_eq!(notes.records[0].2, b"optional");
    assert_eq!(notes.records[5].2, [9; 1001]);
    assert!(notes.ended);
    assert_eq!(summary.bytes, testenc::hvm_stream(&rounds).len() as u64);
    assert_eq!((summary.page_records, summary.pages), (2, 2));
}

#[test]
fn pages_arrive_in_order_with_type_and_contents() {
    let rounds = testenc::pv_rounds();
    let (notes, summary) = ingest(&testenc::pv_stream(1030, &rounds)).unwrap();
    assert_eq!(notes.pages, rounds.concat());
    assert_eq!(summary.pages, 16);
    assert_eq!(summary.pages_with_data, 13);
    let header = notes.header.unwrap();
    assert_eq!((header.version, header.guest), (3, Guest::Pv));
    assert_eq!((header.xen_major, header.xen_minor), (4, 17));
    assert_eq!(notes.legacy, Some(false));
}

#[test]
fn a_version_2_stream_without_static_data_end_is_read_and_written_back() {
    let bytes = Enc::default()
        .xl_header()
        .xc_headers(2, 2)
        .pages(&[(5, 0, Some(page(5)))])
        .hvm_state()
        .xc_end()
        .xl_end();
    let mut out = Vec::new();
    Ingest::new(&bytes[..])
        .run(&mut Writer::new(&mut out))
        .unwrap();
    assert_eq!(out, bytes);
}

#[test]
fn pages_sent_for_verification_are_not_taken_for_new_ones() {
    let bytes = Enc::default()
        .xl_header()
        .xc_headers(3, 2)
        .hvm_start()
        .pages(&[(5, 0, Some(page(5)))])
        .record(0x0d, &[])
        .pages(&[(5, 0, Some(page(6))), (6, 0xf, None)])
        .hvm_state()
        .xc_end()
        .xl_end();
    let (notes, summary) = ingest(&bytes).unwrap();
    assert_eq!(notes.pages, [(5, 0, Some(page(5)))]);
    assert_eq!((notes.verified, summary.pages_verified), (2, 2));
    assert!(notes.records.iter().all(|record| record.1 != 0x0d));
}

#[test]
fn the_writer_gives_back_the_same_bytes() {
    for bytes in [
        testenc::pv_stream(1030, &testenc::pv_rounds()[..1]),
        testenc::pvh_stream(&testenc::pv_rounds()[2..]),
        testenc::hvm_stream(&testenc::pv_rounds()[2..]),
        small_stream(),
    ] {
        let mut writer = Writer::new(Vec::new());
        Ingest::new(&bytes[..]).run(&mut writer).unwrap();
        assert!(writer.into_inner() == bytes);
    }
}

#[test]
fn the_writer_batches_as_xen_does() {
    // 2500 entries in one run become 1024 + 1024 + 452.
    let entry = |pfn: u64| -> Entry { (pfn, 0, (pfn % 3 != 0).then(|| page(pfn))) };
    let retype = |e: Entry| if e.2.is_some() { e } else { (e.0, 0xf, None) };
    let all: Vec<Entry> = (0..2500).map(entry).map(retype).collect();
    let small: Vec<Vec<Entry>> = all.chunks(100).map(<[Entry]>::to_vec).collect();
    let full: Vec<Vec<Entry>> = all.chunks(1024).map(<[Entry]>::to_vec).collect();
    let mut writer = Writer::new(Vec::new());
    Ingest::new(&testenc::pvh_stream(&small)[..])
        .run(&mut writer)
        .unwrap();
    assert!(writer.into_inner() == testenc::pvh_stream(&full));
}

#[test]
fn the_headers_are_right_byte_for_byte() {
    let bytes = small_stream();
    let xl = b"LibxlFmt\x00\x00\x00\x02\x00\x00\x00\x00";
    let context = b"\x01\x00\x00\x00\x00\x00\x00\x00";
    let image =
        b"\xff\xff\xff\xff\xff\xff\xff\xffXENF\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x00";
    let domain = b"\x02\x00\x00\x00\x0c\x00\x00\x00\x04\x00\x00\x00\x11\x00\x00\x00";
    let expected = [&xl[..], context, image, domain].concat();
    let mut writer = Writer::new(Vec::new());
    Ingest::new(&bytes[..]).run(&mut writer).unwrap();
    assert_eq!(writer.into_inner()[..64], expected);
}

#[test]
fn a_stream_cut_at_any_byte_is_an_error_and_not_a_panic() {
    let bytes = small_stream();
    for length in 0..bytes.len() {
        match ingest(&bytes[..length]) {
            Err(Error::Truncated { offset, .. }) => assert_eq!(offset, length as u64),
            other => panic!("cut at {length}: {other:?}"),
        }
    }
    assert!(ingest(&bytes).is_ok());
}

#[test]
fn a_mutilated_stream_is_never_a_panic() {
    let bytes = testenc::pv_stream(1030, &testenc::pv_rounds());
    let header_heavy = small_stream();
    let mut x = 0x1234_5678_9abc_def1_u64;
    let mut random = |below: usize| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x % below as u64) as usize
    };
    let mut survived = 0;
    for round in 0..3000 {
        let mut bad = if round % 2 == 0 {
            bytes.clone()
        } else {
            header_heavy.clone()
        };
        for _ in 0..=random(3) {
            // The first 400 bytes hold most of what can go wrong.
            let limit = if random(2) == 0 { 400 } else { bad.len() };
            let at = random(limit.min(bad.len()));
            bad[at] = [0, 0xff, 0x80, bad[at] ^ (1 << random(8))][random(4)];
        }
        survived += usize::from(ingest(&bad).is_ok());
    }
    assert!(survived < 3000);
}

#[test]
fn a_huge_length_costs_no_memory_and_is_refused() {
    let bytes = Enc::default().xl_header().xc_headers(3, 2).0;
    for (kind, length, expected) in [
        (1_u32, u32::MAX, "more than the 4202504"),
        (0x09, u32::MAX, "more than the 134217728"),
        (0x09, 128 << 20, "ends at byte"),
    ] {
        let mut bad = bytes.clone();
        if kind == 1 {
            bad = Enc(bad).hvm_start().0;
        }
        bad.extend(kind.to_le_bytes());
        bad.extend(length.to_le_bytes());
        assert!(problem(&bad).contains(expected), "{}", problem(&bad));
    }
}

#[test]
fn a_page_record_that_lies_about_itself_is_refused() {
    let start = || Enc::default().xl_header().xc_headers(3, 2).hvm_start();
    let one = |entry: u64, data: usize| {
        let mut body = 1_u64.to_le_bytes().to_vec();
        body.extend(entry.to_le_bytes());
        body.resize(16 + data, 1);
        start().record(1, &body).0
    };
    assert!(problem(&one(5 << 60, 0)).contains("reserved page type 5"));
    assert!(problem(&one(7, 4095)).contains("4095 bytes of page contents"));
    assert!(problem(&one(7, 8192)).contains("8192 bytes of page contents"));
    assert!(problem(&one(0xf << 60, 4096)).contains("ask for 0"));
    assert!(problem(&start().record(1, &[0; 8]).0).contains("no entries"));
    assert!(problem(&start().record(1, &[1; 7]).0).contains("only 7 bytes"));
    assert!(problem(&start().record(1, &[0xff; 16]).0).contains("4294967295 entries"));
}

#[test]
fn reserved_bits_are_ignored_by_the_reader_and_cleared_by_the_writer() {
    let good = testenc::pvh_stream(&[vec![(3, 0, Some(page(3)))]]);
    let bad = testenc::pvh_stream(&[vec![(3 | 0xab << 52, 0, Some(page(3)))]]);
    let mut writer = Writer::new(Vec::new());
    Ingest::new(&bad[..]).run(&mut writer).unwrap();
    assert!(writer.into_inner() == good);
}

#[test]
fn wrong_headers_are_named() {
    let good = small_stream();
    let with = |at: usize, byte: u8| {
        let mut bad = good.clone();
        bad[at] = byte;
        problem(&bad)
    };
    assert!(with(0, b'X').contains("no libxl stream"));
    assert!(with(11, 3).contains("version is 3"));
    assert!(with(15, 1).contains("big-endian"));
    assert!(with(24, 0).contains("no libxc stream"));
    assert!(with(39, 4).contains("version is 4"));
    assert!(with(41, 1).contains("big-endian"));
    assert!(with(48, 3).contains("neither PV nor HVM"));
    assert!(with(52, 13).contains("2^13"));
}

#[test]
fn streams_that_could_not_be_restored_are_refused() {
    let xl = || Enc::default().xl_header();
    assert!(problem(&xl().xl_end()).contains("no LIBXC_CONTEXT"));
    assert!(problem(&xl().record(4, &[]).0).contains("checkpointed"));
    assert!(problem(&xl().record(6, &[]).0).contains("newer Xen"));
    assert!(problem(&xl().record(3, &[0; 7]).0).contains("sub-header"));
    let whole = || {
        xl().xc_headers(3, 2)
            .hvm_start()
            .pages(&[(1, 0xf, None)])
            .hvm_state()
            .xc_end()
    };
    assert!(problem(&whole().record(1, &[]).0).contains("second time"));
    assert!(problem(&whole().record(0, &[0; 8]).0).contains("should be empty"));
    let no_state = xl().xc_headers(3, 2).hvm_start().pages(&[(1, 0xf, None)]);
    assert!(problem(&no_state.xc_end().0).contains("without HVM_CONTEXT"));
    let checkpoint = xl().xc_headers(3, 2).hvm_start().record(0x0e, &[]);
    assert!(problem(&checkpoint.0).contains("Remus"));
}

#[test]
fn the_writer_refuses_what_would_not_be_a_stream() {
    let header = XcHeader {
        version: 3,
        guest: Guest::Hvm,
        xen_major: 4,
        xen_minor: 17,
    };
    let mut writer = Writer::new(Vec::new());
    assert!(writer.xc_header(&header).is_err());
    assert!(writer.end().is_err());
    writer.xl_header(false).unwrap();
    assert!(writer.page(0, PageType::Normal, Some(&page(0))).is_err());
    assert!(writer.end().is_err());
    writer.xc_header(&header).unwrap();
    assert!(writer.record(Place::XlBefore, 3, &[]).is_err());
    assert!(writer.page(0, PageType::Normal, None).is_err());
    assert!(writer.page(0, PageType::Invalid, Some(&page(0))).is_err());
    assert!(writer.page(1 << 52, PageType::Invalid, None).is_err());
    writer.record(Place::XlAfter, 3, &[0; 8]).unwrap();
    assert!(writer.page(0, PageType::Invalid, None).is_err());
    writer.end().unwrap();
    assert!(writer.end().is_err());
}

#[test]
fn a_full_disk_is_an_error_of_the_writer() {
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    match Ingest::new(&small_stream()[..]).run(&mut Writer::new(full)) {
        Err(IngestError::Sink(Error::Write { source })) => {
            assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        }
        other => panic!("{other:?}"),
    }
}

/// A source that hands out one byte at a time and is interrupted in between.
struct Drip<'a>(&'a [u8], bool);

impl std::io::Read for Drip<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.1 = !self.1;
        if self.1 {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        let length = buffer.len().min(1);
        std::io::Read::read(&mut self.0, &mut buffer[..length])
    }
}

#[test]
fn short_reads_and_signals_do_not_tear_a_stream() {
    let bytes = small_stream();
    let mut notes = Notes::default();
    Ingest::new(Drip(&bytes, false)).run(&mut notes).unwrap();
    assert_eq!(notes, ingest(&bytes).unwrap().0);
}

#[test]
fn the_save_file_header_is_xls_byte_for_byte() {
    let header = SaveHeader {
        config_json: Some("{}".to_owned()),
    };
    let mut out = Vec::new();
    header.write(&mut out).unwrap();
    let expected = b"Xen saved domain, xl format\n \0 \r\
        \x04\x03\x02\x01\x03\0\0\0\0\0\0\0\x07\0\0\0\x03\0\0\0{}\0";
    assert_eq!(out, expected);
    out.extend(b"LibxlFmt");
    let mut rest = &out[..];
    assert_eq!(SaveHeader::read(&mut rest).unwrap(), header);
    assert_eq!(rest, b"LibxlFmt");
}

#[test]
fn a_save_file_without_configuration_is_read_and_written() {
    let header = SaveHeader { config_json: None };
    let mut out = Vec::new();
    header.write(&mut out).unwrap();
    assert_eq!(out.len(), 52);
    assert_eq!(SaveHeader::read(&mut &out[..]).unwrap(), header);
}

#[test]
fn a_foreign_save_file_is_refused_with_the_reason() {
    let mut good = Vec::new();
    SaveHeader {
        config_json: Some("{\"a\": 1}".to_owned()),
    }
    .write(&mut good)
    .unwrap();
    for length in 0..good.len() {
        let cut = SaveHeader::read(&mut &good[..length]);
        assert!(
            matches!(cut, Err(Error::Truncated { .. })),
            "{length}: {cut:?}"
        );
    }
    let with = |at: usize, byte: u8| {
        let mut bad = good.clone();
        bad[at] = byte;
        SaveHeader::read(&mut &bad[..]).unwrap_err().to_string()
    };
    assert!(with(0, 0).contains("no xl save file"));
    assert!(with(32, 1).contains("byte order"));
    assert!(with(36, 7).contains("newer xl"));
    assert!(with(36, 1).contains("4.5 or earlier"));
    assert!(with(36, 2).contains("not JSON"));
    assert!(with(46, 0xff).contains("believable"));
    assert!(with(48, 200).contains("cut short"));
    assert!(with(53, 0xff).contains("not text"));
    assert!(with(53, 0).contains("not text"));
}
