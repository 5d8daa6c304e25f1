//! Debian's archive, as this machine's own apt is set up to reach it: nothing
//! here knows a mirror's name.
//!
//! The lab keeps package lists of its own in the cache, source packages
//! included. They're fetched once and stay as they are until `lab prepare
//! --refresh`, so that what is built doesn't change under a running work day.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{bail, Context, Result};

use super::cache::{Cache, Key, Lock};
use super::process;
use crate::suite::Suite;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const UPDATE_LIMIT: Duration = Duration::from_secs(600);
const INSTALL_LIMIT: Duration = Duration::from_secs(1800);

/// One archive that apt reads, such as the main or the security one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Archive {
    uri: String,
    /// `bookworm`, `bookworm-security`, …
    release: String,
    components: Vec<String>,
}

/// apt with the lab's own lists for one suite.
#[derive(Clone, Debug)]
pub struct Apt {
    suite: Suite,
    archives: Vec<Archive>,
    dir: PathBuf,
}

impl Apt {
    /// Reads this machine's apt configuration and makes the lists for
    /// `suite`, with `refresh` anew even when there are some.
    pub fn open(cache: &Cache, suite: Suite, refresh: bool) -> Result<Self> {
        let targets = process::capture(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(CREATED_BY) $(ORIGIN) $(REPO_URI) $(CODENAME) $(RELEASE) $(COMPONENT)",
        ]))
        .context("cannot ask apt for its sources")?;
        let archives = for_suite(&parse_targets(&targets), suite.name())?;
        let dir = cache.dir(&format!("apt-{suite}"))?;
        let apt = Apt {
            suite,
            archives,
            dir,
        };
        apt.update(refresh)?;
        Ok(apt)
    }

    /// The URI to bootstrap the suite from.
    pub fn mirror(&self) -> Result<&str> {
        self.archives
            .iter()
            .find(|archive| archive.release == self.suite.name())
            .map(|archive| archive.uri.as_str())
            .with_context(|| format!("apt has no source for {}", self.suite))
    }

    /// The suite's archives as lines of sources.list, for inside an image.
    pub fn sources_list(&self) -> String {
        self.archives
            .iter()
            .map(|a| format!("deb {} {} {}\n", a.uri, a.release, a.components.join(" ")))
            .collect()
    }

    /// The version that would be installed of each package, one a line.
    pub fn candidates(&self, packages: &[&str]) -> Result<String> {
        let text = process::capture(
            self.command("apt-cache")
                .arg("policy")
                .args(packages)
                .env("LC_ALL", "C"),
        )?;
        let mut lines = String::new();
        for package in packages {
            let version = candidate(&text, package).with_context(|| {
                format!("{} has no package {package} that apt can see", self.suite)
            })?;
            lines.push_str(&format!("{package} {version}\n"));
        }
        Ok(lines)
    }

    /// Has this machine, which is of this suite, the archive's version of a package.
    pub fn upgrade(&self, package: &str) -> Result<()> {
        let policy = process::capture(
            self.command("apt-cache")
                .args(["policy", package])
                .env("LC_ALL", "C"),
        )?;
        let Some(version) = candidate(&policy, package) else {
            bail!("{} has no package {package} that apt can see", self.suite);
        };
        if policy_value(&policy, package, "Installed: ").is_some_and(|now| now == version) {
            return Ok(());
        }
        if !is_root() {
            bail!("{package} isn't version {version}: as root run `apt-get update && apt-get install {package}`");
        }
        eprintln!("lab: upgrading {package} to {version}");
        process::logged(
            self.command("apt-get")
                .args(["-q", "-y", "--no-install-recommends", "install"])
                .arg(format!("{package}={version}"))
                .env("DEBIAN_FRONTEND", "noninteractive"),
            &self.dir.join("upgrade.log"),
            INSTALL_LIMIT,
        )
    }

    /// The versions of a source package, the newest first.
    pub fn source_versions(&self, package: &str) -> Result<Vec<String>> {
        let text = process::capture(self.command("apt-cache").args(["showsrc", package]))?;
        let mut versions: Vec<String> = Vec::new();
        for version in text
            .lines()
            .filter_map(|line| line.strip_prefix("Version: "))
        {
            let place = versions
                .iter()
                .position(|known| !older(version, known))
                .unwrap_or(versions.len());
            if versions.get(place).is_none_or(|known| known != version) {
                versions.insert(place, version.to_owned());
            }
        }
        if versions.is_empty() {
            bail!(
                "{} has no source package {package} that apt can see",
                self.suite
            );
        }
        Ok(versions)
    }

    /// Finds, or fetches and unpacks, a source package: its folder, and what
    /// it's keyed by. The newest version that the archive really has is
    /// taken: an index may name sources that have gone from the mirror.
    pub fn source(&self, cache: &Cache, package: &str) -> Result<(PathBuf, String)> {
        let versions = self.source_versions(package)?;
        let key = Key::new("source")
            .with("package", package)
            .with("versions", versions.join(" "))
            .finish();
        let dir = cache.artefact(&format!("{package}-src"), &key, |out| {
            let mut failures = String::new();
            for version in &versions {
                match self.unpack_source(package, version, out) {
                    Ok(()) => {
                        return std::fs::write(out.join("version"), version)
                            .context("cannot note the source's version");
                    }
                    Err(error) => failures.push_str(&format!("\n{version}: {error:#}")),
                }
            }
            bail!(
                "none of the archive's versions of the source of {package} can be fetched; \
                 `cargo xtask lab prepare --refresh` renews the lists:{failures}"
            )
        })?;
        Ok((dir.join(package), key))
    }

    fn unpack_source(&self, package: &str, version: &str, out: &Path) -> Result<()> {
        // An earlier version that failed may have left some of itself.
        let fetched = out.join("fetched");
        let target = out.join(package);
        for dir in [&fetched, &target] {
            if dir.exists() {
                fs::remove_dir_all(dir)
                    .with_context(|| format!("cannot clear {}", dir.display()))?;
            }
        }
        fs::create_dir(&fetched).context("cannot create a folder for a download")?;
        let log = out.join("fetch.log");
        let downloaded = process::logged(
            self.command("apt-get")
                .args(["source", "--download-only", "-q"])
                .arg(format!("{package}={version}"))
                .current_dir(&fetched),
            &log,
            INSTALL_LIMIT,
        );
        match (downloaded, file_ending(&fetched, ".dsc")?) {
            // apt has checked the signature already.
            (Ok(()), Some(dsc)) => process::logged(
                Command::new("dpkg-source")
                    .args(["--no-check", "-x"])
                    .arg(&dsc)
                    .arg(&target),
                &log,
                INSTALL_LIMIT,
            )?,
            // A mirror may have lost the small file that names the others. What
            // apt keeps of those was checked against the archive's index.
            (Err(error), None) => unpack_without_dsc(&fetched, &target, &log).context(error)?,
            (Err(error), Some(_)) => return Err(error),
            (Ok(()), None) => bail!("apt fetched no .dsc of {package}"),
        }
        fs::remove_dir_all(&fetched).context("cannot remove a download")
    }

    fn update(&self, refresh: bool) -> Result<()> {
        let text = self.sources();
        let sources = self.dir.join("lab.sources");
        let stamp = self.dir.join("updated");
        let same = fs::read_to_string(&stamp).is_ok_and(|old| old == text);
        if same && !refresh {
            return Ok(());
        }
        let _lock = Lock::take(&self.dir.join("lock"))?;
        fs::create_dir_all(self.dir.join("lists/partial")).context("cannot create apt's lists")?;
        fs::create_dir_all(self.dir.join("archives/partial"))
            .context("cannot create apt's archives")?;
        fs::write(&sources, &text)
            .with_context(|| format!("cannot write {}", sources.display()))?;
        let log = self.dir.join("update.log");
        process::logged(
            self.command("apt-get").args(["-q", "update"]),
            &log,
            UPDATE_LIMIT,
        )
        .with_context(|| format!("cannot fetch the package lists of {}", self.suite))?;
        fs::write(&stamp, &text).context("cannot note that apt's lists are there")
    }

    fn sources(&self) -> String {
        let signed_by = if Path::new(KEYRING).exists() {
            format!("Signed-By: {KEYRING}\n")
        } else {
            String::new()
        };
        self.archives
            .iter()
            .map(|a| {
                format!(
                    "Types: deb deb-src\nURIs: {}\nSuites: {}\nComponents: {}\n{signed_by}\n",
                    a.uri,
                    a.release,
                    a.components.join(" ")
                )
            })
            .collect()
    }

    /// An apt program that sees only the lab's own lists.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let dir = self.dir.display();
        for option in [
            format!("Dir::Etc::sourcelist={dir}/lab.sources"),
            "Dir::Etc::sourceparts=-".to_owned(),
            "Dir::Etc::preferencesparts=-".to_owned(),
            format!("Dir::State::lists={dir}/lists"),
            format!("Dir::Cache={dir}"),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }
}

