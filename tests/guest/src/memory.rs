//! Work that waits for memory: how much of what it reads and writes a guest really
//! gets done while its memory is being copied.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use crate::args::Args;
use crate::json::Json;
use crate::status::Status;
use crate::workload::Run;

const PAGE_WORDS: usize = 512;
/// Words between two that are touched: a cache line.
const LINE_WORDS: usize = 8;

/// See [`crate::workload::prepare`].
pub fn prepare(line: &[String], status: &Status) -> Result<Run, String> {
    let args = Args::parse(line, &["mib", "written-pages"])?;
    let pages = args.or::<usize>("mib", 32)?.clamp(1, 4096) * 256;
    let written = args.or::<usize>("written-pages", 256)?.min(pages);
    let done = Arc::new(AtomicU64::new(0));
    let told = done.clone();
    status.add("touched", move || {
        let mut json = Json::new();
        json.number("units", told.load(Ordering::Relaxed));
        json
    });
    Ok(Box::new(move || {
        let mut memory = vec![1u64; pages * PAGE_WORDS];
        let mut sum = 0u64;
        loop {
            // A unit is a page read, and of as many as are to be, one written. They
            // take turns, so that a unit costs the same all the time.
            for (at, page) in memory.chunks_exact_mut(PAGE_WORDS).enumerate() {
                for word in page.iter().step_by(LINE_WORDS) {
                    sum = sum.wrapping_add(*word);
                }
                let is_written = (at + 1) * written / pages != at * written / pages;
                if let (true, Some(word)) = (is_written, page.first_mut()) {
                    *word = sum;
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
            std::hint::black_box(sum);
        }
    }))
}
