//! LVM by its own tool, `lvm`: it owns its metadata, and has no library any more.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{kill_process, Pid, Signal};
use serde::Deserialize;

use super::{unfit, Error};

/// How long a command may take that no guest waits for.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long one may take to end when it's asked to.
const END_MAX: Duration = Duration::from_secs(2);
const LOOK_INTERVAL: Duration = Duration::from_millis(2);
/// What a command may print, in bytes.
const PRINTED_MAX: u64 = 1 << 20;

/// A logical volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Volume {
    /// `/dev/VG/LV`.
    pub path: PathBuf,
    /// LVM's word for what it's made of: `thin`, `linear`.
    pub kind: String,
    /// Its size.
    pub bytes: u64,
    /// Whether somebody has its device open.
    pub open: bool,
}

/// Looks up the volume that a path in `/dev` stands for; `None` if that's no block
/// device of LVM's.
pub(super) fn volume_of(target: &Path) -> Result<Option<Volume>, Error> {
    let facts = std::fs::metadata(target).map_err(Error::io("find", target))?;
    if !facts.file_type().is_block_device() {
        return Ok(None);
    }
    let (major, minor) = (
        rustix::fs::major(facts.rdev()),
        rustix::fs::minor(facts.rdev()),
    );
    // Nothing but the device mapper has this file, and LVM marks its own.
    let uuid = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/dm/uuid"));
    if !uuid.is_ok_and(|uuid| uuid.starts_with("LVM-")) {
        return Ok(None);
    }
    let found = list(&target.to_string_lossy())?;
    match <[Volume; 1]>::try_from(found) {
        Ok([volume]) => Ok(Some(volume)),
        Err(found) => unfit(&format!(
            "{} is {} of LVM's volumes instead of one",
            target.display(),
            found.len()
        )),
    }
}

/// The volume of this path, `/dev/VG/LV`, active or not.
pub(super) fn volume(path: &Path) -> Result<Option<Volume>, Error> {
    let (group, _) = names(path)?;
    let found = list(group)?;
    Ok(found.into_iter().find(|volume| volume.path == path))
}

/// Bytes that are free in a volume's group.
pub(super) fn free_bytes(path: &Path) -> Result<u64, Error> {
    let (group, _) = names(path)?;
    let arguments = [
        "vgs",
        "--noheadings",
        "--units",
        "b",
        "--nosuffix",
        "-o",
        "vg_free",
        "--",
        group,
    ];
    let text = run(&arguments, None, Instant::now() + PATIENCE)?;
    text.trim().parse().map_err(|_| Error::Tool {
        tool: format!("vgs {group}"),
        why: format!("{} bytes are free", text.trim()),
    })
}

/// Group and name of `/dev/VG/LV`.
pub(super) fn names(path: &Path) -> Result<(&str, &str), Error> {
    let parts = path
        .strip_prefix("/dev")
        .ok()
        .and_then(|rest| rest.to_str());
    let parts = parts.and_then(|rest| rest.split_once('/'));
    // LVM's own rule for names; one with a hyphen first would be an option.
    let fits = |name: &str| {
        let may = |byte: u8| byte.is_ascii_alphanumeric() || b"+_.-".contains(&byte);
        !name.is_empty() && !name.starts_with(['-', '.']) && name.bytes().all(may)
    };
    match parts {
        Some((group, name)) if fits(group) && fits(name) => Ok((group, name)),
        _ => unfit(&format!(
            "{} is no logical volume's path, /dev/VG/LV",
            path.display()
        )),
    }
}

/// `VG/LV`.
pub(super) fn short(path: &Path) -> Result<String, Error> {
    let (group, name) = names(path)?;
    Ok(format!("{group}/{name}"))
}

/// Removes a volume; that it's gone already is fine. One that is in use stays, and
/// is an error.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    if volume(path)?.is_none() {
        return Ok(());
    }
    patiently(&["lvremove", "-qq", "--yes", "-An", &short(path)?])
}

/// Renames a volume of the same group.
pub(super) fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    let (group, old) = names(from)?;
    let (_, new) = names(to)?;
    patiently(&["lvrename", "-qq", "-An", group, old, new])
}

/// Runs one of LVM's commands that no guest waits for.
pub(super) fn patiently(arguments: &[&str]) -> Result<(), Error> {
    run(arguments, None, Instant::now() + PATIENCE).map(drop)
}

#[derive(Deserialize)]
struct Told {
    report: Vec<Report>,
}

#[derive(Deserialize)]
struct Report {
    #[serde(default)]
    lv: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    vg_name: String,
    lv_name: String,
    lv_size: String,
    segtype: String,
    lv_device_open: String,
}

/// A volume, or all of a group.
fn list(what: &str) -> Result<Vec<Volume>, Error> {
    const COLUMNS: &str = "vg_name,lv_name,lv_size,segtype,lv_device_open";
    let arguments = [
        "lvs",
        "--reportformat",
        "json",
        "--units",
        "b",
        "--nosuffix",
        "-o",
        COLUMNS,
        "--",
        what,
    ];
    let text = run(&arguments, None, Instant::now() + PATIENCE)?;
    parse(&text).map_err(|why| Error::Tool {
        tool: format!("lvs {what}"),
        why,
    })
}

