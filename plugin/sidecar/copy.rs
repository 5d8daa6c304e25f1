//! A copy of a VNE under another name: what its members are called, and how
//! their configurations differ from the originals'.

use std::path::Path;

use serde_json::{Map, Value};

use super::error::Error;
use crate::image::Name;

/// Puts a vif on its VNE's own network; `bridge` names the VNE then.
const SCRIPT: &str = "vif-vne";

/// One member of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    /// The domain's name.
    pub name: Name,
    /// Its UUID.
    pub uuid: String,
    /// Its configuration.
    pub config_json: String,
}

/// What a member is called in a copy.
pub fn name_in(copy: &Name, member: &Name) -> Result<Name, Error> {
    Ok(Name::new(&format!("{copy}-{member}"))?)
}

/// The member of a copy called `copy` that is made from this one. Its addresses
/// stay; its network is the copy's own, and so are `disks`: the guest's name of each,
/// and what it is in dom0.
pub(super) fn member(
    copy: &Name,
    member: &Name,
    config_json: &str,
    disks: &[(&str, &Path)],
) -> Result<Member, Error> {
    let name = name_in(copy, member)?;
    let uuid = uuid().map_err(Error::start("get a random number"))?;
    let unfit = |why: String| Error::Failed(format!("'{member}' can't be copied: {why}"));
    let mut config: Value =
        serde_json::from_str(config_json).map_err(|error| unfit(error.to_string()))?;
    let what = |key: &str| unfit(format!("its configuration has no {key}"));
    let root = config.as_object_mut().ok_or_else(|| what("contents"))?;
    for disk in root
        .get_mut("disks")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        let vdev = disk.get("vdev").and_then(Value::as_str);
        let own = disks.iter().find(|(name, _)| vdev == Some(name));
        if let (Some((_, path)), Some(disk)) = (own, disk.as_object_mut()) {
            disk.insert("pdev_path".to_owned(), path.to_string_lossy().into());
        }
    }
    refuse_shared(root, disks).map_err(unfit)?;
    let domain = root.get_mut("c_info").and_then(Value::as_object_mut);
    let domain = domain.ok_or_else(|| what("c_info"))?;
    domain.insert("name".to_owned(), name.as_str().into());
    domain.insert("uuid".to_owned(), uuid.as_str().into());
    let nics = root.get_mut("nics").and_then(Value::as_array_mut);
    for nic in nics.into_iter().flatten() {
        let nic = nic.as_object_mut().ok_or_else(|| what("sensible nics"))?;
        // The original's interface in dom0 has it.
        nic.remove("ifname");
        nic.insert("bridge".to_owned(), copy.as_str().into());
        nic.insert("script".to_owned(), SCRIPT.into());
    }
    Ok(Member {
        name,
        uuid,
        config_json: config.to_string(),
    })
}

/// What two domains can't have at a time.
fn refuse_shared(config: &Map<String, Value>, own: &[(&str, &Path)]) -> Result<(), String> {
    let list = |key: &str| {
        let found = config.get(key).and_then(Value::as_array);
        found.map(Vec::as_slice).unwrap_or_default()
    };
    let text = |value: &Value, key: &str| {
        let found = value.get(key).and_then(Value::as_str);
        found.unwrap_or("?").to_owned()
    };
    let writes = |disk: &&Value| match disk.get("readwrite") {
        Some(Value::Bool(writes)) => *writes,
        Some(Value::Number(number)) => number.as_u64() != Some(0),
        _ => false,
    };
    let shared = |disk: &&Value| {
        let vdev = disk.get("vdev").and_then(Value::as_str);
        writes(disk) && !own.iter().any(|(name, _)| vdev == Some(name))
    };
    if let Some(disk) = list("disks").iter().find(shared) {
        return Err(format!(
            "it writes to the disk {} ({}), which the original may use, and which isn't in the \
             snapshot (take one without --memory-only)",
            text(disk, "vdev"),
            text(disk, "pdev_path")
        ));
    }
    for key in ["pcidevs", "usbctrls", "usbdevs", "p9s", "pvcallsifs"] {
        if !list(key).is_empty() {
            return Err(format!("it has {key}, which the original may use"));
        }
    }
    Ok(())
}

