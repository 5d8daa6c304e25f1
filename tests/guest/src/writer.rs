//! A log on a disk, as a database keeps one: records of a fixed size, each with the
//! next number, durable before it counts. Memory knows the last number. Whenever
//! memory and disk are of different times it shows: before a record is written, its
//! slot must hold what was written one round earlier, and all others what came
//! since.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::args::Args;
use crate::clock::Pace;
use crate::json::Json;
use crate::status::{self, lock, Status};
use crate::workload::Run;

/// Bytes of a record; reads and writes go past the guest's own cache.
const RECORD: usize = 4096;
/// Records of a round: so many of the last ones are on the disk.
const SLOTS: u64 = 64;
const DEVICE_LIMIT: Duration = Duration::from_secs(60);
/// Mismatches that are printed; all are counted.
const PRINTED_MAX: u64 = 20;

/// What a writer counts.
#[derive(Default)]
struct Counts {
    /// The last record that is durable; 0 for none.
    last: u64,
    /// How often the whole log was compared with memory.
    compared: u64,
    /// Records that the disk has and memory doesn't know of.
    ahead: u64,
    /// Records that memory knows of and the disk hasn't got.
    behind: u64,
    /// Records that are no records.
    torn: u64,
    /// Reads and writes that failed.
    failed: u64,
}

/// See [`crate::workload::prepare`].
pub fn prepare(line: &[String], status: &Status) -> Result<Run, String> {
    let args = Args::parse(line, &["device", "interval-us"])?;
    let device: String = args.or("device", String::from("/dev/xvda"))?;
    let interval = Duration::from_micros(args.or("interval-us", 5_000)?);
    let disk = open(&device)?;
    let zero = Record([0; RECORD]);
    for slot in 0..SLOTS {
        write(&disk, slot, &zero).map_err(|error| format!("cannot write {device}: {error}"))?;
    }
    let counts = status::shared(status, "writer", Counts::default(), |counts: &Counts| {
        let mut json = Json::new();
        json.number("last", counts.last)
            .number("compared", counts.compared)
            .number("ahead", counts.ahead)
            .number("behind", counts.behind)
            .number("torn", counts.torn)
            .number("failed", counts.failed);
        json
    });
    Ok(Box::new(move || {
        let mut pace = Pace::new(interval);
        let mut next = 1;
        loop {
            pace.wait();
            // Its own slot first, with what is about to be written over.
            let mut slots = vec![next];
            let whole = next % SLOTS == 0;
            if whole {
                slots.extend(next + 1 - SLOTS.min(next)..next);
            } else if next > 1 {
                slots.push(next - 1);
            }
            for number in slots {
                compare(&disk, number, next, &counts);
            }
            let written = write(&disk, next % SLOTS, &Record::of(next));
            let mut counts = lock(&counts);
            counts.compared += u64::from(whole);
            match written {
                Ok(()) => {
                    counts.last = next;
                    next += 1;
                }
                Err(error) => {
                    counts.failed += 1;
                    println!("DISK-FAILED record {next}: {error}");
                }
            }
        }
    }))
}

/// Looks whether the slot of record `number` has what it should have before `next`
/// is written.
fn compare(disk: &File, number: u64, next: u64, counts: &Mutex<Counts>) {
    // The slot of the next one still has what was written a round earlier.
    let expected = match number == next {
        true => next.saturating_sub(SLOTS),
        false => number,
    };
    let mut record = Record([0; RECORD]);
    if let Err(error) = disk.read_exact_at(&mut record.0, number % SLOTS * RECORD as u64) {
        lock(counts).failed += 1;
        println!("DISK-FAILED reading for record {number}: {error}");
        return;
    }
    let found = record.number();
    let mut counts = lock(counts);
    match found {
        Some(found) if found == expected => return,
        Some(found) if found > expected => counts.ahead += 1,
        Some(_) => counts.behind += 1,
        None => counts.torn += 1,
    }
    if counts.ahead + counts.behind + counts.torn <= PRINTED_MAX {
        println!("DISK-MISMATCH found {found:?} instead of {expected}, memory is at {next}");
    }
}

#[repr(align(4096))]
struct Record([u8; RECORD]);

impl Record {
    /// A record: its number, over and over.
    fn of(number: u64) -> Self {
        let mut record = Record([0; RECORD]);
        for word in record.0.chunks_exact_mut(8) {
            word.copy_from_slice(&number.to_le_bytes());
        }
        record
    }

    /// Whose record it is; `None` if parts of it are of different ones.
    fn number(&self) -> Option<u64> {
        let mut words = self.0.chunks_exact(8);
        let first = words.next()?;
        let number = u64::from_le_bytes(first.try_into().ok()?);
        words.all(|word| word == first).then_some(number)
    }
}

fn write(disk: &File, slot: u64, record: &Record) -> std::io::Result<()> {
    disk.write_all_at(&record.0, slot * RECORD as u64)
}

fn open(device: &str) -> Result<File, String> {
    let end = Instant::now() + DEVICE_LIMIT;
    loop {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT | libc::O_DSYNC)
            .open(device);
        match opened {
            Ok(disk) => return Ok(disk),
            Err(error) if Instant::now() > end => {
                return Err(format!("cannot open {device}: {error}"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is counted before `next` is written on a disk that has all up to `last`.
    fn seen(last: u64, next: u64, change: impl Fn(&File)) -> Result<Counts, std::io::Error> {
        let path =
            std::env::temp_dir().join(format!("vne-writer-{}-{last}-{next}", std::process::id()));
        let disk = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)?;
        std::fs::remove_file(&path)?;
        disk.set_len(SLOTS * RECORD as u64)?;
        for number in 1..=last {
            write(&disk, number % SLOTS, &Record::of(number))?;
        }
        change(&disk);
        let counts = Mutex::new(Counts::default());
        compare(&disk, next, next, &counts);
        for number in next.saturating_sub(SLOTS - 1).max(1)..next {
            compare(&disk, number, next, &counts);
        }
        Ok(counts.into_inner().unwrap_or_default())
    }

    #[test]
    fn a_disk_of_another_time_than_memory_shows() -> Result<(), std::io::Error> {
        for next in [1, 2, SLOTS, SLOTS + 1, 5 * SLOTS + 7] {
            let fits = seen(next - 1, next, |_| {})?;
            assert_eq!((fits.ahead, fits.behind, fits.torn), (0, 0, 0), "{next}");
            let later = seen(next + 2, next, |_| {})?;
            assert!(later.ahead > 0 && later.behind == 0, "{next}");
        }
        let earlier = seen(200, 204, |_| {})?;
        assert!(
            earlier.behind == 4 - 1 && earlier.ahead == 0,
            "{}",
            earlier.behind
        );
        let torn = seen(200, 201, |disk| {
            // Half of it is the next one's.
            let _ = disk.write_all_at(&[9; 512], 199 % SLOTS * RECORD as u64);
        })?;
        assert_eq!(torn.torn, 1);
        Ok(())
    }
}
