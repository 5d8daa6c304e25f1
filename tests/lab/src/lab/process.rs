//! The one place that runs other programs to their end.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

/// How long a program may take when nothing else is said.
pub const LIMIT: Duration = Duration::from_secs(900);

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
    output_within(command, &[], LIMIT)
}

/// Runs a program on an input; it's ended when it takes too long.
pub fn output_within(command: &mut Command, input: &[u8], limit: Duration) -> Result<Output> {
    let mut child = command
        .stdin(if input.is_empty() {
            Stdio::null()
        } else {
            Stdio::piped()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", name(command)))?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    // All three at once, since a pipe that's full stops the program.
    let (status, stdout, stderr) = std::thread::scope(|scope| {
        scope.spawn(move || {
            if let Some(mut stdin) = stdin {
                // A program that ends early doesn't read it all; its status tells.
                let _ = stdin.write_all(input);
            }
        });
        let stdout = scope.spawn(move || drain(stdout));
        let stderr = scope.spawn(move || drain(stderr));
        let status = wait(&mut child, limit);
        (
            status,
            stdout.join().unwrap_or_default(),
            stderr.join().unwrap_or_default(),
        )
    });
    match status? {
        Some(status) => Ok(Output {
            status,
            stdout,
            stderr,
        }),
        None => bail!(
            "{} was ended after {} s; it had said: {}{}",
            name(command),
            limit.as_secs(),
            last_lines(&String::from_utf8_lossy(&stdout), 20),
            last_lines(&String::from_utf8_lossy(&stderr), 20)
        ),
    }
}

/// Reads to the end, or as far as it goes.
fn drain(pipe: Option<impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        let _ = pipe.read_to_end(&mut bytes);
    }
    bytes
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
        pause = (pause * 2).min(Duration::from_millis(20));
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
    fn much_input_and_output_at_once_do_not_stop_each_other() -> Result<()> {
        let input = vec![7u8; 1 << 20];
        let output = output_within(&mut Command::new("cat"), &input, LIMIT)?;
        assert!(output.status.success() && output.stdout == input);
        Ok(())
    }

    #[test]
    fn a_program_that_takes_too_long_is_ended_and_quoted() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo so far; exec sleep 60"]);
        let error = output_within(&mut command, &[], Duration::from_millis(300))
            .map_or_else(|e| format!("{e:#}"), |_| String::new());
        assert!(error.contains("so far"), "{error}");
    }

    #[test]
    fn a_child_that_hangs_is_ended() -> Result<()> {
        let mut child = Command::new("sleep").arg("60").spawn()?;
        assert!(wait(&mut child, Duration::from_millis(50))?.is_none());
        Ok(())
    }
}
