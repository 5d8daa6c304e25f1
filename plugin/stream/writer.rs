//! Builds a libxl stream out of what a [`Sink`] is told.

use std::io::Write;

use super::error::Error;
use super::format::{
    padding, xc_record, xl_record, PageType, XcHeader, BATCH_PAGES_MAX, PAGE_TYPE_SHIFT, PFN_MAX,
    RECORD_BYTES_MAX, XC_ID, XC_MARKER, XC_PAGE_SHIFT, XL_IDENT, XL_OPTION_LEGACY, XL_VERSION,
};
use super::{Page, Place, Sink, PAGE_SIZE};

/// Where the writer is in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Start,
    Xl,
    Xc,
    XlAfter,
    Done,
}

/// Writes a libxl stream that stock libxl and libxc accept.
///
/// Pages are collected into PAGE_DATA records of up to [`BATCH_PAGES_MAX`]
/// entries and keep their order; libxl's own saves go through the frame numbers
/// upwards once, and so should the caller. All output is little-endian, all
/// reserved fields and padding are zero.
///
/// The writer makes one `write` call per record or more, and does no buffering
/// besides: pages leave 4 MiB at a time.
#[derive(Debug)]
pub struct Writer<W> {
    output: W,
    stage: Stage,
    /// PAGE_DATA entries waiting, as in the stream.
    entries: Vec<u8>,
    /// The contents that belong to them.
    data: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// A writer of one stream to `output`.
    pub fn new(output: W) -> Self {
        Writer {
            output,
            stage: Stage::Start,
            entries: Vec::with_capacity(BATCH_PAGES_MAX * 8),
            data: Vec::with_capacity(BATCH_PAGES_MAX * PAGE_SIZE),
        }
    }

    /// Gives the output back; complete only after [`Sink::end`].
    pub fn into_inner(self) -> W {
        self.output
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.output
            .write_all(bytes)
            .map_err(|source| Error::Write { source })
    }

    fn put_record(&mut self, record_type: u32, body: &[u8]) -> Result<(), Error> {
        if body.len() > RECORD_BYTES_MAX {
            return Err(unwritable(format!(
                "record {record_type:#x} has {} bytes, more than the {RECORD_BYTES_MAX} that any may have",
                body.len()
            )));
        }
        self.put_record_header(record_type, body.len())?;
        self.put(body)?;
        self.put([0; 8].get(..padding(body.len())).unwrap_or_default())
    }

    /// `length` is at most [`RECORD_BYTES_MAX`].
    fn put_record_header(&mut self, record_type: u32, length: usize) -> Result<(), Error> {
        let header = u64::from(record_type) | (length as u64) << 32;
        self.put(&header.to_le_bytes())
    }

    fn flush_pages(&mut self) -> Result<(), Error> {
        let count = self.entries.len() / 8;
        if count == 0 {
            return Ok(());
        }
        let length = 8 + self.entries.len() + self.data.len();
        self.put_record_header(xc_record::PAGE_DATA, length)?;
        self.put(&(count as u64).to_le_bytes())?;
        let write = |output: &mut W, bytes: &mut Vec<u8>| {
            let result = output.write_all(bytes);
            bytes.clear();
            result.map_err(|source| Error::Write { source })
        };
        write(&mut self.output, &mut self.entries)?;
        write(&mut self.output, &mut self.data)
        // Entries and pages are multiples of 8 bytes: no padding.
    }

    /// Closes the libxc stream if it is open.
    fn leave_xc(&mut self) -> Result<(), Error> {
        match self.stage {
            Stage::Xc => {
                self.flush_pages()?;
                self.put_record(xc_record::END, &[])?;
                self.stage = Stage::XlAfter;
                Ok(())
            }
            Stage::XlAfter => Ok(()),
            Stage::Start | Stage::Xl => Err(unwritable("the libxc stream is missing")),
            Stage::Done => Err(unwritable("it was already ended")),
        }
    }

    fn expect(&self, stage: Stage, what: &str) -> Result<(), Error> {
        if self.stage == stage {
            return Ok(());
        }
        Err(unwritable(format!(
            "{what} in the wrong place ({:?})",
            self.stage
        )))
    }
}

fn unwritable(problem: impl Into<String>) -> Error {
    Error::Unwritable {
        problem: problem.into(),
    }
}

impl<W: Write> Sink for Writer<W> {
    type Error = Error;

    fn xl_header(&mut self, legacy: bool) -> Result<(), Error> {
        self.expect(Stage::Start, "a libxl header")?;
        let options = if legacy { XL_OPTION_LEGACY } else { 0 };
        self.put(&XL_IDENT.to_be_bytes())?;
        self.put(&XL_VERSION.to_be_bytes())?;
        self.put(&options.to_be_bytes())?;
        self.stage = Stage::Xl;
        Ok(())
    }

    fn xc_header(&mut self, header: &XcHeader) -> Result<(), Error> {
        self.expect(Stage::Xl, "a libxc header")?;
        self.put_record(xl_record::LIBXC_CONTEXT, &[])?;
        self.put(&XC_MARKER.to_be_bytes())?;
        self.put(&XC_ID.to_be_bytes())?;
        self.put(&header.version.to_be_bytes())?;
        self.put(&[0; 8])?; // options: little-endian; reserved
        self.put(&(header.guest as u32).to_le_bytes())?;
        self.put(&u32::from(XC_PAGE_SHIFT).to_le_bytes())?;
        self.put(&header.xen_major.to_le_bytes())?;
        self.put(&header.xen_minor.to_le_bytes())?;
        self.stage = Stage::Xc;
        Ok(())
    }

    fn record(&mut self, place: Place, record_type: u32, body: &[u8]) -> Result<(), Error> {
        match place {
            Place::XlBefore => self.expect(Stage::Xl, "a libxl record")?,
            Place::XcBefore | Place::XcAfter => {
                self.expect(Stage::Xc, "a libxc record")?;
                self.flush_pages()?;
            }
            Place::XlAfter => self.leave_xc()?,
        }
        self.put_record(record_type, body)
    }

    fn page(&mut self, pfn: u64, page_type: PageType, data: Option<&Page>) -> Result<(), Error> {
        self.expect(Stage::Xc, "a page")?;
        if pfn > PFN_MAX {
            return Err(unwritable(format!(
                "pfn {pfn:#x} is beyond what the format can name"
            )));
        }
        if data.is_some() != page_type.has_data() {
            return Err(unwritable(format!(
                "pfn {pfn:#x} of type {page_type:?} must have contents, or must not, and it is the other way"
            )));
        }
        let entry = u64::from(page_type.bits()) << PAGE_TYPE_SHIFT | pfn;
        self.entries.extend_from_slice(&entry.to_le_bytes());
        if let Some(page) = data {
            self.data.extend_from_slice(page);
        }
        if self.entries.len() >= BATCH_PAGES_MAX * 8 {
            self.flush_pages()?;
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), Error> {
        self.leave_xc()?;
        self.put_record(xl_record::END, &[])?;
        self.stage = Stage::Done;
        self.output
            .flush()
            .map_err(|source| Error::Write { source })
    }
}
