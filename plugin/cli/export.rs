//! `xl vne-snapshot export`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{Failure, Host, SnapshotName, StoreArgument};
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
    #[command(flatten)]
    store: StoreArgument,
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let store = arguments
        .store
        .open(host, Some(&arguments.snapshot.vne))?;
    let snapshot = arguments.snapshot.open(&store)?;
    let reader = snapshot.member(&arguments.member)?;
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
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&aside)
        .map_err(|error| format!("{}: {error}", aside.display()))?;
    let written = write_whole(reader, file)
        .and_then(|()| Ok(std::fs::rename(&aside, path).map_err(in_path)?));
    if written.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(&aside);
    }
    written
}

fn write_whole(reader: &MemberReader, file: File) -> Result<(), Failure> {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    reader.write_save_file(&mut out, None)?;
    out.flush()?;
    out.get_ref().sync_all()?;
    Ok(())
}
