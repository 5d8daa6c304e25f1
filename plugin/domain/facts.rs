//! What is known of a domain before it is touched, read from the JSON that
//! libxl makes of its configuration.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cpu::CpuFeatures;

/// How a guest is virtualised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DomainKind {
    /// Paravirtualised.
    Pv,
    /// Hardware-assisted without an emulated machine.
    Pvh,
    /// Fully virtualised, with a device model.
    Hvm,
}

impl std::fmt::Display for DomainKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Pv => "pv",
            Self::Pvh => "pvh",
            Self::Hvm => "hvm",
        })
    }
}

/// One network interface of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vif {
    /// libxl's number of the device within the domain.
    pub devid: u32,
    /// The interface's name in dom0.
    pub ifname: String,
    /// The guest's MAC address.
    pub mac: String,
    /// The bridge that it's on, if any is named.
    pub bridge: Option<String>,
    /// The script that connects it, if it isn't the usual one.
    #[serde(default)]
    pub script: Option<String>,
}

impl Vif {
    /// The bridge that has to be there before it's connected. Other scripts than the
    /// usual one give the name a meaning of their own.
    pub fn plain_bridge(&self) -> Option<&str> {
        let usual = |script: &str| script.ends_with("vif-bridge");
        let plain = self.script.as_deref().is_none_or(usual);
        self.bridge.as_deref().filter(|_| plain)
    }
}

/// One disk of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The guest's name for it, such as `xvda`.
    pub vdev: String,
    /// What holds its data in dom0.
    pub target: String,
    /// Whether the guest can write to it.
    pub readwrite: bool,
    /// libxl's name of its format; empty for raw.
    #[serde(default)]
    pub format: String,
    /// The script that attaches it, if it isn't the usual one.
    #[serde(default)]
    pub script: Option<String>,
    /// Whether another domain serves it.
    #[serde(default)]
    pub elsewhere: bool,
}

impl Disk {
    /// The file or device in dom0 that has to be there before it's attached. Other
    /// scripts than the usual one give the target a meaning of their own.
    pub fn path(&self) -> Option<&str> {
        let plain = self.script.is_none() && !self.elsewhere && self.target.starts_with('/');
        Some(self.target.as_str()).filter(|_| plain)
    }
}

/// A domain as it was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainFacts {
    /// Its name.
    pub name: String,
    /// Its number on this host, for this life.
    pub domid: u32,
    /// Its UUID in the usual notation.
    pub uuid: String,
    /// PV, PVH or HVM.
    pub kind: DomainKind,
    /// Memory in KiB.
    pub memory_kib: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// What its virtual CPUs may use together, in percent of one physical CPU; 0
    /// for all they want. None if the scheduler can't limit that.
    #[serde(default)]
    pub cap: Option<u32>,
    /// Its network interfaces.
    pub vifs: Vec<Vif>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// The features of the host's processors.
    #[serde(default)]
    pub host_cpu: Option<CpuFeatures>,
    /// libxl's JSON of the whole configuration, as `xl save` stores it.
    pub config_json: String,
}

impl DomainFacts {
    /// The guest's names for the disks that it can write to.
    pub fn writable_disks(&self) -> Vec<String> {
        let writable = self.disks.iter().filter(|disk| disk.readwrite);
        writable.map(|disk| disk.vdev.clone()).collect()
    }

    /// The guest's names for the disks that it can only read.
    pub fn read_only_disks(&self) -> Vec<String> {
        let read_only = self.disks.iter().filter(|disk| !disk.readwrite);
        read_only.map(|disk| disk.vdev.clone()).collect()
    }

    /// Reads the facts out of libxl's JSON. `domid` and `memory_kib` come from
    /// the hypervisor.
    pub fn from_config(domid: u32, memory_kib: u64, config_json: String) -> Result<Self, String> {
        let config: Value = serde_json::from_str(&config_json)
            .map_err(|error| format!("libxl's configuration of domain {domid}: {error}"))?;
        let text = |path: &str| config.pointer(path).and_then(Value::as_str);
        let name = text("/c_info/name").unwrap_or_default().to_owned();
        let kind = match text("/c_info/type") {
            Some("pv") => DomainKind::Pv,
            Some("pvh") => DomainKind::Pvh,
            Some("hvm") => DomainKind::Hvm,
            other => return Err(format!("{name}: unknown domain type {other:?}")),
        };
        let list = |path: &str| {
            let found = config.pointer(path).and_then(Value::as_array);
            found.map(Vec::as_slice).unwrap_or_default()
        };
        let vifs = list("/nics")
            .iter()
            .enumerate()
            .map(|(at, nic)| vif(&name, domid, at, nic))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            domid,
            uuid: text("/c_info/uuid").unwrap_or_default().to_owned(),
            kind,
            memory_kib,
            vcpus: vcpus(&config),
            cap: None,
            host_cpu: None,
            vifs,
            disks: list("/disks").iter().map(disk).collect(),
            name,
            config_json,
        })
    }
}

