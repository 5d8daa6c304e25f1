//! What `--json` prints is what `plugin/docs/json.md` says, value by value.

use std::collections::BTreeMap;

use serde_json::{json, Value};

use super::timeline;
use crate::cpu::CpuFeatures;
use crate::disk::Piece;
use crate::domain::facts::{Disk, DomainFacts, DomainKind, Vif};
use crate::image::{FileFacts, Manifest, Name, RanOn, Recorded, TimelineRound};
use crate::sidecar::conf::Peer;
use crate::sidecar::rpc::{CopyDone, DaemonStatus, InDoubt, PeerTest};

const PAGE: &str = include_str!("../docs/json.md");

/// A documented value.
struct Row {
    kind: &'static str,
    nullable: bool,
    may_be_missing: bool,
}

/// The table of one section, by path.
fn documented(title: &str) -> BTreeMap<&'static str, Row> {
    let section = PAGE
        .split("\n## ")
        .find(|section| section.starts_with(title));
    let rows = section.unwrap().lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `")?.split(" | ");
        let path = cells.next()?.strip_suffix('`')?;
        let kind = cells.next()?;
        let meaning = cells.next().unwrap_or_default();
        let row = Row {
            kind: kind.strip_suffix(" or null").unwrap_or(kind),
            nullable: kind.ends_with(" or null"),
            may_be_missing: meaning.starts_with("may be missing"),
        };
        Some((path, row))
    });
    rows.collect()
}

/// All values by their paths, and their types.
fn printed(value: &Value, path: &str, found: &mut BTreeMap<String, &'static str>) {
    let kind = match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = match path.is_empty() {
                    true => name.clone(),
                    false => format!("{path}.{name}"),
                };
                printed(value, &path, found);
            }
            return;
        }
        Value::Array(items) => {
            for item in items {
                printed(item, &format!("{path}[]"), found);
            }
            return;
        }
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
    };
    found.insert(path.to_owned(), kind);
}

fn paths(value: &Value) -> BTreeMap<String, &'static str> {
    let mut found = BTreeMap::new();
    printed(value, "", &mut found);
    found
}

