//! A guest's memory that is the same everywhere and each time, and its stream.

use std::error::Error;
use std::io::Write;

use xl_vne::stream::{Guest, Page, PageType, Place, Sink, Writer, XcHeader, PAGE_SIZE};

/// What benchmarks return.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Small steps of a generator that is the same everywhere.
pub struct Noise(u64);

impl Noise {
    /// One of as many generators as there are seeds.
    pub fn of(seed: u64) -> Self {
        Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// What a page of a guest is like: `version` 0 at first.
pub fn page(pfn: u64, version: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    // Zero pages, text and noise lie in stretches, as they do in guests.
    let kind = Noise::of(pfn / 16).next() % 10;
    let mut noise = Noise::of((pfn << 8) + version + 1);
    match kind {
        0..=2 if version == 0 => {}
        0..=6 => structures(&mut page, &mut noise),
        _ => {
            for word in page.chunks_exact_mut(8) {
                word.copy_from_slice(&noise.next().to_le_bytes());
            }
        }
    }
    page
}

/// What kernels and programs have most of: records of pointers into a few
/// regions, small numbers, flags and a little text.
pub fn structures(page: &mut Page, noise: &mut Noise) {
    const WORDS: [&[u8]; 8] = [
        b"connection",
        b"/usr/lib/",
        b"error: ",
        b"value=",
        b"timeout ",
        b"0x7fff",
        b"index",
        b"\n",
    ];
    for record in page.chunks_exact_mut(64) {
        let random = noise.next();
        let pointer = 0xffff_8880_0000_0000 | (random >> 20 & 0xff_ffc0);
        record[..8].copy_from_slice(&pointer.to_le_bytes());
        record[8..16].copy_from_slice(&(pointer + 64).to_le_bytes());
        record[16..20].copy_from_slice(&((random & 0xff) as u32).to_le_bytes());
        record[24..32].copy_from_slice(&(random >> 8 & 0xffff).to_le_bytes());
        let mut at = 32;
        while at < 64 {
            let word = WORDS[(noise.next() % 8) as usize];
            let end = (at + word.len()).min(64);
            record[at..end].copy_from_slice(&word[..end - at]);
            at = end;
        }
    }
}

/// What stands before a guest's pages in its stream.
pub fn begin<W: Write>(output: W) -> Result<Writer<W>> {
    let mut writer = Writer::new(output);
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
    Ok(writer)
}

/// One page.
pub fn put<W: Write>(writer: &mut Writer<W>, pfn: u64, data: &Page) -> Result<()> {
    Ok(writer.page(pfn, PageType::Normal, Some(data))?)
}

/// What stands behind them.
pub fn end<W: Write>(mut writer: Writer<W>) -> Result<()> {
    let mut parameters = [0; 24];
    parameters[0] = 1;
    for (record, body) in [(0x08, &[0; 24][..]), (0x09, &[0; 64]), (0x0a, &parameters)] {
        writer.record(Place::XcAfter, record, body)?;
    }
    writer.end()?;
    writer.into_inner().flush()?;
    Ok(())
}
