//! The admin's own programs that are run before and after a take or restore:
//! `/etc/xen/vne-snapshot.d`. The rules are in xl-vne-snapshot(1), "HOOKS".

use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::Failure;
use crate::image::Name;
use crate::sentence::sentence;

/// The folder, below Xen's folder of configuration files.
const FOLDER: &str = "vne-snapshot.d";
/// How long one hook may take.
const HOOK_MAX: Duration = Duration::from_secs(60);
/// Most hooks that there may be.
const HOOKS_MAX: usize = 64;
/// Between two looks whether a hook has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// What hooks find programs by, whatever xl was started with.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What hooks are run around.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// `take`.
    Take,
    /// `restore`.
    Restore,
}

impl Verb {
    fn before(self) -> &'static str {
        match self {
            Self::Take => "pre-take",
            Self::Restore => "pre-restore",
        }
    }

    fn after(self) -> &'static str {
        match self {
            Self::Take => "post-take",
            Self::Restore => "post-restore",
        }
    }
}

/// The hooks around one take or restore.
pub struct Hooks {
    verb: Verb,
    programs: Vec<PathBuf>,
    variables: Vec<(&'static str, OsString)>,
    hook_max: Duration,
}

impl Hooks {
    /// Finds them, and refuses those that somebody else than root could have
    /// made. Without the folder there are none.
    pub fn find(
        config_dir: &Path,
        verb: Verb,
        vne: &Name,
        members: &[String],
    ) -> Result<Self, Failure> {
        Ok(Self {
            verb,
            programs: programs(&config_dir.join(FOLDER), 0)?,
            variables: vec![
                ("VNE", vne.as_str().into()),
                ("VNE_MEMBERS", members.join(" ").into()),
            ],
            hook_max: HOOK_MAX,
        })
    }

    /// Says more to the hooks that are run from here on.
    pub fn tell(&mut self, name: &'static str, value: impl Into<OsString>) {
        self.variables.push((name, value.into()));
    }