fn vcpus(config: &Value) -> u32 {
    let max = config
        .pointer("/b_info/max_vcpus")
        .and_then(Value::as_u64)
        .unwrap_or(1);
    u32::try_from(max).unwrap_or(u32::MAX)
}

fn vif(domain: &str, domid: u32, at: usize, nic: &Value) -> Result<Vif, String> {
    let text = |key: &str| nic.get(key).and_then(Value::as_str);
    let number = |key: &str| nic.get(key).and_then(Value::as_u64);
    let mac = text("mac").unwrap_or("?").to_owned();
    let elsewhere =
        number("backend_domid").is_some_and(|id| id != 0) || text("backend_domname").is_some();
    if elsewhere {
        return Err(format!(
            "{domain}: the interface with MAC {mac} is served by a driver domain, \
             whose frames can't be held from here"
        ));
    }
    // libxl leaves a devid of 0 out of its JSON, as the default.
    let devid = number("devid").unwrap_or(at as u64);
    let devid = u32::try_from(devid).map_err(|_| format!("{domain}: devid {devid}"))?;
    Ok(Vif {
        devid,
        ifname: text("ifname")
            .filter(|name| !name.is_empty())
            .map_or_else(|| format!("vif{domid}.{devid}"), str::to_owned),
        mac,
        bridge: text("bridge").map(str::to_owned),
        script: text("script").map(str::to_owned),
    })
}

fn disk(disk: &Value) -> Disk {
    let text = |key: &str| {
        let found = disk.get(key).and_then(Value::as_str);
        found.unwrap_or_default().to_owned()
    };
    let named = |key: &str| Some(text(key)).filter(|text| !text.is_empty());
    let domid = disk.get("backend_domid").and_then(Value::as_u64);
    Disk {
        vdev: text("vdev"),
        target: text("pdev_path"),
        readwrite: disk
            .get("readwrite")
            .is_some_and(|value| value.as_bool().unwrap_or(value.as_u64() != Some(0))),
        format: named("format")
            .filter(|format| format != "unknown")
            .unwrap_or_default(),
        script: named("script").filter(|script| script != "block"),
        elsewhere: domid.is_some_and(|domid| domid != 0) || named("backend_domname").is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_libxl_writes() -> Result<(), String> {
        let json = r#"{"c_info":{"type":"pvh","name":"web","uuid":"u-u"},
            "b_info":{"max_vcpus":2},"nics":[{"devid":0,"mac":"00:16:3e:00:00:01",
            "bridge":"xenbr0","ip":"10.0.0.1"},{"devid":3,"ifname":"lan0"}],
            "disks":[{"pdev_path":"/dev/vg/web","vdev":"xvda","readwrite":1}]}"#;
        let facts = DomainFacts::from_config(7, 262_144, json.to_owned())?;
        assert_eq!(facts.kind, DomainKind::Pvh);
        assert_eq!(facts.vcpus, 2);
        assert_eq!(facts.vifs[0].ifname, "vif7.0");
        assert_eq!(facts.vifs[1].ifname, "lan0");
        assert!(facts.disks[0].readwrite);
        assert_eq!(facts.disks[0].script, None);
        Ok(())
    }

    #[test]
    fn what_makes_a_disk_unfit_for_capture_is_read() -> Result<(), String> {
        let json = r#"{"c_info":{"type":"pv","name":"web"},"disks":[
            {"pdev_path":"/a.qcow2","vdev":"xvda","format":"qcow2","readwrite":1},
            {"pdev_path":"r0","vdev":"xvdb","format":"raw","script":"block-drbd","readwrite":1},
            {"pdev_path":"/dev/vg/x","vdev":"xvdc","backend_domname":"storage","readwrite":1},
            {"pdev_path":"/cd.iso","vdev":"xvdd","format":"raw","removable":1}]}"#;
        let facts = DomainFacts::from_config(7, 1, json.to_owned())?;
        assert_eq!(facts.disks[0].format, "qcow2");
        assert_eq!(facts.disks[1].script.as_deref(), Some("block-drbd"));
        assert!(facts.disks[2].elsewhere && !facts.disks[1].elsewhere);
        assert_eq!(facts.read_only_disks(), ["xvdd"]);
        assert_eq!(facts.writable_disks(), ["xvda", "xvdb", "xvdc"]);
        Ok(())
    }

    #[test]
    fn a_vif_in_a_driver_domain_is_refused_not_left_unheld() {
        let json = r#"{"c_info":{"type":"pv","name":"web"},
            "nics":[{"backend_domid":4,"mac":"00:16:3e:00:00:01"}]}"#;
        let error = DomainFacts::from_config(7, 1, json.to_owned()).unwrap_err();
        assert!(error.contains("driver domain"), "{error}");
    }
}
