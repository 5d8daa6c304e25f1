//! What a snapshot says about itself.
//!
//! `manifest.json` is JSON that anything can read, with a checksum of itself as
//! its last field. Layout in `plugin/docs/snapshot-format.md`, "manifest.json".

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::Error;
use super::map::{PageMap, Where};
use super::name::{Name, SnapshotId};
use super::pack::PackId;
use super::timeline::Timeline;
use super::Result;
use crate::cpu::CpuFeatures;
use crate::disk::Piece;

/// The version of the snapshot format that this program writes.
pub const FORMAT: u32 = 2;

/// The oldest version that it reads. Format 1 had each member's pages in a file of
/// the snapshot's own.
pub const FORMAT_MIN: u32 = 1;

/// The manifest's file name.
pub const MANIFEST_NAME: &str = "manifest.json";

/// Bytes in a manifest, at most. A member takes 10 KiB at most: this is enough
/// for more than a thousand, and little enough to read blindly.
pub const MANIFEST_BYTES_MAX: u64 = 16 << 20;

/// A snapshot's description.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the snapshot format: [`FORMAT_MIN`] to [`FORMAT`].
    pub format: u32,
    /// The VNE.
    pub vne: Name,
    /// The snapshot's name among those of the VNE.
    pub id: SnapshotId,
    /// The take that made it, the same on all hosts: 16 hex digits.
    pub take: String,
    /// When it was begun: RFC 3339, UTC.
    pub created: String,
    /// Version of xl-vne that made it.
    pub tool_version: String,
    /// Version of Xen that the members ran on, as in `4.17.5`.
    pub xen_version: String,
    /// The host that this copy belongs to. Its members are stored beside it.
    pub host: Name,
    /// All hosts that have a copy; the first one led the take.
    pub hosts: Vec<Name>,
    /// What the admin called it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The cut as a whole.
    pub cut: Cut,
    /// The hosts whose members are stored beside this copy, where that isn't `host`
    /// alone: some were copied here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stored: Vec<Name>,
    /// The members, in the VNE's order.
    pub members: Vec<Member>,
}

/// Facts of the cut that aren't one member's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// Largest difference between two members' cut times, in ns.
    pub skew_ns: u64,
    /// How wrong `skew_ns` may be, in ns, since hosts' clocks were compared
    /// over the network.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skew_error_ns: u64,
    /// When each member was cut, in ns after the first one, in the order of the
    /// members.
    pub at_ns: Vec<u64>,
    /// From the first frame that could be held to the last one's release, in ns.
    pub hold_ns: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// What kind of domain a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DomainType {
    /// Paravirtual.
    Pv,
    /// Hardware-assisted without a device model.
    Pvh,
    /// Hardware-assisted with a device model.
    Hvm,
}

/// One member of a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// The domain's name.
    pub name: Name,
    /// Its number when the snapshot was taken.
    pub domid: u32,
    /// Its UUID.
    pub uuid: String,
    /// The host that it ran on, and where it's stored.
    pub host: Name,
    /// Its kind.
    #[serde(rename = "type")]
    pub domain_type: DomainType,
    /// Its memory, in KiB.
    pub memory_kib: u64,
    /// Its virtual CPUs.
    pub vcpus: u32,
    /// What it had of the host that it ran on; not of snapshots that were taken by
    /// versions that didn't keep it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ran_on: Option<RanOn>,
    /// How long it stood still, by phase.
    pub downtime: Downtime,
    /// Rounds of pre-copy, the last one while suspended included.
    pub rounds: u32,
    /// Pages sent in all rounds.
    pub pages_sent: u64,
    /// Pages sent while it was suspended.
    pub pages_final_dirty: u64,
    /// Bytes of the stream, all rounds.
    pub stream_bytes: u64,
    /// Whether it was cut before it had converged.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub diverged: bool,
    /// What its processors were limited to in the end, if it had to be slowed
    /// down: in percent of one physical CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttled_to: Option<u32>,
    /// The guest's names for the disks that it could write to and that aren't
    /// in the snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub uncaptured_disks: Vec<String>,
    /// The guest's names for the disks that it could only read: they aren't in
    /// the snapshot, and needn't be.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub read_only_disks: Vec<String>,
    /// The disks that were captured. They are where the originals are, on the
    /// member's host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Piece>,
    /// Frames that came for it while it was suspended: the running guest got
    /// them, and they aren't in the snapshot.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub late_frames: u64,
    /// What it had sent before its cut and nobody had seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recorded: Option<Recorded>,
    /// When what happened to it; not of snapshots that were taken by versions
    /// that didn't keep it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<Timeline>,
    /// What is stored.
    pub image: MemberImage,
}

