//! Restores on other hosts than those that members ran on.

use serde_json::json;
use xl_vne::cpu::CpuFeatures;
use xl_vne::domain::HostFacts;
use xl_vne::image::{Manifest, Member, MemberWriter, SnapshotId, WriterOptions};
use xl_vne::sidecar::restore::Progress;
use xl_vne::sidecar::rpc::{CopyProgress, Placement, RestoreOrder, SnapshotRef};
use xl_vne::stream::Ingest;

use super::client::Client;
use super::copies::stream;
use super::host::{name, Fallible, Host};
use super::{TestResult, ID};

const TAKE: &str = "00000000000000aa";

/// What a command hears.
#[derive(Default)]
struct Heard {
    copied_bytes: u64,
    building: Vec<String>,
    released: bool,
}

impl Progress for Heard {
    fn copying(&mut self, how_far: CopyProgress) {
        self.copied_bytes = self.copied_bytes.max(how_far.done_bytes);
    }

    fn building(&mut self, members: &[&str]) {
        self.building = members.iter().map(|member| (*member).to_owned()).collect();
    }

    fn built(&mut self, _member: &str) {}

    fn released(&mut self, _played: u64) {
        self.released = true;
    }
}

fn facts(taken: &[&str]) -> HostFacts {
    HostFacts {
        xen_version: String::from("4.17.5"),
        free_kib: 1 << 20,
        dom0_kib: 0,
        cpu: CpuFeatures::default(),
        pv: true,
        hvm: true,
        taken: taken.iter().map(|name| (*name).to_owned()).collect(),
    }
}

/// Begins a take on a host, with its member in it.
fn take(host: &Host, member: &str, seed: u64) -> Fallible<(xl_vne::image::Take, Member)> {
    let id: SnapshotId = ID.parse()?;
    let take = host.store()?.begin_as(&name("lab")?, &id)?;
    let mut writer = MemberWriter::create(take.dir(), &name(member)?, &WriterOptions::default())?;
    Ingest::new(stream(300, seed)?.as_slice()).run(&mut writer)?;
    let member = serde_json::from_value(json!({
        "name": member,
        "domid": 7,
        "uuid": format!("c0ffee00-0000-4000-8000-00000000000{seed}"),
        "host": host.name,
        "type": "pvh",
        "memory_kib": 1 << 17,
        "vcpus": 1,
        "ran_on": {"cpu_features": "00000000:10000000:00000000:00000000:00000000:00000000:00000000:00000000"},
        "downtime": {"suspend_ns": 1, "last_pages_ns": 1, "device_state_ns": 1, "resume_ns": 1},
        "rounds": 1,
        "pages_sent": 1,
        "pages_final_dirty": 1,
        "stream_bytes": 1,
        "image": writer.finish("{}")?,
    }))?;
    Ok((take, member))
}

/// Two hosts, and a snapshot with a member on each.
fn hosts() -> Fallible<(Host, Host)> {
    let (mut alpha, mut beta) = (Host::new("alpha")?, Host::new("beta")?);
    alpha.trusts(&[beta.listed_for(&["lab"])?])?;
    beta.trusts(&[alpha.listed_for(&["lab"])?])?;
    let (of_alpha, web) = take(&alpha, "web", 1)?;
    let (of_beta, db) = take(&beta, "db", 2)?;
    let members = [("alpha", "web"), ("beta", "db")];
    for (host, mut take) in [(&mut alpha, of_alpha), (&mut beta, of_beta)] {
        let manifest = Manifest {
            take: TAKE.to_owned(),
            xen_version: String::from("4.17.5"),
            hosts: vec![name("alpha")?, name("beta")?],
            members: vec![web.clone(), db.clone()],
            ..take.manifest(&host.name)
        };
        take.commit(&manifest)?;
        host.knows_all("lab", &members)?;
        let cpu = CpuFeatures::of_host(&[0, 1 << 28]);
        host.has(&HostFacts { cpu, ..facts(&[]) })?;
        host.start()?;
    }
    Ok((alpha, beta))
}

fn trusts(host: &mut Host, peer: &Host) -> TestResult {
    host.accepts(&peer.name)?;
    host.reload()
}

fn restore(leader: &Host, on: &[(&str, &str)]) -> Fallible<Result<Heard, String>> {
    let place = |(member, host): &(&str, &str)| {
        Ok(Placement {
            member: name(member)?,
            host: name(host)?,
        })
    };
    let order = RestoreOrder {
        snapshot: SnapshotRef {
            vne: name("lab")?,
            id: ID.parse()?,
        },
        store: leader.store()?.root().to_owned(),
        copy: None,
        on: on.iter().map(place).collect::<Fallible<_>>()?,
        paused: false,
    };
    let mut heard = Heard::default();
    let restored = leader.admin()?.restore(order, &mut heard);
    Ok(match restored {
        Ok(()) => Ok(heard),
        Err(error) => Err(xl_vne::sentence(&error)),
    })
}

