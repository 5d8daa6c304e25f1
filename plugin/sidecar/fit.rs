//! Whether a host can run what was saved, as far as that can be told before
//! anything is touched. What gets by here, Xen itself refuses.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::copy;
use super::error::Error;
use super::workers::Program;
use crate::cpu::CpuFeatures;
use crate::domain::HostFacts;
use crate::image::{DomainType, Manifest, Member, Name};

/// What libxl leaves dom0 at least, in KiB (`LIBXL_MIN_DOM0_MEM`).
const DOM0_KIB_MIN: u64 = 128 << 10;
/// Members that one host may be asked about at a time.
const MEMBERS_MAX: usize = 1024;

/// What members need of the host that they're to run on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// The Xen that they ran on.
    pub xen_version: String,
    /// Each of them.
    pub members: Vec<Need>,
    /// Names that no domain may have, beside the members' own.
    #[serde(default)]
    pub absent: Vec<Name>,
}

/// What one member needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Need {
    /// What the domain will be called.
    pub domain: Name,
    /// Its kind.
    #[serde(rename = "type")]
    pub domain_type: DomainType,
    /// Its memory, in KiB.
    pub memory_kib: u64,
    /// The features that it uses, if that is known.
    #[serde(default)]
    pub cpu_features: Option<CpuFeatures>,
    /// Bridges that are to be there.
    #[serde(default)]
    pub bridges: Vec<String>,
    /// Disks that are to be there.
    #[serde(default)]
    pub disks: Vec<String>,
}

impl Needs {
    /// What these members of a snapshot need; or a copy of them, with a network of its
    /// own.
    pub fn of<'m>(
        manifest: &Manifest,
        members: impl IntoIterator<Item = &'m Member>,
        copy: Option<&Name>,
    ) -> Result<Self, Error> {
        let need = |member: &Member| {
            let ran_on = member.ran_on.clone().unwrap_or_default();
            Ok(Need {
                domain: match copy {
                    None => member.name.clone(),
                    Some(copy) => copy::name_in(copy, &member.name)?,
                },
                domain_type: member.domain_type,
                memory_kib: member.memory_kib,
                cpu_features: ran_on.cpu_features,
                bridges: match copy {
                    None => ran_on.bridges,
                    Some(_) => Vec::new(),
                },
                disks: ran_on.disks,
            })
        };
        let members = members.into_iter().map(need);
        Ok(Self {
            xen_version: manifest.xen_version.clone(),
            members: members.collect::<Result<_, Error>>()?,
            absent: Vec::new(),
        })
    }

    /// All names that no domain may have.
    pub fn names(&self) -> impl Iterator<Item = &Name> {
        let members = self.members.iter().map(|member| &member.domain);
        members.chain(&self.absent)
    }

    /// What is in the way on this host; nothing if they can run here.
    pub fn problems_here(&self, program: &Program) -> Result<Vec<String>, Error> {
        if self.members.len() > MEMBERS_MAX || self.absent.len() > MEMBERS_MAX {
            return Err(Error::Failed(format!("more than {MEMBERS_MAX} members")));
        }
        let names: Vec<_> = self.names().map(Name::as_str).collect();
        let bridge = |name: &str| {
            let plain = !name.contains('/') && !name.starts_with('.');
            plain && Path::new("/sys/class/net").join(name).exists()
        };
        let disk = |path: &str| Path::new(path).exists();
        Ok(self.problems(&host_facts(program, &names)?, bridge, disk))
    }

    /// The same, of the host with these facts.
    fn problems(
        &self,
        host: &HostFacts,
        has_bridge: impl Fn(&str) -> bool,
        has_disk: impl Fn(&str) -> bool,
    ) -> Vec<String> {
        let mut problems = Vec::new();
        for name in &host.taken {
            problems.push(format!(
                "a domain called '{name}' exists (destroy or rename it first: 'xl destroy {name}')"
            ));
        }
        let versions = (release(&self.xen_version), release(&host.xen_version));
        if let (Some(saved), Some(here)) = versions {
            if saved > here && !self.members.is_empty() {
                problems.push(format!(
                    "the snapshot is from Xen {}, and this is Xen {}: guests can't go back to an \
                     older one",
                    self.xen_version, host.xen_version
                ));
            }
        }
        for member in &self.members {
            let name = &member.domain;
            let runs = match member.domain_type {
                DomainType::Pv => host.pv,
                DomainType::Pvh | DomainType::Hvm => host.hvm,
            };
            if !runs {
                let kind = match member.domain_type {
                    DomainType::Pv => "PV",
                    DomainType::Pvh => "PVH",
                    DomainType::Hvm => "HVM",
                };
                problems.push(format!("'{name}' is {kind}, which this Xen doesn't run"));
            }
            let used = member.cpu_features.unwrap_or_default();
            let missing = used.missing_in(host.cpu);
            if !missing.is_empty() {
                let missing = missing.join(", ");
                problems.push(format!(
                    "'{name}' was shown processor features that this host lacks: {missing}"
                ));
            }
            for bridge in member.bridges.iter().filter(|bridge| !has_bridge(bridge)) {
                problems.push(format!("'{name}' needs the bridge {bridge}"));
            }
            for disk in member.disks.iter().filter(|disk| !has_disk(disk)) {
                problems.push(format!("'{name}' needs its disk {disk}"));
            }
        }
        let needed_kib: u64 = self.members.iter().map(|member| member.memory_kib).sum();
        let most = host.free_kib + host.dom0_kib.saturating_sub(DOM0_KIB_MIN);
        if needed_kib > most {
            problems.push(format!(
                "{} MiB of memory are needed, and {} MiB are free or dom0's to give",
                needed_kib >> 10,
                most >> 10
            ));
        }
        problems
    }
}