/// What a member had of the host that it ran on, for whoever restores it elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RanOn {
    /// Its processors' features.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_features: Option<CpuFeatures>,
    /// The bridges that its network interfaces were on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bridges: Vec<String>,
    /// Where the disks are that aren't in the snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<String>,
}

/// A member's part of the channel state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// How many frames.
    pub frames: u64,
    /// The file that has them, pcapng.
    pub file: FileFacts,
}

/// The phases of a member's downtime, in ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Downtime {
    /// From the suspend request to the guest's standing still.
    pub suspend_ns: u64,
    /// Last pages.
    pub last_pages_ns: u64,
    /// CPU and device state.
    pub device_state_ns: u64,
    /// Waiting for the disks to be captured, which begins with the last pages.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub disks_ns: u64,
    /// Resume.
    pub resume_ns: u64,
}

impl Downtime {
    /// All phases together, in ns.
    pub fn total_ns(&self) -> u64 {
        [
            self.last_pages_ns,
            self.device_state_ns,
            self.disks_ns,
            self.resume_ns,
        ]
        .into_iter()
        .fold(self.suspend_ns, u64::saturating_add)
    }
}

/// What a [`super::MemberWriter`] stored; goes into the manifest as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberImage {
    /// Counts.
    pub stats: MemberStats,
    /// The member's files.
    pub files: Vec<FileFacts>,
    /// The packs that have its pages.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub packs: Vec<PackId>,
    /// The processor features that the guest was shown, where its stream says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_features: Option<CpuFeatures>,
}

/// Counts of one member's ingest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberStats {
    /// Page entries received, counting a page each time it was sent.
    pub pages_received: u64,
    /// Those received after [`super::MemberHandle::enter_final`].
    pub pages_final: u64,
    /// Guest frames that were named at least once.
    pub pages_unique: u64,
    /// Of these, those with contents other than zero.
    pub pages_stored: u64,
    /// Of these, those that are all zero.
    pub pages_zero: u64,
    /// Bytes of page contents received.
    pub bytes_received: u64,
    /// Pages that were written to disk while the guest was suspended, because
    /// the memory for them was used up. Should be 0.
    pub pages_spilled: u64,
    /// The most pages that were kept in memory: while the guest was suspended, and those
    /// that changed all the time before.
    pub pages_held_peak: u64,
    /// Pages that differed when the sender sent them again for verification.
    /// Pages that other domains write to (console, xenstore, network rings) may.
    pub pages_verify_differed: u64,
    /// Pages that the store didn't have.
    #[serde(default)]
    pub pages_new: u64,
    /// Bytes of the pack that was made for them.
    #[serde(default)]
    pub bytes_new: u64,
}

impl MemberStats {
    /// Counts a map's frames.
    pub(super) fn count(&mut self, map: &PageMap) {
        for run in &map.runs {
            let count = u64::from(run.count);
            self.pages_unique += count;
            match run.content {
                Where::Nothing => {}
                Where::Zero => self.pages_zero += count,
                Where::Pack { .. } => self.pages_stored += count,
            }
        }
    }
}

