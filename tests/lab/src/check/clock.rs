//! How long all tests may take together, and which there is no time for.

use std::time::{Duration, Instant};

/// How much what is usual counts against what was seen here.
const USUAL_WEIGHT: Duration = Duration::from_secs(60);

/// Looks ahead: a machine that is twice as slow as usual with what is done is so with
/// what comes.
#[derive(Debug)]
pub struct Clock {
    end: Option<Instant>,
    /// Of what is being done.
    until: Option<Instant>,
    usual: Duration,
    took: Duration,
}

impl Clock {
    /// Ends then, or never.
    pub fn new(end: Option<Instant>) -> Self {
        Self {
            end,
            until: end,
            usual: USUAL_WEIGHT,
            took: USUAL_WEIGHT,
        }
    }

    /// Leaves only this part of the time to what comes next, so that something is left
    /// for what comes after it.
    pub fn share(&mut self, part: f64) {
        self.until = self.end.map(|end| {
            let now = Instant::now();
            now + end.saturating_duration_since(now).mul_f64(part)
        });
    }

    /// Whether something can be done in the time left that usually takes so long; if
    /// not, why not.
    pub fn allows(&self, usual: Duration) -> Result<(), String> {
        let Some(until) = self.until else {
            return Ok(());
        };
        let left = until.saturating_duration_since(Instant::now());
        let needed = usual.mul_f64(self.pace());
        if needed <= left {
            return Ok(());
        }
        Err(format!(
            "it would take about {} s, and {} are left",
            needed.as_secs(),
            left.as_secs()
        ))
    }

    /// Something that usually takes so long took that long.
    pub fn took(&mut self, usual: Duration, took: Duration) {
        self.usual += usual;
        self.took += took;
    }

    fn pace(&self) -> f64 {
        self.took.as_secs_f64() / self.usual.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn a_slow_machine_begins_only_what_it_can_end() {
        let mut clock = Clock::new(Some(Instant::now() + seconds(1000)));
        assert!(clock.allows(seconds(900)).is_ok());
        // Twice as long as usual.
        clock.took(seconds(100), seconds(260));
        assert!(clock.allows(seconds(400)).is_ok());
        let why = clock.allows(seconds(600)).err().unwrap_or_default();
        assert!(why.starts_with("it would take about 1200 s"), "{why}");
    }

    #[test]
    fn what_comes_first_leaves_something_for_the_rest() {
        let mut clock = Clock::new(Some(Instant::now() + seconds(1000)));
        clock.share(0.4);
        assert!(clock.allows(seconds(500)).is_err());
        clock.share(1.0);
        assert!(clock.allows(seconds(500)).is_ok());
    }

    #[test]
    fn without_a_limit_all_is_done() {
        let clock = Clock::new(None);
        assert!(clock.allows(seconds(1_000_000)).is_ok());
    }
}
