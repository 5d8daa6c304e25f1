//! Guests: the stock kernel, and an initial RAM disk with the static init
//! `vne-guest` in it, which brings up the network, dirties memory, runs a
//! workload and tells all about it.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use sha2::{Digest, Sha256};

use super::cache::{Cache, Key};
use super::cpio::Cpio;
use super::image::Image;
use super::process;
use super::qemu::shell_quote;
use super::shape::Flavour;

const BUILD_LIMIT: Duration = Duration::from_secs(1200);
/// What's said by a host that hasn't got the common initrd yet.
pub const INITRD_MISSING: i32 = 77;
/// How long a guest may take until it reports that it's ready.
const READY_LIMIT_S: u32 = 180;
/// The folder in a host where guests' files are.
pub const FOLDER: &str = "/var/lib/xl-vne-lab";

/// A guest to be started.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The domain's name.
    pub name: String,
    /// PV or PVH; without it what the lab's flavour is for.
    pub kind: Option<Flavour>,
    /// Memory.
    pub memory_mib: u32,
    /// Virtual processors.
    pub vcpus: u32,
    /// Pages written a second.
    pub dirty_pages_per_s: u32,
    /// Over how much memory they're spread.
    pub working_set_mib: u32,
    /// Its address; without it one that follows from host and name.
    pub ip: Option<Ipv4Addr>,
    /// The last bytes of its MAC address; without them some that follow from host
    /// and name.
    pub mac: Option<[u8; 3]>,
    /// The VNE whose own network it's on, if it isn't on the hosts'.
    pub vne: Option<String>,
    /// Its disks, as xl wants them.
    pub disks: Vec<String>,
    /// Files to be found at `/BASENAME` in the guest.
    pub add: Vec<PathBuf>,
    /// The workload and its arguments.
    pub workload: Vec<String>,
}

impl Guest {
    /// A guest that does nothing, with everything else as usual.
    pub fn new(name: &str) -> Self {
        Guest {
            name: name.to_owned(),
            kind: None,
            memory_mib: 256,
            vcpus: 1,
            dirty_pages_per_s: 0,
            working_set_mib: 64,
            ip: None,
            mac: None,
            vne: None,
            disks: Vec::new(),
            add: Vec::new(),
            workload: Vec::new(),
        }
    }