/// Whichever host leads: the one that sends its part, or the one that lacks it.
#[test]
fn a_member_moves_and_its_part_with_it() -> TestResult {
    for leader_sends in [true, false] {
        let (mut alpha, mut beta) = hosts()?;
        // It takes the other one's trust: to build what ran elsewhere, or to give away
        // what ran there.
        let leader = if leader_sends { &alpha } else { &beta };
        let refused = restore(leader, &[("web", "beta")])?;
        let refused = refused.err().ok_or("it was restored")?;
        let expected = format!("accept_members = [ \"{}\" ]", leader.name);
        assert!(refused.contains(&expected), "{refused}");
        assert!(refused.contains("nothing was touched"), "{refused}");
        assert!(alpha.restored()?.is_empty() && beta.restored()?.is_empty());
        match leader_sends {
            true => trusts(&mut beta, &alpha)?,
            false => trusts(&mut alpha, &beta)?,
        }
        let leader = if leader_sends { &alpha } else { &beta };
        let heard = restore(leader, &[("web", "beta")])??;
        assert_eq!(heard.building, ["beta:web", "beta:db"]);
        assert!(heard.released && heard.copied_bytes > 0);
        assert!(alpha.restored()?.is_empty());
        assert_eq!(beta.restored()?.len(), 2);
        let catalogue = beta.store()?.catalogue();
        let opened = catalogue.get(&name("lab")?, &ID.parse()?)?;
        let mut bytes = Vec::new();
        opened
            .member(&name("web")?)?
            .write_save_file(&mut bytes, None)?;
        assert!(beta.restored()?.contains(&bytes), "it isn't what alpha has");

        // From now on its part is there.
        let heard = restore(&beta, &[("web", "beta")])??;
        assert_eq!(heard.copied_bytes, 0);
        // Where it ran it still can.
        restore(&alpha, &[])??;
        assert_eq!(alpha.restored()?.len(), 1);
    }
    Ok(())
}

/// A host that is gone for good isn't needed by what was copied.
#[test]
fn members_of_a_dead_host_run_elsewhere() -> TestResult {
    let (mut alpha, beta) = hosts()?;
    let stranded = |refused: Result<Heard, String>| {
        let refused = refused.err().ok_or("it was restored")?;
        assert!(refused.contains("nothing was touched"), "{refused}");
        Fallible::Ok(refused)
    };
    let root = alpha.store()?.root().to_owned();
    let snapshot = SnapshotRef {
        vne: name("lab")?,
        id: ID.parse()?,
    };
    let to = beta.name.clone();
    alpha.admin()?.copy(snapshot, root, to, &mut |_| ())?;
    alpha.end(rustix::process::Signal::KILL)?;
    let refused = stranded(restore(&beta, &[])?)?;
    assert!(refused.contains("--on MEMBER=HOST"), "{refused}");
    let heard = restore(&beta, &[("web", "beta")])??;
    assert_eq!(heard.building, ["beta:web", "beta:db"]);
    assert_eq!(beta.restored()?.len(), 2);
    Ok(())
}

#[test]
fn what_cannot_run_somewhere_is_refused_before_anything_is_touched() -> TestResult {
    let (alpha, mut beta) = hosts()?;
    trusts(&mut beta, &alpha)?;
    let untouched = |on: &[(&str, &str)], expected: &str| -> TestResult {
        let refused = restore(&alpha, on)?.err().ok_or("it was restored")?;
        assert!(refused.contains(expected), "{refused}");
        assert!(alpha.restored()?.is_empty());
        Ok(())
    };
    untouched(&[("mail", "beta")], "has no member 'mail'")?;
    untouched(&[("web", "gamma")], "'gamma' is no peer")?;
    untouched(
        &[("web", "beta"), ("web", "alpha")],
        "'web' is placed twice",
    )?;
    // Another processor, also for who runs there anyway.
    beta.has(&facts(&[]))?;
    untouched(
        &[("web", "beta")],
        "beta: 'web' was shown processor features that this host lacks: avx",
    )?;
    untouched(&[], "beta: 'db' was shown processor features")?;
    let cpu = CpuFeatures::of_host(&[0, 1 << 28]);
    let small = HostFacts {
        cpu,
        free_kib: 200 << 10,
        ..facts(&[])
    };
    beta.has(&small)?;
    untouched(&[("web", "beta")], "256 MiB of memory are needed")?;
    // It still runs where it ran.
    beta.has(&HostFacts { cpu, ..facts(&[]) })?;
    alpha.has(&HostFacts {
        cpu,
        ..facts(&["web"])
    })?;
    untouched(&[("web", "beta")], "alpha: a domain called 'web' exists")?;
    // A host that doesn't know the member.
    alpha.has(&HostFacts { cpu, ..facts(&[]) })?;
    beta.knows_all("lab", &[("beta", "db")])?;
    beta.reload()?;
    untouched(&[("web", "beta")], "'web' is no member of VNE 'lab'")?;
    assert!(beta.restored()?.is_empty());
    Ok(())
}

/// Only of what is to be restored is a peer told whether it can be.
#[test]
fn a_peer_does_not_learn_which_files_a_host_has() -> TestResult {
    let (alpha, beta) = hosts()?;
    let mut client = Client::of(&beta.identity, &alpha)?;
    client.greet("beta")??;
    for id in [ID, "20200101T000000Z"] {
        let needs = json!({
            "xen_version": "4.17.5",
            "members": [{"domain": "web", "type": "pvh", "memory_kib": 1,
                "disks": ["/etc/passwd", "/no/such/file"], "bridges": ["nobr0"]}],
        });
        let snapshot = json!({"vne": "lab", "id": id});
        let asked = json!({"snapshot": snapshot, "members": [], "copy": null, "needs": needs});
        let fit = client.call("peer_fit", asked)??;
        assert_eq!(fit["problems"], json!([]), "{fit}");
    }
    Ok(())
}
