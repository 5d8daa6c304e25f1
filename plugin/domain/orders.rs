//! The engine's orders to a worker, as its threads see them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::now_ns;

/// How long a guest stands still for its disks, at most. It's below what is left of
/// the cut's own limit.
const DISKS_MAX: Duration = Duration::from_secs(8);

/// The last order that the engine gave. Orders only ever advance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Order {
    Precopy,
    Approach,
    Cut,
    /// The disks were captured, or couldn't be.
    Disks,
    Finalise,
    /// What was captured of the disks is durable, or couldn't be made so.
    Settled,
    Abort,
}

/// The engine's orders, as the other threads see them.
pub(super) struct Orders {
    last: Mutex<Order>,
    changed: Condvar,
    /// libxl's call is over, so that nobody waits for an answer any more.
    over: AtomicBool,
    /// Why the disks couldn't be captured.
    disks_failed: Mutex<Option<String>>,
}

impl Orders {
    /// To begin with.
    pub(super) fn new() -> Self {
        Self {
            last: Mutex::new(Order::Precopy),
            changed: Condvar::new(),
            over: AtomicBool::new(false),
            disks_failed: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Order> {
        // A poisoned order is still an order: it is a plain value.
        self.last
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(super) fn advance(&self, order: Order) {
        let mut last = self.lock();
        *last = order.max(*last);
        self.changed.notify_all();
    }

    pub(super) fn now(&self) -> Order {
        *self.lock()
    }

    /// Ends all waiting in [`Orders::wait_past`].
    pub(super) fn call_over(&self) {
        let _last = self.lock();
        self.over.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Waits until there is another order than `order`, until the time, or until
    /// [`Orders::call_over`].
    pub(super) fn wait_past(&self, order: Order, until_ns: u64) -> Order {
        let mut last = self.lock();
        loop {
            let left = until_ns.saturating_sub(now_ns());
            if *last != order || left == 0 || self.over.load(Ordering::Acquire) {
                return *last;
            }
            let waited = self.changed.wait_timeout(last, Duration::from_nanos(left));
            last = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }

    pub(super) fn wait_past_cut(&self) -> Order {
        let mut last = self.lock();
        while *last <= Order::Disks {
            let waited = self.changed.wait(last);
            last = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        *last
    }

    /// Takes in how it went with the disks.
    pub(super) fn disks(&self, order: Order, why: Option<String>) {
        let failed = self.disks_failed.lock();
        *failed.unwrap_or_else(PoisonError::into_inner) = why;
        self.advance(order);
    }

    fn disks_failed(&self) -> Result<(), String> {
        let failed = self.disks_failed.lock();
        let failed = failed.unwrap_or_else(PoisonError::into_inner).take();
        failed.map_or(Ok(()), Err)
    }

    /// Waits until what was captured of the disks is durable, for as long as it takes.
    pub(super) fn wait_settled(&self) -> Result<Order, String> {
        let last = self.lock();
        let waited = self.changed.wait_while(last, |last| *last < Order::Settled);
        let last = *waited.unwrap_or_else(PoisonError::into_inner);
        self.disks_failed().map(|()| last)
    }

    /// Waits until the disks have been captured.
    pub(super) fn wait_for_disks(&self) -> Result<(), String> {
        let last = self.lock();
        let waited = self
            .changed
            .wait_timeout_while(last, DISKS_MAX, |last| *last < Order::Disks);
        let (last, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match *last {
            Order::Precopy | Order::Approach | Order::Cut => Err(format!(
                "capturing its disks takes longer than {} s (are they, or dom0, very busy?)",
                DISKS_MAX.as_secs()
            )),
            Order::Disks => self.disks_failed(),
            // It's what is told anyway.
            Order::Finalise | Order::Settled | Order::Abort => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed() -> Option<String> {
        Some(String::from("no space"))
    }

    #[test]
    fn a_guest_runs_as_soon_as_its_disks_are_captured_or_cannot_be() {
        let orders = Orders::new();
        orders.advance(Order::Cut);
        orders.disks(Order::Disks, None);
        assert_eq!(orders.wait_for_disks(), Ok(()));
        let orders = Orders::new();
        orders.disks(Order::Disks, failed());
        assert_eq!(orders.wait_for_disks().err(), failed());
    }

    #[test]
    fn a_guest_does_not_wait_for_disks_of_a_take_that_was_given_up() {
        let orders = Orders::new();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| orders.wait_for_disks());
            orders.advance(Order::Abort);
            assert!(waiting.join().is_ok_and(|waited| waited.is_ok()));
        });
        // What comes later changes nothing.
        orders.disks(Order::Disks, failed());
        assert_eq!(orders.now(), Order::Abort);
    }

    #[test]
    fn nobody_waits_on_when_the_helper_was_killed() {
        let orders = Orders::new();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| orders.wait_past(Order::Precopy, u64::MAX));
            orders.call_over();
            assert!(waiting.join().is_ok_and(|order| order == Order::Precopy));
        });
    }

    #[test]
    fn nothing_is_stored_before_its_disks_are_settled() {
        let orders = Orders::new();
        orders.disks(Order::Disks, None);
        orders.advance(Order::Finalise);
        assert_eq!(orders.wait_past_cut(), Order::Finalise);
        orders.disks(Order::Settled, failed());
        assert_eq!(orders.wait_settled().err(), failed());
        let orders = Orders::new();
        orders.disks(Order::Settled, None);
        assert_eq!(orders.wait_settled(), Ok(Order::Settled));
    }
}
