//! One emulated Xen host: QEMU's command line, and its control socket.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use super::process;
use super::shape::Flavour;

/// Memory of a host.
const MEMORY_MIB: u32 = 3072;
/// dom0's share of it.
const DOM0_MIB: u32 = 1024;

/// All that decides how a host starts, apart from its own files.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Platform {
    /// The emulator.
    pub emulator: PathBuf,
    /// The hypervisor, an ELF file.
    pub xen: PathBuf,
    /// dom0's kernel.
    pub kernel: PathBuf,
    /// dom0's initial RAM disk.
    pub initrd: PathBuf,
    /// Which traps to steer around.
    pub flavour: Flavour,
    /// Processors.
    pub cpus: usize,
}

impl Platform {
    /// The processor model, without what QEMU 7.2 emulates in a way that kills:
    ///
    /// - `monitor`: Xen faults in its idle loop at boot;
    /// - `smap`, `smep`: an `iret` to user mode is done with kernel rights, and
    ///   dom0 dies at its first one;
    /// - `rdtscp`: exits as RDTSC, and Xen kills the PVH guest.
    fn cpu(&self) -> &'static str {
        match self.flavour {
            Flavour::Pv => "EPYC,-monitor,-smap,-smep,-rdtscp",
            Flavour::Pvh => "EPYC,+svm,+npt,-monitor,-smap,-smep,-rdtscp",
        }
    }

    /// Xen's command line. `eager-fpu` because the emulator's XSAVE doesn't
    /// trap while CR0.TS is set, so that with lazy switching registers leak
    /// between domains and healthy programs crash at random. `cpuidle=0` goes
    /// with `-monitor`.
    fn xen_options(&self) -> String {
        format!(
            "console=com1 com1=115200,8n1 dom0_mem={DOM0_MIB}M,max:{DOM0_MIB}M \
             dom0_max_vcpus={} noreboot ucode=no cpuidle=0 spec-ctrl=eager-fpu \
             loglvl=all guest_loglvl=all",
            self.cpus
        )
    }

    /// What the state of a booted host depends on, in words.
    pub fn describe(&self) -> String {
        format!(
            "{} {} {} {MEMORY_MIB} {} net.ifnames=0",
            self.cpu(),
            self.cpus,
            self.xen_options(),
            self.flavour.name()
        )
    }
}

/// Where one host's files are.
#[derive(Clone, Debug)]
pub struct Files {
    dir: PathBuf,
    host: usize,
}

impl Files {
    /// The files of host number `host` in `dir`.
    pub fn new(dir: &Path, host: usize) -> Self {
        Files {
            dir: dir.to_owned(),
            host,
        }
    }

    fn path(&self, what: &str) -> PathBuf {
        self.dir.join(format!("host{}.{what}", self.host))
    }

    /// The disk: an overlay over a base that's never written to.
    pub fn disk(&self) -> PathBuf {
        self.path("qcow2")
    }

    /// All that Xen and dom0 ever printed.
    pub fn console(&self) -> PathBuf {
        self.path("console.log")
    }

    /// What the emulator itself printed.
    pub fn log(&self) -> PathBuf {
        self.path("qemu.log")
    }

    /// The control socket.
    pub fn qmp(&self) -> PathBuf {
        self.path("qmp")
    }

    /// The socket to type at the console.
    pub fn console_socket(&self) -> PathBuf {
        self.path("con")
    }

    /// The host's end of the network.
    pub fn nic(&self) -> PathBuf {
        self.path("nic")
    }

    /// The hub's end of the network.
    pub fn port(&self) -> PathBuf {
        self.path("port")
    }

    /// The socket of the shared ssh connection.
    pub fn ssh(&self) -> PathBuf {
        self.path("ssh")
    }
}

/// Makes an overlay over a disk.
pub fn overlay(base: &Path, format: &str, disk: &Path) -> Result<()> {
    process::capture(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", format, "-b"])
            .arg(base)
            .arg(disk),
    )
    .map(drop)
    .with_context(|| format!("cannot make the disk {}", disk.display()))
}

/// A running emulator; ends when dropped, and with the thread that started it.
pub struct Machine {
    child: Child,
    files: Files,
    /// The local port that leads to dom0's ssh.
    pub ssh_port: u16,
}

