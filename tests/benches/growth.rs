//! How long the stream path takes and how much memory, as the guest gets bigger.
//!
//! `cargo bench --bench growth` makes the stream of a guest of each size, up to
//! `VNE_BENCH_GIB` GiB (64, or 2 for a short run), has it come from a pipe with the
//! rounds of a live save, and takes it into a store in a process of its own. Time and
//! peak memory a GiB are printed, and should be the same for all sizes.
//!
//! So that it fits on a disk, most of the guest is zero pages or pages of which
//! others have the same; a sixteenth is all its own and can be compressed.
//! `VNE_BENCH_DIR` is another folder than the target folder's, `VNE_BENCH_JSON` a file
//! for the figures.

mod figures;
mod synthetic;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use xl_vne::image::{MemberWriter, Name, Store, WriterOptions};
use xl_vne::stream::{Ingest, Page};

use figures::{setting, Figures};
use synthetic::{page, structures, Noise, Result};

/// Pages that many others are the same as.
const COMMON: u64 = 65_536;
/// Changed since: of all pages in the second round, and of those in the third.
const AGAIN: [u64; 2] = [20, 200];

/// A page of the guest, as a round of pre-copy finds it.
fn content(pfn: u64, round: u64) -> Page {
    match Noise::of(pfn / 4).next() % 16 {
        0..=4 => [0; 4096],
        5..=14 => page(Noise::of(pfn).next() % COMMON, 0),
        _ => {
            let mut all = [0; 4096];
            structures(&mut all, &mut Noise::of((pfn << 2 | round) + COMMON));
            all
        }
    }
}

/// Writes the stream to stdout.
fn send(pages: u64) -> Result<()> {
    let out = BufWriter::with_capacity(1 << 20, std::io::stdout().lock());
    let mut writer = synthetic::begin(out)?;
    for pfn in 0..pages {
        synthetic::put(&mut writer, pfn, &content(pfn, 0))?;
    }
    for (round, share) in (1..).zip(AGAIN) {
        for pfn in (0..pages).filter(|pfn| Noise::of(pfn ^ round).next() % share == 0) {
            synthetic::put(&mut writer, pfn, &content(pfn, round))?;
        }
    }
    synthetic::end(writer)
}

/// Takes the stream on stdin into a store, and prints the peak of this process's
/// memory in KiB.
fn receive(dir: &Path) -> Result<()> {
    let store = Store::open(dir)?;
    let take = store.begin(&Name::new("bench")?)?;
    let options = WriterOptions::default();
    let mut writer = MemberWriter::create(take.dir(), &Name::new("guest")?, &options)?;
    Ingest::new(std::io::stdin().lock()).run(&mut writer)?;
    writer.finish("{}")?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.and_then(|rest| rest.split_whitespace().next());
    println!("{}", peak.ok_or("the kernel doesn't tell VmHWM")?);
    take.discard()?;
    Ok(())
}

/// Seconds, and the peak in MiB.
fn measure(dir: &Path, gib: u64) -> Result<(f64, f64)> {
    let _ = std::fs::remove_dir_all(dir);
    std::fs::create_dir_all(dir)?;
    rustix::fs::sync();
    let program = std::env::current_exe()?;
    let start = Instant::now();
    let mut sender = Command::new(&program)
        .args(["send", &(gib << 18).to_string()])
        .stdout(Stdio::piped())
        .spawn()?;
    let pipe = sender.stdout.take().ok_or("no pipe")?;
    let receiver = Command::new(&program)
        .arg("receive")
        .arg(dir)
        .stdin(pipe)
        .stderr(Stdio::inherit())
        .output()?;
    let seconds = start.elapsed().as_secs_f64();
    let sent = sender.wait()?.success();
    std::fs::remove_dir_all(dir)?;
    if !(sent && receiver.status.success()) {
        return Err(format!("a guest of {gib} GiB isn't taken").into());
    }
    let kib: f64 = String::from_utf8(receiver.stdout)?.trim().parse()?;
    Ok((seconds, kib / 1024.0))
}

/// The stream alone, into nothing: what the sender takes is not the store's.
fn alone(gib: u64) -> Result<f64> {
    let start = Instant::now();
    let status = Command::new(std::env::current_exe()?)
        .args(["send", &(gib << 18).to_string()])
        .stdout(File::options().write(true).open("/dev/null")?)
        .status()?;
    match status.success() {
        true => Ok(start.elapsed().as_secs_f64()),
        false => Err("the stream can't be made".into()),
    }
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["send", pages] => return send(pages.parse()?),
        ["receive", dir] => return receive(Path::new(dir)),
        _ => {}
    }
    let most = setting("VNE_BENCH_GIB", 64)?;
    let dir = match std::env::var_os("VNE_BENCH_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
    };
    let dir = dir.join("growth-bench");
    let mut figures = Figures::default();
    for gib in std::iter::successors(Some(1), |gib| Some(gib * 2)).take_while(|gib| *gib <= most) {
        let (seconds, peak_mib) = measure(&dir, gib)?;
        let sender = alone(gib)?;
        let per = |value: f64| value / gib as f64;
        figures.add(&format!("{gib} GiB, time a GiB"), "s", per(seconds));
        figures.add(
            &format!("{gib} GiB, of it the stream's sender alone"),
            "s",
            per(sender),
        );
        figures.add(&format!("{gib} GiB, peak memory"), "MiB", peak_mib);
        figures.add(
            &format!("{gib} GiB, peak memory a GiB"),
            "MiB",
            per(peak_mib),
        );
        // A big guest takes long.
        std::io::stdout().flush()?;
    }
    figures.print();
    figures.save()
}
