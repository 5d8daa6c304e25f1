//! Setting a captured guest running again, as soon as nothing more of it is needed.
//!
//! That is when the libxc stream is over: for a PV or PVH guest libxl adds nothing to
//! it. What comes until `libxl_domain_suspend` returns is clean-up, such as unmapping
//! a table of all the machine's memory, and takes about as long as the last pages do.
//! An HVM guest has to stand still until libxl has saved its device model.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::orders::Orders;
use super::xl::{self, Xl};
use super::{DomainFacts, DomainKind};
use crate::clock::now_ns;
use crate::net::{self, Watched};

/// How long a guest stands still at most until its network has been looked at: far
/// above what a look may take.
const LOOK_MAX: Duration = Duration::from_secs(1);

/// Whether the network of a stopped guest has been looked at. What it sends when it
/// runs again must not be taken for sent before its cut.
#[derive(Default)]
pub(super) struct Look {
    done: Mutex<bool>,
    changed: Condvar,
}

impl Look {
    /// It has.
    pub(super) fn done(&self) {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits for it; whether it came in time.
    fn wait(&self) -> bool {
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .changed
            .wait_timeout_while(done, LOOK_MAX, |done| !*done);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Sets one guest running, once.
pub(super) struct Restart<'a> {
    xl: &'a Xl,
    facts: &'a DomainFacts,
    orders: &'a Orders,
    look: &'a Look,
    watched: &'a Mutex<Watched>,
    disks: bool,
    /// How it went. Locked for as long as it goes.
    done: Mutex<Option<Restarted>>,
}

/// How it went. Times are `CLOCK_MONOTONIC` in ns.
pub(super) struct Restarted {
    /// All of it had been saved.
    pub(super) saved_ns: u64,
    /// Its network was looked at before it was set running.
    pub(super) looked: bool,
    /// Whether its disks were captured, if it has any.
    pub(super) captured: Result<(), String>,
    /// They had been.
    pub(super) disks_ns: u64,
    /// Frames that it had sent, at the last moment at which all of these were sent
    /// before its cut.
    pub(super) sent: Result<u64, net::Error>,
    /// Whether it runs.
    pub(super) resumed: Result<(), xl::Error>,
    /// It ran.
    pub(super) resumed_ns: u64,
}

impl<'a> Restart<'a> {
    /// Of a guest that `xl` saves; with `disks`, when these have been captured.
    pub(super) fn new(
        xl: &'a Xl,
        facts: &'a DomainFacts,
        orders: &'a Orders,
        (look, watched): (&'a Look, &'a Mutex<Watched>),
        disks: bool,
    ) -> Self {
        Self {
            xl,
            facts,
            orders,
            look,
            watched,
            disks,
            done: Mutex::new(None),
        }
    }

    /// The libxc stream is over.
    pub(super) fn stream_over(&self) {
        if self.facts.kind != DomainKind::Hvm {
            self.lock().get_or_insert_with(|| self.run());
        }
    }

    /// libxl has saved it.
    pub(super) fn saved(&self) -> Restarted {
        let done = self.lock().take();
        done.unwrap_or_else(|| self.run())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Restarted>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) -> Restarted {
        let saved_ns = now_ns();
        let looked = self.look.wait();
        // The engine has them captured since it knows that the guest has stopped: here no
        // other process may be started while libxl works.
        let (captured, disks_ns) = match self.disks {
            true => (self.orders.wait_for_disks(), now_ns()),
            false => (Ok(()), saved_ns),
        };
        let watched = self.watched.lock();
        let sent = watched.unwrap_or_else(PoisonError::into_inner).sent();
        let resumed = self.xl.resume(self.facts.domid);
        Restarted {
            saved_ns,
            looked,
            captured,
            disks_ns,
            sent,
            resumed,
            resumed_ns: now_ns(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_stands_still_until_its_network_was_looked_at() {
        let look = Look::default();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| look.wait());
            look.done();
            assert!(waiting.join().is_ok_and(|looked| looked));
        });
    }

    #[test]
    fn and_not_for_ever() {
        assert!(!Look::default().wait());
    }
}
