//! The one place that runs other programs to their end.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

/// Runs a program and returns what it printed; fails when it fails.
pub fn capture(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    if !output.status.success() {
        bail!(
            "{} failed ({}): {}",
            name(command),
            output.status,
            last_lines(&String::from_utf8_lossy(&output.stderr), 20)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program and returns output and status, whatever the status is.
pub fn output(command: &mut Command) -> Result<Output> {
    command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", name(command)))
}

/// Runs a program with its output in a log file; when it fails or takes too
/// long the error carries the log's last lines.
pub fn logged(command: &mut Command, log: &Path, limit: Duration) -> Result<()> {
    let file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot open the log {}", log.display()))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file.try_clone().context("cannot share a log file")?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("cannot run {}", name(command)))?;
    let status = wait(&mut child, limit)?;
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => bail!(
            "{} failed ({status}); the last lines of {}:\n{}",
            name(command),
            log.display(),
            tail(log, 25)
        ),
        None => bail!(
            "{} was ended after {} s; the last lines of {}:\n{}",
            name(command),
            limit.as_secs(),
            log.display(),
            tail(log, 25)
        ),
    }
}

/// Waits for a child; kills it after `limit` and returns `None`.
pub fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(5);
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a child")? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            // It may have ended just now; there's nothing to do about either.
            let _ = child.kill();
            let _ = child.wait();
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// The last lines of a file, or a remark that it can't be read.
pub fn tail(path: &Path, lines: usize) -> String {
    match std::fs::read(path) {
        Ok(bytes) => last_lines(&String::from_utf8_lossy(&bytes), lines),
        Err(error) => format!("(cannot read {}: {error})", path.display()),
    }
}

/// The last lines of a text.
pub fn last_lines(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    all.get(from..).unwrap_or_default().join("\n")
}

/// Whether a program is in PATH or where administrators' programs are.
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(program).is_file())
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capture_reports_the_program_and_its_complaint() {
        let error = capture(Command::new("sh").args(["-c", "echo why >&2; exit 3"]))
            .map_or_else(|e| format!("{e:#}"), |_| String::new());
        assert!(
            error.contains("sh failed") && error.contains("why"),
            "{error}"
        );
    }

    #[test]
    fn a_child_that_hangs_is_ended() -> Result<()> {
        let mut child = Command::new("sleep").arg("60").spawn()?;
        assert!(wait(&mut child, Duration::from_millis(50))?.is_none());
        Ok(())
    }
}
