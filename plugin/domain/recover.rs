//! Bringing domains back to running after their worker or save helper was
//! killed. Repeating it, or doing it to a healthy domain, does no harm.

use std::time::{Duration, Instant};

use super::monitor::Monitors;
use super::xl::{Error, Xl};

/// How long a guest may take from answering the request until it has stopped.
/// Only such a guest has to be waited for; 3 s is far above what is seen, and
/// lets everything run again within 5 s.
const STOP_MAX: Duration = Duration::from_secs(3);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Makes sure that the domain runs; see [`recover_domains`].
pub fn recover_domain(xl: &Xl, domid: u32, uuid: &str, asked: bool) -> Result<(), Error> {
    recover_domains(xl, &[(domid, uuid)], asked)
}

/// Makes sure that the domains run, now and after a guest has acted on a
/// suspend request that nobody waits for any more. A domain with another UUID
/// has taken over the number: it's left alone. All are tried; the first error
/// is returned.
///
/// `asked` says whether they may have been asked to suspend. If not, there is
/// nothing to wait for, and a request or a suspend that is found is somebody
/// else's.
pub fn recover_domains(xl: &Xl, domains: &[(u32, &str)], asked: bool) -> Result<(), Error> {
    let mut first_error = Ok(());
    let mut waiting = Vec::new();
    for &(domid, uuid) in domains {
        match xl.state(domid) {
            Ok(state) if state.uuid == uuid => waiting.push(Waiting {
                domid,
                asked,
                withdrawn: asked && withdraw(xl, domid),
            }),
            Ok(_) | Err(Error::Gone(_)) => {}
            Err(error) => keep_first(&mut first_error, error),
        }
    }
    let start = Instant::now();
    while !waiting.is_empty() {
        let out_of_time = start.elapsed() > STOP_MAX;
        waiting.retain(|domain| match domain.settle(xl, out_of_time) {
            Ok(settled) => !settled,
            Err(error) => {
                keep_first(&mut first_error, error);
                false
            }
        });
        if !waiting.is_empty() {
            std::thread::sleep(LOOK_INTERVAL);
        }
    }
    first_error
}

struct Waiting {
    domid: u32,
    asked: bool,
    withdrawn: bool,
}

impl Waiting {
    /// `true` when there is nothing more to wait for.
    fn settle(&self, xl: &Xl, out_of_time: bool) -> Result<bool, Error> {
        let state = match xl.state(self.domid) {
            Err(Error::Gone(_)) => return Ok(true),
            other => other?,
        };
        if self.asked && state.suspended {
            log::warn!("domain {}: was left suspended, resuming it", self.domid);
            xl.resume(self.domid)?;
        } else if self.asked && !self.withdrawn && !out_of_time {
            return Ok(false);
        }
        if let Some(name) = xl.name(self.domid) {
            Monitors::find(&name).let_go();
        }
        // Not fatal: the guest runs, only slower, and the next save mends it.
        if let Err(error) = xl.logdirty_off(self.domid) {
            log::debug!("domain {}: {error}", self.domid);
        }
        Ok(true)
    }
}

fn withdraw(xl: &Xl, domid: u32) -> bool {
    xl.cancel_suspend_request(domid).unwrap_or_else(|error| {
        log::warn!("domain {domid}: {error}");
        false
    })
}

fn keep_first(kept: &mut Result<(), Error>, error: Error) {
    if kept.is_ok() {
        *kept = Err(error);
    } else {
        log::error!("{error}");
    }
}