/// What this host has. Asked of a process that has libxl.
fn host_facts(program: &Program, names: &[&str]) -> Result<HostFacts, Error> {
    let mut command = program.command(&["host", "--"]);
    command.args(names).stdout(std::process::Stdio::piped());
    command.stderr(std::process::Stdio::inherit());
    let output = command.output();
    let output = output.map_err(Error::start("look at the host"))?;
    if !output.status.success() {
        return Err(Error::Failed(format!(
            "what this host has can't be read ({})",
            output.status
        )));
    }
    serde_json::from_slice(&output.stdout)
        .map_err(|error| Error::Failed(format!("what xl says of this host: {error}")))
}

/// Major and minor version.
fn release(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn host() -> HostFacts {
        HostFacts {
            xen_version: String::from("4.17.6-pre"),
            free_kib: 100 << 10,
            dom0_kib: 256 << 10,
            cpu: CpuFeatures::of_host(&[0, 1 << 28]),
            pv: true,
            hvm: false,
            taken: Vec::new(),
        }
    }

    fn needs() -> Needs {
        Needs {
            xen_version: String::from("4.17.5"),
            members: vec![Need {
                domain: Name::new("web").unwrap(),
                domain_type: DomainType::Pv,
                memory_kib: 228 << 10,
                cpu_features: Some(CpuFeatures::of_host(&[0, 1 << 28])),
                bridges: vec![String::from("br0")],
                disks: vec![String::from("/cd.iso")],
            }],
            absent: Vec::new(),
        }
    }

    fn told(change: impl FnOnce(&mut Needs, &mut HostFacts)) -> String {
        let (mut needs, mut host) = (needs(), host());
        change(&mut needs, &mut host);
        needs
            .problems(&host, |name| name == "br0", |path| path == "/cd.iso")
            .join("; ")
    }

    #[test]
    fn what_fits_is_not_refused() {
        assert_eq!(told(|_, _| {}), "");
        assert_eq!(told(|_, host| host.xen_version = "4.20.0".into()), "");
        assert_eq!(told(|needs, _| needs.xen_version = "unknown".into()), "");
        assert_eq!(told(|needs, _| needs.members[0].cpu_features = None), "");
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        type Change = fn(&mut Needs, &mut HostFacts);
        let cases: [(Change, &str); 7] = [
            (
                |_, host| host.taken = vec!["web".into()],
                "a domain called 'web' exists (destroy or rename it first: 'xl destroy web')",
            ),
            (
                |needs, _| needs.xen_version = "4.20.1".into(),
                "the snapshot is from Xen 4.20.1, and this is Xen 4.17.6-pre: guests can't go \
                 back to an older one",
            ),
            (
                |needs, _| needs.members[0].domain_type = DomainType::Pvh,
                "'web' is PVH, which this Xen doesn't run",
            ),
            (
                |_, host| host.cpu = CpuFeatures::default(),
                "'web' was shown processor features that this host lacks: avx",
            ),
            (
                |needs, _| needs.members[0].bridges = vec!["br1".into()],
                "'web' needs the bridge br1",
            ),
            (
                |needs, _| needs.members[0].disks = vec!["/dev/vg/a".into()],
                "'web' needs its disk /dev/vg/a",
            ),
            (
                |needs, _| needs.members[0].memory_kib += 1,
                "228 MiB of memory are needed, and 228 MiB are free or dom0's to give",
            ),
        ];
        for (change, expected) in cases {
            assert_eq!(told(change), expected);
        }
    }
}
