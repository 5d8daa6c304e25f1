//! The form and order that the records of a libxc stream must have.
//!
//! These are the checks that libxc makes when it restores
//! (`tools/libs/guest/xg_sr_restore*.c`), as far as they need no domain to
//! check against. Made while a snapshot is taken, they turn "could never have
//! been restored" into an error at the time when something can be done.

use super::format::{xc_record as rec, Guest, XcHeader, RECORD_OPTIONAL};
use super::PAGE_SIZE;

/// `sizeof(xen_cpuid_leaf_t)`.
const CPUID_LEAF_BYTES: usize = 24;
/// `sizeof(xen_msr_entry_t)`.
const MSR_ENTRY_BYTES: usize = 16;
/// `sizeof(struct xc_sr_rec_x86_tsc_info)`.
const TSC_INFO_BYTES: usize = 24;

/// `sizeof(struct xc_sr_rec_x86_pv_vcpu_hdr)`.
const VCPU_HEADER_BYTES: usize = 8;

/// What a record type means to a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// PAGE_DATA.
    Pages,
    /// VERIFY: what follows is for comparison.
    Verify,
    /// END of the libxc stream.
    End,
    /// Anything to be kept as it is.
    Keep,
}

/// The state of the checks over one libxc stream.
#[derive(Debug)]
pub(crate) struct Rules {
    header: XcHeader,
    /// From X86_PV_INFO: bytes in a guest word.
    pv_width: Option<usize>,
    static_data_end: bool,
    p2m_frames: bool,
    pages: bool,
    vcpu0: bool,
    hvm_context: bool,
}

type Checked<T> = Result<T, String>;

impl Rules {
    pub(crate) fn new(header: XcHeader) -> Self {
        Rules {
            header,
            pv_width: None,
            static_data_end: false,
            p2m_frames: false,
            pages: false,
            vcpu0: false,
            hvm_context: false,
        }
    }

    /// Whether any PAGE_DATA has been seen.
    pub(crate) fn seen_pages(&self) -> bool {
        self.pages
    }

    /// Checks a record by its type alone, before its body is read.
    pub(crate) fn admit(&mut self, record_type: u32) -> Checked<Class> {
        match record_type {
            rec::END => self.finished().map(|()| Class::End),
            rec::PAGE_DATA => self.admit_pages(),
            rec::VERIFY => Ok(Class::Verify),
            rec::X86_PV_INFO
            | rec::X86_PV_P2M_FRAMES
            | rec::X86_PV_VCPU_BASIC
            | rec::X86_PV_VCPU_EXTENDED
            | rec::X86_PV_VCPU_XSAVE
            | rec::X86_PV_VCPU_MSRS
            | rec::SHARED_INFO => self.only_for(Guest::Pv),
            rec::HVM_CONTEXT | rec::HVM_PARAMS => self.only_for(Guest::Hvm),
            rec::X86_TSC_INFO
            | rec::STATIC_DATA_END
            | rec::X86_CPUID_POLICY
            | rec::X86_MSR_POLICY => Ok(Class::Keep),
            rec::CHECKPOINT | rec::CHECKPOINT_DIRTY_PFN_LIST => Err(
                "it belongs to a checkpointed stream (Remus or COLO), which has no single state"
                    .to_owned(),
            ),
            rec::TOOLSTACK => Err("it was withdrawn from the format".to_owned()),
            optional if optional & RECORD_OPTIONAL != 0 => Ok(Class::Keep),
            _ => Err(
                "it is unknown and mandatory: the stream is from a newer Xen than this program knows"
                    .to_owned(),
            ),
        }
    }

