//! The two migration stream formats: reader and writer.
//!
//! A saved domain is a *libxl* stream (`docs/specs/libxl-migration-stream.pandoc`
//! in Xen's source, version 2) whose LIBXC_CONTEXT record is followed by an
//! embedded *libxc* stream (`libxc-migration-stream.pandoc`, versions 2 and 3).
//! A file made by `xl save` has xl's own header with the domain's
//! configuration in front of that.
//!
//! ```text
//! xl save file   SaveHeader (magic, flags, config)      savefile.rs
//!   libxl        header                                  Sink::xl_header
//!                records …                               Sink::record(Place::XlBefore)
//!                LIBXC_CONTEXT
//!     libxc      image header, domain header             Sink::xc_header
//!                records …                               Sink::record(Place::XcBefore)
//!                PAGE_DATA, PAGE_DATA, …                 Sink::page
//!                records …                               Sink::record(Place::XcAfter)
//!                END                                     Sink::xc_end
//!                records …                               Sink::record(Place::XlAfter)
//!                END                                     Sink::end
//! ```
//!
//! [`Ingest`] turns such bytes into calls of a [`Sink`]; [`Writer`] is a sink
//! that turns the calls back into bytes. So a snapshot is written by ingesting
//! into the image store, and restored by replaying the store into a `Writer`.
//! Nothing here knows about files, snapshots or libxl.
//!
//! A stream is hostile until checked: every length has a limit, every record is
//! checked for form and order as libxc itself would, so that a stream which
//! could never be restored fails while it is taken and not when it is needed.

mod error;
mod format;
mod ingest;
mod input;
mod rules;
mod savefile;
mod writer;

#[cfg(test)]
pub(crate) mod testenc;
#[cfg(test)]
mod tests;

pub use error::{Error, IngestError, Level};
pub use format::{
    xc_record, xl_record, Guest, PageType, XcHeader, BATCH_PAGES_MAX, PAGE_DATA_BYTES_MAX, PFN_MAX,
    RECORD_BYTES_MAX, RECORD_OPTIONAL,
};
pub use ingest::{Ingest, Summary};
pub use savefile::{is_save_file, SaveHeader, CONFIG_BYTES_MAX};
pub use writer::Writer;

/// Bytes in a guest page. The only page size that libxc accepts on x86
/// (domain header, `page_shift` 12).
pub const PAGE_SIZE: usize = 4096;

/// The contents of one guest page.
pub type Page = [u8; PAGE_SIZE];

/// Where a record that isn't page data stood in the stream.
///
/// The order of the variants is the order in the stream, so records sorted by
/// place (stably) can be written back as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Place {
    /// In the libxl stream, ahead of LIBXC_CONTEXT.
    XlBefore = 0,
    /// In the libxc stream, ahead of the first PAGE_DATA.
    XcBefore = 1,
    /// In the libxc stream, after the first PAGE_DATA. Xen sends all of these
    /// after the last one, with the guest suspended.
    XcAfter = 2,
    /// In the libxl stream, after the libxc stream's end.
    XlAfter = 3,
}

impl Place {
    /// The place that `number` stands for (as in `Place as u8`), if any.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Place::XlBefore),
            1 => Some(Place::XcBefore),
            2 => Some(Place::XcAfter),
            3 => Some(Place::XlAfter),
            _ => None,
        }
    }
}

/// Takes what a stream contains, in the stream's order.
///
/// Contract: `xl_header` comes first and once; then records at
/// [`Place::XlBefore`]; then `xc_header`, once; then records and pages of the
/// libxc stream; then `xc_end`; then records at [`Place::XlAfter`]; then `end`, once. After an
/// error no further call is made. A page may come any number of times, and only
/// its last version counts.
///
/// END and LIBXC_CONTEXT are structure and not reported; VERIFY is not a record
/// to keep either (kept, it would tell a restore to compare instead of to
/// load), it only turns the following pages into [`Sink::verify_page`] calls.
pub trait Sink {
    /// What can go wrong in this sink.
    type Error: std::error::Error + 'static;

    /// The libxl header. `legacy` says that the stream was made by Xen's
    /// conversion tool from the format of Xen 4.5 and earlier (option bit 1).
    fn xl_header(&mut self, legacy: bool) -> Result<(), Self::Error>;

    /// The libxc image header and domain header.
    fn xc_header(&mut self, header: &XcHeader) -> Result<(), Self::Error>;

    /// A record other than PAGE_DATA, verbatim, without its padding.
    fn record(&mut self, place: Place, record_type: u32, body: &[u8]) -> Result<(), Self::Error>;

    /// One entry of a PAGE_DATA record: a guest frame number (at most
    /// [`PFN_MAX`]), its type, and its contents for the types that have any
    /// ([`PageType::has_data`]).
    fn page(
        &mut self,
        pfn: u64,
        page_type: PageType,
        data: Option<&Page>,
    ) -> Result<(), Self::Error>;

    /// An entry that was sent again after VERIFY, for comparison only (libxl's
    /// `LIBXL_SUSPEND_DEBUG`). Ignored unless a sink wants to know.
    fn verify_page(
        &mut self,
        _pfn: u64,
        _page_type: PageType,
        _data: Option<&Page>,
    ) -> Result<(), Self::Error> {
        Ok(())
    }

    /// The libxc stream is over: all of a PV or PVH guest has come.
    fn xc_end(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }

    /// The stream ended where and how it should.
    fn end(&mut self) -> Result<(), Self::Error>;
}
