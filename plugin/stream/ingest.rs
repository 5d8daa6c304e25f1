//! Reads a libxl stream and tells a [`Sink`] what is in it.

use std::io::Read;

use super::error::{Error, IngestError, Level};
use super::format::{
    padding, xl_record, Guest, PageType, XcHeader, PAGE_DATA_BYTES_MAX, PAGE_DATA_HEADER_BYTES,
    PAGE_TYPE_SHIFT, PFN_MAX, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, RECORD_OPTIONAL,
    XC_DOMAIN_HEADER_BYTES, XC_ID, XC_IMAGE_HEADER_BYTES, XC_MARKER, XC_OPTION_BIG_ENDIAN,
    XC_PAGE_SHIFT, XL_HEADER_BYTES, XL_IDENT, XL_OPTION_BIG_ENDIAN, XL_OPTION_LEGACY, XL_VERSION,
};
use super::input::Input;
use super::rules::{Class, Rules};
use super::{Page, Place, Sink, PAGE_SIZE};

/// A record's body is asked for in steps of this size, so that a header that
/// lies about its length costs no more memory than the bytes that really come.
const BODY_STEP_BYTES: usize = 1 << 20;

/// Pages that are read at once. Few, so that a processor still has them in its cache
/// when the sink takes them, and so that the sink works while the save helper
/// maps and writes the next ones.
const CHUNK_PAGES: usize = 32;

/// What went through an [`Ingest`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of the stream, all of it.
    pub bytes: u64,
    /// PAGE_DATA records.
    pub page_records: u64,
    /// Entries in them, counting a page each time it was sent.
    pub pages: u64,
    /// Those of the entries that carried contents.
    pub pages_with_data: u64,
    /// Entries sent after VERIFY, not counted above.
    pub pages_verified: u64,
}

/// Reads one libxl stream from a blocking source, usually the pipe that libxl's
/// save helper writes into.
///
/// A PAGE_DATA record is checked as soon as its list of pages has come, and its pages
/// are handed on while further ones are still being written; nothing is allocated per
/// page.
#[derive(Debug)]
pub struct Ingest<R> {
    input: Input<R>,
    /// The list of pages of the PAGE_DATA record at hand.
    entries: Vec<u8>,
    /// Some of its pages.
    chunk: Box<[Page; CHUNK_PAGES]>,
    /// The body of any other record at hand.
    body: Vec<u8>,
    summary: Summary,
}

struct Header {
    record_type: u32,
    length: usize,
    offset: u64,
}

impl<R: Read> Ingest<R> {
    /// An ingest of the stream that begins at `source`'s next byte.
    pub fn new(source: R) -> Self {
        Ingest {
            input: Input::new(source),
            entries: Vec::new(),
            chunk: Box::new([[0; PAGE_SIZE]; CHUNK_PAGES]),
            body: Vec::new(),
            summary: Summary::default(),
        }
    }

    /// Reads up to and including the libxl END record.
    ///
    /// What follows it in the source isn't looked at, though some of it may
    /// have been read.
    ///
    /// # Errors
    ///
    /// [`IngestError::Stream`] when the stream is cut short, malformed, from a
    /// newer Xen, big-endian or checkpointed, or when reading fails;
    /// [`IngestError::Sink`] with whatever the sink returned.
    pub fn run<S: Sink>(mut self, sink: &mut S) -> Result<Summary, IngestError<S::Error>> {
        let legacy = self.xl_header()?;
        sink.xl_header(legacy).map_err(IngestError::Sink)?;
        let mut place = Place::XlBefore;
        loop {
            let header = self.record_header(Level::Xl)?;
            match header.record_type {
                xl_record::END => {
                    self.empty_body(Level::Xl, &header)?;
                    if place == Place::XlBefore {
                        return Err(header
                            .wrong(Level::Xl, "no LIBXC_CONTEXT came before it")
                            .into());
                    }
                    sink.end().map_err(IngestError::Sink)?;
                    self.summary.bytes = self.input.offset();
                    return Ok(self.summary);
                }
                xl_record::LIBXC_CONTEXT => {
                    self.empty_body(Level::Xl, &header)?;
                    if place != Place::XlBefore {
                        return Err(header.wrong(Level::Xl, "it comes a second time").into());
                    }
                    self.xc_stream(sink)?;
                    place = Place::XlAfter;
                }
                _ => self.xl_record(&header, place, sink)?,
            }
        }
    }

