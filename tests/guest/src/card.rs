//! The guest's network card, which it loses for a moment with each restore.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

const STATE: &str = "/sys/class/net/eth0/operstate";
const CARRIER: &str = "/sys/class/net/eth0/carrier";

/// The card, to be looked at before each datagram that must not be lost.
pub struct Card {
    carrier: Option<File>,
}

impl Card {
    /// Where there is no such card, none is waited for.
    pub fn open() -> Self {
        Card {
            carrier: File::open(CARRIER).ok(),
        }
    }

    /// Waits until the guest has its card, and says whether it had to: right after a
    /// restore, as after a migration, it hasn't, and its kernel drops what is sent
    /// then without a word.
    ///
    /// User programs don't run between that and this, so only who is suspended
    /// between this and the call that sends loses something of its own accord. That's
    /// why the last look is a single call on an open file: a guest that is short of
    /// processors takes milliseconds for a few more.
    pub fn wait(&self) -> bool {
        let mut waited = false;
        // What the kernel has made of it, and then the driver.
        while std::fs::read_to_string(STATE).is_ok_and(|state| state.trim() == "down")
            || self.is_lost()
        {
            waited = true;
            std::thread::sleep(Duration::from_millis(2));
        }
        waited
    }

    fn is_lost(&self) -> bool {
        let mut byte = [0];
        let read = self.carrier.as_ref().map(|file| file.read_at(&mut byte, 0));
        matches!(read, Some(Ok(1))) && byte == *b"0"
    }
}
