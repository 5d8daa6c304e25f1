//! What is done to VNEs when their host is shut down and booted, for
//! `xen-vne-domains.service`: like xendomains, but for members together.
//!
//! At shutdown a snapshot is taken of each VNE that `vne.conf` names, a note is
//! made of it, and its members are destroyed; at boot the notes say what to
//! restore. Whatever can't be done is left to the host's usual way.

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::config::VneConfig;
use super::{hostconf, take, Failure, Host, SnapshotName};
use crate::image::{Manifest, Name, MANIFEST_BYTES_MAX};
use crate::sentence::sentence;
use crate::sidecar::files;

/// Where notes are, below the usual store: it's kept over a boot.
const NOTES: &str = "at-boot";
/// Longer than any snapshot's name.
const NOTE_BYTES_MAX: u64 = 256;
/// How such snapshots are told from others.
const LABEL: &str = "host-shutdown";

/// Takes snapshots of the VNEs, and destroys their members.
pub fn shutdown(host: &Host) -> Result<(), Failure> {
    let vnes = hostconf::at_shutdown(&host.config_dir)?;
    each(vnes, |vne| save(host, vne))
}

/// Restores what was noted.
pub fn boot(host: &Host) -> Result<(), Failure> {
    let notes = Notes::usual();
    each(notes.all()?, |vne| bring_back(host, &notes, vne))
}

/// One that fails mustn't keep the others from being saved.
fn each(vnes: Vec<Name>, does: impl Fn(&Name) -> Result<(), Failure>) -> Result<(), Failure> {
    let mut failed = Vec::new();
    for vne in vnes {
        if let Err(error) = does(&vne) {
            log::error!("VNE '{vne}': {}", sentence(error.as_ref()));
            failed.push(vne.to_string());
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => Err(format!("failed for {}", failed.join(", ")).into()),
    }
}

fn save(host: &Host, vne: &Name) -> Result<(), Failure> {
    let config = VneConfig::find(host, vne)?.ok_or("it isn't described")?;
    let here = host.name()?;
    let members = take::placed(&config.members, &here)?;
    if let Some(member) = members.iter().find(|member| member.host != here) {
        return Err(format!(
            "'{}' is on host '{}': only VNEs that are all on this host are saved at its shutdown",
            member.name, member.host
        )
        .into());
    }
    if members
        .iter()
        .all(|member| host.xl.find(member.name.as_str()).is_err())
    {
        log::info!("VNE '{vne}' isn't running");
        return Ok(());
    }
    let manifest = taken(host, vne)?;
    let snapshot = format!("{}@{}", manifest.vne, manifest.id);
    if let Some(member) = manifest
        .members
        .iter()
        .find(|m| !m.uncaptured_disks.is_empty())
    {
        return Err(format!(
            "'{}' can write to {}, which may change until it's shut down: {snapshot} won't be \
             restored at boot",
            member.name,
            member.uncaptured_disks.join(", ")
        )
        .into());
    }
    // First, so that there is no moment at which they are gone for good.
    Notes::usual().make(vne, &snapshot)?;
    for member in &manifest.members {
        // It may have ended by itself, and its number be somebody else's.
        let same = host
            .xl
            .state(member.domid)
            .is_ok_and(|state| state.uuid == member.uuid);
        if same {
            host.xl.destroy(member.domid)?;
        }
    }
    log::info!("{snapshot} will be restored at boot");
    Ok(())
}

/// Has `take` do it, with its hooks and all.
fn taken(host: &Host, vne: &Name) -> Result<Manifest, Failure> {
    let mut child = host
        .program()
        .xl_command(crate::COMMAND)
        .args(["take", "--json", "--label", LABEL, "--", vne.as_str()])
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|error| format!("cannot start xl: {error}"))?;
    let mut text = Vec::new();
    if let Some(out) = child.stdout.take() {
        out.take(MANIFEST_BYTES_MAX).read_to_end(&mut text)?;
    }
    let status = child.wait()?;
    if !status.success() {
        return Err(format!("no snapshot could be taken ({status})").into());
    }
    Ok(serde_json::from_slice(&text)?)
}