/// A random UUID (RFC 9562, version 4).
fn uuid() -> std::io::Result<String> {
    let (high, low) = (crate::random::number()?, crate::random::number()?);
    let high = high & !0xf000 | 0x4000;
    let low = low & !(0b11 << 62) | 0b10 << 62;
    Ok(format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high >> 32,
        high >> 16 & 0xffff,
        high & 0xffff,
        low >> 48,
        low & 0xffff_ffff_ffff
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn made(config: &str) -> Result<Member, Error> {
        made_with(config, &[])
    }

    fn made_with(config: &str, disks: &[(&str, &Path)]) -> Result<Member, Error> {
        let (copy, web) = (Name::new("try").unwrap(), Name::new("web").unwrap());
        member(&copy, &web, config, disks)
    }

    #[test]
    fn a_copy_has_disks_of_its_own_and_shares_those_that_are_only_read() {
        let config = r#"{"c_info":{},"disks":[
            {"vdev":"xvda","pdev_path":"/dev/vg/web","readwrite":1},
            {"vdev":"xvdb","pdev_path":"/cd.iso","readwrite":0}]}"#;
        let made = made_with(config, &[("xvda", Path::new("/dev/vg/try-web"))]).unwrap();
        let config: Value = serde_json::from_str(&made.config_json).unwrap();
        assert_eq!(config["disks"][0]["pdev_path"], "/dev/vg/try-web");
        assert_eq!(config["disks"][1]["pdev_path"], "/cd.iso");
    }

    #[test]
    fn a_copy_has_names_and_a_network_of_its_own_and_keeps_addresses() {
        let made = made(
            r#"{"c_info":{"type":"pv","name":"web","uuid":"u"},"b_info":{"max_vcpus":2},
                "disks":[{"vdev":"xvda","readwrite":0}],
                "nics":[{"mac":"00:16:3e:00:00:01","ip":"10.0.0.1","bridge":"xenbr0",
                         "ifname":"lan0"}]}"#,
        )
        .unwrap();
        assert_eq!(made.name.as_str(), "try-web");
        let config: Value = serde_json::from_str(&made.config_json).unwrap();
        assert_eq!(config["c_info"]["name"], "try-web");
        assert_eq!(config["c_info"]["uuid"], made.uuid.as_str());
        assert_eq!(config["b_info"]["max_vcpus"], 2);
        let nic = serde_json::json!({"mac": "00:16:3e:00:00:01", "ip": "10.0.0.1",
            "bridge": "try", "script": "vif-vne"});
        assert_eq!(config["nics"][0], nic);
    }

    #[test]
    fn what_two_domains_cannot_share_is_refused() {
        for (config, why) in [
            (
                r#"{"c_info":{},"disks":[{"vdev":"xvdb","readwrite":1}]}"#,
                "xvdb",
            ),
            (
                r#"{"c_info":{},"disks":[{"vdev":"xvdb","readwrite":true}]}"#,
                "xvdb",
            ),
            (r#"{"c_info":{},"pcidevs":[{"func":0}]}"#, "pcidevs"),
            (r#"{"nics":[]}"#, "c_info"),
            ("[]", "contents"),
            ("{", "copied"),
        ] {
            let error = made(config).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn uuids_are_random_ones_of_version_4() {
        let (one, other) = (uuid().unwrap(), uuid().unwrap());
        assert_ne!(one, other);
        assert_eq!(one.len(), 36);
        assert_eq!(one.as_bytes()[14], b'4');
        assert!(b"89ab".contains(&one.as_bytes()[19]));
    }
}
