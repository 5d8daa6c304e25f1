//! Takes a member's stream into the store.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use twox_hash::XxHash3_64;

use super::error::Error;
use super::files::{self, Lock};
use super::held::HeldPages;
use super::key::Key;
use super::known::Known;
use super::manifest::{MemberImage, MemberStats};
use super::name::Name;
use super::packer::{Packer, Rest};
use super::packs::Packs;
use super::publish::{self, Published};
use super::records::{Record, Records};
use super::seal::Vault;
use super::slots::{Scrambler, SlotFile};
use super::store::{self, CONFIG_NAME, INDEX_NAME, PACK_NAME, RECORDS_NAME};
use super::table::{Content, PageTable, PFN_COUNT_MAX};
use super::Result;
use crate::cpu::CpuFeatures;
use crate::stream::{xc_record, Page, PageType, Place, Sink, XcHeader, PAGE_SIZE};

/// Bytes of a member's records, at most. They are kept in memory until the end:
/// a big HVM guest's device model and CPU state take a few tens of MiB.
pub const RECORDS_BYTES_MAX: usize = 256 << 20;

/// Records of a member, at most: a few per virtual CPU.
const RECORDS_MAX: usize = 1 << 16;

/// Pages that newer versions may replace.
const STAGED_NAME: &str = "staged";

/// Pages that are kept in memory while the guest runs, at most, 32 MiB; and what part of
/// all that may be.
const HOT_PAGES_MAX: usize = 8192;
const HOT_SHARE: usize = 4;

/// How a [`MemberWriter`] works.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    /// Bytes of pages to keep in memory, at most. Beyond it pages go to the disk, and a
    /// suspended guest waits for it. While the guest runs, a quarter of it at most.
    pub held_bytes_max: usize,
    /// Bytes that the hashes of the store's pages may take in memory, at most.
    /// Pages beyond are stored once more.
    pub known_bytes_max: usize,
    /// Threads that hash and compress, at most.
    pub threads_max: usize,
    /// Bytes of pages that wait for them, at most.
    pub queue_bytes_max: usize,
    /// What the store is encrypted with, if it is.
    pub key: Option<Key>,
}

impl Default for WriterOptions {
    /// 256 MiB: 65,536 pages, hundreds of times what a converged pre-copy
    /// leaves over. And 256 MiB for 11 to 22 million known pages: 40 GiB of
    /// contents at least. More threads than 4 only help where there is nothing else
    /// to do.
    fn default() -> Self {
        WriterOptions {
            held_bytes_max: 256 << 20,
            known_bytes_max: 256 << 20,
            threads_max: 4,
            queue_bytes_max: 8 << 20,
            key: None,
        }
    }
}

/// What other threads see of a [`MemberWriter`], and the switch they have.
#[derive(Clone, Debug)]
pub struct MemberHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    is_final: AtomicBool,
    packer: Rest,
    /// Held while a page may be written to disk for a running guest.
    disk: Mutex<()>,
    pages_received: AtomicU64,
    pages_final: AtomicU64,
    pages_spilled: AtomicU64,
    /// How many are likely to be final.
    pages_expected: AtomicU64,
}

impl MemberHandle {
    /// From its return on, pages are kept in memory and the disk isn't touched
    /// until [`MemberWriter::finish`].
    ///
    /// Waits for a write that is under way (at most 1 MiB), so it's to be called
    /// just before the guest is suspended and not after.
    pub fn enter_final(&self) {
        self.0.is_final.store(true, Ordering::Release);
        // First, so that nobody waits for the packer with the other lock.
        self.0.packer.begin();
        drop(self.0.lock_disk());
    }

    /// Says how many pages are likely to come after [`MemberHandle::enter_final`], so
    /// that there is memory for them.
    pub fn expect_final(&self, pages: u64) {
        self.0.pages_expected.store(pages, Ordering::Relaxed);
    }

    /// Whether [`MemberHandle::enter_final`] was called.
    pub fn is_final(&self) -> bool {
        self.0.is_final.load(Ordering::Acquire)
    }

    /// Page entries received so far.
    pub fn pages_received(&self) -> u64 {
        self.0.pages_received.load(Ordering::Relaxed)
    }

    /// Those received since [`MemberHandle::enter_final`].
    pub fn pages_final(&self) -> u64 {
        self.0.pages_final.load(Ordering::Relaxed)
    }

    /// Pages that went to disk while the guest was suspended; see
    /// [`MemberStats::pages_spilled`].
    pub fn pages_spilled(&self) -> u64 {
        self.0.pages_spilled.load(Ordering::Relaxed)
    }
}