/// One file of a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub length: u64,
    /// BLAKE3 of its contents, in hex. None for format 1's `pages`, each slot of
    /// which has a hash in `index`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blake3: Option<String>,
}

impl Manifest {
    /// The members that are stored beside this copy.
    pub fn members_here(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| self.has(member))
    }

    /// Whether a member is stored beside this copy.
    pub(crate) fn has(&self, member: &Member) -> bool {
        match self.stored.is_empty() {
            true => member.host == self.host,
            false => self.stored.contains(&member.host),
        }
    }

    /// The members that ran on this copy's host. Others that are stored here too
    /// have their own host act for them.
    pub fn members_of_host(&self) -> impl Iterator<Item = &Member> {
        let of_host = |member: &&Member| member.host == self.host;
        self.members_here().filter(of_host)
    }

    /// Whether all that is stored here was copied here.
    pub fn is_copy(&self) -> bool {
        !self.stored.is_empty() && !self.stored.contains(&self.host)
    }

    /// The same for another host.
    pub fn of_host(&self, host: &Name) -> Self {
        Self {
            host: host.clone(),
            stored: Vec::new(),
            ..self.clone()
        }
    }
}

/// What stands between the JSON object's other fields and the checksum.
const CHECKSUM_FIELD: &str = ",\n  \"checksum\": \"";
/// What stands after it.
const CHECKSUM_END: &str = "\"\n}\n";

impl Manifest {
    /// The bytes of the file: the object pretty-printed, and as its last field
    /// the BLAKE3 of everything in front of the comma that precedes it.
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        let unstorable = |problem: String| Error::unstorable("the manifest", problem);
        let pretty = serde_json::to_string_pretty(self).map_err(|e| unstorable(e.to_string()))?;
        let text = Self::with_checksum(pretty.strip_suffix("\n}").unwrap_or(&pretty));
        if text.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(unstorable(format!(
                "it is longer than {MANIFEST_BYTES_MAX} bytes"
            )));
        }
        // What can't be read back must not be committed.
        match Manifest::decode(text.as_bytes(), Path::new(MANIFEST_NAME)) {
            Ok(read) if read == *self => Ok(text.into_bytes()),
            _ => Err(unstorable("it does not survive being written".to_owned())),
        }
    }

    /// An object that isn't closed yet, with its checksum.
    pub(super) fn with_checksum(object: &str) -> String {
        let checksum = blake3::hash(object.as_bytes()).to_hex();
        [object, CHECKSUM_FIELD, &checksum, CHECKSUM_END].concat()
    }

    /// Reads the bytes of the file at `path` (for the error only), checking the
    /// checksum first.
    pub(crate) fn decode(bytes: &[u8], path: &Path) -> Result<Self> {
        let text = std::str::from_utf8(bytes).map_err(|_| Error::damaged(path, "it is no text"))?;
        check_checksum(text).ok_or_else(|| Error::damaged(path, "its checksum is wrong"))?;
        let not_json = |e: serde_json::Error| Error::damaged(path, e.to_string());
        let Format { format } = serde_json::from_str(text).map_err(not_json)?;
        if !(FORMAT_MIN..=FORMAT).contains(&format) {
            let path = path.to_owned();
            return Err(Error::Newer { path, format });
        }
        serde_json::from_str(text).map_err(not_json)
    }
}

/// The one field that every version of the format has.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