impl Machine {
    /// Starts an emulator; with `state` it doesn't boot but carries on from
    /// that file. Without `ssh_port` it's any free one.
    pub fn start(
        platform: &Platform,
        files: &Files,
        state: Option<&Path>,
        ssh_port: Option<u16>,
    ) -> Result<Self> {
        for path in [&platform.kernel, &platform.initrd] {
            // QEMU splits its list of boot modules there, and knows no quotes.
            if path.to_string_lossy().contains([',', ' ']) {
                bail!(
                    "{} has a comma or a space in it: set XL_VNE_CACHE to a folder without",
                    path.display()
                );
            }
        }
        let ssh_port = ssh_port.map_or_else(free_port, Ok)?;
        for socket in [files.qmp(), files.console_socket(), files.nic()] {
            check_socket_path(&socket)?;
            // It's fine when there was none.
            let _ = std::fs::remove_file(socket);
        }
        let log = File::create(files.log())
            .with_context(|| format!("cannot create {}", files.log().display()))?;
        let mut command = Command::new(&platform.emulator);
        command
            .args(arguments(platform, files, ssh_port, state))
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot share a log file")?)
            .stderr(log);
        die_with_parent(&mut command);
        let child = command
            .spawn()
            .with_context(|| format!("cannot run {}", platform.emulator.display()))?;
        Ok(Machine {
            child,
            files: files.clone(),
            ssh_port,
        })
    }

    /// Fails, with the last words, when the emulator has ended.
    pub fn check(&mut self) -> Result<()> {
        match self
            .child
            .try_wait()
            .context("cannot look after an emulator")?
        {
            None => Ok(()),
            Some(status) => bail!(
                "the emulator of host {} has ended ({status}):\n{}\n{}",
                self.files.host,
                self.complaints(),
                self.last_words()
            ),
        }
    }

    /// What the emulator printed, without what it prints at every start.
    fn complaints(&self) -> String {
        process::tail(&self.files.log(), 100)
            .lines()
            .filter(|line| !line.contains("TCG doesn't support requested feature"))
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// The last lines of Xen's and dom0's console.
    pub fn last_words(&self) -> String {
        format!(
            "the last lines of host {}'s console:\n{}",
            self.files.host,
            process::tail(&self.files.console(), 25)
        )
    }

    /// Connects to the control socket.
    pub fn control(&mut self) -> Result<Control> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            self.check()?;
            match Control::connect(&self.files.qmp()) {
                Ok(control) => return Ok(control),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Waits for the emulator's end, for instance after `quit`.
    pub fn wait(mut self, limit: Duration) -> Result<()> {
        match process::wait(&mut self.child, limit)? {
            Some(_) => Ok(()),
            None => bail!("the emulator of host {} doesn't end", self.files.host),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Either fails only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn arguments(
    platform: &Platform,
    files: &Files,
    ssh_port: u16,
    state: Option<&Path>,
) -> Vec<OsString> {
    let q = |path: &Path| path.display().to_string().replace(',', ",,");
    let mut list: Vec<OsString> = Vec::new();
    let mut add = |name: &str, value: String| {
        list.push(name.into());
        list.push(value.into());
    };
    add("-machine", "q35".into());
    add("-accel", "tcg".into());
    add("-cpu", platform.cpu().into());
    add("-smp", platform.cpus.to_string());
    add("-m", MEMORY_MIB.to_string());
    add("-display", "none".into());
    add("-kernel", platform.xen.display().to_string());
    add("-append", platform.xen_options());
    add(
        "-initrd",
        format!(
            "{} root=/dev/vda rw console=hvc0 net.ifnames=0,{}",
            platform.kernel.display(),
            platform.initrd.display()
        ),
    );
    add(
        "-drive",
        format!(
            "file={},if=none,id=disk,format=qcow2,cache=unsafe,discard=unmap",
            q(&files.disk())
        ),
    );
    add("-device", "virtio-blk-pci,drive=disk".into());
    add(
        "-netdev",
        format!("user,id=way-in,restrict=on,hostfwd=tcp:127.0.0.1:{ssh_port}-:22"),
    );
    add("-device", "virtio-net-pci,netdev=way-in,romfile=".into());
    add(
        "-netdev",
        format!(
            "dgram,id=wire,local.type=unix,local.path={},remote.type=unix,remote.path={}",
            q(&files.nic()),
            q(&files.port())
        ),
    );
    add(
        "-device",
        "virtio-net-pci,netdev=wire,romfile=,mac=52:54:00:76:01:ff".into(),
    );
    add(
        "-chardev",
        format!(
            "socket,id=con,path={},server=on,wait=off,logfile={},logappend=on",
            q(&files.console_socket()),
            q(&files.console())
        ),
    );
    add("-serial", "chardev:con".into());
    add(
        "-qmp",
        format!("unix:{},server=on,wait=off", q(&files.qmp())),
    );
    if let Some(state) = state {
        add(
            "-incoming",
            format!("exec:cat {}", shell_quote(&state.display().to_string())),
        );
    }
    list.push("-nodefaults".into());
    list.push("-no-user-config".into());
    list
}

/// A connection to an emulator's control socket (QMP).
pub struct Control {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Control {
    fn connect(path: &Path) -> Result<Self> {
        let writer = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        writer
            .set_read_timeout(Some(Duration::from_secs(60)))
            .context("cannot bound the wait for an emulator's answer")?;
        let reader = BufReader::new(writer.try_clone().context("cannot share a socket")?);
        let mut control = Control { reader, writer };
        control.line()?;
        control.execute("qmp_capabilities", json!({}))?;
        Ok(control)
    }

    /// Executes one command and returns its result.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        // In one piece: `quit` is done before a line break that follows it.
        self.writer
            .write_all(format!("{request}\n").as_bytes())
            .context("cannot write to an emulator")?;
        loop {
            let mut answer = self.line()?;
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("the emulator refused {command}: {error}");
            }
            // Else it's an event, of no interest here.
        }
    }

    /// Stops the machine, writes its state to a file and ends the emulator.
    pub fn save_and_quit(&mut self, state: &Path, limit: Duration) -> Result<()> {
        self.execute("stop", json!({}))?;
        let uri = format!("exec:cat >{}", shell_quote(&state.display().to_string()));
        self.execute(
            "migrate-set-parameters",
            json!({"max-bandwidth": 1u64 << 40}),
        )?;
        self.execute("migrate", json!({"uri": uri}))?;
        let deadline = Instant::now() + limit;
        loop {
            let answer = self.execute("query-migrate", json!({}))?;
            match answer.get("status").and_then(Value::as_str) {
                Some("completed") => break,
                Some("failed" | "cancelled") => {
                    bail!("the emulator couldn't save its state: {answer}")
                }
                _ if Instant::now() > deadline => {
                    bail!(
                        "the emulator didn't save its state in {} s",
                        limit.as_secs()
                    )
                }
                _ => std::thread::sleep(Duration::from_millis(100)),
            }
        }
        // It may be gone before its answer is; its end is waited for anyway.
        let _ = self.execute("quit", json!({}));
        Ok(())
    }

    /// Sets a machine going that has loaded its state; says whether it runs.
    pub fn go_on(&mut self) -> Result<bool> {
        let status = self.execute("query-status", json!({}))?;
        match status.get("status").and_then(Value::as_str) {
            Some("running") => return Ok(true),
            // It was stopped when its state was saved.
            Some("paused" | "postmigrate") => drop(self.execute("cont", json!({}))?),
            _ => {}
        }
        Ok(false)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let count = self
            .reader
            .read_line(&mut line)
            .context("no answer from an emulator")?;
        if count == 0 {
            bail!("an emulator closed its control socket");
        }
        serde_json::from_str(&line).with_context(|| format!("an emulator said {line:?}"))
    }
}

/// Makes a command's process end when the calling thread ends.
pub fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: only async-signal-safe calls are made between fork and exec.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // The parent may have ended before the request was in force.
            if libc::getppid() as u32 != parent {
                return Err(std::io::Error::from_raw_os_error(libc::ECHILD));
            }
            Ok(())
        });
    }
}