    /// Checks the body of a record that [`Rules::admit`] let in as
    /// [`Class::Keep`], [`Class::Verify`] or [`Class::End`].
    pub(crate) fn check(&mut self, record_type: u32, body: &[u8]) -> Checked<()> {
        match record_type {
            rec::END | rec::VERIFY => must_be(body, 0),
            rec::STATIC_DATA_END => self.static_data_end(body),
            rec::X86_PV_INFO => self.pv_info(body),
            rec::X86_PV_P2M_FRAMES => self.p2m_frames(body),
            rec::X86_PV_VCPU_BASIC => self.vcpu_basic(body),
            rec::X86_PV_VCPU_EXTENDED | rec::X86_PV_VCPU_XSAVE | rec::X86_PV_VCPU_MSRS => {
                vcpu(body).map(|_vcpu| ())
            }
            rec::SHARED_INFO => must_be(body, PAGE_SIZE),
            rec::X86_TSC_INFO => must_be(body, TSC_INFO_BYTES),
            rec::HVM_CONTEXT => self.hvm_context(body),
            rec::HVM_PARAMS => hvm_params(body),
            rec::X86_CPUID_POLICY => multiple_of(body, CPUID_LEAF_BYTES),
            rec::X86_MSR_POLICY => multiple_of(body, MSR_ENTRY_BYTES),
            _optional => Ok(()),
        }
    }

    fn only_for(&self, guest: Guest) -> Checked<Class> {
        if self.header.guest == guest {
            return Ok(Class::Keep);
        }
        Err(match self.header.guest {
            Guest::Pv => "it has no place in the stream of a PV guest",
            Guest::Hvm => "it has no place in the stream of an HVM or PVH guest",
        }
        .to_owned())
    }

    fn admit_pages(&mut self) -> Checked<Class> {
        self.infer_static_data_end()?;
        if self.header.guest == Guest::Pv && !self.p2m_frames {
            return Err("it comes before X86_PV_P2M_FRAMES".to_owned());
        }
        self.pages = true;
        Ok(Class::Pages)
    }

    /// Version 2 has no STATIC_DATA_END; its place follows from the first
    /// record that needs it ("v3 compat with v2" in the specification).
    fn infer_static_data_end(&mut self) -> Checked<()> {
        if self.header.version < 3 {
            self.static_data_end = true;
        }
        if self.static_data_end {
            return Ok(());
        }
        Err("it comes before STATIC_DATA_END".to_owned())
    }

    fn static_data_end(&mut self, body: &[u8]) -> Checked<()> {
        must_be(body, 0)?;
        if self.static_data_end {
            return Err("it comes a second time, or after memory".to_owned());
        }
        self.static_data_end = true;
        Ok(())
    }

    fn pv_info(&mut self, body: &[u8]) -> Checked<()> {
        must_be(body, 8)?;
        if self.pv_width.is_some() {
            return Err("it comes a second time".to_owned());
        }
        match body {
            [4, 3, ..] => self.pv_width = Some(4),
            [8, 4, ..] => self.pv_width = Some(8),
            [width, levels, ..] => {
                return Err(format!(
                    "a guest with {width}-byte words and {levels} page table levels does not exist"
                ))
            }
            _ => return Err("it is too short".to_owned()),
        }
        Ok(())
    }

    fn p2m_frames(&mut self, body: &[u8]) -> Checked<()> {
        self.infer_static_data_end()?;
        let Some(width) = self.pv_width else {
            return Err("it comes before X86_PV_INFO".to_owned());
        };
        let (first, last) = (word(body, 0)?, word(body, 4)?);
        if first > last {
            return Err(format!(
                "its range ends ({last:#x}) before it begins ({first:#x})"
            ));
        }
        let per_frame = (PAGE_SIZE / width) as u64;
        let frames = u64::from(last) / per_frame - u64::from(first) / per_frame + 1;
        if body.len() as u64 != 8 + 8 * frames {
            return Err(format!(
                "it is {} bytes long, where frames {first:#x} to {last:#x} take {}",
                body.len(),
                8 + 8 * frames
            ));
        }
        self.p2m_frames = true;
        Ok(())
    }