fn check_checksum(text: &str) -> Option<()> {
    let (object, checksum) = text
        .strip_suffix(CHECKSUM_END)?
        .rsplit_once(CHECKSUM_FIELD)?;
    let expected = blake3::hash(object.as_bytes()).to_hex();
    (checksum == expected.as_str()).then_some(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;

    /// A manifest with one member.
    pub(crate) fn sample() -> Manifest {
        Manifest {
            format: FORMAT,
            vne: Name::new("lab").unwrap(),
            id: "20261121T023652Z".parse().unwrap(),
            take: "00000000c0ffee00".to_owned(),
            created: "2026-11-21T02:36:52Z".to_owned(),
            tool_version: "0.1.0".to_owned(),
            xen_version: "4.17.5".to_owned(),
            host: Name::new("dom0").unwrap(),
            hosts: vec![Name::new("dom0").unwrap()],
            label: Some("before \"upgrade\"".to_owned()),
            cut: Cut {
                skew_ns: 1,
                skew_error_ns: 0,
                at_ns: vec![0],
                hold_ns: 2,
            },
            stored: Vec::new(),
            members: vec![sample_member("web-1")],
        }
    }

    pub(crate) fn sample_member(name: &str) -> Member {
        Member {
            name: Name::new(name).unwrap(),
            host: Name::new("dom0").unwrap(),
            domid: 7,
            uuid: "c0ffee00-0000-4000-8000-000000000000".to_owned(),
            domain_type: DomainType::Pvh,
            memory_kib: 262_144,
            vcpus: 2,
            ran_on: None,
            downtime: Downtime {
                suspend_ns: 61_000_000,
                last_pages_ns: 20_000_000,
                device_state_ns: 9_000_000,
                disks_ns: 0,
                resume_ns: 14_000_000,
            },
            rounds: 12,
            pages_sent: 70_000,
            pages_final_dirty: 160,
            stream_bytes: 300_000_000,
            diverged: false,
            throttled_to: None,
            uncaptured_disks: Vec::new(),
            read_only_disks: Vec::new(),
            disks: Vec::new(),
            late_frames: 0,
            recorded: None,
            timeline: None,
            image: MemberImage {
                stats: MemberStats::default(),
                files: Vec::new(),
                packs: Vec::new(),
                cpu_features: None,
            },
        }
    }

    #[test]
    fn what_is_encoded_comes_back_and_is_plain_json() {
        let bytes = sample().encode().unwrap();
        assert_eq!(Manifest::decode(&bytes, Path::new("m")).unwrap(), sample());
        let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(json["format"], 2);
        assert_eq!(json["members"][0]["type"], "pvh");
        assert_eq!(json["checksum"].as_str().unwrap().len(), 64);
        assert!(bytes.starts_with(b"{\n  \"format\": 2,\n  \"vne\": \"lab\""));
    }

    #[test]
    fn the_checksum_can_be_checked_as_documented() {
        let bytes = sample().encode().unwrap();
        let (object, rest) = bytes.split_at(bytes.len() - 85);
        let checksum = blake3::hash(object).to_hex();
        assert_eq!(&rest[17..81], checksum.as_bytes());
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let good = sample().encode().unwrap();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(Manifest::decode(&bad, Path::new("m")).is_err(), "byte {at}");
            }
        }
        for length in 0..good.len() {
            assert!(Manifest::decode(&good[..length], Path::new("m")).is_err());
        }
        let longer = [&good[..], b"\n"].concat();
        assert!(Manifest::decode(&longer, Path::new("m")).is_err());
    }

    #[test]
    fn a_later_format_is_named_and_not_called_damaged() {
        let mut later = sample();
        later.format = 3;
        assert!(later.encode().is_err());
        let text = "{\n  \"format\": 3,\n  \"vats\": []";
        let checksum = blake3::hash(text.as_bytes()).to_hex();
        let file = format!("{text}{CHECKSUM_FIELD}{checksum}{CHECKSUM_END}");
        let error = Manifest::decode(file.as_bytes(), Path::new("m")).unwrap_err();
        assert!(matches!(error, Error::Newer { format: 3, .. }), "{error}");
    }

    #[test]
    fn a_label_cannot_forge_the_checksum_field() {
        let mut manifest = sample();
        manifest.label = Some(format!("x\"{CHECKSUM_FIELD}0{CHECKSUM_END}"));
        let bytes = manifest.encode().unwrap();
        assert_eq!(Manifest::decode(&bytes, Path::new("m")).unwrap(), manifest);
    }
}