fn parse(text: &str) -> Result<Vec<Volume>, String> {
    let told: Told = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let rows = told.report.into_iter().flat_map(|report| report.lv);
    rows.map(|row| {
        let bytes = row.lv_size.parse();
        Ok(Volume {
            path: PathBuf::from(format!("/dev/{}/{}", row.vg_name, row.lv_name)),
            kind: row.segtype,
            bytes: bytes.map_err(|_| format!("its size is {:?}", row.lv_size))?,
            // "open", or nothing; "1" with other settings.
            open: matches!(row.lv_device_open.as_str(), "open" | "1"),
        })
    })
    .collect()
}

/// Runs `lvm` with these arguments, and returns what it printed. It has `lock` open
/// for as long as it works, and is never killed: in the middle of its work devices
/// are suspended.
///
/// # Errors
///
/// [`Error::Tool`] with what it said; [`Error::Unfinished`].
pub(super) fn run(
    arguments: &[&str],
    lock: Option<&File>,
    deadline: Instant,
) -> Result<String, Error> {
    let tool = format!("lvm {}", arguments.join(" "));
    let failed = |source| Error::Tool {
        tool: tool.clone(),
        why: format!("{source} (is the package lvm2 installed?)"),
    };
    let (out, err) = (memory().map_err(failed)?, memory().map_err(failed)?);
    // Not read by it: a way to hand a descriptor down that needs nothing else.
    let stdin = match lock {
        Some(lock) => Stdio::from(lock.try_clone().map_err(failed)?),
        None => Stdio::null(),
    };
    let started = Instant::now();
    let mut child = Command::new("lvm")
        .args(arguments)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .env("LVM_SUPPRESS_FD_WARNINGS", "1")
        .stdin(stdin)
        .stdout(out.try_clone().map_err(failed)?)
        .stderr(err.try_clone().map_err(failed)?)
        .spawn()
        .map_err(failed)?;
    let Some(status) = wait(&mut child, deadline).map_err(failed)? else {
        // Somebody has to bury it.
        std::thread::spawn(move || child.wait());
        return Err(Error::Unfinished {
            tool,
            seconds: started.elapsed().as_secs(),
        });
    };
    log::debug!("{tool}: {status} after {:?}", started.elapsed());
    if status.success() {
        return text(out).map_err(failed);
    }
    let said = text(err).map_err(failed)?;
    Err(Error::Tool {
        tool,
        why: match said.trim() {
            "" => status.to_string(),
            said => said.replace('\n', "; "),
        },
    })
}

/// Waits until the deadline; then it's asked to end, which it does while it waits
/// for others' locks, and otherwise when it has finished.
fn wait(child: &mut Child, deadline: Instant) -> std::io::Result<Option<std::process::ExitStatus>> {
    for end in [deadline, deadline + END_MAX] {
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= end {
                break;
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // It isn't waited for yet, so that the number is its own.
            let _ = kill_process(pid, Signal::TERM);
        }
    }
    Ok(None)
}

/// A file in memory: a child never waits for somebody to read it.
fn memory() -> std::io::Result<File> {
    let file = rustix::fs::memfd_create(c"vne-lvm", rustix::fs::MemfdFlags::CLOEXEC)?;
    Ok(File::from(file))
}

fn text(mut file: File) -> std::io::Result<String> {
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(PRINTED_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_read_from_what_lvs_prints() -> Result<(), String> {
        let text = r#"  {"report": [{"lv": [
            {"vg_name":"vg0","lv_name":"web","lv_size":"67108864","segtype":"thin","lv_device_open":"open"},
            {"vg_name":"vg0","lv_name":"pool","lv_size":"134217728","segtype":"thin-pool","lv_device_open":""}
            ]}]}"#;
        let volumes = parse(text)?;
        assert_eq!(volumes[0].path, Path::new("/dev/vg0/web"));
        assert_eq!((volumes[0].bytes, volumes[0].open), (64 << 20, true));
        assert_eq!(
            (volumes[1].kind.as_str(), volumes[1].open),
            ("thin-pool", false)
        );
        assert!(parse("{\"report\":[{\"lv\":[{\"vg_name\":\"x\"}]}]}").is_err());
        Ok(())
    }

    #[test]
    fn only_a_volumes_path_is_given_to_lvm() {
        assert!(matches!(
            names(Path::new("/dev/vg0/web")),
            Ok(("vg0", "web"))
        ));
        for bad in [
            "/dev/vg0",
            "/dev/vg0/",
            "/dev/vg0/-f",
            "/dev/-vg/web",
            "/dev/a/b/c",
            "/dev/vg0/a b",
            "/dev/../etc",
            "vg0/web",
        ] {
            assert!(names(Path::new(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_tool_is_quoted_or_said_to_be_missing() {
        let told = run(&["no-such-command"], None, Instant::now() + PATIENCE);
        let told = told.map_err(|error| error.to_string());
        assert!(
            told.as_ref()
                .is_err_and(|told| told.contains("no-such-command")),
            "{told:?}"
        );
    }
}