    fn vcpu_basic(&mut self, body: &[u8]) -> Checked<()> {
        // An empty one doesn't count (specification, errata 1).
        if vcpu(body)? == 0 && body.len() > VCPU_HEADER_BYTES {
            self.vcpu0 = true;
        }
        Ok(())
    }

    fn hvm_context(&mut self, body: &[u8]) -> Checked<()> {
        if body.is_empty() {
            return Err("it is empty".to_owned());
        }
        self.hvm_context = true;
        Ok(())
    }

    /// What a stream needs before it may end.
    fn finished(&self) -> Checked<()> {
        let missing = match self.header.guest {
            _ if !self.pages => "PAGE_DATA",
            Guest::Pv if !self.vcpu0 => "X86_PV_VCPU_BASIC for vcpu 0",
            Guest::Hvm if !self.hvm_context => "HVM_CONTEXT",
            _ => return Ok(()),
        };
        Err(format!("the stream ends without {missing}"))
    }
}

/// The virtual CPU that a record is about.
fn vcpu(body: &[u8]) -> Checked<u32> {
    if body.len() < VCPU_HEADER_BYTES {
        return Err(format!("it is only {} bytes long", body.len()));
    }
    word(body, 0)
}

fn hvm_params(body: &[u8]) -> Checked<()> {
    let count = u64::from(word(body, 0)?);
    if body.len() as u64 != 8 + 16 * count {
        return Err(format!(
            "it is {} bytes long, where {count} parameters take {}",
            body.len(),
            8 + 16 * count
        ));
    }
    Ok(())
}

fn must_be(body: &[u8], length: usize) -> Checked<()> {
    if body.len() == length {
        return Ok(());
    }
    Err(format!(
        "it is {} bytes long and should be {length}",
        body.len()
    ))
}

fn multiple_of(body: &[u8], entry: usize) -> Checked<()> {
    if !body.is_empty() && body.len() % entry == 0 {
        return Ok(());
    }
    Err(format!(
        "it is {} bytes long, which is no whole number of {entry}-byte entries",
        body.len()
    ))
}

