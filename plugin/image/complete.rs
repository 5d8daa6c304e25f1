//! Whether all of a snapshot is there, as far as can be seen without reading it.

use std::path::Path;

use super::error::Error;
use super::manifest::{FileFacts, Manifest, Member};
use super::pack::Pack;
use super::packs::Packs;
use super::store::{member_dir, CONFIG_NAME, FRAMES_NAME, INDEX_NAME, PAGES_NAME, RECORDS_NAME};
use super::Result;

/// Whether all files and packs that the manifest names are there, files at their
/// lengths.
pub(super) fn check_files(snapshot: &Path, manifest: &Manifest, packs: &Packs) -> Result<()> {
    for member in manifest.members_here() {
        check_member(snapshot, member, manifest.format, packs)?;
    }
    Ok(())
}

/// The same of one member.
pub(super) fn check_member(
    snapshot: &Path,
    member: &Member,
    format: u32,
    packs: &Packs,
) -> Result<()> {
    check_member_files(&member_dir(snapshot, &member.name), member, format)?;
    for id in &member.image.packs {
        Pack::glance(&packs.path(id))?;
    }
    Ok(())
}

fn check_member_files(dir: &Path, member: &Member, format: u32) -> Result<()> {
    let pages = (format == 1).then_some(PAGES_NAME);
    for name in [CONFIG_NAME, RECORDS_NAME, INDEX_NAME]
        .into_iter()
        .chain(pages)
    {
        let path = dir.join(name);
        let facts = member.image.files.iter().find(|file| file.name == name);
        let Some(facts) = facts else {
            return Err(Error::damaged(&path, "the manifest doesn't name it"));
        };
        check_length(&path, facts)?;
    }
    match &member.recorded {
        Some(recorded) if recorded.file.name != FRAMES_NAME => Err(Error::damaged(
            dir,
            "its recorded frames are in no known file",
        )),
        Some(recorded) => check_length(&dir.join(FRAMES_NAME), &recorded.file),
        None => Ok(()),
    }
}

fn check_length(path: &Path, facts: &FileFacts) -> Result<()> {
    let length = match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => found.len(),
        Ok(_) => return Err(Error::damaged(path, "it is no file")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::damaged(path, "it is missing"));
        }
        Err(error) => return Err(Error::io("look at", path)(error)),
    };
    if length != facts.length {
        let problem = format!("it has {length} bytes instead of {}", facts.length);
        return Err(Error::damaged(path, problem));
    }
    Ok(())
}
