//! The two clocks that matter in a guest. The monotonic one stands still
//! while the guest is suspended: right for pacing, wrong for measuring a
//! pause. The boot-time one goes on.

use std::time::{Duration, Instant};

/// Nanoseconds since the guest booted, suspended time included.
pub fn boottime_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is ours; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Ticks at an interval. Missed ticks are dropped, not caught up with.
pub struct Pace {
    interval: Duration,
    next: Instant,
}

impl Pace {
    /// The first tick is now.
    pub fn new(interval: Duration) -> Self {
        Pace {
            interval,
            next: Instant::now(),
        }
    }

    /// Sleeps until the next tick.
    pub fn wait(&mut self) {
        let now = Instant::now();
        if let Some(pause) = self.next.checked_duration_since(now) {
            std::thread::sleep(pause);
        }
        self.next = (self.next + self.interval).max(Instant::now());
    }
}
