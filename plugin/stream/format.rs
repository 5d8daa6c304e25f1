//! The numbers and fixed headers of both formats, each stated once.

use super::error::Level;
use super::PAGE_SIZE;

/// Pages in one PAGE_DATA record, at most.
///
/// libxc collects `MAX_BATCH_SIZE` (1024) of them per record
/// (`tools/libs/guest/xg_save_restore.h`) and always has; the format itself
/// sets no bound.
pub const BATCH_PAGES_MAX: usize = 1024;

/// Bytes in the body of one PAGE_DATA record, at most: the sub-header, a pfn
/// and a page for each entry. 4,202,504 bytes.
pub const PAGE_DATA_BYTES_MAX: usize = PAGE_DATA_HEADER_BYTES + BATCH_PAGES_MAX * (8 + PAGE_SIZE);

/// Bytes in the body of any other record, at most: libxc's own
/// `REC_LENGTH_MAX`. (libxl sets none.)
pub const RECORD_BYTES_MAX: usize = 128 << 20;

/// The largest guest frame number: PAGE_DATA has 52 bits for it.
pub const PFN_MAX: u64 = (1 << 52) - 1;

/// Set in the type of a record that a reader may ignore.
pub const RECORD_OPTIONAL: u32 = 0x8000_0000;

pub(crate) const XL_HEADER_BYTES: usize = 16;
pub(crate) const XL_IDENT: u64 = 0x4c69_6278_6c46_6d74;
pub(crate) const XL_VERSION: u32 = 2;
pub(crate) const XL_OPTION_BIG_ENDIAN: u32 = 1 << 0;
pub(crate) const XL_OPTION_LEGACY: u32 = 1 << 1;

pub(crate) const XC_IMAGE_HEADER_BYTES: usize = 24;
pub(crate) const XC_DOMAIN_HEADER_BYTES: usize = 16;
pub(crate) const XC_MARKER: u64 = u64::MAX;
pub(crate) const XC_ID: u32 = 0x5845_4e46;
pub(crate) const XC_OPTION_BIG_ENDIAN: u16 = 1 << 0;
pub(crate) const XC_PAGE_SHIFT: u16 = 12;

pub(crate) const RECORD_HEADER_BYTES: usize = 8;
pub(crate) const PAGE_DATA_HEADER_BYTES: usize = 8;
pub(crate) const PAGE_TYPE_SHIFT: u32 = 60;

/// Record types of the libxl stream.
pub mod xl_record {
    #![allow(missing_docs)] // the specification's own names, explained there

    pub const END: u32 = 0;
    pub const LIBXC_CONTEXT: u32 = 1;
    pub const EMULATOR_XENSTORE_DATA: u32 = 2;
    pub const EMULATOR_CONTEXT: u32 = 3;
    pub const CHECKPOINT_END: u32 = 4;
    pub const CHECKPOINT_STATE: u32 = 5;
}

/// Record types of the libxc stream.
pub mod xc_record {
    #![allow(missing_docs)] // the specification's own names, explained there

    pub const END: u32 = 0x00;
    pub const PAGE_DATA: u32 = 0x01;
    pub const X86_PV_INFO: u32 = 0x02;
    pub const X86_PV_P2M_FRAMES: u32 = 0x03;
    pub const X86_PV_VCPU_BASIC: u32 = 0x04;
    pub const X86_PV_VCPU_EXTENDED: u32 = 0x05;
    pub const X86_PV_VCPU_XSAVE: u32 = 0x06;
    pub const SHARED_INFO: u32 = 0x07;
    pub const X86_TSC_INFO: u32 = 0x08;
    pub const HVM_CONTEXT: u32 = 0x09;
    pub const HVM_PARAMS: u32 = 0x0a;
    pub const TOOLSTACK: u32 = 0x0b;
    pub const X86_PV_VCPU_MSRS: u32 = 0x0c;
    pub const VERIFY: u32 = 0x0d;
    pub const CHECKPOINT: u32 = 0x0e;
    pub const CHECKPOINT_DIRTY_PFN_LIST: u32 = 0x0f;
    pub const STATIC_DATA_END: u32 = 0x10;
    pub const X86_CPUID_POLICY: u32 = 0x11;
    pub const X86_MSR_POLICY: u32 = 0x12;
}

/// The specification's name of a record type, with the number where there is
/// none.
pub(crate) fn record_name(level: Level, record_type: u32) -> String {
    let known = match level {
        Level::Xl => xl_name(record_type),
        Level::Xc => xc_name(record_type),
    };
    known.map_or_else(|| format!("{record_type:#x}"), str::to_owned)
}

fn xl_name(record_type: u32) -> Option<&'static str> {
    Some(match record_type {
        xl_record::END => "END",
        xl_record::LIBXC_CONTEXT => "LIBXC_CONTEXT",
        xl_record::EMULATOR_XENSTORE_DATA => "EMULATOR_XENSTORE_DATA",
        xl_record::EMULATOR_CONTEXT => "EMULATOR_CONTEXT",
        xl_record::CHECKPOINT_END => "CHECKPOINT_END",
        xl_record::CHECKPOINT_STATE => "CHECKPOINT_STATE",
        _ => return None,
    })
}

