//! The guard: a process beside each take or restore that outlives it. It waits
//! for its lock, which the kernel frees when the take's process ends, however
//! it ends; and when something is left to undo then, it undoes it.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use super::held;
use super::journal::{self, JournalCap, JournalDomain, JournalProcess, Orphan, RestoreStage};
use super::workers::Program;
use crate::disk::exchange;
use crate::domain::recover::recover_domains;
use crate::domain::xl::{self, Xl};
use crate::image::{self, Store};
use crate::net::{self, HoldRecord};
use crate::sentence::sentence;

/// A worker whose engine is gone gives up by itself, after a cut that is
/// under way; then it's killed.
const WORKER_END_MAX: Duration = Duration::from_millis(1_000);
/// An 'xl restore' whose save file ends too early destroys what it has half
/// built, and lets the next one do so: they share a lock. Then it's killed.
pub(super) const BUILDER_END_MAX: Duration = Duration::from_secs(10);
/// How long a disk's capture may go on when its engine was killed; longer, and the next
/// take cleans up after it.
const CAPTURE_END_MAX: Duration = Duration::from_secs(5);
/// How long a killed process may take to end.
pub(super) const KILLED_END_MAX: Duration = Duration::from_secs(2);

/// Waits until the take that owns the journal in `folder` has ended, and
/// cleans up after it if it didn't do so itself.
pub fn watch(xl: &Xl, program: &Program, folder: &Path) -> Result<(), String> {
    let adopted = Orphan::adopt(folder, FlockOperation::LockExclusive);
    match adopted.map_err(|error| sentence(&error))? {
        Some(orphan) => {
            clean_up(xl, program, orphan);
            Ok(())
        }
        None => Ok(()),
    }
}