    /// Reads the libxl header; returns whether the stream is a converted one.
    fn xl_header(&mut self) -> Result<bool, Error> {
        const WHAT: &str = "libxl header";
        let offset = self.input.offset();
        let mut bytes = [0; XL_HEADER_BYTES];
        self.input.exact(&mut bytes, WHAT)?;
        let wrong = |problem: String| Error::Header {
            what: WHAT,
            offset,
            problem,
        };
        // Big-endian whatever the stream is.
        let number = u128::from_be_bytes(bytes);
        let (ident, version, options) =
            ((number >> 64) as u64, (number >> 32) as u32, number as u32);
        if ident != XL_IDENT {
            return Err(wrong("this is no libxl stream".to_owned()));
        }
        if version != XL_VERSION {
            return Err(wrong(format!(
                "its version is {version}, and only 2 is known"
            )));
        }
        if options & XL_OPTION_BIG_ENDIAN != 0 {
            return Err(wrong("the stream is big-endian".to_owned()));
        }
        Ok(options & XL_OPTION_LEGACY != 0)
    }

    /// Reads a record of the libxl stream that has a body to keep.
    fn xl_record<S: Sink>(
        &mut self,
        header: &Header,
        place: Place,
        sink: &mut S,
    ) -> Result<(), IngestError<S::Error>> {
        let emulator = match header.record_type {
            xl_record::EMULATOR_XENSTORE_DATA | xl_record::EMULATOR_CONTEXT => true,
            xl_record::CHECKPOINT_END | xl_record::CHECKPOINT_STATE => {
                let problem =
                    "it belongs to a checkpointed stream (Remus or COLO), which has no single state";
                return Err(header.wrong(Level::Xl, problem).into());
            }
            optional if optional & RECORD_OPTIONAL != 0 => false,
            _ => {
                let problem = "it is unknown and mandatory: the stream is from a newer Xen than this program knows";
                return Err(header.wrong(Level::Xl, problem).into());
            }
        };
        self.read_body(Level::Xl, header)?;
        if emulator && self.body.len() < 8 {
            let problem = "it is too short for its emulator sub-header";
            return Err(header.wrong(Level::Xl, problem).into());
        }
        sink.record(place, header.record_type, &self.body)
            .map_err(IngestError::Sink)
    }

    /// Reads the embedded libxc stream, headers to END.
    fn xc_stream<S: Sink>(&mut self, sink: &mut S) -> Result<(), IngestError<S::Error>> {
        let xc_header = self.xc_header()?;
        sink.xc_header(&xc_header).map_err(IngestError::Sink)?;
        let mut rules = Rules::new(xc_header);
        let mut verifying = false;
        loop {
            let header = self.record_header(Level::Xc)?;
            let wrong = |problem: String| header.wrong(Level::Xc, problem);
            let class = rules.admit(header.record_type).map_err(wrong)?;
            if class == Class::Pages {
                let data_pages = self.read_entries(&header)?;
                self.pass_pages(data_pages, verifying, sink)?;
                self.skip_padding(header.length)?;
                continue;
            }
            let place = if rules.seen_pages() {
                Place::XcAfter
            } else {
                Place::XcBefore
            };
            self.read_body(Level::Xc, &header)?;
            rules.check(header.record_type, &self.body).map_err(wrong)?;
            match class {
                Class::End => return sink.xc_end().map_err(IngestError::Sink),
                Class::Verify => verifying = true,
                Class::Keep | Class::Pages => sink
                    .record(place, header.record_type, &self.body)
                    .map_err(IngestError::Sink)?,
            }
        }
    }

