//! The way into a host: OpenSSH over a local port, sharing one connection.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};

use super::{process, qemu};

/// As long as a host takes to boot.
const ANSWER_LIMIT: Duration = Duration::from_secs(300);

/// How to reach one host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ssh {
    /// The host's number, for messages.
    pub host: usize,
    /// The local port.
    pub port: u16,
    /// The private key.
    pub key: PathBuf,
    /// The socket of the shared connection; without it each call connects.
    pub socket: PathBuf,
}

impl Ssh {
    /// A call of `program` (ssh or scp) up to where its own arguments start.
    fn base(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(["-F", "none", "-i"]).arg(&self.key);
        let port = if program == "scp" { "-P" } else { "-p" };
        command.arg(port).arg(self.port.to_string());
        for option in [
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "BatchMode=yes",
            "ConnectTimeout=30",
            "ServerAliveInterval=30",
            "ServerAliveCountMax=10",
            "ControlPersist=no",
        ] {
            command.args(["-o", option]);
        }
        let mut path = std::ffi::OsString::from("ControlPath=");
        path.push(&self.socket);
        command.arg("-o").arg(path);
        command
    }

    /// An ssh call that runs one shell line in the host.
    pub fn command(&self, line: &str) -> Command {
        let mut command = self.base("ssh");
        command
            .args(["-o", "ControlMaster=no", "root@127.0.0.1", "--"])
            .arg(line);
        command
    }

    /// Copies files or folders; exactly one of the two sides is in the host.
    pub fn copy(&self, from: Side<'_>, to: Side<'_>) -> Result<()> {
        let word = |side: &Side<'_>| match side {
            Side::Here(path) if path.as_os_str().to_string_lossy().contains(':') => {
                Path::new(".").join(path).display().to_string()
            }
            Side::Here(path) => path.display().to_string(),
            Side::Host(path) => format!("root@127.0.0.1:{path}"),
        };
        let mut command = self.base("scp");
        command
            .args(["-o", "ControlMaster=no", "-r", "-p", "-q", "--"])
            .arg(word(&from))
            .arg(word(&to));
        let output = process::output(&mut command)?;
        if !output.status.success() {
            bail!(
                "cannot copy {} to {} of host {}: {}",
                word(&from),
                word(&to),
                self.host,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }

    /// Starts the shared connection, once the host answers; it lasts as long as
    /// the child does.
    pub fn start_master(&self) -> Result<Child> {
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            match self.connect(deadline) {
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(500));
                }
                connected => return connected,
            }
        }
    }

    fn connect(&self, deadline: Instant) -> Result<Child> {
        qemu::check_socket_path(&self.socket)?;
        // It's fine when there was none.
        let _ = std::fs::remove_file(&self.socket);
        let mut command = self.base("ssh");
        command
            .args(["-M", "-N", "root@127.0.0.1"])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        qemu::die_with_parent(&mut command);
        let mut child = command.spawn().context("cannot run ssh")?;
        while !self.socket.exists() {
            let ended = child.try_wait().context("cannot look after ssh")?;
            if ended.is_some() || Instant::now() > deadline {
                // Either fails only when it has ended already.
                let _ = child.kill();
                let _ = child.wait();
                bail!("ssh cannot connect to host {}", self.host);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(child)
    }
}

/// One side of a copy.
pub enum Side<'a> {
    /// A path on this machine.
    Here(&'a Path),
    /// A path in the host.
    Host(&'a str),
}
