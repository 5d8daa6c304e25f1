//! Whether what is installed tells where it was built. It would be of no use to
//! anybody, and make packages differ from one machine to the next.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, ensure, Context, Result};

use super::folder;
use crate::builder::cargo_home;
use crate::lab::{self, process};
use crate::suite::Suite;

/// What begins the names of folders that only last as long as a build.
const PASSING: &[&str] = &["/tmp/xl-ext."];

/// Looks through the files of a suite's packages.
pub fn check(suite: Suite, packages: &[PathBuf]) -> Result<()> {
    let telling = telling(suite)?;
    let unpacked = folder(suite).join("unpacked");
    for package in packages {
        if unpacked.exists() {
            fs::remove_dir_all(&unpacked).context("cannot clear an earlier look")?;
        }
        process::capture(
            Command::new("dpkg-deb")
                .arg("-x")
                .arg(package)
                .arg(&unpacked),
        )?;
        let found = files_with(&telling, &unpacked)?;
        ensure!(
            found.is_empty(),
            "{} names folders of the machine that built it ({}) in\n{found}",
            package.display(),
            telling.join(", ")
        );
    }
    fs::remove_dir_all(&unpacked).context("cannot remove unpacked packages")
}

/// The folders that were built in and from.
fn telling(suite: Suite) -> Result<Vec<String>> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut found = vec![
        text(&lab::workspace()),
        text(&folder(suite)),
        text(&cargo_home()?),
        text(&lab::xen_source(suite)?),
    ];
    found.extend(PASSING.iter().copied().map(str::to_owned));
    Ok(found)
}

/// The files in a folder that have one of some texts in them, one a line.
fn files_with(texts: &[String], folder: &Path) -> Result<String> {
    let mut command = Command::new("grep");
    command.args(["--recursive", "--files-with-matches", "--fixed-strings"]);
    for text in texts {
        command.args(["-e", text]);
    }
    let output = process::output(command.arg("--").arg(folder))?;
    match output.status.code() {
        Some(0 | 1) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        _ => bail!(
            "grep failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_found_in_the_midst_of_a_binary() -> Result<()> {
        let dir = std::env::temp_dir().join(format!("xl-vne-paths-test-{}", std::process::id()));
        fs::create_dir_all(dir.join("lib"))?;
        fs::write(
            dir.join("lib/clean.so"),
            b"\x7fELF\0\xff/rustc/abc/library\0",
        )?;
        let texts = ["/home/me/crates".to_owned(), "/home/me/here".to_owned()];
        assert_eq!(files_with(&texts, &dir)?, "");
        let bytes = b"\x7fELF\0\xffsrc/home/me/here/plugin/lib.rs\0";
        fs::write(dir.join("lib/told.so"), bytes)?;
        let found = files_with(&texts, &dir)?;
        assert_eq!(found.lines().count(), 1, "{found}");
        assert!(found.contains("told.so"), "{found}");
        fs::remove_dir_all(dir)?;
        Ok(())
    }
}