/// The one file of a folder whose name ends so.
fn file_ending(dir: &Path, end: &str) -> Result<Option<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    Ok(entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.to_string_lossy().ends_with(end)))
}

/// Does what dpkg-source does with a source package in format 3.0 (quilt).
fn unpack_without_dsc(fetched: &Path, target: &Path, log: &Path) -> Result<()> {
    let part = |end: &str| {
        file_ending(fetched, end)?.with_context(|| format!("apt fetched no file *{end} either"))
    };
    fs::create_dir(target).context("cannot create the source's folder")?;
    let script = "tar -xf \"$1\" --strip-components=1 && tar -xf \"$2\" && \
                  sed 's/[[:space:]]*#.*//; /^$/d' debian/patches/series | \
                  while read -r name; do patch -s -f -p1 -i \"debian/patches/$name\" || exit; done";
    process::logged(
        Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(part(".orig.tar.xz")?)
            .arg(part(".debian.tar.xz")?)
            .current_dir(target),
        log,
        INSTALL_LIMIT,
    )
}

/// Installs the packages of which a program or file is missing. Without the
/// right to do it, says what to install.
pub fn install(wanted: &[(&str, &str)]) -> Result<()> {
    // A package from elsewhere, such as backports, may have to give way to another
    // one's needs, and is then missing itself.
    for _ in 0..2 {
        let missing = missing(wanted);
        if missing.is_empty() {
            return Ok(());
        }
        install_all(&missing)?;
    }
    match missing(wanted).as_slice() {
        [] => Ok(()),
        left => bail!(
            "{} were installed, and what they should bring isn't there",
            left.join(" ")
        ),
    }
}

