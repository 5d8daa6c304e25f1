//! This host and its peers: `/etc/xen/vne.conf`, in xl's syntax.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{flock, FlockOperation};

use super::statements::{statements, warn_of_unknown_keys};
use super::xlcfg::{XlConfig, CONFIG_BYTES_MAX};
use super::Failure;
use crate::image::{KeySource, Name};
use crate::sentence::sentence;
use crate::sidecar::conf::{host_name, listen_address, Conf, Peer};
use crate::sidecar::files;

/// The file, below Xen's folder of configuration files.
pub const FILE: &str = "vne.conf";

/// All keys.
const KEYS: [&str; 8] = [
    "name",
    "listen",
    "peers",
    "accept_members",
    "at_shutdown",
    "store_key",
    "store_key_command",
    "store_memory_mib",
];

/// What the file says, and nothing that it doesn't.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Said {
    /// This host's name.
    pub name: Option<Name>,
    /// Where its daemon listens.
    pub listen: Option<String>,
    /// The others.
    pub peers: Vec<Peer>,
    /// Those that say which members run here.
    pub accept_members: Vec<Name>,
    /// VNEs to save when the host is shut down.
    pub at_shutdown: Vec<Name>,
    /// Where the key of this host's stores comes from.
    pub store_key: Option<KeySource>,
    /// MiB that members may take together while they are stored or read back.
    pub store_memory_mib: Option<u32>,
}

impl Said {
    fn parse(source: &str, text: &[u8]) -> Result<Self, Failure> {
        let config = XlConfig::parse(source, text)?;
        let bad = |error| format!("{source}: {}", sentence(&error));
        let name = config.string(c"name")?;
        let listen = config.string(c"listen")?;
        let peers = config.list(c"peers")?.unwrap_or_default();
        let peers: Result<Vec<Peer>, _> = peers.iter().map(|item| item.parse()).collect();
        let accepted = config.list(c"accept_members")?.unwrap_or_default();
        let accepted: Result<_, _> = accepted.iter().map(|name| host_name(name)).collect();
        let vnes = config.list(c"at_shutdown")?.unwrap_or_default();
        let vnes: Result<Vec<Name>, _> = vnes.iter().map(|vne| Name::new(vne)).collect();
        let store_key = match (
            config.string(c"store_key")?,
            config.string(c"store_key_command")?,
        ) {
            (Some(_), Some(_)) => {
                return Err(format!(
                    "{source}: store_key and store_key_command can't both say where the key is"
                )
                .into());
            }
            (Some(file), None) => Some(KeySource::File(file.into())),
            (None, command) => command.map(KeySource::Command),
        };
        Ok(Self {
            store_key,
            store_memory_mib: config.number(c"store_memory_mib", 24, 1 << 20)?,
            name: name.map(|name| host_name(&name)).transpose().map_err(bad)?,
            listen: listen
                .map(|listen| listen_address(&listen))
                .transpose()
                .map_err(bad)?,
            peers: peers.map_err(bad)?,
            accept_members: accepted.map_err(bad)?,
            at_shutdown: vnes.map_err(|error| format!("{source}: {}", sentence(&error)))?,
        })
    }

    /// All of it; a host that isn't named has the name of its node.
    pub fn complete(self, path: &Path) -> Result<Conf, Failure> {
        let conf = Conf {
            name: match self.name {
                Some(name) => name,
                None => node_name(path)?,
            },
            listen: self.listen,
            peers: self.peers,
            accept_members: self.accept_members,
            store_key: self.store_key,
            store_memory_mib: self.store_memory_mib,
        };
        conf.check()
            .map_err(|error| format!("{}: {}", path.display(), sentence(&error)))?;
        Ok(conf)
    }
}

/// The node's name up to its first dot.
fn node_name(path: &Path) -> Result<Name, Failure> {
    let system = rustix::system::uname();
    let node = system.nodename().to_string_lossy();
    let first = node.split('.').next().unwrap_or_default();
    Ok(host_name(first).map_err(|error| {
        let way_out = format!("say name = \"NAME\" in {}", path.display());
        format!("{}; {way_out}", sentence(&error))
    })?)
}

/// Reads the file; without it this host has no peers.
pub fn load(config_dir: &Path) -> Result<Conf, Failure> {
    let path = config_dir.join(FILE);
    let text = read(&path)?;
    let source = path.to_string_lossy();
    let said = Said::parse(&source, &text)?;
    warn_of_unknown_keys(&source, &text, &KEYS);
    said.complete(&path)
}

/// The VNEs that are to be saved when this host is shut down, in that order.
pub fn at_shutdown(config_dir: &Path) -> Result<Vec<Name>, Failure> {
    let path = config_dir.join(FILE);
    Ok(Said::parse(&path.to_string_lossy(), &read(&path)?)?.at_shutdown)
}

/// A file that doesn't exist says nothing.
fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let failed = |error| format!("{}: {error}", path.display());
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut text = Vec::new();
    file.take(CONFIG_BYTES_MAX as u64 + 1)
        .read_to_end(&mut text)
        .map_err(failed)?;
    Ok(text)
}