    /// Runs `work` between the hooks. The first hook that fails before it ends
    /// it all before it has begun; those after it are run however it ended, and
    /// `about` says what they are told of a success.
    pub fn around<T>(
        mut self,
        work: impl FnOnce() -> Result<T, Failure>,
        about: impl FnOnce(&T) -> Vec<(&'static str, OsString)>,
    ) -> Result<T, Failure> {
        let before = self.run_all(self.verb.before());
        let result = before.and_then(|()| work());
        match &result {
            Ok(done) => {
                self.tell("VNE_RESULT", "ok");
                self.variables.extend(about(done));
            }
            Err(error) => {
                self.tell("VNE_RESULT", "failed");
                self.tell("VNE_ERROR", sentence(error.as_ref()));
            }
        }
        // What is done can't be undone by one that fails, and the others may
        // have something to put back.
        for program in &self.programs {
            if let Err(why) = self.run(program, self.verb.after()) {
                log::warn!("{why}");
            }
        }
        result
    }

    fn run_all(&self, moment: &str) -> Result<(), Failure> {
        for program in &self.programs {
            self.run(program, moment)?;
        }
        Ok(())
    }

    /// Its output is for people: stdout may be somebody's JSON.
    fn run(&self, program: &Path, moment: &str) -> Result<(), String> {
        let named = || format!("the hook {} {moment}", program.display());
        let failed = |error| format!("{}: {error}", named());
        let out = std::io::stderr().as_fd().try_clone_to_owned();
        let mut child = Command::new(program)
            .arg(moment)
            .env_clear()
            .env("PATH", PATH)
            .env("LANG", "C.UTF-8")
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(out.map_err(failed)?)
            .spawn()
            .map_err(failed)?;
        let deadline = Instant::now() + self.hook_max;
        loop {
            match child.try_wait().map_err(failed)? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(format!("{} failed ({status})", named())),
                None if Instant::now() < deadline => std::thread::sleep(LOOK_INTERVAL),
                None => {
                    // It may have ended just now; there's nothing to do about
                    // either.
                    let _ = child.kill();
                    let _ = child.wait();
                    let limit = self.hook_max.as_secs();
                    return Err(format!("{} was killed after {limit} s", named()));
                }
            }
        }
    }
}

/// All hooks in the order of their names. Like run-parts, files whose names have
/// other characters than letters, digits, hyphens and underscores aren't any:
/// what editors and dpkg leave.
fn programs(folder: &Path, owner: u32) -> Result<Vec<PathBuf>, Failure> {
    let refused = |path: &Path, why: &str| -> Failure {
        format!(
            "{}: {why}; hooks run as root, so nothing is done",
            path.display()
        )
        .into()
    };
    let failed = |error| format!("{}: {error}", folder.display());
    let opened = match File::open(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let about = opened.metadata().map_err(failed)?;
    if let Some(why) = others_can_change(&about, owner) {
        return Err(refused(folder, why));
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        if !name.as_encoded_bytes().iter().all(is_name) {
            continue;
        }
        let path = entry.path();
        let about =
            fs::symlink_metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        if about.is_symlink() {
            return Err(refused(&path, "it's a symbolic link"));
        }
        if !about.is_file() || about.mode() & 0o111 == 0 {
            continue;
        }
        if let Some(why) = others_can_change(&about, owner) {
            return Err(refused(&path, why));
        }
        found.push(path);
    }
    if found.len() > HOOKS_MAX {
        return Err(refused(folder, "there are more than 64 hooks"));
    }
    found.sort();
    Ok(found)
}

fn others_can_change(about: &Metadata, owner: u32) -> Option<&'static str> {
    if about.uid() != owner {
        Some("it doesn't belong to root")
    } else if about.mode() & 0o022 != 0 {
        Some("others than root can write to it")
    } else {
        None
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::os::unix::fs::{symlink, PermissionsExt};

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            let folder = Self(tempfile::tempdir().unwrap());
            fs::create_dir(folder.path()).unwrap();
            folder.mode("", 0o755);
            folder
        }

        fn path(&self) -> PathBuf {
            self.0.path().join(FOLDER)
        }

        fn mode(&self, name: &str, mode: u32) {
            let path = self.path().join(name);
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }

        /// A hook that notes what it was told.
        fn hook(&self, name: &str, does: &str) {
            let log = self.0.path().join("log");
            let script = format!("#!/bin/sh\necho {name} $1 >>{}\n{does}\n", log.display());
            // By another process: one that another test starts meanwhile would
            // inherit the open file, which then can't be run.
            let written = Command::new("sh")
                .args(["-c", "printf %s \"$2\" >\"$1\"", "sh"])
                .args([self.path().join(name).into_os_string(), script.into()])
                .status()
                .unwrap();
            assert!(written.success());
            self.mode(name, 0o755);
        }

        fn log(&self) -> Vec<String> {
            let text = fs::read_to_string(self.0.path().join("log")).unwrap_or_default();
            text.lines().map(str::to_owned).collect()
        }

        fn owner(&self) -> u32 {
            fs::metadata(self.path()).unwrap().uid()
        }

        fn hooks(&self) -> Result<Hooks, String> {
            Ok(Hooks {
                verb: Verb::Take,
                programs: programs(&self.path(), self.owner()).map_err(|e| e.to_string())?,
                variables: vec![("VNE", "lab".into())],
                hook_max: Duration::from_millis(300),
            })
        }

        fn around(&self, result: Result<u32, &str>) -> (bool, Result<u32, String>) {
            let begun = Cell::new(false);
            let work = || {
                begun.set(true);
                result.map_err(Failure::from)
            };
            let about = |number: &u32| vec![("VNE_SNAPSHOT", number.to_string().into())];
            let hooks = self.hooks().unwrap();
            let ended = hooks.around(work, about).map_err(|error| error.to_string());
            (begun.get(), ended)
        }
    }