impl Shared {
    /// The lock guards no data, so a panic under it leaves nothing broken.
    fn lock_disk(&self) -> MutexGuard<'_, ()> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stores one member: the [`Sink`] for its stream.
///
/// While the guest runs, the first version of each page goes to a packer, which
/// works beside the stream. Later ones are staged in slots on disk, where a newer
/// version overwrites the older one: most pages that change once change again, and
/// would be compressed for nothing. Pages that then change once more are hot: they are
/// kept in memory, which is what makes rounds fast that find the same pages again and
/// again. After [`MemberHandle::enter_final`] pages stay
/// in memory and the packer rests, so that a suspended guest never waits for a
/// disk; [`MemberWriter::finish`], called when the guest runs again, packs them
/// and everything else.
///
/// On any error the member is lost and with it the snapshot: the directory is
/// to be left to [`super::Take`] or [`super::Store::clean_tmp`].
#[derive(Debug)]
pub struct MemberWriter {
    name: Name,
    dir: PathBuf,
    /// Keeps [`super::Store::clean_tmp`] away from the take's directory.
    _lock: File,
    packs: Packs,
    packer: Packer,
    /// 32 bits of a hash of each page that the packer has.
    prints: Vec<u32>,
    slots: SlotFile,
    held: HeldPages,
    /// How many of these may be there before the last ones come.
    hot_pages_max: usize,
    table: PageTable,
    handle: MemberHandle,
    stats: MemberStats,
    legacy: bool,
    header: Option<XcHeader>,
    records: Vec<Record>,
    records_bytes: usize,
    ended: bool,
}

impl MemberWriter {
    /// Makes the member's directory in that of a [`super::Take`], which may
    /// belong to another process.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] if the take is being cleaned away as dead;
    /// [`Error::Io`], also if the member exists.
    pub fn create(take_dir: &Path, name: &Name, options: &WriterOptions) -> Result<Self> {
        let dir = store::member_dir(take_dir, name);
        Self::create_over(take_dir, dir, name, options, files::create_file)
    }

    /// With the files for pages that `make` makes.
    pub(super) fn create_over(
        take_dir: &Path,
        dir: PathBuf,
        name: &Name,
        options: &WriterOptions,
        make: impl Fn(&Path) -> Result<File>,
    ) -> Result<Self> {
        let Some(lock) = files::try_lock_dir(take_dir, Lock::Shared)? else {
            let path = take_dir.to_owned();
            return Err(Error::InUse { path });
        };
        files::make_dir(&dir)?;
        let vault = Vault::new(options.key.clone());
        let packs = Packs::of(store::root_of_take(take_dir), &vault);
        let (pack, staged) = (dir.join(PACK_NAME), dir.join(STAGED_NAME));
        let known = Known::new(&packs, options.known_bytes_max);
        let scrambler = match vault.seals() {
            true => Some(Scrambler::new(&staged)?),
            false => None,
        };
        let packer = Packer::new(make(&pack)?, &pack, known, options)?;
        let shared = Shared {
            is_final: AtomicBool::new(false),
            packer: packer.rest(),
            disk: Mutex::new(()),
            pages_received: AtomicU64::new(0),
            pages_final: AtomicU64::new(0),
            pages_spilled: AtomicU64::new(0),
            pages_expected: AtomicU64::new(1),
        };
        Ok(MemberWriter {
            name: name.clone(),
            slots: SlotFile::over(make(&staged)?, &staged, scrambler),
            dir,
            packs,
            packer,
            prints: Vec::new(),
            _lock: lock,
            held: HeldPages::new(options.held_bytes_max),
            hot_pages_max: (options.held_bytes_max / HOT_SHARE / PAGE_SIZE).min(HOT_PAGES_MAX),
            table: PageTable::default(),
            handle: MemberHandle(Arc::new(shared)),
            stats: MemberStats::default(),
            legacy: false,
            header: None,
            records: Vec::new(),
            records_bytes: 0,
            ended: false,
        })
    }

    /// The switch and the counters, for other threads.
    pub fn handle(&self) -> MemberHandle {
        self.handle.clone()
    }