/// The file while it's changed. Nobody else changes it meanwhile, and all that
/// isn't replaced stays as it is.
pub struct Editor {
    path: PathBuf,
    text: Vec<u8>,
    said: Said,
    /// Kept for its lock.
    _lock: File,
}

impl Editor {
    /// Reads the file when all others are done with it.
    pub fn open(config_dir: &Path) -> Result<Self, Failure> {
        let lock = lock(config_dir)?;
        let path = config_dir.join(FILE);
        // Where it is a link, the file itself is replaced.
        let path = path.canonicalize().unwrap_or(path);
        let text = read(&path)?;
        let source = path.to_string_lossy();
        let said = Said::parse(&source, &text)?;
        warn_of_unknown_keys(&source, &text, &KEYS);
        Ok(Self {
            path,
            text,
            said,
            _lock: lock,
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it said when it was read.
    pub fn said(&self) -> &Said {
        &self.said
    }

    /// Says who this host is, if the file doesn't yet.
    pub fn introduce(&mut self, name: &Name, listen: &str) -> Result<(), Failure> {
        if self.said.name.is_none() {
            self.set("name", &format!("\"{name}\""))?;
        }
        if self.said.listen.is_none() {
            self.set("listen", &format!("\"{listen}\""))?;
        }
        Ok(())
    }

    /// Replaces all peers.
    pub fn set_peers(&mut self, peers: &[Peer]) -> Result<(), Failure> {
        let items = peers.iter().map(|peer| format!("\n    \"{peer}\","));
        let items: String = items.collect();
        let end = if items.is_empty() { " " } else { "\n" };
        self.set("peers", &format!("[{items}{end}]"))
    }

    /// Makes sure that the new text says what is meant, and unless `dry_run`
    /// puts it in the old one's place.
    pub fn finish(self, meant: &Conf, dry_run: bool) -> Result<(), Failure> {
        let source = self.path.to_string_lossy();
        meant
            .check()
            .map_err(|error| format!("{source}: {}", sentence(&error)))?;
        let says = Said::parse(&source, &self.text)?.complete(&self.path)?;
        if says != *meant {
            return Err(format!(
                "{source}: this text can't be changed safely, and wasn't; change it by hand"
            )
            .into());
        }
        if !dry_run {
            files::replace(&self.path, &self.text).map_err(|error| format!("{source}: {error}"))?;
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), Failure> {
        let new = format!("{key} = {value}");
        let source = self.path.display();
        let mut found = statements(&self.text)
            .into_iter()
            .filter(|statement| statement.key == key);
        match (found.next(), found.next()) {
            (None, _) => {
                if self.text.last().is_some_and(|&last| last != b'\n') {
                    self.text.push(b'\n');
                }
                self.text.extend_from_slice(new.as_bytes());
                self.text.push(b'\n');
            }
            (Some(old), None) if !old.commented => {
                self.text.splice(old.range, new.into_bytes());
            }
            (Some(_), None) => {
                return Err(format!(
                    "{source}: the comments within '{key}' would be lost; put them above it"
                )
                .into())
            }
            (Some(_), Some(_)) => {
                return Err(format!("{source}: there is more than one '{key}'; make it one").into())
            }
        }
        Ok(())
    }
}

/// The folder's lock, as the file itself is replaced. Held for as long as it
/// takes to write a few files.
fn lock(folder: &Path) -> Result<File, Failure> {
    let failed = |error| format!("{}: {error}", folder.display());
    let lock = File::open(folder).map_err(failed)?;
    loop {
        match flock(&lock, FlockOperation::LockExclusive) {
            Ok(()) => return Ok(lock),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed(errno.into()).into()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    const BETA: &str = "name=beta,address=10.0.0.2:7791,\
                        fingerprint=bbbb-bbbb-bbbb-bbbb-bbbb-bbbb-bbbb-bbbb,vne=lab,vne=web";
    const GAMMA: &str = "name=gamma,address=[::1]:7791,\
                         fingerprint=cccc-cccc-cccc-cccc-cccc-cccc-cccc-cccc,vne=lab";

    fn folder(text: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), text).unwrap();
        dir
    }

    fn text_in(dir: &tempfile::TempDir) -> String {
        fs::read_to_string(dir.path().join(FILE)).unwrap()
    }

    fn set_peers(dir: &tempfile::TempDir, items: &[&str]) -> Result<(), Failure> {
        let mut editor = Editor::open(dir.path())?;
        let mut conf = editor.said().clone().complete(editor.path())?;
        conf.peers = items.iter().map(|item| item.parse().unwrap()).collect();
        editor.set_peers(&conf.peers)?;
        editor.finish(&conf, false)
    }

    #[test]
    fn without_the_file_there_are_no_peers() {
        let dir = tempfile::tempdir().unwrap();
        let conf = load(dir.path()).unwrap();
        assert_eq!((conf.listen, conf.peers), (None, Vec::new()));
        let node = rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned();
        assert!(node.starts_with(conf.name.as_str()));
    }

    #[test]
    fn all_keys_are_read() {
        let dir = folder(&format!(
            "name = 'alpha'\nlisten = \"10.0.0.1\"\npeers = [ \"{BETA}\", \"{GAMMA}\" ]\n"
        ));
        let conf = load(dir.path()).unwrap();
        assert_eq!(conf.name.as_str(), "alpha");
        assert_eq!(conf.listen.as_deref(), Some("10.0.0.1:7791"));
        assert_eq!(conf.peers, [BETA, GAMMA].map(|item| item.parse().unwrap()));
        assert_eq!(at_shutdown(dir.path()).unwrap(), []);
        let dir = folder("at_shutdown = [ \"lab\", \"web\" ]\n");
        let expected = ["lab", "web"].map(|vne| Name::new(vne).unwrap());
        assert_eq!(at_shutdown(dir.path()).unwrap(), expected);
    }

    #[test]
    fn errors_name_the_file_and_what_is_wrong() {
        for (text, expected) in [
            ("name = \"a/b\"", "can't name a host"),
            ("listen = \"lo\"", "no address to listen at"),
            ("peers = \"beta\"", "must be a list"),
            ("peers = [ \"name=beta\" ]", "has no address"),
            (&format!("name='beta';peers=['{BETA}']"), "this host itself"),
            (&format!("peers=['{BETA}','{BETA}']"), "two peers"),
        ] {
            let dir = folder(text);
            let error = load(dir.path()).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(FILE), "{error}");
        }
    }

    #[test]
    fn what_is_not_replaced_stays_byte_for_byte() {
        for (before, after) in [
            (
                "# mine\r\n\n  peers=[ 'OLD'  ,\n ] # those;\n\tname = 'a' ;;",
                "",
            ),
            (
                "name = 'peers = [ ]'; listen='[::]'\n# peers = [ 'OLD' ]\n",
                "\n",
            ),
            ("", "\n"),
            ("listen='[::]'", "\n"),
            (
                "peers += [ 'OLD' ] ; name=\"b\"\nfuture = [ 1, \"x\\\"]\" ]\n",
                "",
            ),
        ] {
            let text = before.replace("OLD", GAMMA).replace("peers = [ ]", "b");
            let dir = folder(&text);
            set_peers(&dir, &[BETA]).unwrap();
            let got = text_in(&dir);
            let new = format!("peers = [\n    \"{BETA}\",\n]");
            assert_eq!(got.matches(&new).count(), 1, "{got}");
            let old = statements(text.as_bytes());
            let old = old.iter().find(|old| old.key == "peers");
            let expected = match old {
                Some(old) => text.replacen(&text[old.range.clone()], &new, 1),
                None if text.is_empty() || text.ends_with('\n') => text + &new + after,
                None => text + "\n" + &new + after,
            };
            assert_eq!(got, expected);
            set_peers(&dir, &[]).unwrap();
            assert_eq!(text_in(&dir), expected.replace(&new, "peers = [ ]"));
        }
    }

    #[test]
    fn what_would_be_lost_is_not_replaced() {
        for (text, expected) in [
            (
                format!("peers = [\n# of old\n'{GAMMA}' ]\n"),
                "comments within",
            ),
            ("peers = [ ]\npeers = [ ]\n".into(), "more than one"),
        ] {
            let dir = folder(&text);
            let error = set_peers(&dir, &[BETA]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert_eq!(text_in(&dir), text);
        }
    }

    #[test]
    fn a_text_that_would_not_say_what_is_meant_is_not_written() {
        let dir = folder("peers = [ ]\n");
        let mut editor = Editor::open(dir.path()).unwrap();
        let mut conf = editor.said().clone().complete(editor.path()).unwrap();
        editor.set_peers(&[BETA.parse().unwrap()]).unwrap();
        conf.peers = vec![GAMMA.parse().unwrap()];
        assert!(editor.finish(&conf, false).is_err());
        assert_eq!(text_in(&dir), "peers = [ ]\n");
    }

    #[test]
    fn mode_and_link_are_kept() {
        let dir = folder("");
        let (link, file) = (dir.path().join(FILE), dir.path().join("elsewhere"));
        fs::rename(&link, &file).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("elsewhere", &link).unwrap();
        set_peers(&dir, &[BETA]).unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o640);
        assert!(fs::read_to_string(&file).unwrap().contains(BETA));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn no_two_change_it_at_a_time() {
        let dir = folder("name = 'alpha'\n");
        std::thread::scope(|scope| {
            for at in 0..8 {
                let dir = &dir;
                scope.spawn(move || {
                    let mut editor = Editor::open(dir.path()).unwrap();
                    let mut conf = editor.said().clone().complete(editor.path()).unwrap();
                    let item = BETA.replace("beta", &format!("p{at}"));
                    let item = item.replace("bbbb-bbbb", &format!("bbbb-bbb{at}"));
                    conf.peers.push(item.parse().unwrap());
                    editor.set_peers(&conf.peers).unwrap();
                    editor.finish(&conf, false).unwrap();
                });
            }
        });
        assert_eq!(load(dir.path()).unwrap().peers.len(), 8);
    }
}