/// Undoes what a dead take or restore left. Every step is tried; the journal goes only
/// when all have worked, so that the next one tries again.
pub fn clean_up(xl: &Xl, program: &Program, orphan: Orphan) {
    let record = &orphan.record;
    log::warn!(
        "cleaning up after a {} of VNE '{}' (process {}) that was killed",
        record.what(),
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
    let stage = record.restore.map(|stage| outcome(&orphan, stage));
    must(remove_holds(record, stage.as_ref()).map_err(|error| sentence(&error)));
    let patience = match record.restore {
        Some(_) => BUILDER_END_MAX,
        None if record.asked => WORKER_END_MAX,
        // No cut is under way: they only keep others from the processors.
        None => Duration::ZERO,
    };
    must(end_processes(&record.workers, patience));
    match stage {
        None => {
            must(restore_caps(xl, record));
            let domains: Vec<_> = record
                .domains
                .iter()
                .map(|domain| (domain.domid, domain.uuid.as_str()))
                .collect();
            must(recover_domains(xl, &domains, record.asked).map_err(|error| sentence(&error)));
            if let Err(error) = clean_store(&record.store) {
                // Half a snapshot is never listed; the next take tries again.
                log::warn!("{}", sentence(&error));
            }
        }
        Some(Outcome::End(stage)) => {
            let ended = end_restore(xl, program, &record.domains, stage);
            // Disks that somebody may still use stay as they are.
            let forward = stage == RestoreStage::Releasing;
            must(ended.and_then(|()| end_exchange(record, forward)));
        }
        Some(Outcome::Leave) => must(end_exchange(record, true)),
        Some(Outcome::Wait) => {
            let leader = record.leader.as_deref().unwrap_or("its leader");
            log::warn!("vned has to ask host '{leader}' how the restore was decided");
            return;
        }
    }
    if undone {
        if let Err(error) = orphan.close() {
            log::error!("{}", sentence(&error));
        }
    }
}

/// Deletes the killed take's part. A tool that captures a disk outlives its engine, and is
/// waited for: what it makes is to go as well.
fn clean_store(root: &Path) -> Result<(), image::Error> {
    let store = Store::open(root)?;
    let start = Instant::now();
    while store.clean_tmp()?.live > 0 && store.has_captures() {
        if start.elapsed() > CAPTURE_END_MAX {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// What is to become of the domains that a killed restore has built.
enum Outcome {
    End(RestoreStage),
    /// They are to stay paused.
    Leave,
    /// That knows another host only.
    Wait,
}

fn outcome(orphan: &Orphan, stage: RestoreStage) -> Outcome {
    let Some(joint) = &orphan.record.joint else {
        return Outcome::End(stage);
    };
    if stage != RestoreStage::Built {
        return Outcome::End(stage);
    }
    match journal::decided_paused(orphan.root(), &joint.ticket) {
        Some(true) => Outcome::Leave,
        Some(false) => Outcome::End(RestoreStage::Releasing),
        None if joint.led_here => Outcome::End(RestoreStage::Building),
        None => Outcome::Wait,
    }
}

/// The disks of a killed restore: those that members have stay, others are put back.
fn end_exchange(record: &journal::Record, forward: bool) -> Result<(), String> {
    let folder = record.exchange.as_deref();
    let ended = folder.map_or(Ok(()), |folder| exchange::end(folder, forward));
    ended.map_err(|error| sentence(&error))
}

/// Half a VNE must not stay: its domains all run, or none exists. Nobody may be
/// building them any more.
pub fn end_restore(
    xl: &Xl,
    program: &Program,
    domains: &[JournalDomain],
    stage: RestoreStage,
) -> Result<(), String> {
    let mut result = Ok(());
    for (domid, uuid) in parse_vm_list(&vm_list(program)?) {
        let Some(domain) = domains.iter().find(|domain| domain.uuid == uuid) else {
            continue;
        };
        if let Err(error) = end_built(xl, domid, domain, stage) {
            let error = sentence(&error);
            log::error!("{}: {error}", domain.name);
            result = Err(error);
        }
    }
    result
}

fn end_built(
    xl: &Xl,
    domid: u32,
    domain: &JournalDomain,
    stage: RestoreStage,
) -> Result<(), xl::Error> {
    // A killed 'xl restore' may not have got as far as to name it. One with
    // another name was renamed to make room for the one to be restored.
    let ours = xl
        .name(domid)
        .is_none_or(|name| name.is_empty() || name == domain.name);
    let state = match xl.state(domid) {
        Err(xl::Error::Gone(_)) => return Ok(()),
        other => other?,
    };
    // Only what the restore has built, and nobody has set running since.
    if !ours || state.uuid != domain.uuid || !state.paused || state.dying {
        return Ok(());
    }
    let ended = match stage {
        RestoreStage::Building | RestoreStage::Built => xl.destroy(domid),
        RestoreStage::Releasing => xl.unpause(domid),
    };
    match xl.state(domid) {
        // Somebody else was faster.
        Err(xl::Error::Gone(_)) => Ok(()),
        Ok(state) if !state.paused => Ok(()),
        _ => ended,
    }
}

/// All domains of the host, also those without a name: libxl finds no domain
/// by its UUID.
fn vm_list(program: &Program) -> Result<String, String> {
    let listed = program
        .xl_command("vm-list")
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("xl vm-list: {error}"))?;
    if listed.status.success() {
        Ok(String::from_utf8_lossy(&listed.stdout).into_owned())
    } else {
        Err(format!("xl vm-list: {}", listed.status))
    }
}

/// Lines of UUID, number and name, below a heading.
fn parse_vm_list(text: &str) -> impl Iterator<Item = (u32, &str)> {
    text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let uuid = words.next()?;
        Some((words.next()?.parse().ok()?, uuid))
    })
}

fn restore_caps(xl: &Xl, record: &journal::Record) -> Result<(), String> {
    let mut result = Ok(());
    for JournalCap { domid, uuid, cap } in &record.caps {
        let restored = match xl.state(*domid) {
            Ok(state) if state.uuid == *uuid => xl.set_cap(*domid, *cap),
            Ok(_) | Err(xl::Error::Gone(_)) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = restored {
            result = Err(format!("domain {domid}: {}", sentence(&error)));
        }
    }
    result
}

/// What members sent that run, goes on its way.
fn remove_holds(record: &journal::Record, outcome: Option<&Outcome>) -> Result<(), net::Error> {
    match outcome {
        None | Some(Outcome::End(RestoreStage::Releasing)) => {
            held::on_holds(record, HoldRecord::remove)
        }
        Some(_) => held::discard(record),
    }
}

fn end_processes(processes: &[JournalProcess], patience: Duration) -> Result<(), String> {
    let lives =
        |process: &&JournalProcess| journal::start_ticks(process.pid) == Some(process.start_ticks);
    let wait = |how_long: Duration| {
        let start = Instant::now();
        while processes.iter().any(|process| lives(&process)) && start.elapsed() < how_long {
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    wait(patience);
    for process in processes.iter().filter(lives) {
        let Some(pid) = i32::try_from(process.pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw)
        else {
            continue;
        };
        log::warn!("process {} doesn't end, killing it", process.pid);
        if let Err(error) = rustix::process::kill_process(pid, rustix::process::Signal::KILL) {
            log::warn!("process {}: {error}", process.pid);
        }
    }
    wait(KILLED_END_MAX);
    match processes.iter().find(lives) {
        None => Ok(()),
        Some(process) => Err(format!("process {} can't be killed", process.pid)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sidecar::workers::journal_process;

    #[test]
    fn domains_are_found_in_xls_list_with_or_without_a_name() {
        let text = "UUID                                  ID    name\n\
                    00000000-0000-0000-0000-000000000000  0    Domain-0                      \n\
                    9f0c0bd5-7c3b-4f8b-a5a5-3c1f0c6c1d11  7    ring0                         \n\
                    9f0c0bd5-7c3b-4f8b-a5a5-3c1f0c6c1d12  8    (null)                        \n";
        let found: Vec<_> = parse_vm_list(text).skip(1).collect();
        let expected = [
            (7, "9f0c0bd5-7c3b-4f8b-a5a5-3c1f0c6c1d11"),
            (8, "9f0c0bd5-7c3b-4f8b-a5a5-3c1f0c6c1d12"),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_process_that_does_not_end_is_killed_and_another_one_of_its_number_is_not(
    ) -> Result<(), Box<dyn std::error::Error>> {
        let mut child = std::process::Command::new("sleep").arg("60").spawn()?;
        let process = journal_process(&child);
        let another = JournalProcess {
            start_ticks: process.start_ticks + 1,
            ..process.clone()
        };
        end_processes(&[another], Duration::ZERO)?;
        assert_eq!(child.try_wait()?, None);
        let waiter = std::thread::spawn(move || child.wait());
        end_processes(&[process], Duration::from_millis(20))?;
        let status = waiter.join().map_err(|_| "wait panicked")??;
        assert!(!status.success());
        Ok(())
    }
}
