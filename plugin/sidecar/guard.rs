//! The guard: a process beside each take that outlives it. It waits for the
//! take's lock, which the kernel frees when the take's process ends, however
//! it ends; and when something is left to undo then, it undoes it.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use super::journal::{self, JournalDomain, JournalProcess, Orphan, RestoreStage};
use crate::domain::recover::recover_domains;
use crate::domain::xl::{self, Xl};
use crate::image::Store;
use crate::net::{self, Rtnl};
use crate::sentence::sentence;

/// A worker whose engine is gone gives up by itself, after a cut that is
/// under way; then it's killed.
const WORKER_END_MAX: Duration = Duration::from_millis(1_000);

/// Waits until the take that owns the journal in `folder` has ended, and
/// cleans up after it if it didn't do so itself.
pub fn watch(xl: &Xl, folder: &Path) -> Result<(), String> {
    let adopted = Orphan::adopt(folder, FlockOperation::LockExclusive);
    match adopted.map_err(|error| sentence(&error))? {
        Some(orphan) => {
            clean_up(xl, orphan);
            Ok(())
        }
        None => Ok(()),
    }
}

/// Undoes what a dead take left. Every step is tried; the journal goes only
/// when all have worked, so that the next one tries again.
pub fn clean_up(xl: &Xl, orphan: Orphan) {
    let record = &orphan.record;
    log::warn!(
        "cleaning up after a take of VNE '{}' (process {}) that was killed",
        record.vne,
        record.pid
    );
    let mut undone = true;
    let mut must = |result: Result<(), String>| {
        if let Err(error) = result {
            log::error!("{error}");
            undone = false;
        }
    };
    // The network first: every other step may take a while.
    must(remove_holds(record).map_err(|error| sentence(&error)));
    end_workers(&record.workers);
    match record.restore {
        None => {
            let domains: Vec<_> = record
                .domains
                .iter()
                .map(|domain| (domain.domid, domain.uuid.as_str()))
                .collect();
            must(recover_domains(xl, &domains).map_err(|error| sentence(&error)));
        }
        Some(stage) => {
            for domain in &record.domains {
                must(end_restore(xl, domain, stage).map_err(|error| sentence(&error)));
            }
        }
    }
    if let Err(error) = Store::open(&record.store).and_then(|store| store.clean_tmp()) {
        // Half a snapshot is never listed; the next take tries again.
        log::warn!("{}", sentence(&error));
    }
    if undone {
        if let Err(error) = orphan.close() {
            log::error!("{}", sentence(&error));
        }
    }
}

/// Half a VNE must not stay: its domains all run, or none exists.
fn end_restore(xl: &Xl, domain: &JournalDomain, stage: RestoreStage) -> Result<(), xl::Error> {
    let domid = match xl.find(&domain.name) {
        Ok(domid) => domid,
        Err(xl::Error::NoSuchDomain(_)) => return Ok(()),
        Err(error) => return Err(error),
    };
    let state = match xl.state(domid) {
        Err(xl::Error::Gone(_)) => return Ok(()),
        other => other?,
    };
    // Only what the restore has built, and nobody has set running since.
    if state.uuid != domain.uuid || !state.paused {
        return Ok(());
    }
    match stage {
        RestoreStage::Building => xl.destroy(domid),
        RestoreStage::Releasing => xl.unpause(domid),
    }
}

fn remove_holds(record: &journal::Record) -> Result<(), net::Error> {
    if record.holds.is_empty() {
        return Ok(());
    }
    let mut rtnl = Rtnl::open()?;
    let mut result = Ok(());
    for hold in record.holds.iter().filter(|hold| hold.is_plausible()) {
        if let Err(error) = hold.remove(&mut rtnl) {
            log::error!("{}: {}", hold.vif, sentence(&error));
            result = Err(error);
        }
    }
    result
}

fn end_workers(workers: &[JournalProcess]) {
    let lives =
        |worker: &&JournalProcess| journal::start_ticks(worker.pid) == Some(worker.start_ticks);
    let start = Instant::now();
    while workers.iter().any(|worker| lives(&worker)) && start.elapsed() < WORKER_END_MAX {
        std::thread::sleep(Duration::from_millis(10));
    }
    for worker in workers.iter().filter(lives) {
        let Some(pid) = i32::try_from(worker.pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw)
        else {
            continue;
        };
        log::warn!("worker {} doesn't end, killing it", worker.pid);
        if let Err(error) = rustix::process::kill_process(pid, rustix::process::Signal::KILL) {
            log::warn!("worker {}: {error}", worker.pid);
        }
    }
    while workers.iter().any(|worker| lives(&worker)) && start.elapsed() < 2 * WORKER_END_MAX {
        std::thread::sleep(Duration::from_millis(10));
    }
}
