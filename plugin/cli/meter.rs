//! Progress of what reads or writes much: how far, how fast, how much longer.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use super::units::bytes;

const REDRAW_INTERVAL: Duration = Duration::from_millis(200);
/// What takes less isn't worth a line.
const SILENT: Duration = Duration::from_secs(1);

/// A line on stderr, if that is a terminal.
pub struct Meter {
    verb: &'static str,
    total: u64,
    begun: Instant,
    drawn: Option<Instant>,
    quiet: bool,
}

impl Meter {
    /// `verb` is what is done with the bytes: "read".
    pub fn new(verb: &'static str, total: u64, quiet: bool) -> Self {
        Self {
            verb,
            total,
            begun: Instant::now(),
            drawn: None,
            quiet: quiet || !std::io::stderr().is_terminal(),
        }
    }

    /// So many bytes there are, if that wasn't known before.
    pub fn expect(&mut self, total: u64) {
        self.total = total;
    }

    /// So many bytes are done.
    pub fn tell(&mut self, done: u64) {
        let soon = self.drawn.is_some_and(|at| at.elapsed() < REDRAW_INTERVAL);
        let elapsed = self.begun.elapsed();
        if self.quiet || soon || elapsed < SILENT {
            return;
        }
        self.drawn = Some(Instant::now());
        let line = line(self.verb, done, self.total, elapsed);
        // Progress that can't be shown must not fail anything.
        let _ = write!(std::io::stderr(), "\r{line}\x1b[K");
    }

    /// Takes the line away.
    pub fn end(&mut self) {
        if self.drawn.take().is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.end();
    }
}

fn line(verb: &str, done: u64, total: u64, elapsed: Duration) -> String {
    let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
    let left_s = total.saturating_sub(done) as f64 / rate.max(1.0);
    format!(
        "{verb} {} of {}, {}/s, {left_s:.0} s left",
        bytes(done),
        bytes(total.max(done)),
        bytes(rate as u64)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_and_what_is_left_follow_from_what_is_done() {
        let half = line("read", 512 << 20, 1 << 30, Duration::from_secs(4));
        assert_eq!(half, "read 512.0 MiB of 1.0 GiB, 128.0 MiB/s, 4 s left");
        let done = line("read", 9, 8, Duration::ZERO);
        assert_eq!(done, "read 9 B of 9 B, 8.8 KiB/s, 0 s left");
    }
}
