//! Copies of snapshots from one host's store to another's.

use rustix::process::Signal;
use serde_json::json;
use xl_vne::image::{
    Checker, Incoming, IncomingLimits, MemberWriter, Name, SnapshotId, WriterOptions,
};
use xl_vne::sidecar::rpc::{CopyDone, CopyProgress, SnapshotRef};
use xl_vne::stream::{Guest, Ingest, PageType, Place, Sink, Writer, XcHeader, PAGE_SIZE};

use super::client::Client;
use super::host::{name, Fallible, Host};
use super::{TestResult, ID};

/// The stream of a guest whose pages differ from each other, and from those of a
/// guest with another seed.
pub fn stream(pages: u64, seed: u64) -> Fallible<Vec<u8>> {
    let mut writer = Writer::new(Vec::new());
    writer.xl_header(false)?;
    writer.xc_header(&XcHeader {
        version: 3,
        guest: Guest::Hvm,
        xen_major: 4,
        xen_minor: 17,
    })?;
    for (record, body) in [(0x11, &[0; 24][..]), (0x12, &[0; 32]), (0x10, &[])] {
        writer.record(Place::XcBefore, record, body)?;
    }
    let mut word = seed | 1;
    for pfn in 0..pages {
        let mut page = [0; PAGE_SIZE];
        for bytes in page.chunks_exact_mut(8) {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        writer.page(pfn, PageType::Normal, Some(&page))?;
    }
    let mut parameters = [0; 24];
    parameters[0] = 1;
    for (record, body) in [(0x08, &[0; 24][..]), (0x09, &[0; 64]), (0x0a, &parameters)] {
        writer.record(Place::XcAfter, record, body)?;
    }
    writer.end()?;
    Ok(writer.into_inner())
}

/// A snapshot of a member that is on this host.
fn snapshot(host: &Host, id: &str, stream: &[u8]) -> Fallible<SnapshotRef> {
    let id: SnapshotId = id.parse()?;
    let mut take = host.store()?.begin_as(&name("lab")?, &id)?;
    let web = name("web")?;
    let mut writer = MemberWriter::create(take.dir(), &web, &WriterOptions::default())?;
    Ingest::new(stream).run(&mut writer)?;
    let image = writer.finish("{}")?;
    let mut manifest = take.manifest(&host.name);
    manifest.members.push(serde_json::from_value(json!({
        "name": web,
        "domid": 7,
        "uuid": "c0ffee00-0000-4000-8000-000000000000",
        "host": host.name,
        "type": "pvh",
        "memory_kib": 1 << 17,
        "vcpus": 1,
        "downtime": {"suspend_ns": 1, "last_pages_ns": 1, "device_state_ns": 1, "resume_ns": 1},
        "rounds": 1,
        "pages_sent": 1,
        "pages_final_dirty": 1,
        "stream_bytes": 1,
        "image": image,
    }))?);
    take.commit(&manifest)?;
    let vne = name("lab")?;
    Ok(SnapshotRef { vne, id })
}

/// Two daemons that list each other, and know where each other's snapshots are.
fn both() -> Fallible<(Host, Host)> {
    let (mut alpha, mut beta) = (Host::new("alpha")?, Host::new("beta")?);
    alpha.trusts(&[beta.listed_for(&["lab"])?])?;
    beta.trusts(&[alpha.listed_for(&["lab"])?])?;
    alpha.knows("lab", &["web"])?;
    beta.knows("lab", &["db"])?;
    alpha.start()?;
    beta.start()?;
    Ok((alpha, beta))
}

fn copy(
    from: &Host,
    to: &Name,
    snapshot: &SnapshotRef,
    mut progress: impl FnMut(CopyProgress),
) -> Fallible<Result<CopyDone, String>> {
    let root = from.store()?.root().to_owned();
    let admin = from.admin()?;
    let copied = admin.copy(snapshot.clone(), root, to.clone(), &mut progress);
    Ok(copied.map_err(|error| xl_vne::sentence(&error)))
}

/// The member's stream as this host has it, after all of it was verified.
fn stored(host: &Host, snapshot: &SnapshotRef) -> Fallible<Vec<u8>> {
    let store = host.store()?;
    let mut checker = Checker::new(&store);
    let found = checker.snapshot(&snapshot.vne, &snapshot.id, &mut |_| ())?;
    assert!(found.is_empty(), "{found:?}");
    let opened = store.catalogue().get(&snapshot.vne, &snapshot.id)?;
    let mut out = Vec::new();
    opened.member(&name("web")?)?.write_stream(&mut out)?;
    Ok(out)
}

fn lists_nothing(host: &Host) -> TestResult {
    let listing = host.store()?.catalogue().list(None)?;
    assert!(listing.snapshots.is_empty() && listing.damaged.is_empty());
    Ok(())
}

#[test]
fn a_snapshot_is_copied_and_only_what_is_lacking_is_sent() -> TestResult {
    let (alpha, beta) = both()?;
    let bytes = stream(700, 1)?;
    let one = snapshot(&alpha, ID, &bytes)?;
    let mut told = CopyProgress::default();
    let done = copy(&alpha, &beta.name, &one, |how_far| told = how_far)??;
    assert_eq!((done.pages, done.pages_sent), (700, 700));
    assert_eq!(done.members, [name("web")?]);
    let all = 700 * PAGE_SIZE as u64;
    assert_eq!((told.total_bytes, told.done_bytes), (all, all));
    assert!(stored(&beta, &one)? == stored(&alpha, &one)?);

    let again = copy(&alpha, &beta.name, &one, |_| ())??;
    assert!(again.members.is_empty() && again.sent_bytes == 0);

    // A second one with the same pages and some more.
    let more = stream(710, 1)?;
    let two = snapshot(&alpha, "20261121T023653Z", &more)?;
    let done = copy(&alpha, &beta.name, &two, |_| ())??;
    assert_eq!((done.pages, done.pages_sent), (710, 10));
    assert!(stored(&beta, &two)? == stored(&alpha, &two)?);

    // A copy is its host's own: the peer can't have it deleted.
    let mut client = Client::of(&alpha.identity, &beta)?;
    client.greet("alpha")??;
    let removed = client.call("peer_remove", json!({ "snapshot": one }))??;
    assert_eq!(removed, false);
    assert_eq!(beta.store()?.catalogue().list(None)?.snapshots.len(), 2);
    Ok(())
}

#[test]
fn who_is_not_listed_for_the_vne_copies_nothing() -> TestResult {
    let (alpha, mut beta) = both()?;
    let one = snapshot(&alpha, ID, &stream(10, 1)?)?;
    beta.trusts(&[alpha.listed_for(&["other"])?])?;
    beta.reload()?;
    let refused = copy(&alpha, &beta.name, &one, |_| ())?;
    let refused = refused.err().ok_or("it was copied")?;
    let expected = "doesn't act for 'alpha' in a VNE 'lab'";
    assert!(refused.contains(expected), "{refused}");
    let unknown = copy(&alpha, &name("gamma")?, &one, |_| ())?;
    let unknown = unknown.err().ok_or("it was copied")?;
    assert!(unknown.contains("'gamma' is no peer"), "{unknown}");
    // Nor is anything done without a beginning.
    let mut client = Client::of(&alpha.identity, &beta)?;
    client.greet("alpha")??;
    for (method, params) in [
        ("peer_copy_end", json!({})),
        ("peer_copy_state", json!({})),
        ("peer_copy_member", json!({"member": "web"})),
        (
            "peer_copy_frame",
            json!({"member": "web", "count": 1, "data": ""}),
        ),
    ] {
        let refused = client.call(method, params)?.err();
        assert!(refused.is_some_and(|why| why.contains("no copy was begun")));
    }
    lists_nothing(&beta)
}

/// Whichever side is killed: nothing is listed, and the next copy goes on.
#[test]
fn a_copy_that_was_killed_goes_on_where_it_was() -> TestResult {
    for kill_sender in [false, true] {
        let (mut alpha, mut beta) = both()?;
        let bytes = stream(12_000, 1)?;
        let one = snapshot(&alpha, ID, &bytes)?;
        let victim = if kill_sender {
            alpha.pid()?
        } else {
            beta.pid()?
        };
        let mut killed = false;
        let broken = copy(&alpha, &beta.name, &one, |how_far| {
            if !killed && how_far.sent_pages > 0 {
                killed = rustix::process::kill_process(victim, Signal::KILL).is_ok();
            }
        })?;
        assert!(killed && broken.is_err(), "{broken:?}");
        let dead = if kill_sender { &mut alpha } else { &mut beta };
        dead.buried()?;
        dead.start()?;
        lists_nothing(&beta)?;
        let done = super::host::wait_for("the old copy to end", || {
            let done = copy(&alpha, &beta.name, &one, |_| ()).ok()?;
            done.ok()
        })?;
        assert_eq!(done.pages, 12_000);
        assert!(done.pages_sent > 0 && done.pages_sent < 12_000, "{done:?}");
        assert!(stored(&beta, &one)? == stored(&alpha, &one)?);
        let left = std::fs::read_dir(beta.store()?.root().join("tmp"))?;
        assert_eq!(left.count(), 0);
    }
    Ok(())
}

/// Killed when all had arrived, and nothing was listed yet.
#[test]
fn a_copy_that_lacked_only_its_end_gets_it() -> TestResult {
    let (alpha, beta) = both()?;
    let one = snapshot(&alpha, ID, &stream(100, 1)?)?;
    let from = alpha.store()?.catalogue().get(&one.vne, &one.id)?;
    let manifest = from.manifest_to_copy()?;
    let limits = IncomingLimits::default();
    let begun = Incoming::begin(&beta.store()?, &beta.name, manifest, limits)?;
    let mut incoming = begun.ok_or("all is there")?;
    let web = name("web")?;
    incoming.begin_member(&web)?;
    for (file, bytes) in from.files_to_copy(&web)? {
        incoming.file(&web, file, 0, &bytes)?;
    }
    let mut member = from.member_to_copy(&web)?;
    while let Some(batch) = member.next_batch() {
        let lacking = incoming.batch(&web, &batch.bytes)?;
        for frame in member.read(&batch, &lacking)? {
            incoming.frame(&web, &frame.bytes, frame.count)?;
        }
    }
    let last = member.close_frame()?.ok_or("nothing is left")?;
    incoming.frame(&web, &last.bytes, last.count)?;
    incoming.end_member(&web)?;
    drop(incoming);
    lists_nothing(&beta)?;
    let done = copy(&alpha, &beta.name, &one, |_| ())??;
    assert_eq!((done.members, done.pages_sent), (vec![web], 0));
    assert!(stored(&beta, &one)? == stored(&alpha, &one)?);
    Ok(())
}
