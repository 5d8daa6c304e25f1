//! How fast the image store is, beside programs that everybody knows.
//!
//! `cargo bench` makes the stream of a guest of 2 GiB (30% zero pages, 40% that
//! can be compressed, 30% noise), has it come from a pipe, and measures on the same
//! bytes, one after the other, each with a sync of what was written:
//!
//! - `cat > file`
//! - `zstd -T1 -1 > file`
//! - a take's ingest, and that of a second one with 5% of the pages changed
//! - `zstd -d`, and the restore of both snapshots, into a file
//!
//! Sizes and times are printed with their ratios. `VNE_BENCH_MIB` is another size
//! of the guest, `VNE_BENCH_DIR` another folder than the target folder's.

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

use xl_vne::image::{DomainType, Downtime, MemberStats, MemberWriter, Name, Store, WriterOptions};
use xl_vne::stream::{Guest, Ingest, Page, PageType, Place, Sink, Writer, XcHeader, PAGE_SIZE};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Small steps of a generator that is the same everywhere.
struct Noise(u64);

impl Noise {
    fn of(seed: u64) -> Self {
        Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// What a page of a guest is like: `version` 0 at first.
fn page(pfn: u64, version: u64) -> Page {
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
fn structures(page: &mut Page, noise: &mut Noise) {
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

/// Writes the stream; in the second one, 5% of the pages have changed.
fn make_stream(path: &Path, pages: u64, changed: bool) -> Result<()> {
    let mut writer = Writer::new(BufWriter::with_capacity(1 << 20, File::create(path)?));
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
    for pfn in 0..pages {
        let is_new = changed && Noise::of(pfn ^ 0x5555).next() % 20 == 0;
        let data = page(pfn, u64::from(is_new));
        writer.page(pfn, PageType::Normal, Some(&data))?;
    }
    let mut parameters = [0; 24];
    parameters[0] = 1;
    for (record, body) in [(0x08, &[0; 24][..]), (0x09, &[0; 64]), (0x0a, &parameters)] {
        writer.record(Place::XcAfter, record, body)?;
    }
    writer.end()?;
    Ok(())
}

/// The bytes of a file from a pipe.
fn from_pipe(path: &Path) -> Result<(Child, ChildStdout)> {
    let mut cat = Command::new("cat")
        .arg(path)
        .stdout(Stdio::piped())
        .spawn()?;
    let out = cat.stdout.take().ok_or("no pipe")?;
    Ok((cat, out))
}

/// A line of the table: what, how long, how many bytes.
struct Measured {
    what: String,
    seconds: f64,
    bytes: u64,
}

fn timed(what: &str, work: impl FnOnce() -> Result<u64>) -> Result<Measured> {
    // What was written before is no business of this one.
    rustix::fs::sync();
    let start = Instant::now();
    let bytes = work()?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Measured {
        what: what.to_owned(),
        seconds,
        bytes,
    })
}

/// Has a program read `from` through a pipe, and syncs what it has written.
fn program(words: &[&str], from: &Path, to: &Path) -> Result<u64> {
    let (mut cat, out) = from_pipe(from)?;
    let file = File::create(to)?;
    let status = Command::new(words[0])
        .args(&words[1..])
        .stdin(out)
        .stdout(file.try_clone()?)
        .status()?;
    cat.wait()?;
    if !status.success() {
        return Err(format!("{} failed", words.join(" ")).into());
    }
    file.sync_all()?;
    Ok(file.metadata()?.len())
}

fn bytes_below(path: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        let facts = entry.metadata()?;
        bytes += match facts.is_dir() {
            true => bytes_below(&entry.path())?,
            false => facts.len(),
        };
    }
    Ok(bytes)
}

/// Takes a snapshot of a stream that comes from a pipe.
fn take(store: &Store, stream: &Path) -> Result<MemberStats> {
    let (mut cat, out) = from_pipe(stream)?;
    let (vne, host, guest) = (Name::new("bench")?, Name::new("dom0")?, Name::new("guest")?);
    let mut take = store.begin(&vne)?;
    let mut writer = MemberWriter::create(take.dir(), &guest, &WriterOptions::default())?;
    Ingest::new(out).run(&mut writer)?;
    let image = writer.finish("{}")?;
    cat.wait()?;
    let stats = image.stats;
    let mut manifest = take.manifest(&host);
    manifest.members.push(xl_vne::image::Member {
        name: guest,
        domid: 1,
        uuid: String::from("c0ffee00-0000-4000-8000-000000000000"),
        host,
        domain_type: DomainType::Pvh,
        memory_kib: 0,
        vcpus: 1,
        downtime: Downtime::default(),
        rounds: 1,
        pages_sent: stats.pages_received,
        pages_final_dirty: 0,
        stream_bytes: 0,
        diverged: false,
        throttled_to: None,
        uncaptured_disks: Vec::new(),
        late_frames: 0,
        recorded: None,
        timeline: None,
        image,
    });
    take.commit(&manifest)?;
    Ok(stats)
}

fn restore(store: &Store, nth: usize, to: &Path) -> Result<u64> {
    let listing = store.catalogue().list(None)?;
    let manifest = listing.snapshots.get(nth).ok_or("no such snapshot")?;
    let snapshot = store.catalogue().get(&manifest.vne, &manifest.id)?;
    let mut file = BufWriter::with_capacity(1 << 20, File::create(to)?);
    snapshot
        .member(&Name::new("guest")?)?
        .write_stream(&mut file)?;
    file.flush()?;
    file.get_ref().sync_all()?;
    Ok(file.get_ref().metadata()?.len())
}

fn same(a: &Path, b: &Path) -> Result<()> {
    match Command::new("cmp").args([a, b]).status()?.success() {
        true => Ok(()),
        false => Err(format!("{} is not what was taken", b.display()).into()),
    }
}

fn tell(measured: &[Measured], stream_bytes: u64) {
    for one in measured {
        let rate = stream_bytes as f64 / 1e6 / one.seconds;
        let mib = one.bytes as f64 / 1048576.0;
        println!(
            "{:<34} {:>7.2} s {:>7.0} MB/s {mib:>9.1} MiB",
            one.what, one.seconds, rate
        );
    }
}

fn main() -> Result<()> {
    let mib: u64 = match std::env::var("VNE_BENCH_MIB") {
        Ok(text) => text.parse()?,
        Err(_) => 2048,
    };
    let dir = match std::env::var_os("VNE_BENCH_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
    };
    let dir = dir.join("store-bench");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir)?;
    let measured = measure(&dir, mib);
    std::fs::remove_dir_all(&dir)?;
    measured
}

fn measure(dir: &Path, mib: u64) -> Result<()> {
    let at = |name: &str| dir.join(name);
    let (first, second) = (at("first"), at("second"));
    make_stream(&first, mib << 8, false)?;
    make_stream(&second, mib << 8, true)?;
    let stream_bytes = first.metadata()?.len();
    println!("a guest of {mib} MiB: 30% zero, 40% compressible, 30% noise");
    let (plain, zst, out) = (at("plain"), at("zst"), at("out"));
    let cat = timed("cat > file", || program(&["cat"], &first, &plain))?;
    std::fs::remove_file(&plain)?;
    let zstd = ["zstd", "-T1", "-1", "-q", "-c"];
    let zstd = timed("zstd -T1 -1 > file", || program(&zstd, &first, &zst))?;
    let store = Store::open(&at("store"))?;
    let full = timed("ingest", || {
        take(&store, &first)?;
        bytes_below(store.root())
    })?;
    let both = timed("ingest, 5% changed", || {
        take(&store, &second)?;
        bytes_below(store.root())
    })?;
    let more = Measured {
        bytes: both.bytes - full.bytes,
        ..both
    };
    let unzstd = ["zstd", "-d", "-q", "-c"];
    let unzstd = timed("zstd -d > file", || program(&unzstd, &zst, &out))?;
    same(&first, &out)?;
    let back = timed("restore > file", || restore(&store, 0, &out))?;
    same(&first, &out)?;
    let back_more = timed("restore, 5% changed > file", || restore(&store, 1, &out))?;
    same(&second, &out)?;
    let ratios = [
        ("ingest, speed to zstd's", zstd.seconds / full.seconds),
        ("ingest, speed to cat's", cat.seconds / full.seconds),
        ("size to zstd's", full.bytes as f64 / zstd.bytes as f64),
        (
            "size of the second to the first",
            more.bytes as f64 / full.bytes as f64,
        ),
        ("restore, speed to zstd's", unzstd.seconds / back.seconds),
        (
            "the second's, speed to zstd's",
            unzstd.seconds / back_more.seconds,
        ),
    ];
    tell(
        &[cat, zstd, full, more, unzstd, back, back_more],
        stream_bytes,
    );
    for (what, ratio) in ratios {
        println!("{what:<34} {ratio:>7.2}");
    }
    Ok(())
}
