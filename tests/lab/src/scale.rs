//! How much the lab tests do.

use std::sync::OnceLock;

static FULL: OnceLock<bool> = OnceLock::new();

/// Says it, once and before anything is asked.
pub fn set_full(full: bool) {
    // A second word would come too late for what was asked already.
    let _ = FULL.set(full);
}

/// Whether each thing is tried as often and in as many ways as the project's claims
/// say, which takes far longer.
pub fn is_full() -> bool {
    *FULL.get().unwrap_or(&false)
}

/// How often something is done, in a short run and in a full one.
pub fn of(short: usize, full: usize) -> usize {
    if is_full() {
        full
    } else {
        short
    }
}
