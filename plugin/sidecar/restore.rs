//! Brings a snapshot back on this host: all members are built paused, then
//! all are released together.
//!
//! Each member is built by stock `xl restore -p`, which reads a save file that
//! is generated from the image as it goes, and leaves behind the monitor that
//! an admin expects (`on_reboot` and the like work as ever).

use std::io::{self, BufWriter};
use std::path::PathBuf;
use std::process::{Child, Stdio};

use super::engine::{start_guard, sweep, Error};
use super::journal::{JournalDomain, Record, Register, RestoreStage};
use super::workers::Program;
use crate::image::{self, MemberReader, Name, Snapshot};
use crate::sentence::sentence;
use crate::stream;

/// What to restore and how.
#[derive(Debug)]
pub struct RestoreRequest {
    /// The root of the image store, for the journal.
    pub store: PathBuf,
    /// Xen's folder for what is gone after a reboot.
    pub run_dir: PathBuf,
    /// How xl is started.
    pub program: Program,
    /// Leave the members paused when all are built.
    pub paused: bool,
}

/// What there is to see of a restore while it works.
pub trait Progress {
    /// All is checked; the members are being built.
    fn building(&mut self, members: &[&str]);
    /// One is built, paused.
    fn built(&mut self, member: &str);
    /// All run.
    fn released(&mut self);
}

/// Restores all members of `snapshot`, or none.
pub fn restore(
    request: &RestoreRequest,
    snapshot: &Snapshot,
    progress: &mut dyn Progress,
) -> Result<(), Error> {
    let register = Register::open(&request.run_dir)?;
    sweep(&request.program, &register)?;
    let manifest = snapshot.manifest();
    let names: Vec<&str> = manifest.members.iter().map(|m| m.name.as_str()).collect();
    refuse_existing(&request.program, &names)?;
    // Every header and index is read and checked before the first domain is
    // built; each page is checked as it's read.
    let readers = names
        .iter()
        .map(|name| Ok((*name, snapshot.member(&Name::new(name)?)?)))
        .collect::<Result<Vec<_>, Error>>()?;

    let domain = |member: &crate::image::Member| JournalDomain {
        name: member.name.to_string(),
        domid: 0,
        uuid: member.uuid.clone(),
    };
    let record = Record {
        vne: manifest.vne.to_string(),
        pid: std::process::id(),
        store: request.store.clone(),
        domains: manifest.members.iter().map(domain).collect(),
        workers: Vec::new(),
        holds: Vec::new(),
        restore: Some(RestoreStage::Building),
    };
    let mut journal = register.enter(record)?;
    start_guard(&request.program, &journal)?;

    progress.building(&names);
    let (built, failure) = build_all(&request.program, readers, progress);
    if let Some(why) = failure {
        if destroy_all(&request.program, &built) {
            journal.close()?;
        }
        // Otherwise the journal stays, and the guard tries as this ends.
        return Err(Error::Failed(why));
    }
    if !request.paused {
        journal.update(|record| record.restore = Some(RestoreStage::Releasing))?;
        let mut release = request.program.command(&["release", "--"]);
        release.args(&names).stderr(Stdio::inherit());
        let status = release.status();
        let status = status.map_err(|source| Error::Start {
            what: "release the members",
            source,
        })?;
        if !status.success() {
            return Err(Error::Failed(String::from(
                "not all members could be set running",
            )));
        }
        progress.released();
    }
    journal.close()?;
    Ok(())
}

fn refuse_existing(program: &Program, names: &[&str]) -> Result<(), Error> {
    for name in names {
        let found = program
            .xl_command("domid")
            .arg(name)
            .stderr(Stdio::null())
            .status()
            .map_err(|source| Error::Start {
                what: "look for domains",
                source,
            })?;
        if found.success() {
            return Err(Error::Failed(format!(
                "a domain called '{name}' exists (destroy or rename it first: \
                 'xl destroy {name}'); nothing was touched"
            )));
        }
    }
    Ok(())
}

/// Builds all members side by side. Returns those that were built, and what
/// went wrong with the first that was not.
fn build_all(
    program: &Program,
    readers: Vec<(&str, MemberReader)>,
    progress: &mut dyn Progress,
) -> (Vec<String>, Option<String>) {
    let (done, finished) = std::sync::mpsc::channel();
    let count = readers.len();
    std::thread::scope(|scope| {
        for (name, reader) in readers {
            let done = done.clone();
            scope.spawn(move || {
                let result = build(program, name, &reader);
                // The receiver outlives the scope.
                let _ = done.send((name.to_owned(), result));
            });
        }
        let mut built = Vec::new();
        let mut failure = None;
        for (name, result) in finished.iter().take(count) {
            match result {
                Ok(()) => {
                    progress.built(&name);
                    built.push(name);
                }
                Err(why) => {
                    failure.get_or_insert(why);
                }
            }
        }
        (built, failure)
    })
}

fn build(program: &Program, name: &str, reader: &MemberReader) -> Result<(), String> {
    let mut command = program.xl_command("restore");
    command
        .args(["-p", "/dev/stdin"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .map_err(|error| format!("cannot start xl: {error}"))?;
    let fed = feed(&mut child, reader);
    let output = child
        .wait_with_output()
        .map_err(|error| format!("{name}: {error}"))?;
    if output.status.success() && fed.is_ok() {
        return Ok(());
    }
    if let Err(why) = fed {
        // An image that can't be read; a pipe that xl closed is xl's story.
        return Err(format!("{name}: {why}"));
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = words.lines().collect();
    let last = &lines[lines.len().saturating_sub(12)..];
    Err(format!(
        "xl restore of '{name}': {}\n  {}",
        output.status,
        last.join("\n  ")
    ))
}

fn feed(child: &mut Child, reader: &MemberReader) -> Result<(), String> {
    let Some(pipe) = child.stdin.take() else {
        return Err(String::from("xl has no stdin"));
    };
    match reader.write_save_file(BufWriter::with_capacity(1 << 20, pipe), None) {
        Err(image::Error::Stream {
            source: stream::Error::Write { source },
            ..
        }) if source.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|error| sentence(&error)),
    }
}

fn destroy_all(program: &Program, names: &[String]) -> bool {
    let mut gone = true;
    for name in names {
        let status = program.xl_command("destroy").arg(name).status();
        if !status.is_ok_and(|status| status.success()) {
            log::error!("cannot destroy '{name}'");
            gone = false;
        }
    }
    gone
}
