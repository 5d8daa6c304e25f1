//! The disks of a take's members on this host: who captures them, and the capture
//! itself while each member stands still.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::error::Error;
use crate::disk::{self, Driver, Moment, Piece, Source};
use crate::domain::facts::Disk;
use crate::domain::messages::{self, Command};
use crate::domain::{DomainFacts, DomainKind};
use crate::sentence::sentence;

/// How long all disks of a member may take: less than its worker waits.
const CAPTURE_MAX: Duration = Duration::from_secs(7);
/// How long a capture may still go on after that: tools are asked to end.
const CAPTURE_END_MAX: Duration = Duration::from_secs(5);

/// What is going to be made of each member's disks, in the order of the members;
/// `take` is the take's number.
pub(super) fn plan(members: &[DomainFacts], take: u64) -> Result<Vec<Vec<Piece>>, Error> {
    let mut planned = Vec::new();
    let mut owners: BTreeMap<PathBuf, String> = BTreeMap::new();
    let mut nth = 0;
    for member in members {
        let mut pieces = Vec::new();
        for disk in member.disks.iter().filter(|disk| disk.readwrite) {
            let source = source(member, disk);
            let refused = |why: String| {
                Error::Failed(format!(
                    "member '{}' can write to {} ({}), which can't be captured: {why}; or take its \
                     memory alone with --memory-only, if you put the disk back yourself as it was",
                    member.name, disk.vdev, disk.target
                ))
            };
            let found = disk::look(&source).map_err(|error| refused(sentence(&error)))?;
            let piece = Piece::planned(&source, found, take, nth);
            nth += 1;
            if let Some(other) = owners.insert(piece.origin.clone(), member.name.clone()) {
                return Err(refused(format!(
                    "'{other}' has the same disk, and each would need it as it is at its own cut"
                )));
            }
            pieces.push(piece);
        }
        planned.push(pieces);
    }
    Ok(planned)
}

fn source<'a>(member: &DomainFacts, disk: &'a Disk) -> Source<'a> {
    Source {
        vdev: &disk.vdev,
        target: &disk.target,
        format: &disk.format,
        script: disk.script.as_deref(),
        elsewhere: disk.elsewhere,
        domid: member.domid,
        emulated: member.kind == DomainKind::Hvm,
    }
}

/// Does beforehand what can be done beforehand. The list of `pieces` is durable.
pub(super) fn prepare(pieces: &[Piece]) -> Result<(), Error> {
    each(pieces, |driver, piece| driver.prepare(piece)).map_err(Error::Failed)
}

/// The capture of a member's disks, in a thread of its own: the others' news can't
/// wait for it.
#[derive(Debug)]
pub(super) struct Capture {
    thread: JoinHandle<()>,
    /// Has it go on when the guest runs; dropped, it ends there.
    settle: Option<Sender<()>>,
}

impl Capture {
    /// Captures `pieces` now, and tells the worker, which then sets the guest running.
    /// Tools that may outlive this process have `lock` open.
    pub fn start(
        domid: u32,
        pieces: Vec<Piece>,
        lock: File,
        worker: UnixStream,
    ) -> std::io::Result<Self> {
        let (settle, go_on) = mpsc::channel();
        let thread = std::thread::Builder::new().name(String::from("disks"));
        let thread = thread.spawn(move || {
            let started = Instant::now();
            let now = Moment {
                domid,
                lock: &lock,
                deadline: started + CAPTURE_MAX,
            };
            let captured = each(&pieces, |driver, piece| driver.capture(piece, &now));
            let failed = captured.is_err();
            // First of all: the guest waits.
            let why = captured.err();
            tell(&worker, &Command::Disks { why });
            log::info!("{} disks in {:?}", pieces.len(), started.elapsed());
            if failed || go_on.recv().is_err() {
                return;
            }
            crate::priority::background();
            let why = each(&pieces, |driver, piece| driver.settle(piece)).err();
            tell(&worker, &Command::Settled { why });
        })?;
        Ok(Self {
            thread,
            settle: Some(settle),
        })
    }

    /// Has what was captured made last, and the worker told of that. It isn't waited
    /// for.
    pub fn settle(&mut self) {
        if let Some(settle) = self.settle.take() {
            // One that has failed has told so.
            let _ = settle.send(());
        }
    }

    /// Waits until nothing is made any more. `false` if a tool still works.
    pub fn end(mut self) -> bool {
        self.settle = None;
        let deadline = Instant::now() + CAPTURE_MAX + CAPTURE_END_MAX;
        while !self.thread.is_finished() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // How it ended, its worker knows.
        self.thread.join().is_ok()
    }
}

fn tell(worker: &UnixStream, what: &Command) {
    if let Err(error) = messages::send(worker, what) {
        log::debug!("a worker isn't told of its disks: {error}");
    }
}

/// Does something with each of a member's disks; what went wrong, as a sentence.
fn each(
    pieces: &[Piece],
    what: impl Fn(&dyn Driver, &Piece) -> Result<(), disk::Error>,
) -> Result<(), String> {
    for piece in pieces {
        let done = piece.driver().and_then(|driver| what(driver, piece));
        done.map_err(|error| format!("{}: {}", piece.target.display(), sentence(&error)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, disks: &str) -> Result<DomainFacts, String> {
        let json = format!(r#"{{"c_info":{{"type":"pv","name":"{name}"}},"disks":[{disks}]}}"#);
        DomainFacts::from_config(1, 1, json)
    }

    #[test]
    fn a_disk_that_nobody_can_capture_is_refused_with_the_reason_and_the_way_out(
    ) -> Result<(), String> {
        let disk = r#"{"pdev_path":"/web.vhd","vdev":"xvda","format":"vhd","readwrite":1}"#;
        let told = plan(&[member("web", disk)?], 1).map_err(|error| error.to_string());
        let told = told.err().unwrap_or_default();
        for part in [
            "'web'",
            "xvda",
            "/web.vhd",
            "format is vhd",
            "qemu-img",
            "--memory-only",
        ] {
            assert!(told.contains(part), "{part} isn't in: {told}");
        }
        Ok(())
    }

    #[test]
    fn disks_that_are_only_read_need_no_driver() -> Result<(), String> {
        let disk = r#"{"pdev_path":"/cd.iso","vdev":"xvdd","format":"raw"}"#;
        let planned = plan(&[member("web", disk)?, member("db", "")?], 1);
        let planned = planned.map_err(|error| error.to_string())?;
        assert_eq!(planned, [Vec::new(), Vec::new()]);
        Ok(())
    }
}
