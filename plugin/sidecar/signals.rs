//! Ctrl-C and its like, as something to hear of.

use super::error::Error;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// From here on such a signal no longer ends this process: `heard` is called
/// for each one, in a thread of its own, until it returns false.
pub fn watch(heard: impl Fn() -> bool + Send + 'static) -> Result<(), Error> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(|source| Error::Start {
        what: "watch for signals",
        source,
    })?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            if !heard() {
                return;
            }
        }
    });
    Ok(())
}