    /// Refuses what can't work, before anything is started.
    pub fn check(&self) -> Result<()> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.name.is_empty() || !self.name.chars().all(plain) || self.name.starts_with('-') {
            bail!(
                "{:?} is no name for a guest: letters, digits, -, _ and . only",
                self.name
            );
        }
        if self.working_set_mib + 64 > self.memory_mib {
            bail!(
                "a working set of {} MiB doesn't fit into {} MiB of memory: \
                 leave 64 MiB, or set --memory",
                self.working_set_mib,
                self.memory_mib
            );
        }
        if let Some(disk) = self
            .disks
            .iter()
            .find(|disk| !disk.chars().all(|c| plain(c) || "/:,=".contains(c)))
        {
            bail!("{disk:?} is no disk of xl's, such as phy:/dev/vg0/web,xvda,w");
        }
        if let Some(word) = self.workload.iter().find(|word| word.contains('\n')) {
            bail!("a workload's argument has a line break in it: {word:?}");
        }
        Ok(())
    }

    /// The guest's address.
    pub fn address(&self, host: usize) -> Ipv4Addr {
        self.ip.unwrap_or_else(|| {
            let hash = name_hash(host, &self.name);
            Ipv4Addr::new(10, 77, 16 + host as u8, 2 + hash[0] % 250)
        })
    }

    /// The guest's own part of its initrd: its settings and added files.
    pub fn overlay(&self, host: usize) -> Result<Vec<u8>> {
        let mut settings = format!(
            "name={}\nip={}/16\ndirty={}\nworking_set={}\n",
            self.name,
            self.address(host),
            self.dirty_pages_per_s,
            self.working_set_mib
        );
        for word in &self.workload {
            settings.push_str(&format!("arg={word}\n"));
        }
        let mut cpio = Cpio::default();
        cpio.file("etc/vne", false, settings.as_bytes());
        for path in &self.add {
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .with_context(|| format!("{} has no usable base name", path.display()))?;
            let content = std::fs::read(path)
                .with_context(|| format!("cannot read {} to add it", path.display()))?;
            cpio.file(name, true, &content);
        }
        let bytes = cpio.finish();
        if bytes.len() as u64 > u64::from(self.memory_mib) << 18 {
            bail!(
                "the added files are {} MiB, too much for {} MiB of memory: set --memory",
                bytes.len() >> 20,
                self.memory_mib
            );
        }
        Ok(bytes)
    }

    /// xl's configuration of the domain.
    pub fn config(&self, host: usize, flavour: Flavour) -> String {
        let kind = self.kind.unwrap_or(flavour).name();
        let name = &self.name;
        let hash = name_hash(host, name);
        let mac = self.mac.unwrap_or([hash[1] & 0x7f, hash[2], hash[3]]);
        let bridge = match &self.vne {
            Some(vne) => format!("script=vif-vne,bridge={vne}"),
            None => String::from("bridge=xenbr0"),
        };
        let disks: Vec<String> = self.disks.iter().map(|disk| format!("{disk:?}")).collect();
        format!(
            "name = \"{name}\"\n\
             type = \"{kind}\"\n\
             kernel = \"/boot/vmlinuz-guest\"\n\
             ramdisk = \"{FOLDER}/{name}.initrd\"\n\
             extra = \"console=hvc0 loglevel=4 panic=1\"\n\
             memory = {}\n\
             maxmem = {}\n\
             vcpus = {}\n\
             vif = [ \"mac=00:16:3e:{:02x}:{:02x}:{:02x},{bridge}\" ]\n\
             disk = [ {} ]\n\
             on_crash = \"destroy\"\n",
            self.memory_mib,
            self.memory_mib,
            self.vcpus,
            mac[0],
            mac[1],
            mac[2],
            disks.join(", "),
        )
    }

    /// The script that starts the guest in a host, with [`Guest::overlay`] as
    /// its input, and waits until the guest is ready.
    pub fn script(&self, host: usize, flavour: Flavour, initrd: &str) -> String {
        let name = shell_quote(&self.name);
        let log = console_log(&self.name);
        format!(
            "set -e
cd {FOLDER}
[ -e {initrd} ] || exit {INITRD_MISSING}
{{ cat {initrd} -; }} >{name}.initrd
cat >{name}.cfg <<'END-OF-CONFIG'
{config}END-OF-CONFIG
log={log}
if xl domid {name} >/dev/null 2>&1; then
    echo 'there is a domain of this name already' >&2
    exit 1
fi
before=$(stat -c %s \"$log\" 2>/dev/null || echo 0)
xl create -q {name}.cfg >&2
if vne-guest await-ready \"$log\" --from \"$before\" --seconds {READY_LIMIT_S}; then exit 0; fi
xl list >&2
# Out of the way of the next attempt; what it said is kept.
xl destroy {name} >/dev/null 2>&1
exit 1",
            config = self.config(host, flavour),
        )
    }
}

/// Where a host keeps all that a guest's console ever said.
pub fn console_log(name: &str) -> String {
    shell_quote(&format!("/var/log/xen/console/guest-{name}.log"))
}

fn name_hash(host: usize, name: &str) -> [u8; 4] {
    let digest = Sha256::digest(format!("{host} {name}"));
    let mut hash = [0u8; 4];
    hash.copy_from_slice(&digest[..4]);
    hash
}