/// The little-endian 32-bit number at `at`.
fn word(body: &[u8], at: usize) -> Checked<u32> {
    body.get(at..)
        .and_then(|tail| tail.first_chunk::<4>())
        .map(|bytes| u32::from_le_bytes(*bytes))
        .ok_or_else(|| format!("it is only {} bytes long", body.len()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn rules(version: u32, guest: Guest) -> Rules {
        Rules::new(XcHeader {
            version,
            guest,
            xen_major: 4,
            xen_minor: 17,
        })
    }

    const PV_INFO_64: [u8; 8] = [8, 4, 0, 0, 0, 0, 0, 0];

    fn p2m_frames(last: u32, frames: usize) -> Vec<u8> {
        let mut body = vec![0; 8 + 8 * frames];
        body[4..8].copy_from_slice(&last.to_le_bytes());
        body
    }

    #[test]
    fn pages_before_the_static_data_end_are_refused_in_version_3_only() {
        assert!(rules(3, Guest::Hvm).admit(rec::PAGE_DATA).is_err());
        assert!(rules(2, Guest::Hvm).admit(rec::PAGE_DATA).is_ok());
        let mut three = rules(3, Guest::Hvm);
        three.check(rec::STATIC_DATA_END, &[]).unwrap();
        assert!(three.admit(rec::PAGE_DATA).is_ok());
        assert!(three.check(rec::STATIC_DATA_END, &[]).is_err());
    }

    #[test]
    fn pv_pages_need_info_and_p2m_frames_first() {
        let mut rules = rules(3, Guest::Pv);
        assert!(rules
            .check(rec::X86_PV_P2M_FRAMES, &p2m_frames(5, 1))
            .is_err());
        rules.check(rec::X86_PV_INFO, &PV_INFO_64).unwrap();
        assert!(rules.check(rec::X86_PV_INFO, &PV_INFO_64).is_err());
        rules.check(rec::STATIC_DATA_END, &[]).unwrap();
        assert!(rules.admit(rec::PAGE_DATA).is_err());
        assert!(rules
            .check(rec::X86_PV_P2M_FRAMES, &p2m_frames(512, 1))
            .is_err());
        rules
            .check(rec::X86_PV_P2M_FRAMES, &p2m_frames(512, 2))
            .unwrap();
        assert_eq!(rules.admit(rec::PAGE_DATA), Ok(Class::Pages));
    }

    #[test]
    fn a_pv_guest_of_an_impossible_width_is_refused() {
        for info in [[4, 4], [8, 3], [0, 0], [16, 4]] {
            let body = [info[0], info[1], 0, 0, 0, 0, 0, 0];
            assert!(rules(3, Guest::Pv).check(rec::X86_PV_INFO, &body).is_err());
        }
    }

    #[test]
    fn records_of_the_other_kind_of_guest_are_refused() {
        for record in [rec::X86_PV_INFO, rec::SHARED_INFO, rec::X86_PV_VCPU_MSRS] {
            assert!(rules(3, Guest::Hvm).admit(record).is_err());
        }
        for record in [rec::HVM_CONTEXT, rec::HVM_PARAMS] {
            assert!(rules(3, Guest::Pv).admit(record).is_err());
        }
    }

    #[test]
    fn a_stream_without_cpu_state_does_not_end_well() {
        let mut hvm = rules(2, Guest::Hvm);
        hvm.admit(rec::PAGE_DATA).unwrap();
        assert!(hvm.admit(rec::END).unwrap_err().contains("HVM_CONTEXT"));
        assert!(hvm.check(rec::HVM_CONTEXT, &[]).is_err());
        hvm.check(rec::HVM_CONTEXT, &[1]).unwrap();
        assert_eq!(hvm.admit(rec::END), Ok(Class::End));

        let mut pv = rules(2, Guest::Pv);
        pv.check(rec::X86_PV_INFO, &PV_INFO_64).unwrap();
        pv.check(rec::X86_PV_P2M_FRAMES, &p2m_frames(1, 1)).unwrap();
        pv.admit(rec::PAGE_DATA).unwrap();
        pv.check(rec::X86_PV_VCPU_BASIC, &[0; 8]).unwrap();
        assert!(pv.admit(rec::END).unwrap_err().contains("vcpu 0"));
        pv.check(rec::X86_PV_VCPU_BASIC, &[0; 16]).unwrap();
        assert_eq!(pv.admit(rec::END), Ok(Class::End));
    }

    #[test]
    fn checkpointed_and_future_streams_are_refused_and_optional_records_are_not() {
        for record in [
            rec::CHECKPOINT,
            rec::CHECKPOINT_DIRTY_PFN_LIST,
            rec::TOOLSTACK,
            0x13,
        ] {
            assert!(rules(3, Guest::Pv).admit(record).is_err(), "{record:#x}");
        }
        assert_eq!(rules(3, Guest::Pv).admit(0x8000_0013), Ok(Class::Keep));
    }

    #[test]
    fn lengths_that_do_not_fit_the_contents_are_refused() {
        let bad: &[(u32, usize)] = &[
            (rec::SHARED_INFO, 4095),
            (rec::X86_TSC_INFO, 23),
            (rec::X86_CPUID_POLICY, 0),
            (rec::X86_CPUID_POLICY, 25),
            (rec::X86_MSR_POLICY, 24),
            (rec::HVM_PARAMS, 7),
            (rec::HVM_PARAMS, 24),
            (rec::X86_PV_VCPU_BASIC, 7),
            (rec::X86_PV_VCPU_XSAVE, 7),
            (rec::VERIFY, 1),
            (rec::END, 8),
        ];
        for &(record, length) in bad {
            let mut rules = rules(3, Guest::Pv);
            assert!(
                rules.check(record, &vec![0; length]).is_err(),
                "{record:#x} {length}"
            );
        }
    }
}