    /// Writes what is in memory, the index, the records and `config_json` (the
    /// domain's configuration as `libxl_domain_config_to_json` gives it), and
    /// makes all of it last. Slow: for when the guest runs again.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`] if the stream wasn't read to its end or the
    /// configuration is no JSON; [`Error::Io`]; [`Error::Damaged`] if the disk
    /// doesn't keep what it was given.
    pub fn finish(mut self, config_json: &str) -> Result<MemberImage> {
        store::check_config(config_json)
            .map_err(|problem| self.unstorable(format!("its configuration: {problem}")))?;
        let header = match self.header {
            Some(header) if self.ended => header,
            _ => return Err(self.unstorable("its stream was not read to the end")),
        };
        self.stats.pages_held_peak = self.held.peak() as u64;
        self.stats.pages_spilled = self.handle.pages_spilled();
        self.pack_the_rest()?;
        let cpu_features = self.cpu_features();
        let records = self.encode_records(header);
        let dir = self.dir;
        self.slots.remove()?;
        let packed = self.packer.finish()?;
        let published = publish::publish(packed, &self.table, &self.packs, &dir)?;
        let Published { map, own, .. } = &published;
        // What a reader would refuse must not be committed.
        map.check()
            .map_err(|problem| Error::damaged(&dir.join(INDEX_NAME), problem))?;
        let mut stats = self.stats;
        stats.count(map);
        (stats.pages_new, stats.bytes_new) = *own;
        let vault = self.packs.vault();
        let write = |name, bytes: &[u8]| vault.write_file(&dir.join(name), name, bytes);
        let files = vec![
            write(CONFIG_NAME, config_json.as_bytes())?,
            write(RECORDS_NAME, &records)?,
            write(INDEX_NAME, &map.encode())?,
        ];
        files::sync_dir(&dir)?;
        Ok(MemberImage {
            stats,
            files,
            packs: map.packs.iter().map(|(id, _)| *id).collect(),
            cpu_features,
        })
        // Only now nobody needs to be kept from removing the packs.
    }

    #[cfg(test)]
    pub(super) fn stats_for_tests(&self) -> &MemberStats {
        &self.stats
    }

    /// Hands the packer what is staged and what is in memory.
    fn pack_the_rest(&mut self) -> Result<()> {
        self.packer.work()?;
        self.slots.flush()?;
        let rest: Vec<_> = self
            .table
            .iter()
            .filter(|(_, _, content)| matches!(content, Content::Held(_) | Content::Slot(_)))
            .collect();
        for (pfn, page_type, content) in rest {
            let page = match content {
                Content::Slot(slot) => self.slots.read(slot)?,
                Content::Held(number) => match self.held.get(number) {
                    Some((page, _)) => *page,
                    None => return Err(self.unstorable(format!("pfn {pfn:#x} was lost"))),
                },
                Content::Nothing | Content::Zero | Content::Packed(_) => continue,
            };
            let number = self.packer.add(&page)?;
            self.note(pfn, page_type, Content::Packed(number))?;
        }
        Ok(())
    }

    fn cpu_features(&self) -> Option<CpuFeatures> {
        let mut records = self.records.iter();
        let policy = records.find(|record| record.record_type == xc_record::X86_CPUID_POLICY);
        policy.map(|policy| CpuFeatures::of_policy(&policy.body))
    }

    fn encode_records(&mut self, header: XcHeader) -> Vec<u8> {
        let mut records = std::mem::take(&mut self.records);
        records.sort_by_key(|record| record.place); // stable
        Records {
            legacy: self.legacy,
            header,
            records,
        }
        .encode()
    }

    /// A page with contents, to be kept in memory if that's the mode.
    fn store_page(&mut self, pfn: u64, page_type: PageType, page: &Page, last: bool) -> Result<()> {
        let slot = match self.table.get(pfn) {
            Some((_, Content::Held(number))) => {
                self.held.replace(number, page);
                return self.note(pfn, page_type, Content::Held(number));
            }
            Some((_, Content::Slot(slot))) => Some(slot),
            Some((_, Content::Nothing | Content::Zero | Content::Packed(_))) => None,
            None if !last => {
                let number = self.packer.add(page)?;
                self.prints.push(print(page));
                return self.note(pfn, page_type, Content::Packed(number));
            }
            None => None,
        };
        if last || slot.is_some() && self.held.count() < self.hot_pages_max {
            if let Some(number) = self.held.hold(page, slot) {
                return self.note(pfn, page_type, Content::Held(number));
            }
        }
        if last {
            self.handle.0.pages_spilled.fetch_add(1, Ordering::Relaxed);
        }
        self.write_page(pfn, page_type, slot, page)
    }

    fn write_page(
        &mut self,
        pfn: u64,
        page_type: PageType,
        slot: Option<u32>,
        page: &Page,
    ) -> Result<()> {
        let Some(slot) = slot.or_else(|| self.slots.allocate()) else {
            return Err(self.unstorable("it has more pages than a store can number"));
        };
        self.note(pfn, page_type, Content::Slot(slot))?;
        self.slots.write(slot, page)
    }

