//! The two clocks that matter in a guest. The monotonic one stands still
//! while the guest is suspended: right for pacing, wrong for measuring a
//! pause. The boot-time one goes on.

use std::time::{Duration, Instant};

/// Nanoseconds since the guest booted, suspended time included.
pub fn boottime_ns() -> u64 {
    read_ns(libc::CLOCK_BOOTTIME)
}

/// Nanoseconds that the guest has been suspended for, and a bit more when this is
/// held up between two clocks.
pub fn suspended_ns() -> u64 {
    let awake = read_ns(libc::CLOCK_MONOTONIC);
    boottime_ns().saturating_sub(awake)
}

fn read_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is ours; these clocks always exist.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Ticks at an interval. Missed ticks are dropped, but for as many as a
/// given time holds.
pub struct Pace {
    interval: Duration,
    next: Instant,
    catch_up: Duration,
}

impl Pace {
    /// The first tick is now; no missed tick is caught up with.
    pub fn new(interval: Duration) -> Self {
        Self::catching_up(interval, Duration::ZERO)
    }

    /// The first tick is now; ticks missed in the last `limit` follow at once.
    pub fn catching_up(interval: Duration, limit: Duration) -> Self {
        Pace {
            interval,
            next: Instant::now(),
            catch_up: limit,
        }
    }

    /// Sleeps until the next tick.
    pub fn wait(&mut self) {
        let now = Instant::now();
        if let Some(pause) = self.next.checked_duration_since(now) {
            std::thread::sleep(pause);
        }
        let now = Instant::now();
        let earliest = now.checked_sub(self.catch_up).unwrap_or(now);
        self.next = (self.next + self.interval).max(earliest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks_after_a_stall(catch_up: Duration) -> u32 {
        let mut pace = Pace::catching_up(Duration::from_millis(1), catch_up);
        pace.wait();
        std::thread::sleep(Duration::from_millis(60));
        let start = Instant::now();
        let mut ticks = 0;
        while start.elapsed() < Duration::from_millis(5) {
            pace.wait();
            ticks += 1;
        }
        ticks
    }

    #[test]
    fn missed_ticks_are_caught_up_with_only_within_the_limit() {
        assert!(ticks_after_a_stall(Duration::ZERO) <= 8);
        assert!(ticks_after_a_stall(Duration::from_millis(30)) >= 20);
    }
}
