//! Storing a member and reading it back take no more memory than they are given: in
//! processes of their own, by what the kernel says of these.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use xl_vne::image::{MemberWriter, MemoryShare, Name, SnapshotId, Store, WriterOptions};
use xl_vne::stream::{Guest, Page, PageType, Place, Sink, XcHeader, PAGE_SIZE};

type Fallible<T> = Result<T, Box<dyn Error>>;

/// Pages of the guest: 96 MiB.
const PAGES: u64 = 24 << 10;
/// What it may take.
const SHARE_BYTES: u64 = 24 << 20;
/// What says which page is where.
const TABLES_BYTES: u64 = 64 * PAGES;
/// What allocators keep, and stacks of threads.
const SPARE_BYTES: u64 = 12 << 20;

const ID: &str = "20261121T023652Z";

fn page(pfn: u64, round: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    let mut word = (pfn << 1 | 1) + (round << 40);
    for bytes in page.chunks_exact_mut(8) {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    page
}

/// A line of `/proc/self/status`, in bytes.
fn status(line: &str) -> Fallible<u64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let found = text.lines().find_map(|text| text.strip_prefix(line));
    let kib = found.and_then(|rest| rest.trim_matches([':', ' ', '\t', 'k', 'B']).parse().ok());
    let kib: u64 = kib.ok_or("no such line")?;
    Ok(kib << 10)
}

/// Stores a guest that sends all of it a second time while it's suspended.
fn ingest(root: &Path, options: &WriterOptions) -> Fallible<()> {
    let id: SnapshotId = ID.parse()?;
    let (vne, web, here) = (Name::new("lab")?, Name::new("web")?, Name::new("dom0")?);
    let mut take = Store::open(root)?.begin_as(&vne, &id)?;
    let mut writer = MemberWriter::create(take.dir(), &web, options)?;
    writer.xl_header(false)?;
    writer.xc_header(&XcHeader {
        version: 3,
        guest: Guest::Hvm,
        xen_major: 4,
        xen_minor: 17,
    })?;
    for round in 0..2 {
        for pfn in 0..PAGES {
            writer.page(pfn, PageType::Normal, Some(&page(pfn, round)))?;
        }
        writer.handle().enter_final();
    }
    writer.record(Place::XcAfter, 0x08, &[0; 24])?;
    writer.end()?;
    let image = writer.finish("{}")?;
    let mut manifest = take.manifest(&here);
    manifest
        .members
        .push(serde_json::from_value(serde_json::json!({
            "name": web, "domid": 7, "uuid": "", "host": here, "type": "pvh",
            "memory_kib": 1, "vcpus": 1,
            "downtime": {"suspend_ns": 1, "last_pages_ns": 1, "device_state_ns": 1, "resume_ns": 1},
            "rounds": 2, "pages_sent": 1, "pages_final_dirty": 1, "stream_bytes": 1,
            "image": image,
        }))?);
    take.commit(&manifest)?;
    Ok(())
}

fn restore(root: &Path, share: Option<MemoryShare>) -> Fallible<()> {
    let store = Store::open(root)?;
    let opened = store.catalogue().newest(&Name::new("lab")?)?;
    let mut member = opened.member(&Name::new("web")?)?;
    if let Some(share) = share {
        member.limit(share);
    }
    Ok(member.write_stream(std::io::sink())?)
}

/// What the processes do. By itself it does nothing.
#[test]
#[ignore = "run by the other test"]
fn work() -> Fallible<()> {
    let Ok(what) = std::env::var("VNE_MEMORY_WORK") else {
        return Ok(());
    };
    let root = PathBuf::from(std::env::var("VNE_MEMORY_ROOT")?);
    let share = match std::env::var("VNE_MEMORY_LIMITED")?.as_str() {
        "yes" => Some(MemoryShare::of(SHARE_BYTES, 1)?),
        _ => None,
    };
    let before = status("VmRSS")?;
    match what.as_str() {
        "ingest" => ingest(&root, &share.map_or_else(Default::default, |s| s.writer()))?,
        _ => restore(&root, share)?,
    }
    println!("took {} bytes", status("VmHWM")?.saturating_sub(before));
    Ok(())
}

fn taken(what: &str, limited: bool, root: &Path) -> Fallible<u64> {
    let output = Command::new(std::env::current_exe()?)
        .args(["--ignored", "--exact", "work", "--nocapture"])
        .env("VNE_MEMORY_WORK", what)
        .env("VNE_MEMORY_ROOT", root)
        .env("VNE_MEMORY_LIMITED", if limited { "yes" } else { "no" })
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let line = said.lines().find_map(|line| line.split("took ").nth(1));
    let bytes = line.and_then(|rest| rest.strip_suffix(" bytes")?.parse().ok());
    bytes.ok_or_else(|| format!("{said}{}", String::from_utf8_lossy(&output.stderr)).into())
}

#[test]
fn a_member_is_stored_and_read_back_within_its_share() -> Fallible<()> {
    let dir = tempfile::tempdir()?;
    let limit = SHARE_BYTES + TABLES_BYTES + SPARE_BYTES;
    let bounded = taken("ingest", true, &dir.path().join("a"))?;
    assert!(bounded <= limit, "{bounded} of {limit}");
    // Else this could not fail.
    let usual = taken("ingest", false, &dir.path().join("b"))?;
    assert!(usual > limit, "{usual}, and the limit is {limit}");
    let bounded = taken("restore", true, &dir.path().join("b"))?;
    assert!(bounded <= limit, "{bounded} of {limit}");
    Ok(())
}
