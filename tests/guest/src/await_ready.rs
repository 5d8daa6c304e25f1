//! Waits, in dom0, until a guest says on its console that it's ready. A loop
//! in a shell would take the emulated processor from the guest that boots.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::time::{Duration, Instant};

use crate::args::Args;

const LAST_LINES: usize = 40;

/// Follows a console's log from a place on.
pub fn run(line: &[String]) -> Result<(), String> {
    let args = Args::parse(line, &["from", "seconds"])?;
    let [log] = args.words.as_slice() else {
        return Err("await-ready wants one log".to_owned());
    };
    let from: u64 = args.need("from")?;
    let seconds: u64 = args.need("seconds")?;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut said = String::new();
    let mut why = format!("it took more than {seconds} s");
    while Instant::now() < end {
        said = read(log, from).unwrap_or_default();
        if said.lines().any(|line| line.starts_with("VNE-READY")) {
            return Ok(());
        }
        let failure = ["VNE-FAILED", "Kernel panic"]
            .iter()
            .find_map(|word| said.lines().find(|line| line.contains(word)));
        if let Some(failure) = failure {
            why = failure.trim().to_owned();
            // What follows belongs to it.
            std::thread::sleep(Duration::from_secs(1));
            said = read(log, from).unwrap_or_default();
            break;
        }
        std::thread::sleep(Duration::from_millis(150));
    }
    let lines: Vec<&str> = said.lines().collect();
    let last = lines
        .get(lines.len().saturating_sub(LAST_LINES)..)
        .unwrap_or_default();
    Err(format!(
        "the guest isn't ready: {why}; the last lines of its console:\n{}",
        last.join("\n")
    ))
}

fn read(log: &str, from: u64) -> Option<String> {
    let mut file = File::open(log).ok()?;
    file.seek(SeekFrom::Start(from)).ok()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}