fn bring_back(host: &Host, notes: &Notes, vne: &Name) -> Result<(), Failure> {
    // Taken away first: tried once only, as members that have run since have
    // to be left alone.
    let snapshot = notes.take(vne)?;
    let run = |arguments: &[&str]| -> Result<(), Failure> {
        let mut command = host.program().xl_command(crate::COMMAND);
        command.args(arguments).arg("--").arg(&snapshot);
        let status = command.stderr(Stdio::inherit()).status()?;
        match status.success() {
            true => Ok(()),
            false => Err(format!("{status}").into()),
        }
    };
    run(&["restore", "--quiet"])
        .map_err(|error| format!("{error}; to try again: xl vne-snapshot restore {snapshot}"))?;
    // As xendomains does with its files.
    run(&["remove"])
}

/// Which snapshot of a VNE is to be restored.
struct Notes(PathBuf);

impl Notes {
    fn usual() -> Self {
        Self(super::default_root().join(NOTES))
    }

    fn path(&self, vne: &Name) -> PathBuf {
        self.0.join(vne.as_str())
    }

    /// Whose snapshots are to be restored.
    fn all(&self) -> Result<Vec<Name>, Failure> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| self.failed(&self.0, error))?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut vnes: Vec<Name> = names.filter_map(|name| Name::new(&name).ok()).collect();
        vnes.sort();
        Ok(vnes)
    }

    fn make(&self, vne: &Name, snapshot: &str) -> Result<(), Failure> {
        let made = fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(&self.0);
        made.map_err(|error| self.failed(&self.0, error))?;
        let path = self.path(vne);
        files::replace(&path, format!("{snapshot}\n").as_bytes())
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o600)))
            .map_err(|error| self.failed(&path, error))
    }

    /// Reads a note and removes it.
    fn take(&self, vne: &Name) -> Result<String, Failure> {
        let path = self.path(vne);
        let mut text = String::new();
        let read = fs::File::open(&path)
            .and_then(|file| file.take(NOTE_BYTES_MAX).read_to_string(&mut text));
        read.map_err(|error| self.failed(&path, error))?;
        fs::remove_file(&path).map_err(|error| self.failed(&path, error))?;
        let snapshot = text.trim_end().to_owned();
        match snapshot.parse::<SnapshotName>() {
            Ok(name) if name.vne == *vne && name.id.is_some() => Ok(snapshot),
            _ => Err(format!("{} names no snapshot of it", path.display()).into()),
        }
    }

    fn failed(&self, path: &Path, error: std::io::Error) -> Failure {
        format!("{}: {error}", path.display()).into()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_for_one_boot() {
        let dir = tempfile::tempdir().unwrap();
        let notes = Notes(dir.path().join(NOTES));
        assert!(notes.all().unwrap().is_empty());
        let (lab, web) = (Name::new("lab").unwrap(), Name::new("web").unwrap());
        notes.make(&web, "web@20261121T023652Z").unwrap();
        notes.make(&lab, "lab@20261121T023652Z").unwrap();
        notes.make(&lab, "lab@20261122T101500Z").unwrap();
        assert_eq!(notes.all().unwrap(), [lab.clone(), web]);
        let mode = fs::metadata(notes.path(&lab)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(notes.take(&lab).unwrap(), "lab@20261122T101500Z");
        assert!(notes.take(&lab).is_err());
        assert_eq!(notes.all().unwrap().len(), 1);
    }

    #[test]
    fn a_note_that_names_anything_else_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let notes = Notes(dir.path().join(NOTES));
        let lab = Name::new("lab").unwrap();
        for text in ["", "lab", "web@20261121T023652Z", "lab@latest", "--paused"] {
            notes.make(&lab, text).unwrap();
            assert!(notes.take(&lab).is_err(), "{text}");
            // Nor again at the next boot.
            assert!(notes.all().unwrap().is_empty(), "{text}");
        }
    }

    #[test]
    fn one_vne_that_fails_does_not_keep_the_others() {
        let names = ["a", "b", "c"]
            .map(|name| Name::new(name).unwrap())
            .to_vec();
        let seen = std::cell::RefCell::new(Vec::new());
        let result = each(names, |vne| {
            seen.borrow_mut().push(vne.to_string());
            match vne.as_str() {
                "b" => Err("no".into()),
                _ => Ok(()),
            }
        });
        assert_eq!(*seen.borrow(), ["a", "b", "c"]);
        assert!(result.unwrap_err().to_string().ends_with("for b"));
    }
}