/// The packages of which a program or file is missing.
fn missing<'a>(wanted: &[(&'a str, &str)]) -> Vec<&'a str> {
    let mut missing: Vec<&str> = wanted
        .iter()
        .filter(|(_, proof)| {
            if proof.starts_with('/') {
                !Path::new(proof).exists()
            } else {
                !process::installed(proof)
            }
        })
        .map(|(package, _)| *package)
        .collect();
    missing.sort_unstable();
    missing.dedup();
    missing
}

fn install_all(missing: &[&str]) -> Result<()> {
    let list = missing.join(" ");
    if !is_root() {
        bail!("these packages are missing: as root run `apt-get install {list}`");
    }
    eprintln!("lab: installing {list}");
    let log = std::env::temp_dir().join(format!("xl-vne-apt-{}.log", std::process::id()));
    let apt = |arguments: &[&str]| {
        process::logged(
            Command::new("apt-get")
                .args(["-q", "-y", "--no-install-recommends"])
                .args(arguments)
                .env("DEBIAN_FRONTEND", "noninteractive"),
            &log,
            INSTALL_LIMIT,
        )
    };
    let mut arguments = vec!["install"];
    arguments.extend(missing);
    if apt(&arguments).is_err() {
        // Most likely stale or missing lists.
        apt(&["update"])?;
        apt(&arguments).with_context(|| format!("cannot install {list}"))?;
    }
    // It may be gone already; it's only a log.
    let _ = fs::remove_file(&log);
    Ok(())
}

