//! How fast this machine's emulation is, for limits of time.
//!
//! What is promised in seconds is so where the lab runs as it usually does. A machine
//! that is shared may be several times slower, and then says nothing about the product.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::Lab;

/// Starting a program is what a PV dom0 is slowest at under emulation.
const YARDSTICK: &str = "start=${EPOCHREALTIME/[.,]/}; for i in {1..40}; do /bin/true; done; \
                         echo $(((${EPOCHREALTIME/[.,]/} - start) / 1000))";
/// What it takes on two cores of 2026 with nothing beside the lab, in ms.
const USUAL_MS: f64 = 1000.0;

static PACE: OnceLock<f64> = OnceLock::new();

/// Looks how slow a host without guests is, once.
pub fn measure(lab: &Lab) -> Result<()> {
    if PACE.get().is_none() {
        let took = lab.run(0, &format!("bash -c '{YARDSTICK}'"))?;
        let took: f64 = took.trim().parse().with_context(|| took.clone())?;
        let pace = *PACE.get_or_init(|| took / USUAL_MS);
        if pace > 1.0 {
            println!(
                "the lab is {pace:.1} times slower here than usual: limits of time are longer"
            );
        }
    }
    Ok(())
}

/// A limit as it is here: never shorter than it's said to be.
pub fn here(limit: Duration) -> Duration {
    limit.mul_f64(PACE.get().copied().unwrap_or(1.0).clamp(1.0, 4.0))
}