/// `full` has all that there can be, and `bare` as little as possible.
fn agrees(title: &str, full: &Value, bare: &Value) {
    let documented = documented(title);
    let full = paths(full);
    let names: Vec<&str> = full.keys().map(String::as_str).collect();
    assert_eq!(
        documented.keys().copied().collect::<Vec<_>>(),
        names,
        "{title}"
    );
    for (path, kind) in &full {
        assert_eq!(documented[path.as_str()].kind, *kind, "{title}: {path}");
    }
    let bare = paths(bare);
    for (path, row) in documented {
        match bare.get(path) {
            Some(&"null") => assert!(row.nullable, "{title}: {path} is null"),
            Some(kind) => assert_eq!(row.kind, *kind, "{title}: {path}"),
            None => assert!(row.may_be_missing, "{title}: {path} is missing"),
        }
    }
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn file(blake3: bool) -> FileFacts {
    FileFacts {
        name: "pages".into(),
        length: 4096,
        blake3: blake3.then(|| "00".into()),
    }
}

fn manifests() -> [Manifest; 2] {
    let mut full = timeline::tests::manifest();
    full.cut.skew_error_ns = 1;
    full.stored = vec![name("alpha")];
    full.members.truncate(1);
    full.cut.at_ns.truncate(1);
    let mut bare = full.clone();
    for member in &mut full.members {
        member.diverged = true;
        member.throttled_to = Some(50);
        member.uncaptured_disks = vec!["xvda".into()];
        member.read_only_disks = vec!["xvdb".into()];
        member.ran_on = Some(RanOn {
            cpu_features: Some(CpuFeatures::default()),
            bridges: vec!["xenbr0".into()],
            disks: vec!["/srv/cd.iso".into()],
        });
        member.image.cpu_features = Some(CpuFeatures::default());
        member.downtime.disks_ns = 1;
        member.disks = vec![Piece {
            vdev: "xvdc".into(),
            driver: "lvm-thin".into(),
            target: "/dev/vg0/db".into(),
            origin: "/dev/vg0/db".into(),
            bytes: 1,
            kept: "/dev/vg0/vnesnap-0000000000000001-0".into(),
        }];
        member.late_frames = 1;
        member.recorded = Some(Recorded {
            frames: 1,
            file: file(true),
        });
        member.image.files = vec![file(true)];
        if let Some(times) = &mut member.timeline {
            times.rounds.push(TimelineRound {
                before_ns: 1,
                duration_ns: 1,
                pages: 1,
                count: 2,
            });
        }
    }
    bare.label = None;
    bare.stored = Vec::new();
    bare.cut.skew_error_ns = 0;
    for member in &mut bare.members {
        member.timeline = None;
        member.image.files = vec![file(false)];
    }
    [full, bare]
}

#[test]
fn a_manifest_is_as_documented() {
    let [full, bare] = manifests().map(|manifest| json!(manifest));
    agrees("take, show", &full, &bare);
}

#[test]
fn the_rounds_of_a_timeline_lack_what_is_said_to_lack() {
    let round = TimelineRound {
        before_ns: 1,
        duration_ns: 1,
        pages: 1,
        count: 1,
    };
    assert_eq!(json!(round).get("count"), None);
}

#[test]
fn a_plan_is_as_documented() {
    let facts = |full: bool| DomainFacts {
        name: "db".into(),
        domid: 1,
        uuid: String::new(),
        kind: DomainKind::Pvh,
        memory_kib: 1,
        vcpus: 1,
        cap: full.then_some(50),
        host_cpu: full.then(CpuFeatures::default),
        vifs: vec![Vif {
            devid: 0,
            ifname: "vif1.0".into(),
            mac: String::new(),
            bridge: full.then(|| "xenbr0".into()),
            script: full.then(|| "vif-vne".into()),
        }],
        disks: vec![Disk {
            vdev: "xvda".into(),
            target: String::new(),
            readwrite: true,
            format: "raw".into(),
            script: full.then(|| "block-drbd".into()),
            elsewhere: false,
        }],
        config_json: String::new(),
    };
    agrees("take -N", &json!([facts(true)]), &json!([facts(false)]));
}

#[test]
fn what_came_of_a_copy_is_as_documented() {
    use super::copy::Printed;
    let printed = |full: bool| {
        let done = CopyDone {
            members: full.then(|| name("db")).into_iter().collect(),
            pages: 1,
            pages_sent: 1,
            sent_bytes: 1,
            duration_ns: 1,
        };
        json!(Printed {
            vne: &name("lab"),
            id: &"20261121T023652Z".parse().unwrap(),
            host: &name("beta"),
            done: &done,
        })
    };
    agrees("copy", &printed(true), &printed(false));
}

#[test]
fn a_status_is_as_documented() {
    use super::status::{Activity, Status};
    let status = |full: bool| Status {
        activities: vec![Activity {
            what: "take",
            vne: "lab".into(),
            leader: full.then(|| "alpha".into()),
            members: vec!["db".into()],
            pid: 1,
        }],
        daemon: Some(DaemonStatus {
            version: String::new(),
            host: name("alpha"),
            listen: full.then(String::new),
            fingerprint: full.then(|| FINGERPRINT.parse().unwrap()),
            in_doubt: vec![InDoubt {
                snapshot: String::new(),
                leader: String::new(),
            }],
        }),
    };
    agrees("status", &json!(status(true)), &json!(status(false)));
}

const FINGERPRINT: &str = "3f2a-90c1-0000-ffff-1234-5678-9abc-def0";

#[test]
fn networks_are_as_documented() {
    use super::net::{Shown, ShownPeer, ShownTunnel};
    let address = "10.0.0.1".parse().unwrap();
    let network = |full: bool| Shown {
        vne: "lab".into(),
        bridge: "vne-lab".into(),
        mtu: 1500,
        up: true,
        tunnel: Some(ShownTunnel {
            interface: "vx-lab".into(),
            vni: 1,
            port: 4789,
            local: full.then_some(address),
            peers: vec![ShownPeer {
                name: full.then(|| name("beta")),
                address,
            }],
        }),
        vifs: vec!["vif1.0".into()],
    };
    agrees("net", &json!([network(true)]), &json!([network(false)]));
}

#[test]
fn what_is_said_of_peers_is_as_documented() {
    use super::peer::Card;
    let card = |full: bool| Card {
        name: name("alpha"),
        listen: full.then(String::new),
        fingerprint: FINGERPRINT.parse().unwrap(),
    };
    agrees("peer id", &json!(card(true)), &json!(card(false)));
    let peer = json!([Peer {
        name: name("beta"),
        address: String::new(),
        fingerprint: FINGERPRINT.parse().unwrap(),
        vnes: vec![name("lab")],
    }]);
    agrees("peer list", &peer, &peer);
    let test = |full: bool| PeerTest {
        name: name("beta"),
        address: String::new(),
        version: full.then(String::new),
        error: full.then(String::new),
        round_trip_ns: 1,
    };
    agrees("peer test", &json!([test(true)]), &json!([test(false)]));
}
