//! `xl vne-snapshot export`.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::{print, Failure, Host, SnapshotName, StoreArgument};
use crate::image::{MemberReader, Name};

/// Write a member as a file for stock 'xl restore'.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// VNE, for the newest one, or VNE@ID
    snapshot: SnapshotName,
    /// The member
    member: Name,
    /// The file to write, or - for stdout
    file: PathBuf,
    /// Say what would be written, and write nothing (as 'xl -N')
    #[arg(short = 'N', long)]
    dry_run: bool,
    #[command(flatten)]
    store: StoreArgument,
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let store = arguments.store.open(host, Some(&arguments.snapshot.vne))?;
    let snapshot = arguments.snapshot.open(&store)?;
    let reader = snapshot.member(&arguments.member)?;
    if arguments.dry_run || host.dry_run {
        let manifest = snapshot.manifest();
        return print(&format!(
            "Would write member {} of {}@{} to {}.\n",
            arguments.member,
            manifest.vne,
            manifest.id,
            arguments.file.display()
        ));
    }
    if arguments.file.as_os_str() == "-" {
        reader.write_save_file(BufWriter::new(std::io::stdout().lock()), None)?;
        return Ok(());
    }
    write_aside(&reader, &arguments.file)
}

/// The file appears whole or not at all, and only root can read it: it holds
/// a guest's memory.
fn write_aside(reader: &MemberReader, path: &Path) -> Result<(), Failure> {
    let in_path = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut aside = path.as_os_str().to_owned();
    aside.push(".part");
    let aside = PathBuf::from(aside);
    let file = make_aside(&aside).map_err(|error| match error.kind() {
        ErrorKind::WouldBlock => format!("{}: another export is writing it", aside.display()),
        _ => format!("{}: {error}", aside.display()),
    })?;
    let written = write_whole(reader, file)
        .and_then(|()| Ok(std::fs::rename(&aside, path).map_err(in_path)?));
    if written.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(&aside);
    }
    written
}

/// Makes the file anew, also if an export that was killed has left one. It's
/// locked while somebody writes it, so that no half of it gets the good name.
fn make_aside(path: &Path) -> std::io::Result<File> {
    let lock = |file: &File| rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive);
    match File::open(path) {
        Ok(left) => {
            lock(&left)?;
            std::fs::remove_file(path)?;
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    lock(&file)?;
    Ok(file)
}

fn write_whole(reader: &MemberReader, file: File) -> Result<(), Failure> {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    reader.write_save_file(&mut out, None)?;
    out.flush()?;
    out.get_ref().sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_export_left_is_replaced_and_a_live_one_is_not() -> std::io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("db.save.part");
        std::fs::write(&path, "half")?;
        let live = make_aside(&path)?;
        assert_eq!(live.metadata()?.len(), 0);
        let second = make_aside(&path).map_err(|error| error.kind());
        assert_eq!(second.err(), Some(ErrorKind::WouldBlock));
        Ok(())
    }
}