fn xc_name(record_type: u32) -> Option<&'static str> {
    Some(match record_type {
        xc_record::END => "END",
        xc_record::PAGE_DATA => "PAGE_DATA",
        xc_record::X86_PV_INFO => "X86_PV_INFO",
        xc_record::X86_PV_P2M_FRAMES => "X86_PV_P2M_FRAMES",
        xc_record::X86_PV_VCPU_BASIC => "X86_PV_VCPU_BASIC",
        xc_record::X86_PV_VCPU_EXTENDED => "X86_PV_VCPU_EXTENDED",
        xc_record::X86_PV_VCPU_XSAVE => "X86_PV_VCPU_XSAVE",
        xc_record::SHARED_INFO => "SHARED_INFO",
        xc_record::X86_TSC_INFO => "X86_TSC_INFO",
        xc_record::HVM_CONTEXT => "HVM_CONTEXT",
        xc_record::HVM_PARAMS => "HVM_PARAMS",
        xc_record::TOOLSTACK => "TOOLSTACK",
        xc_record::X86_PV_VCPU_MSRS => "X86_PV_VCPU_MSRS",
        xc_record::VERIFY => "VERIFY",
        xc_record::CHECKPOINT => "CHECKPOINT",
        xc_record::CHECKPOINT_DIRTY_PFN_LIST => "CHECKPOINT_DIRTY_PFN_LIST",
        xc_record::STATIC_DATA_END => "STATIC_DATA_END",
        xc_record::X86_CPUID_POLICY => "X86_CPUID_POLICY",
        xc_record::X86_MSR_POLICY => "X86_MSR_POLICY",
        _ => return None,
    })
}

/// The type of a guest page in PAGE_DATA (`XEN_DOMCTL_PFINFO_*`, the table in
/// the libxc specification).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageType {
    /// An ordinary page. The only type with data that an HVM or PVH guest has.
    Normal = 0x0,
    /// PV page table, level 1.
    L1 = 0x1,
    /// PV page table, level 2.
    L2 = 0x2,
    /// PV page table, level 3.
    L3 = 0x3,
    /// PV page table, level 4.
    L4 = 0x4,
    /// PV page table, level 1, pinned.
    L1Pinned = 0x9,
    /// PV page table, level 2, pinned.
    L2Pinned = 0xa,
    /// PV page table, level 3, pinned.
    L3Pinned = 0xb,
    /// PV page table, level 4, pinned.
    L4Pinned = 0xc,
    /// A page with a hardware fault. No data.
    Broken = 0xd,
    /// To be allocated, contents don't matter. No data. (Xen 4.2 to 4.5.)
    AllocateOnly = 0xe,
    /// No page at this frame number, or none that could be sent just now: a PV
    /// page table in the middle of a change is sent like this while the guest
    /// runs, and again after it is suspended. No data.
    Invalid = 0xf,
}

impl PageType {
    /// The type that the four bits 63 to 60 of a PAGE_DATA entry stand for;
    /// `None` for the reserved values 5 to 8 and for more than four bits.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits {
            0x0 => PageType::Normal,
            0x1 => PageType::L1,
            0x2 => PageType::L2,
            0x3 => PageType::L3,
            0x4 => PageType::L4,
            0x9 => PageType::L1Pinned,
            0xa => PageType::L2Pinned,
            0xb => PageType::L3Pinned,
            0xc => PageType::L4Pinned,
            0xd => PageType::Broken,
            0xe => PageType::AllocateOnly,
            0xf => PageType::Invalid,
            _ => return None,
        })
    }

    /// The four bits.
    pub const fn bits(self) -> u8 {
        self as u8
    }

    /// Whether PAGE_DATA carries the contents of pages of this type.
    pub const fn has_data(self) -> bool {
        !matches!(
            self,
            PageType::Broken | PageType::AllocateOnly | PageType::Invalid
        )
    }
}

/// What kind of guest a libxc stream holds (domain header, `type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Guest {
    /// x86 PV.
    Pv = 1,
    /// x86 HVM, and PVH, which is the same to libxc.
    Hvm = 2,
}

impl Guest {
    /// The kind of guest that a domain header's `type` stands for.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Guest::Pv),
            2 => Some(Guest::Hvm),
            _ => None,
        }
    }
}

/// What the libxc image header and domain header say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XcHeader {
    /// Version of the libxc stream format: 2 (Xen 4.6 to 4.13) or 3.
    pub version: u32,
    /// The kind of guest.
    pub guest: Guest,
    /// Major version of the Xen that saved it; 0 for a converted legacy image.
    pub xen_major: u32,
    /// Minor version of it.
    pub xen_minor: u32,
}

/// How many zero bytes bring `length` to a multiple of 8.
pub(crate) const fn padding(length: usize) -> usize {
    length.wrapping_neg() % 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_page_types_are_not_taken_for_normal_pages() {
        for bits in 0..=u8::MAX {
            let known = matches!(bits, 0..=4 | 9..=15);
            assert_eq!(PageType::from_bits(bits).is_some(), known, "{bits:#x}");
            if let Some(page_type) = PageType::from_bits(bits) {
                assert_eq!(page_type.bits(), bits);
                assert_eq!(page_type.has_data(), bits < 0xd);
            }
        }
    }

    #[test]
    fn records_stay_aligned_to_eight_bytes() {
        for length in 0..64 {
            assert!(padding(length) < 8);
            assert_eq!((length + padding(length)) % 8, 0);
        }
    }
}