    /// Reads the libxc image header and domain header.
    fn xc_header(&mut self) -> Result<XcHeader, Error> {
        let version = self.xc_image_header()?;
        const WHAT: &str = "libxc domain header";
        let offset = self.input.offset();
        let mut bytes = [0; XC_DOMAIN_HEADER_BYTES];
        self.input.exact(&mut bytes, WHAT)?;
        let wrong = |problem: String| Error::Header {
            what: WHAT,
            offset,
            problem,
        };
        let number = u128::from_le_bytes(bytes);
        let page_shift = (number >> 32) as u16;
        if page_shift != XC_PAGE_SHIFT {
            return Err(wrong(format!(
                "its pages are 2^{page_shift} bytes, not 4096"
            )));
        }
        let Some(guest) = Guest::from_number(number as u32) else {
            let problem = format!("guest type {} is neither PV nor HVM", number as u32);
            return Err(wrong(problem));
        };
        Ok(XcHeader {
            version,
            guest,
            xen_major: (number >> 64) as u32,
            xen_minor: (number >> 96) as u32,
        })
    }

    fn xc_image_header(&mut self) -> Result<u32, Error> {
        const WHAT: &str = "libxc image header";
        let offset = self.input.offset();
        let mut bytes = [0; XC_IMAGE_HEADER_BYTES];
        self.input.exact(&mut bytes, WHAT)?;
        let wrong = |problem: String| Error::Header {
            what: WHAT,
            offset,
            problem,
        };
        // Big-endian whatever the stream is. The last six bytes are reserved.
        let [front @ .., options0, options1, _, _, _, _, _, _] = bytes;
        let number = u128::from_be_bytes(front);
        let options = u16::from_be_bytes([options0, options1]);
        let (marker, id, version) = ((number >> 64) as u64, (number >> 32) as u32, number as u32);
        if marker != XC_MARKER || id != XC_ID {
            return Err(wrong("no libxc stream begins here".to_owned()));
        }
        if !matches!(version, 2 | 3) {
            return Err(wrong(format!(
                "its version is {version}; 2 and 3 are known"
            )));
        }
        if options & XC_OPTION_BIG_ENDIAN != 0 {
            return Err(wrong("the stream is big-endian".to_owned()));
        }
        Ok(version)
    }

    fn record_header(&mut self, level: Level) -> Result<Header, Error> {
        let offset = self.input.offset();
        let mut bytes = [0; RECORD_HEADER_BYTES];
        let what = match level {
            Level::Xl => "a libxl record header",
            Level::Xc => "a libxc record header",
        };
        self.input.exact(&mut bytes, what)?;
        let number = u64::from_le_bytes(bytes);
        Ok(Header {
            record_type: number as u32,
            // Sound on every target that has 32-bit pointers or wider.
            length: (number >> 32) as usize,
            offset,
        })
    }

    /// Reads a record's body into `self.body` and skips its padding, which
    /// readers must ignore.
    fn read_body(&mut self, level: Level, header: &Header) -> Result<(), Error> {
        if header.length > RECORD_BYTES_MAX {
            let problem = format!(
                "it claims {} bytes, more than the {RECORD_BYTES_MAX} that any record may have",
                header.length
            );
            return Err(header.wrong(level, problem));
        }
        self.body.clear();
        while self.body.len() < header.length {
            let from = self.body.len();
            let step = (header.length - from).min(BODY_STEP_BYTES);
            self.body.resize(from + step, 0);
            let fresh = self.body.get_mut(from..).unwrap_or_default();
            self.input.exact(fresh, "a record's body")?;
        }
        self.skip_padding(header.length)
    }

    fn empty_body(&mut self, level: Level, header: &Header) -> Result<(), Error> {
        if header.length == 0 {
            return Ok(());
        }
        let problem = format!("it is {} bytes long and should be empty", header.length);
        Err(header.wrong(level, problem))
    }

    fn skip_padding(&mut self, length: usize) -> Result<(), Error> {
        let mut scratch = [0; 8];
        let pad = scratch.get_mut(..padding(length)).unwrap_or_default();
        self.input.exact(pad, "a record's padding")
    }

