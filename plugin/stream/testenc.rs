//! An encoder of streams for the tests, written from the specifications with
//! their literal numbers. It shares nothing with the real writer on purpose: a
//! mistake in one would otherwise hide in the other.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::{Page, PAGE_SIZE};

/// A page of a guest as the tests say it: frame number, type bits, contents.
pub(crate) type Entry = (u64, u8, Option<Page>);

/// Contents that differ for every `seed` and are compressible by nobody.
pub(crate) fn page(seed: u64) -> Page {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut page = [0; PAGE_SIZE];
    for chunk in page.chunks_exact_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        chunk.copy_from_slice(&x.to_le_bytes());
    }
    page
}

/// X86_TSC_INFO: its last four bytes are reserved.
fn tsc() -> [u8; 24] {
    let mut body = [8; 24];
    body[20..].fill(0);
    body
}

/// Bytes of a stream under construction.
#[derive(Clone, Default)]
pub(crate) struct Enc(pub Vec<u8>);

impl Enc {
    /// libxl header.
    pub fn xl_header(mut self) -> Self {
        self.0.extend(b"LibxlFmt\x00\x00\x00\x02\x00\x00\x00\x00");
        self
    }

    /// A record of either level.
    pub fn record(mut self, record_type: u32, body: &[u8]) -> Self {
        self.0.extend(record_type.to_le_bytes());
        self.0
            .extend(u32::try_from(body.len()).unwrap().to_le_bytes());
        self.0.extend(body);
        while self.0.len() % 8 != 0 {
            self.0.push(0);
        }
        self
    }

    /// LIBXC_CONTEXT, libxc image header and domain header (Xen 4.17).
    pub fn xc_headers(self, version: u8, guest: u8) -> Self {
        let mut next = self.record(1, &[]);
        next.0.extend([0xff; 8]);
        next.0.extend(b"XENF\x00\x00\x00");
        next.0.push(version);
        next.0.extend([0; 8]);
        next.0
            .extend([guest, 0, 0, 0, 12, 0, 0, 0, 4, 0, 0, 0, 17, 0, 0, 0]);
        next
    }

    /// One PAGE_DATA record.
    pub fn pages(self, entries: &[Entry]) -> Self {
        let mut body = (entries.len() as u64).to_le_bytes().to_vec();
        for (pfn, bits, _) in entries {
            body.extend((u64::from(*bits) << 60 | pfn).to_le_bytes());
        }
        for (_, _, data) in entries {
            body.extend(data.iter().flatten());
        }
        self.record(0x01, &body)
    }

    /// X86_PV_INFO, policies, STATIC_DATA_END, X86_PV_P2M_FRAMES of a 64-bit
    /// guest with frames 0 to `last`.
    pub fn pv_start(self, last: u32) -> Self {
        let mut p2m = vec![0, 0, 0, 0];
        p2m.extend(last.to_le_bytes());
        for frame in 0..=last / 512 {
            p2m.extend(u64::from(frame).to_le_bytes());
        }
        self.record(0x02, &[8, 4, 0, 0, 0, 0, 0, 0])
            .record(0x11, &[0x11; 48])
            .record(0x12, &[0x12; 16])
            .record(0x10, &[])
            .record(0x03, &p2m)
    }

    /// TSC, shared info and one vcpu's records, with a length that needs
    /// padding among them.
    pub fn pv_state(self) -> Self {
        let vcpu = |fill: u8, length: usize| {
            let mut body = vec![0; 8];
            body.resize(8 + length, fill);
            body
        };
        self.record(0x08, &tsc())
            .record(0x07, &page(7)[..])
            .record(0x04, &vcpu(4, 5168))
            .record(0x05, &vcpu(5, 125))
            .record(0x06, &vcpu(6, 576))
            .record(0x0c, &vcpu(0xc, 32))
    }

    /// Policies and STATIC_DATA_END of an HVM or PVH guest.
    pub fn hvm_start(self) -> Self {
        self.record(0x11, &[0x11; 24])
            .record(0x12, &[0x12; 32])
            .record(0x10, &[])
    }

    /// TSC, HVM context (of an odd length) and parameters.
    pub fn hvm_state(self) -> Self {
        let mut params = vec![2, 0, 0, 0, 0, 0, 0, 0];
        params.extend([9; 32]);
        self.record(0x08, &tsc())
            .record(0x09, &[9; 1001])
            .record(0x0a, &params)
    }

    /// END of the libxc stream.
    pub fn xc_end(self) -> Self {
        self.record(0, &[])
    }

    /// END of the libxl stream.
    pub fn xl_end(self) -> Vec<u8> {
        self.record(0, &[]).0
    }
}

/// A PV guest's live save in `rounds`, each a list of PAGE_DATA records.
pub(crate) fn pv_stream(last: u32, rounds: &[Vec<Entry>]) -> Vec<u8> {
    let start = Enc::default().xl_header().xc_headers(3, 1).pv_start(last);
    rounds
        .iter()
        .fold(start, |enc, entries| enc.pages(entries))
        .pv_state()
        .xc_end()
        .xl_end()
}

/// A PVH guest's live save.
pub(crate) fn pvh_stream(rounds: &[Vec<Entry>]) -> Vec<u8> {
    let start = Enc::default().xl_header().xc_headers(3, 2).hvm_start();
    rounds
        .iter()
        .fold(start, |enc, entries| enc.pages(entries))
        .hvm_state()
        .xc_end()
        .xl_end()
}

/// An HVM guest's, with a device model and a record ahead of LIBXC_CONTEXT.
pub(crate) fn hvm_stream(rounds: &[Vec<Entry>]) -> Vec<u8> {
    let start = Enc::default()
        .xl_header()
        .record(0x8000_0001, b"optional")
        .xc_headers(3, 2)
        .hvm_start();
    rounds
        .iter()
        .fold(start, |enc, entries| enc.pages(entries))
        .hvm_state()
        .record(0x8000_0077, b"later")
        .xc_end()
        .record(2, b"\x02\0\0\0\0\0\0\0physmap/0\0value\0")
        .record(3, b"\x02\0\0\0\0\0\0\0QEVM and more")
        .xl_end()
}

/// A small PV guest with everything in it: several rounds, zero pages, pages
/// that change type both ways, types without data.
pub(crate) fn pv_rounds() -> Vec<Vec<Entry>> {
    let zero = Some([0; PAGE_SIZE]);
    vec![
        vec![
            (0, 0x0, Some(page(100))),
            (1, 0x1, Some(page(101))),
            (2, 0xf, None),
            (3, 0x0, zero),
            (4, 0xc, Some(page(104))),
            (5, 0x0, Some(page(105))),
            (6, 0xe, None),
            (7, 0x0, Some(page(107))),
        ],
        vec![
            (1, 0x0, Some(page(201))), // a page table becomes a plain page
            (2, 0x2, Some(page(202))), // could not be sent before
            (5, 0x0, zero),            // freed
            (7, 0xf, None),            // ballooned away
        ],
        vec![
            (0, 0x0, Some(page(300))),
            (3, 0x0, Some(page(303))), // no longer zero
            (5, 0x0, Some(page(305))), // in use again
            (1030, 0x0, Some(page(306))),
        ],
    ]
}

/// What the last versions are: sorted, one entry a frame.
pub(crate) fn last_versions(rounds: &[Vec<Entry>]) -> Vec<Entry> {
    let mut last = std::collections::BTreeMap::new();
    for &(pfn, bits, data) in rounds.iter().flatten() {
        last.insert(pfn, (pfn, bits, data));
    }
    last.into_values().collect()
}
