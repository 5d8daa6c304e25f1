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
//! `VNE_BENCH_ROUNDS` says how often all of it is done after a first time that only
//! warms up; without it it's done once. `VNE_BENCH_JSON` is a file for the figures.

mod figures;
mod synthetic;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

use xl_vne::image::{DomainType, Downtime, MemberStats, MemberWriter, Name, Store, WriterOptions};
use xl_vne::stream::Ingest;

use figures::{setting, Figures};
use synthetic::{page, Noise, Result};

const MIB: f64 = 1048576.0;

/// Writes the stream; in the second one, 5% of the pages have changed.
fn make_stream(path: &Path, pages: u64, changed: bool) -> Result<()> {
    let mut writer = synthetic::begin(BufWriter::with_capacity(1 << 20, File::create(path)?))?;
    for pfn in 0..pages {
        let is_new = changed && Noise::of(pfn ^ 0x5555).next() % 20 == 0;
        synthetic::put(&mut writer, pfn, &page(pfn, u64::from(is_new)))?;
    }
    synthetic::end(writer)
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

/// What, how long, how many bytes.
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
        ran_on: None,
        downtime: Downtime::default(),
        rounds: 1,
        pages_sent: stats.pages_received,
        pages_final_dirty: 0,
        stream_bytes: 0,
        diverged: false,
        throttled_to: None,
        uncaptured_disks: Vec::new(),
        read_only_disks: Vec::new(),
        disks: Vec::new(),
        late_frames: 0,
        recorded: None,
        timeline: None,
        image,
    });
    take.commit(&manifest)?;
    Ok(stats)
}

/// Into a new file, as to empty an old one takes its time.
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

fn main() -> Result<()> {
    let mib = setting("VNE_BENCH_MIB", 2048)?;
    let rounds = setting("VNE_BENCH_ROUNDS", 0)?;
    let dir = match std::env::var_os("VNE_BENCH_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
    };
    let dir = dir.join("store-bench");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir)?;
    let figures = measure(&dir, mib, rounds);
    std::fs::remove_dir_all(&dir)?;
    let figures = figures?;
    println!("a guest of {mib} MiB: 30% zero, 40% compressible, 30% noise");
    figures.print();
    figures.save()
}

fn measure(dir: &Path, mib: u64, rounds: u64) -> Result<Figures> {
    let (first, second) = (dir.join("first"), dir.join("second"));
    make_stream(&first, mib << 8, false)?;
    make_stream(&second, mib << 8, true)?;
    let mut figures = Figures::default();
    for nth in 0..=rounds {
        let mut warm = Figures::default();
        let into = match nth == 0 && rounds > 0 {
            true => &mut warm,
            false => &mut figures,
        };
        round(dir, &first, &second, into)?;
    }
    Ok(figures)
}

/// Everything once, on the same bytes.
fn round(dir: &Path, first: &Path, second: &Path, figures: &mut Figures) -> Result<()> {
    let at = |name: &str| dir.join(name);
    let stream_bytes = first.metadata()?.len();
    let (plain, zst, out) = (at("plain"), at("zst"), at("out"));
    let cat = timed("cat > file", || program(&["cat"], first, &plain))?;
    std::fs::remove_file(&plain)?;
    let zstd = ["zstd", "-T1", "-1", "-q", "-c"];
    let zstd = timed("zstd -T1 -1 > file", || program(&zstd, first, &zst))?;
    let store = Store::open(&at("store"))?;
    let full = timed("ingest", || {
        take(&store, first)?;
        bytes_below(store.root())
    })?;
    let both = timed("ingest, 5% changed", || {
        take(&store, second)?;
        bytes_below(store.root())
    })?;
    let more = Measured {
        bytes: both.bytes - full.bytes,
        ..both
    };
    let unzstd = ["zstd", "-d", "-q", "-c"];
    let unzstd = timed("zstd -d > file", || program(&unzstd, &zst, &out))?;
    same(first, &out)?;
    std::fs::remove_file(&out)?;
    let back = timed("restore > file", || restore(&store, 0, &out))?;
    same(first, &out)?;
    std::fs::remove_file(&out)?;
    let back_more = timed("restore, 5% changed > file", || restore(&store, 1, &out))?;
    same(second, &out)?;
    for file in [zst, out] {
        std::fs::remove_file(file)?;
    }
    std::fs::remove_dir_all(store.root())?;
    let ratios = [
        ("ingest, speed to zstd's", zstd.seconds / full.seconds),
        ("ingest, speed to cat's", cat.seconds / full.seconds),
        ("size to zstd's", full.bytes as f64 / zstd.bytes as f64),
        (
            "size of the second to the first",
            more.bytes as f64 / full.bytes as f64,
        ),
        (
            "time of the second to the first",
            more.seconds / full.seconds,
        ),
        ("restore, speed to zstd's", unzstd.seconds / back.seconds),
        (
            "the second's, speed to zstd's",
            unzstd.seconds / back_more.seconds,
        ),
    ];
    for one in [cat, zstd, full, more, unzstd, back, back_more] {
        let rate = stream_bytes as f64 / 1e6 / one.seconds;
        figures.add(&one.what, "s", one.seconds);
        figures.add(&format!("{}, speed", one.what), "MB/s", rate);
        figures.add(
            &format!("{}, size", one.what),
            "MiB",
            one.bytes as f64 / MIB,
        );
    }
    for (what, ratio) in ratios {
        figures.add(what, "", ratio);
    }
    Ok(())
}