    /// Reads a PAGE_DATA body up to the contents of its pages, and checks it; returns
    /// how many pages have any.
    fn read_entries(&mut self, header: &Header) -> Result<usize, Error> {
        let wrong = |problem: String| header.wrong(Level::Xc, problem);
        if header.length > PAGE_DATA_BYTES_MAX {
            return Err(wrong(format!(
                "it claims {} bytes, more than the {PAGE_DATA_BYTES_MAX} that 1024 pages take",
                header.length
            )));
        }
        let Some(rest) = header.length.checked_sub(PAGE_DATA_HEADER_BYTES) else {
            return Err(wrong(format!("it is only {} bytes long", header.length)));
        };
        let mut front = [0; PAGE_DATA_HEADER_BYTES];
        self.input.exact(&mut front, "PAGE_DATA")?;
        let count = u64::from_le_bytes(front) as u32 as usize;
        if count == 0 {
            return Err(wrong("it has no entries".to_owned()));
        }
        // No overflow: count is below 2^32, and a body that long can't be here.
        let length = count.saturating_mul(8);
        let Some(data_bytes) = rest.checked_sub(length) else {
            return Err(wrong(format!(
                "it claims {count} entries and is only {} bytes long",
                header.length
            )));
        };
        self.entries.resize(length, 0);
        self.input.exact(&mut self.entries, "PAGE_DATA")?;
        let mut with_data = 0;
        for entry in self.entries.chunks_exact(8).map(number) {
            let (pfn, page_type) = decode_entry(entry);
            match page_type {
                Some(page_type) => with_data += usize::from(page_type.has_data()),
                None => {
                    let bits = entry >> PAGE_TYPE_SHIFT;
                    return Err(wrong(format!(
                        "pfn {pfn:#x} has the reserved page type {bits}"
                    )));
                }
            }
        }
        if data_bytes != with_data * PAGE_SIZE {
            return Err(wrong(format!(
                "it has {data_bytes} bytes of page contents, where its page types ask for {}",
                with_data * PAGE_SIZE
            )));
        }
        self.summary.page_records += 1;
        Ok(with_data)
    }

    /// Hands the entries of a PAGE_DATA record, already checked, to the sink, with the
    /// contents of `left` of them that come now.
    fn pass_pages<S: Sink>(
        &mut self,
        mut left: usize,
        verifying: bool,
        sink: &mut S,
    ) -> Result<(), IngestError<S::Error>> {
        let mut pages: std::slice::Iter<'_, Page> = [].iter();
        for entry in self.entries.chunks_exact(8).map(number) {
            let (pfn, Some(page_type)) = decode_entry(entry) else {
                continue; // read_entries saw to it
            };
            let mut page = None;
            if page_type.has_data() {
                if pages.as_slice().is_empty() {
                    let count = left.min(CHUNK_PAGES);
                    left -= count;
                    let chunk = self.chunk.get_mut(..count).unwrap_or_default();
                    self.input.exact(chunk.as_flattened_mut(), "PAGE_DATA")?;
                    pages = chunk.iter();
                }
                page = pages.next();
            }
            let passed = if verifying {
                self.summary.pages_verified += 1;
                sink.verify_page(pfn, page_type, page)
            } else {
                self.summary.pages += 1;
                self.summary.pages_with_data += u64::from(page.is_some());
                sink.page(pfn, page_type, page)
            };
            passed.map_err(IngestError::Sink)?;
        }
        Ok(())
    }
}

impl Header {
    fn wrong(&self, level: Level, problem: impl Into<String>) -> Error {
        Error::Record {
            level,
            record_type: self.record_type,
            offset: self.offset,
            problem: problem.into(),
        }
    }
}

fn number(chunk: &[u8]) -> u64 {
    chunk
        .first_chunk::<8>()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// A PAGE_DATA entry's frame number and type. Bits 59 to 52 are reserved, to be
/// ignored by readers.
fn decode_entry(entry: u64) -> (u64, Option<PageType>) {
    let bits = (entry >> PAGE_TYPE_SHIFT) as u8;
    (entry & PFN_MAX, PageType::from_bits(bits))
}