/// Quotes a word for a shell.
pub fn shell_quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Refuses paths that the kernel would refuse, in words that help.
pub fn check_socket_path(path: &Path) -> Result<()> {
    // sun_path has 108 bytes, and ssh adds a suffix of 17.
    if path.as_os_str().len() > 90 {
        bail!(
            "{} is too long for a socket: set XL_VNE_CACHE to a shorter folder",
            path.display()
        );
    }
    Ok(())
}

fn free_port() -> Result<u16> {
    let listener =
        std::net::TcpListener::bind("127.0.0.1:0").context("cannot find a free local port")?;
    Ok(listener
        .local_addr()
        .context("cannot read a socket's address")?
        .port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(flavour: Flavour) -> Platform {
        Platform {
            emulator: "qemu".into(),
            xen: "xen.elf".into(),
            kernel: "vmlinuz".into(),
            initrd: "initrd.img".into(),
            flavour,
            cpus: 1,
        }
    }

    #[test]
    fn every_flavour_steers_around_the_known_traps() {
        for flavour in [Flavour::Pv, Flavour::Pvh] {
            let text = platform(flavour).describe();
            for trap in [
                "-monitor",
                "-smap",
                "-smep",
                "-rdtscp",
                "eager-fpu",
                "cpuidle=0",
            ] {
                assert!(text.contains(trap), "{flavour:?} lacks {trap}: {text}");
            }
        }
    }

    #[test]
    fn commas_in_paths_are_doubled_for_qemu() {
        let files = Files::new(Path::new("/a,b"), 0);
        let list = arguments(&platform(Flavour::Pv), &files, 1, None);
        assert!(list
            .iter()
            .any(|a| a.to_string_lossy().contains("file=/a,,b/host0.qcow2")));
    }

    #[test]
    fn words_are_quoted_for_the_shell_only_when_needed() {
        assert_eq!(shell_quote("a-b/c"), "a-b/c");
        assert_eq!(shell_quote("it's $x"), r"'it'\''s $x'");
        assert_eq!(shell_quote(""), "''");
    }
}
