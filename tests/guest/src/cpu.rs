//! Work that's only counted: how much of its processor a guest really gets.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use crate::args::Args;
use crate::json::Json;
use crate::status::Status;
use crate::workload::Run;

/// Rounds of the mixing function in one unit of work.
const UNIT: u32 = 10_000;

/// See [`crate::workload::prepare`].
pub fn prepare(line: &[String], status: &Status) -> Result<Run, String> {
    Args::parse(line, &[])?;
    let done = Arc::new(AtomicU64::new(0));
    let told = done.clone();
    status.add("cpu", move || {
        let mut json = Json::new();
        json.number("units", told.load(Ordering::Relaxed));
        json
    });
    Ok(Box::new(move || {
        let mut value = 1u64;
        loop {
            for _ in 0..UNIT {
                value ^= value << 13;
                value ^= value >> 7;
                value ^= value << 17;
            }
            std::hint::black_box(value);
            done.fetch_add(1, Ordering::Relaxed);
        }
    }))
}