/// Builds the static program `vne-guest` and returns its path.
pub fn binary(cache: &Cache) -> Result<PathBuf> {
    let target = "x86_64-unknown-linux-gnu";
    // One for each checkout: cargo takes a program that was built from another
    // one's newer sources for that of this one.
    let checkout = Key::new("checkout").with("path", workspace().display().to_string());
    let dir = cache.dir(&format!("guest-target-{}", checkout.finish()))?;
    let log = dir.join("build.log");
    // Only the last run is of interest; it's fine when there was none.
    let _ = std::fs::remove_file(&log);
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    process::logged(
        Command::new(cargo)
            .args(["build", "--release", "--package", "vne-guest"])
            .args(["--target", target, "--target-dir"])
            .arg(&dir)
            .current_dir(workspace())
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env(
                "RUSTFLAGS",
                "-C target-feature=+crt-static -C strip=symbols",
            ),
        &log,
        BUILD_LIMIT,
    )?;
    Ok(dir.join(target).join("release/vne-guest"))
}

/// The common part of all guests' initrds.
#[derive(Clone, Debug)]
pub struct Initrd {
    /// Where it is.
    pub path: PathBuf,
    /// The name it has in a host's folder.
    pub name: String,
}

/// Finds or builds the common part of all guests' initrds.
pub fn initrd(cache: &Cache, image: &Image) -> Result<Initrd> {
    let binary = binary(cache)?;
    let init =
        std::fs::read(&binary).with_context(|| format!("cannot read {}", binary.display()))?;
    let key = Key::new("guest-initrd")
        .with("init", &init)
        .with("format", "2")
        .with("image", &image.key)
        .finish();
    let dir = cache.artefact("guest-initrd", &key, |out| {
        let mut cpio = Cpio::default();
        for folder in ["dev", "proc", "sys", "etc", "modules"] {
            cpio.folder(folder);
        }
        cpio.device("dev/console", 5, 1);
        cpio.file("init", true, &init);
        // Called by the kernel when the toolstack asks for a shutdown.
        cpio.link("sbin/poweroff", "/init");
        for module in image.guest_modules()? {
            let (name, content) = plain_module(&module)?;
            cpio.file(&format!("modules/{name}"), false, &content);
        }
        std::fs::write(out.join("initrd"), cpio.finish()).context("cannot write the initrd")
    })?;
    Ok(Initrd {
        path: dir.join("initrd"),
        name: format!("initrd-{key}"),
    })
}

/// The name and content of a kernel module that needn't be unpacked any more: Debian
/// compresses them from 13 on, and the guests' init hands them to the kernel as they
/// are.
fn plain_module(path: &Path) -> Result<(String, Vec<u8>)> {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .with_context(|| format!("{} has no usable name", path.display()))?;
    let Some(plain) = name.strip_suffix(".xz") else {
        let content =
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        return Ok((name.to_owned(), content));
    };
    let output = process::output(Command::new("xz").arg("-dc").arg(path))?;
    if !output.status.success() {
        bail!(
            "{} can't be unpacked ({}): {}",
            path.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok((plain.to_owned(), output.stdout))
}

/// The checkout that this program was started from.
pub fn workspace() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package
        .ancestors()
        .nth(2)
        .unwrap_or(Path::new("."))
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_names_the_type_that_the_flavour_is_for_unless_told() {
        let mut guest = Guest::new("g1");
        assert!(guest.config(0, Flavour::Pv).contains("type = \"pv\""));
        assert!(guest.config(0, Flavour::Pvh).contains("type = \"pvh\""));
        guest.kind = Some(Flavour::Pvh);
        assert!(guest.config(0, Flavour::Pv).contains("type = \"pvh\""));
    }

    #[test]
    fn addresses_follow_from_host_and_name() {
        let guest = Guest::new("g1");
        assert_eq!(guest.address(0), guest.address(0));
        assert_ne!(guest.address(0), guest.address(1));
        assert_ne!(
            guest.config(0, Flavour::Pv),
            guest.config(1, Flavour::Pv),
            "the same MAC on two hosts"
        );
    }

    #[test]
    fn names_that_a_shell_or_xl_would_trip_over_are_refused() {
        for name in ["", "a b", "a;b", "-a", "a/b", "ä"] {
            assert!(Guest::new(name).check().is_err(), "{name:?}");
        }
        assert!(Guest::new("ring-1.a_b").check().is_ok());
    }
}
