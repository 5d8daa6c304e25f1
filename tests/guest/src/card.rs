//! The guest's network card, which it loses for a moment with each restore.

use std::time::Duration;

const CARD: &str = "/sys/class/net/eth0";

/// Waits until the guest has its card, and says whether it had to: right after a
/// restore, as after a migration, it hasn't, and its kernel drops what is sent
/// then without a word. User programs don't run between that and this.
pub fn wait() -> bool {
    let says = |file: &str, word: &str| {
        let text = std::fs::read_to_string(format!("{CARD}/{file}"));
        text.is_ok_and(|text| text.trim() == word)
    };
    let mut waited = false;
    // The driver, and what the kernel has made of it.
    while says("carrier", "0") || says("operstate", "down") {
        waited = true;
        std::thread::sleep(Duration::from_millis(2));
    }
    waited
}