/// Whether this process has root's rights.
pub fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions and can't fail.
    unsafe { libc::geteuid() == 0 }
}

/// Whether a version is older than another one, as Debian sees it. When that
/// can't be told, the order of the index stands.
fn older(version: &str, than: &str) -> bool {
    process::output(Command::new("dpkg").args(["--compare-versions", version, "lt", than]))
        .is_ok_and(|output| output.status.success())
}

fn parse_targets(text: &str) -> Vec<(String, Archive)> {
    let mut found: Vec<(String, Archive)> = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [created_by, origin, uri, codename, release, component] = words[..] else {
            continue;
        };
        if created_by != "Packages" || origin != "Debian" {
            continue;
        }
        let known = found
            .iter_mut()
            .find(|(_, a)| a.uri == uri && a.release == release);
        match known {
            Some((_, archive)) => {
                if !archive.components.iter().any(|c| c == component) {
                    archive.components.push(component.to_owned());
                }
            }
            None => found.push((
                codename.to_owned(),
                Archive {
                    uri: uri.to_owned(),
                    release: release.to_owned(),
                    components: vec![component.to_owned()],
                },
            )),
        }
    }
    found
}

/// The machine's archives with its own suite's name replaced by the wanted one.
fn for_suite(found: &[(String, Archive)], suite: &str) -> Result<Vec<Archive>> {
    // The shortest codename is the suite itself, not its updates or security.
    let own = found
        .iter()
        .map(|(codename, _)| codename.as_str())
        .min_by_key(|codename| codename.len())
        .context("apt has no Debian archive among its sources; is this a Debian machine?")?;
    let mut archives: Vec<Archive> = Vec::new();
    for (codename, archive) in found {
        let Some(rest) = codename.strip_prefix(own) else {
            continue;
        };
        let archive = Archive {
            uri: archive.uri.clone(),
            release: format!("{suite}{rest}"),
            components: archive.components.clone(),
        };
        if !archives.contains(&archive) {
            archives.push(archive);
        }
    }
    Ok(archives)
}

/// The candidate of one package in the output of `apt-cache policy`.
fn candidate(policy: &str, package: &str) -> Option<String> {
    policy_value(policy, package, "Candidate: ")
}

fn policy_value(policy: &str, package: &str, name: &str) -> Option<String> {
    let mut lines = policy
        .lines()
        .skip_while(|line| line.strip_suffix(':') != Some(package));
    lines.next()?;
    lines
        .take_while(|line| line.starts_with(' '))
        .find_map(|line| line.trim_start().strip_prefix(name))
        .filter(|version| *version != "(none)")
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGETS: &str = "\
Packages Debian http://a.example/debian/ bookworm bookworm main
DEP-11 Debian http://a.example/debian/ bookworm bookworm main
Packages Debian http://a.example/debian/ bookworm bookworm contrib
Packages Debian http://a.example/debian/ bookworm-updates bookworm-updates main
Packages Debian http://a.example/security/ bookworm-security bookworm-security main
Packages Elsewhere http://b.example/ nodistro nodistro main
";

    #[test]
    fn archives_follow_the_wanted_suite() -> Result<()> {
        let archives = for_suite(&parse_targets(TARGETS), "trixie")?;
        let lines: Vec<String> = archives
            .iter()
            .map(|a| format!("{} {} {}", a.uri, a.release, a.components.join(",")))
            .collect();
        assert_eq!(
            lines,
            [
                "http://a.example/debian/ trixie main,contrib",
                "http://a.example/debian/ trixie-updates main",
                "http://a.example/security/ trixie-security main",
            ]
        );
        Ok(())
    }

    #[test]
    fn candidate_is_of_the_package_asked_for() {
        let text = "a:\n  Installed: (none)\n  Candidate: 1.0\nab:\n  Candidate: (none)\n";
        assert_eq!(candidate(text, "a").as_deref(), Some("1.0"));
        assert_eq!(candidate(text, "ab"), None);
        assert_eq!(candidate(text, "b"), None);
    }
}