    /// A page without contents to store: gives up what an older version has.
    fn drop_page(&mut self, pfn: u64, page_type: PageType, content: Content) -> Result<()> {
        let slot = match self.table.get(pfn) {
            Some((_, Content::Slot(slot))) => Some(slot),
            Some((_, Content::Held(number))) => self.held.release(number),
            _ => None,
        };
        if let Some(slot) = slot {
            self.slots.release(slot);
        }
        self.note(pfn, page_type, content)
    }

    fn note(&mut self, pfn: u64, page_type: PageType, content: Content) -> Result<()> {
        if self.table.set(pfn, page_type, content) {
            return Ok(());
        }
        Err(self.unstorable(format!(
            "pfn {pfn:#x} is beyond the {PFN_COUNT_MAX:#x} frames (1 TiB) that a store holds"
        )))
    }

    fn unstorable(&self, problem: impl Into<String>) -> Error {
        Error::unstorable(format!("member {}", self.name), problem)
    }
}

/// Enough to tell whether a page is the same, where nothing depends on it.
fn print(page: &Page) -> u32 {
    XxHash3_64::oneshot(page) as u32
}

/// Whether a page is all zero. Most others differ within the first bytes, where
/// the comparison ends.
fn is_zero(page: &Page) -> bool {
    const ZERO: &Page = &[0; PAGE_SIZE];
    page == ZERO
}

impl Sink for MemberWriter {
    type Error = Error;

    fn xl_header(&mut self, legacy: bool) -> Result<()> {
        self.legacy = legacy;
        Ok(())
    }

    fn xc_header(&mut self, header: &XcHeader) -> Result<()> {
        self.header = Some(*header);
        Ok(())
    }

    fn record(&mut self, place: Place, record_type: u32, body: &[u8]) -> Result<()> {
        self.records_bytes = self.records_bytes.saturating_add(body.len());
        if self.records_bytes > RECORDS_BYTES_MAX || self.records.len() >= RECORDS_MAX {
            return Err(self.unstorable(format!(
                "its records are more than {RECORDS_MAX} or longer than {RECORDS_BYTES_MAX} bytes"
            )));
        }
        // A PV guest whose p2m grows may send its frames again between rounds.
        // Pages of the new range are valid only after that, and in the image
        // there is one round: so it must stand ahead of it.
        let moves = place == Place::XcAfter && record_type == xc_record::X86_PV_P2M_FRAMES;
        self.records.push(Record {
            place: if moves { Place::XcBefore } else { place },
            record_type,
            body: body.to_vec(),
        });
        Ok(())
    }

    fn page(&mut self, pfn: u64, page_type: PageType, data: Option<&Page>) -> Result<()> {
        let shared = Arc::clone(&self.handle.0);
        if !self.handle.is_final() {
            let expected = shared.pages_expected.load(Ordering::Relaxed);
            let expected = usize::try_from(expected).unwrap_or(usize::MAX);
            self.held
                .make_ready(self.held.count().saturating_add(expected));
        }
        let disk = shared.lock_disk();
        let last = self.handle.is_final();
        // While the guest runs, enter_final waits until this page is dealt with.
        let _disk = (!last).then_some(disk);
        self.stats.pages_received += 1;
        self.stats.pages_final += u64::from(last);
        shared
            .pages_received
            .store(self.stats.pages_received, Ordering::Relaxed);
        shared
            .pages_final
            .store(self.stats.pages_final, Ordering::Relaxed);
        let Some(page) = data else {
            return self.drop_page(pfn, page_type, Content::Nothing);
        };
        self.stats.bytes_received += PAGE_SIZE as u64;
        if is_zero(page) {
            self.drop_page(pfn, page_type, Content::Zero)
        } else {
            self.store_page(pfn, page_type, page, last)
        }
    }

    fn verify_page(&mut self, pfn: u64, page_type: PageType, data: Option<&Page>) -> Result<()> {
        let same = match (self.table.get(pfn), data) {
            (Some((kept, _)), _) if kept != page_type => false,
            (Some((_, Content::Zero)), Some(page)) => is_zero(page),
            (Some((_, Content::Slot(slot))), Some(page)) => self.slots.holds(slot, page),
            (Some((_, Content::Held(number))), Some(page)) => {
                self.held.get(number).is_some_and(|(held, _)| held == page)
            }
            (Some((_, Content::Packed(number))), Some(page)) => {
                self.prints.get(number as usize) == Some(&print(page))
            }
            (Some((_, Content::Nothing)), None) => true,
            _ => false,
        };
        self.stats.pages_verify_differed += u64::from(!same);
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        self.ended = true;
        Ok(())
    }
}