    #[test]
    fn hooks_are_run_in_order_before_and_after_and_hear_how_it_ended() {
        let folder = Folder::new();
        let note = format!(
            "echo \"$VNE $VNE_RESULT $VNE_SNAPSHOT $VNE_ERROR\" >>{}/log",
            folder.0.path().display()
        );
        folder.hook("20-second", "");
        folder.hook("10-first", &note);
        assert_eq!(folder.around(Ok(7)), (true, Ok(7)));
        let expected = [
            "10-first pre-take",
            "lab   ",
            "20-second pre-take",
            "10-first post-take",
            "lab ok 7 ",
            "20-second post-take",
        ];
        assert_eq!(folder.log(), expected);
        fs::remove_file(folder.0.path().join("log")).unwrap();
        let (_, ended) = folder.around(Err("no space"));
        assert_eq!(ended, Err(String::from("no space")));
        assert!(folder.log().contains(&String::from("lab failed  no space")));
    }

    #[test]
    fn one_that_fails_before_keeps_it_from_beginning_and_the_others_hear() {
        let folder = Folder::new();
        folder.hook("10-fails", "[ $1 != pre-take ]");
        folder.hook("20-next", "");
        let (begun, ended) = folder.around(Ok(1));
        assert!(!begun);
        assert!(ended.unwrap_err().contains("10-fails pre-take failed"));
        let expected = [
            "10-fails pre-take",
            "10-fails post-take",
            "20-next post-take",
        ];
        assert_eq!(folder.log(), expected);
    }

    #[test]
    fn one_that_fails_after_changes_nothing() {
        let folder = Folder::new();
        folder.hook("10-fails", "[ $1 != post-take ]");
        assert_eq!(folder.around(Ok(1)), (true, Ok(1)));
    }

    #[test]
    fn one_that_takes_too_long_is_killed_and_has_failed() {
        let folder = Folder::new();
        folder.hook("10-slow", "exec sleep 60");
        let start = Instant::now();
        let (begun, ended) = folder.around(Ok(1));
        assert!(!begun && ended.unwrap_err().contains("was killed after"));
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn what_others_could_have_put_there_is_refused() {
        let folder = Folder::new();
        folder.hook("10-hook", "");
        assert_eq!(folder.hooks().map(|hooks| hooks.programs.len()), Ok(1));
        let refused = |expected: &str| {
            let why = folder.hooks().map(|_| ()).unwrap_err();
            assert!(why.contains(expected), "{why}");
        };
        for mode in [0o775, 0o757, 0o1777] {
            folder.mode("", mode);
            refused("others than root");
        }
        folder.mode("", 0o755);
        folder.mode("10-hook", 0o775);
        refused("10-hook: others than root");
        folder.mode("10-hook", 0o755);
        let owner = folder.owner();
        assert!(programs(&folder.path(), owner + 1).is_err());
        symlink("/bin/true", folder.path().join("20-link")).unwrap();
        refused("20-link: it's a symbolic link");
        fs::remove_file(folder.path().join("20-link")).unwrap();
        assert!(folder.hooks().is_ok());
        assert_eq!(folder.log(), [""; 0]);
    }

    #[test]
    fn what_is_no_hook_is_left_alone() {
        let folder = Folder::new();
        for name in ["10-hook.dpkg-old", "10-hook~", ".hidden", "README.txt"] {
            folder.hook(name, "");
        }
        folder.hook("20-not-executable", "");
        folder.mode("20-not-executable", 0o644);
        fs::create_dir(folder.path().join("folder")).unwrap();
        assert_eq!(folder.hooks().map(|hooks| hooks.programs.len()), Ok(0));
        let none = tempfile::tempdir().unwrap();
        assert!(programs(&none.path().join(FOLDER), 0).unwrap().is_empty());
    }
}
