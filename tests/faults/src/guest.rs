//! A guest that is made of numbers: its stream, and what is in it in the end.

use std::collections::BTreeMap;
use std::convert::Infallible;

use anyhow::Result;
use xl_vne::image::{MemberReader, ReplayError};
use xl_vne::stream::{Guest, Page, PageType, Place, Sink, Writer, XcHeader, PAGE_SIZE};

/// Frames of a guest: some MiB, a moment's work.
const FRAMES: u64 = 1500;

/// What a frame holds after so many rounds. Guests have most of it in common with
/// others and with themselves a while ago.
fn page(seed: u64, pfn: u64, round: u64) -> Page {
    let mut random = fastrand::Rng::with_seed(seed ^ pfn.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let own = random.u64(..10) < 2;
    let mut page = [0; PAGE_SIZE];
    let seed = match pfn % 7 {
        0 => return page,
        1 | 2 if own => seed << 20,
        _ => 0,
    };
    let mut random = fastrand::Rng::with_seed(seed + pfn + (round << 40));
    let noise = if pfn % 2 == 0 { PAGE_SIZE } else { 300 };
    random.fill(&mut page[..noise]);
    page
}

/// The rounds in which a frame is sent.
fn rounds(seed: u64, pfn: u64) -> u64 {
    match (seed ^ pfn) % 6 {
        0 => 3,
        1 => 2,
        _ => 1,
    }
}

/// The stream of a live save.
pub fn stream(seed: u64) -> Result<Vec<u8>> {
    let mut writer = Writer::new(Vec::new());
    let mut bytes = Vec::new();
    writer.xl_header(false)?;
    writer.xc_header(&XcHeader {
        version: 3,
        guest: Guest::Hvm,
        xen_major: 4,
        xen_minor: 17,
    })?;
    for (record, body) in [(0x11, &[0; 24][..]), (0x12, &[0; 32]), (0x10, &[])] {
        writer.record(Place::XcBefore, record, body)?;
    }
    for round in 0..3 {
        for pfn in (0..FRAMES).filter(|&pfn| round < rounds(seed, pfn)) {
            writer.page(pfn, PageType::Normal, Some(&page(seed, pfn, round)))?;
        }
    }
    let mut parameters = [0; 24];
    parameters[0] = 1;
    for (record, body) in [(0x08, &[0; 24][..]), (0x09, &[0; 64]), (0x0a, &parameters)] {
        writer.record(Place::XcAfter, record, body)?;
    }
    writer.end()?;
    bytes.append(&mut writer.into_inner());
    Ok(bytes)
}

/// A hash of all frames in the end.
pub fn digest(seed: u64) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for pfn in 0..FRAMES {
        hasher.update(&pfn.to_le_bytes());
        hasher.update(&page(seed, pfn, rounds(seed, pfn) - 1));
    }
    hasher.finalize()
}

/// The same of what was stored.
pub fn stored_digest(member: &MemberReader) -> Result<blake3::Hash> {
    let mut frames = Frames(blake3::Hasher::new());
    match member.replay(&mut frames) {
        Ok(()) => Ok(frames.0.finalize()),
        Err(ReplayError::Store(error)) => Err(error.into()),
        Err(ReplayError::Sink(never)) => match never {},
    }
}

struct Frames(blake3::Hasher);

impl Sink for Frames {
    type Error = Infallible;

    fn xl_header(&mut self, _legacy: bool) -> Result<(), Infallible> {
        Ok(())
    }

    fn xc_header(&mut self, _header: &XcHeader) -> Result<(), Infallible> {
        Ok(())
    }

    fn record(&mut self, _place: Place, _type: u32, _body: &[u8]) -> Result<(), Infallible> {
        Ok(())
    }

    fn page(&mut self, pfn: u64, _type: PageType, data: Option<&Page>) -> Result<(), Infallible> {
        self.0.update(&pfn.to_le_bytes());
        self.0.update(data.map_or(&[][..], |page| page));
        Ok(())
    }

    fn end(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// Digests that were computed already.
#[derive(Default)]
pub struct Digests(BTreeMap<u64, blake3::Hash>);

impl Digests {
    /// [`digest`].
    pub fn of(&mut self, seed: u64) -> blake3::Hash {
        *self.0.entry(seed).or_insert_with(|| digest(seed))
    }
}
