//! A VNE's description: `/etc/xen/vne/NAME.cfg`, in xl's syntax.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::PathBuf;

use super::statements::warn_of_unknown_keys;
use super::xlcfg::{XlConfig, CONFIG_BYTES_MAX};
use super::{Failure, Host};
use crate::cut::OnDivergence;
use crate::image::Name;
use crate::net::overlay::{Settings, VNI_MAX};

/// All keys.
const KEYS: [&str; 9] = [
    "members",
    "store",
    "hold_kib",
    "precopy_max",
    "last_copy_ms",
    "diverging",
    "memory_only",
    "vni",
    "vxlan_port",
];

/// What the file may say. What it doesn't say is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VneConfig {
    /// The members, by domain name.
    pub members: Vec<String>,
    /// Where its snapshots are kept.
    pub store: Option<PathBuf>,
    /// Size of each vif's hold queue, in KiB.
    pub hold_kib: Option<u32>,
    /// How long pre-copy may take, in seconds.
    pub precopy_max_s: Option<u32>,
    /// How long copying the last pages may be expected to take, in ms.
    pub last_copy_ms: Option<u32>,
    /// What to do about members that don't converge.
    pub diverging: Option<OnDivergence>,
    /// Whether to leave out what is on the members' disks.
    pub memory_only: bool,
    /// About its own network, if it has one.
    pub network: Settings,
}

impl VneConfig {
    /// The file's place for a VNE.
    pub fn path(host: &Host, vne: &Name) -> PathBuf {
        host.config_dir.join("vne").join(format!("{vne}.cfg"))
    }

    /// Reads the description of a VNE, if there is one.
    pub fn find(host: &Host, vne: &Name) -> Result<Option<Self>, Failure> {
        let path = Self::path(host, vne);
        let file = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|error| format!("{}: {error}", path.display()))?,
        };
        let mut text = Vec::new();
        file.take(CONFIG_BYTES_MAX as u64 + 1)
            .read_to_end(&mut text)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let source = path.to_string_lossy();
        let config = Self::parse(&source, &text)?;
        warn_of_unknown_keys(&source, &text, &KEYS);
        Ok(Some(config))
    }

    /// The stores that the descriptions of VNEs here name. One that can't be
    /// read is told of, and left out.
    pub fn all_stores(host: &Host) -> Vec<PathBuf> {
        let Ok(folder) = std::fs::read_dir(host.config_dir.join("vne")) else {
            return Vec::new();
        };
        let names = folder.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let vnes = names.filter_map(|name| Name::new(name.strip_suffix(".cfg")?).ok());
        vnes.filter_map(|vne| match Self::find(host, &vne) {
            Ok(config) => config?.store,
            Err(error) => {
                log::warn!("{error}");
                None
            }
        })
        .collect()
    }

    fn parse(source: &str, text: &[u8]) -> Result<Self, String> {
        let config = XlConfig::parse(source, text)?;
        let diverging = match config.string(c"diverging")?.as_deref() {
            None => None,
            Some("go") => Some(OnDivergence::Go),
            Some("throttle") => Some(OnDivergence::Throttle),
            Some("abort") => Some(OnDivergence::Abort),
            Some(other) => {
                return Err(format!(
                    "{source}: 'diverging' is '{other}', but must be go, throttle or abort"
                ))
            }
        };
        let members = config.list(c"members")?;
        Ok(Self {
            members: members.ok_or_else(|| {
                format!("{source}: 'members' is missing (members = [ \"DOMAIN\", … ])")
            })?,
            store: config.string(c"store")?.map(PathBuf::from),
            hold_kib: config.number(c"hold_kib", 16, 1 << 20)?,
            precopy_max_s: config.number(c"precopy_max", 1, 86_400)?,
            last_copy_ms: config.number(c"last_copy_ms", 1, 60_000)?,
            diverging,
            memory_only: config.number(c"memory_only", 0, 1)? == Some(1),
            network: Settings {
                vni: config.number(c"vni", 1, VNI_MAX)?,
                port: config
                    .number(c"vxlan_port", 1, u32::from(u16::MAX))?
                    .and_then(|port| u16::try_from(port).ok()),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_keys_are_read() -> Result<(), String> {
        let values = [
            "[ \"a\" ]",
            "\"/x\"",
            "16",
            "1",
            "1",
            "\"go\"",
            "1",
            "2",
            "3",
        ];
        let text: String = KEYS
            .iter()
            .zip(values)
            .map(|(key, value)| format!("{key} = {value}\n"))
            .collect();
        let config = VneConfig::parse("lab.cfg", text.as_bytes())?;
        assert!(config.store.is_some() && config.hold_kib.is_some());
        assert!(config.precopy_max_s.is_some() && config.last_copy_ms.is_some());
        assert_eq!(config.diverging, Some(OnDivergence::Go));
        assert!(config.memory_only);
        let (vni, port) = (Some(2), Some(3));
        assert_eq!(config.network, Settings { vni, port });
        Ok(())
    }

    #[test]
    fn everything_is_read() -> Result<(), String> {
        let text = b"members = [ \"a\", \"b\" ]\nstore = \"/srv/vne\"\nhold_kib = 512\n\
                     precopy_max = 30\nlast_copy_ms = 20\ndiverging = \"go\"\n";
        let config = VneConfig::parse("lab.cfg", text)?;
        let expected = VneConfig {
            members: vec!["a".into(), "b".into()],
            store: Some("/srv/vne".into()),
            hold_kib: Some(512),
            precopy_max_s: Some(30),
            last_copy_ms: Some(20),
            diverging: Some(OnDivergence::Go),
            memory_only: false,
            network: Settings::default(),
        };
        assert_eq!(config, expected);
        Ok(())
    }

    #[test]
    fn errors_name_the_key_and_the_way_out() {
        for (text, expected) in [
            ("store = \"/srv\"", "'members' is missing"),
            ("members = \"a\"", "'members' must be a list"),
            ("members = [ \"a\" ]\nhold_kib = 1", "from 16 to"),
            (
                "members = [ \"a\" ]\ndiverging = \"maybe\"",
                "go, throttle or abort",
            ),
        ] {
            let error = VneConfig::parse("lab.cfg", text.as_bytes()).unwrap_err();
            assert!(
                error.contains(expected) && error.contains("lab.cfg"),
                "{error}"
            );
        }
    }
}
