//! From store to store, by calls that vneds make of each other.

use super::sharing::{guest, packs_bytes};
use super::*;
use crate::image::{Checker, Incoming, IncomingLimits, Received};

/// What a copy has sent.
#[derive(Debug, Default)]
struct Sent {
    frames: usize,
    pages: u32,
}

/// Copies as vned does, and breaks off when so many frames were sent.
fn send(
    from: &Snapshot,
    to: &Store,
    here: &str,
    frames_max: usize,
) -> Result<(Sent, Option<Received>)> {
    let mut sent = Sent::default();
    let limits = IncomingLimits {
        free_bytes_min: 0,
        ..IncomingLimits::default()
    };
    let manifest = from.manifest_to_copy()?;
    let Some(mut incoming) = Incoming::begin(to, &name(here), manifest, limits)? else {
        return Ok((sent, None));
    };
    for member in incoming.wanted() {
        incoming.begin_member(&member)?;
        for (file, bytes) in from.files_to_copy(&member)? {
            for (nth, part) in bytes.chunks(1000).enumerate() {
                incoming.file(&member, file, nth as u64 * 1000, part)?;
            }
        }
        let mut outgoing = from.member_to_copy(&member)?;
        let mut more = true;
        while more {
            let batch = outgoing.next_batch();
            more = batch.is_some();
            let frames = match &batch {
                Some(batch) => {
                    let lacking = incoming.batch(&member, &batch.bytes)?;
                    outgoing.read(batch, &lacking)?
                }
                None => outgoing.close_frame()?.into_iter().collect(),
            };
            for mut frame in frames {
                if sent.frames == frames_max {
                    return Ok((sent, None));
                }
                incoming.frame(&member, &frame.bytes, frame.count)?;
                sent.frames += 1;
                sent.pages += frame.count;
                outgoing.arrived(&frame.take_hashes());
            }
        }
        incoming.end_member(&member)?;
    }
    Ok((sent, Some(incoming.finish()?)))
}

fn copy(from: &Snapshot, to: &Store) -> Result<(Sent, Option<Received>)> {
    send(from, to, "beta", usize::MAX)
}

/// A snapshot over the hosts "dom0" and "beta" with a member on each; this is `host`'s
/// part.
fn part(lab: &Lab, host: &str, stream: &[u8]) -> Snapshot {
    let mut take = lab.store.begin_at(&name("lab"), noon()).unwrap();
    let mut manifest = take.manifest(&name("dom0"));
    manifest.take = "00000000c0ffee00".to_owned();
    manifest.hosts.push(name("beta"));
    for (member, on) in [("web-1", "dom0"), ("db", "beta")] {
        let mut member = sample_member(member);
        member.host = name(on);
        if on == host {
            let options = lab.options();
            let writer = MemberWriter::create(take.dir(), &member.name, &options);
            let mut writer = writer.unwrap();
            Ingest::new(stream).run(&mut writer).unwrap();
            member.image = writer.finish(CONFIG).unwrap();
        }
        manifest.members.push(member);
    }
    take.commit(&manifest.of_host(&name(host))).unwrap();
    lab.store.catalogue().newest(&name("lab")).unwrap()
}

fn is_good(store: &Store) {
    let listing = store.catalogue().list(None).unwrap();
    assert!(listing.damaged.is_empty(), "{:?}", listing.damaged);
    let mut checker = Checker::new(store);
    for manifest in &listing.snapshots {
        let found = checker.snapshot(&manifest.vne, &manifest.id, &mut |_| ());
        assert!(found.unwrap().is_empty());
    }
    assert!(checker.other_packs(&mut |_| ()).unwrap().is_empty());
    assert_eq!(store.catalogue().sweep().unwrap().packs_removed, 0);
}

#[test]
fn a_copy_is_the_same_guest_and_a_second_one_sends_what_has_changed() {
    let (here, there) = (Lab::new(), Lab::new());
    let first = guest(4000, |pfn| pfn / 2);
    let one = here.snapshot(&first);
    let (sent, received) = copy(&one, &there.store).unwrap();
    assert_eq!(sent.pages, 2000);
    assert_eq!(received.unwrap().members, [name("web-1")]);
    let copied = there.store.catalogue().newest(&name("lab")).unwrap();
    assert!(stream_of(&copied).unwrap() == first);
    assert!(copied.manifest().is_copy());
    assert_eq!(copied.manifest().host, name("beta"));
    // All is there: nothing is sent, and nothing fails.
    let (sent, received) = copy(&one, &there.store).unwrap();
    assert_eq!((sent.frames, received), (0, None));

    let second = guest(4000, |pfn| pfn / 2 + if pfn == 7 { 1 << 40 } else { 0 });
    let two = here.snapshot(&second);
    let (sent, _) = copy(&two, &there.store).unwrap();
    assert_eq!((sent.frames, sent.pages), (1, 1));
    let copied = there.store.catalogue().newest(&name("lab")).unwrap();
    assert!(stream_of(&copied).unwrap() == second);
    is_good(&there.store);
    assert_eq!(there.tmp_count(), 0);
    // And further on from there, to where the first one was removed.
    let third = Lab::new();
    send(&copied, &third.store, "gamma", usize::MAX).unwrap();
    is_good(&third.store);
}

#[test]
fn what_has_arrived_is_not_sent_again_and_is_no_snapshot() {
    let (here, there) = (Lab::new(), Lab::new());
    let stream = guest(4000, |pfn| pfn);
    let one = here.snapshot(&stream);
    let mut all = 0;
    for frames_max in [0, 1, 20, 0, 11] {
        let (sent, received) = send(&one, &there.store, "beta", frames_max).unwrap();
        assert_eq!((sent.frames, received), (frames_max, None));
        all += sent.pages;
        let listing = there.store.catalogue().list(None).unwrap();
        assert!(listing.snapshots.is_empty() && listing.damaged.is_empty());
        // Nor does it go when others clean up, until a day is over.
        let cleaned = there.store.clean_tmp().unwrap();
        assert_eq!((cleaned.unfinished, cleaned.removed), (1, 0));
    }
    let (sent, received) = copy(&one, &there.store).unwrap();
    assert_eq!(all + sent.pages, 4000);
    assert_eq!(received.unwrap().pages_new, 4000);
    let copied = there.store.catalogue().newest(&name("lab")).unwrap();
    assert!(stream_of(&copied).unwrap() == stream);
    is_good(&there.store);
    assert_eq!(there.tmp_count(), 0);
}

#[test]
fn what_a_broken_copy_has_left_goes_after_a_day() {
    let (here, there) = (Lab::new(), Lab::new());
    let one = here.snapshot(&guest(1000, |pfn| pfn));
    send(&one, &there.store, "beta", 3).unwrap();
    let dir = fs::read_dir(there.tmp()).unwrap().next().unwrap().unwrap();
    let yesterday = SystemTime::now() - Duration::from_secs(25 * 3600);
    let folder = fs::File::open(dir.path()).unwrap();
    folder.set_modified(yesterday).unwrap();
    drop(folder);
    assert_eq!(there.store.clean_tmp().unwrap().removed, 1);
    assert_eq!((there.tmp_count(), packs_bytes(&there)), (0, 0));
}

#[test]
fn what_has_arrived_and_was_damaged_since_is_sent_again() {
    for damaged in ["pack", "pack.log"] {
        let (here, there) = (Lab::new(), Lab::new());
        let stream = guest(4000, |pfn| pfn);
        let one = here.snapshot(&stream);
        send(&one, &there.store, "beta", 20).unwrap();
        let dir = fs::read_dir(there.tmp()).unwrap().next().unwrap().unwrap();
        let path = dir.path().join("members/web-1").join(damaged);
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.unwrap();
        let at = file.metadata().unwrap().len() / 2;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        let (sent, _) = copy(&one, &there.store).unwrap();
        assert!(sent.pages > 2720 && sent.pages < 4000, "{}", sent.pages);
        let copied = there.store.catalogue().newest(&name("lab")).unwrap();
        assert!(stream_of(&copied).unwrap() == stream);
        is_good(&there.store);
    }
}

#[test]
fn a_part_joins_that_of_another_host() {
    let (dom0, beta) = (Lab::new(), Lab::new());
    let (web, db) = (guest(500, |pfn| pfn), guest(700, |pfn| pfn + 100));
    let from = part(&dom0, "dom0", &web);
    let own = part(&beta, "beta", &db);
    assert!(own.member(&name("web-1")).is_err());
    let reader = own.member(&name("db")).unwrap();
    let (sent, _) = copy(&from, &beta.store).unwrap();
    // The first hundred: the others the store has as another member's.
    assert_eq!(sent.pages, 100);
    let both = beta.store.catalogue().newest(&name("lab")).unwrap();
    assert_eq!(both.manifest().stored, [name("beta"), name("dom0")]);
    assert!(!both.manifest().is_copy());
    let own_members: Vec<_> = both.manifest().members_of_host().collect();
    assert_eq!(own_members.len(), 1);
    assert!(stream_of(&both).unwrap() == web);
    let mut out = Vec::new();
    both.member(&name("db"))
        .unwrap()
        .write_stream(&mut out)
        .unwrap();
    assert!(out == db);
    // Who had it open goes on.
    let mut out = Vec::new();
    reader.write_stream(&mut out).unwrap();
    assert!(out == db);
    is_good(&beta.store);
    assert_eq!(beta.tmp_count(), 0);
}

#[test]
fn a_part_of_another_snapshot_of_that_name_is_refused() {
    let (dom0, beta) = (Lab::new(), Lab::new());
    let from = part(&dom0, "dom0", &guest(50, |pfn| pfn));
    part(&beta, "beta", &guest(50, |pfn| pfn));
    let mut manifest = from.manifest().clone();
    manifest.take = "00000000c0ffee01".to_owned();
    let begin = |manifest| {
        let limits = IncomingLimits::default();
        Incoming::begin(&beta.store, &name("beta"), manifest, limits)
    };
    let refused = begin(manifest).unwrap_err().to_string();
    assert!(
        refused.contains("there is another snapshot lab@"),
        "{refused}"
    );
    // While it's received once, it isn't twice.
    let _one = begin(from.manifest().clone()).unwrap();
    let refused = begin(from.manifest().clone()).unwrap_err();
    assert!(matches!(refused, Error::InUse { .. }), "{refused}");
}

/// Whoever sends may say what he likes.
#[test]
fn a_hostile_sender_gets_nothing_listed() {
    let (here, there) = (Lab::new(), Lab::new());
    let one = here.snapshot(&guest(300, |pfn| pfn));
    let limits = IncomingLimits::default();
    let web = name("web-1");
    let begin = || {
        let manifest = one.manifest().clone();
        let begun = Incoming::begin(&there.store, &name("beta"), manifest, limits);
        let mut incoming = begun.unwrap().unwrap();
        incoming.begin_member(&web).unwrap();
        incoming
    };
    let mut outgoing = one.member_to_copy(&web).unwrap();
    let batch = outgoing.next_batch().unwrap();
    let frame = outgoing.read(&batch, &[0xff; 40]).unwrap().remove(0);
    // Not what it says, or not as much, or nothing that can be unpacked.
    assert!(begin().frame(&web, &frame.bytes, 63).is_err());
    assert!(begin().frame(&web, &frame.bytes, 0).is_err());
    assert!(begin().frame(&web, &frame.bytes, 65).is_err());
    assert!(begin().frame(&web, &frame.bytes[..99], 64).is_err());
    assert!(begin().frame(&name("db"), &frame.bytes, 64).is_err());
    assert!(begin().batch(&web, &batch.bytes[1..]).is_err());
    // Files of other names, in other places, longer than said.
    for (file, offset, length) in [
        ("index", 0, 1),
        ("../web-1/config.json", 0, 1),
        ("config.json", 1, 1),
        ("config.json", 0, 1 << 20),
        ("frames.pcapng", 0, 1),
    ] {
        let refused = begin().file(&web, file, offset, &vec![b'{'; length]);
        assert!(refused.is_err(), "{file}");
    }
    // The end before all is there; pages other than promised; another configuration.
    assert!(begin().end_member(&web).is_err());
    assert!(begin().finish().is_err());
    let mut incoming = begin();
    for (file, bytes) in one.files_to_copy(&web).unwrap() {
        incoming.file(&web, file, 0, &bytes).unwrap();
    }
    incoming.batch(&web, &batch.bytes).unwrap();
    let elsewhere = Lab::new();
    let other = elsewhere.snapshot(&guest(64, |pfn| pfn + (1 << 40)));
    let mut others = other.member_to_copy(&web).unwrap();
    let batch = others.next_batch().unwrap();
    let frame = others.read(&batch, &[0xff; 8]).unwrap().remove(0);
    incoming.frame(&web, &frame.bytes, 64).unwrap();
    let lacking = incoming.end_member(&web).unwrap_err().to_string();
    assert!(lacking.contains("never came"), "{lacking}");
    drop(incoming);
    for (file, mut bytes) in one.files_to_copy(&web).unwrap() {
        bytes[0] ^= 1;
        let damaged = begin().file(&web, file, 0, &bytes).unwrap_err();
        assert!(damaged.is_damage(), "{damaged}");
    }
    let listing = there.store.catalogue().list(None).unwrap();
    assert!(listing.snapshots.is_empty() && listing.damaged.is_empty());
    // And for all that the honest one comes through.
    copy(&one, &there.store).unwrap();
    is_good(&there.store);
}

#[test]
fn a_store_that_is_nearly_full_takes_no_copy() {
    let (here, there) = (Lab::new(), Lab::new());
    let one = here.snapshot(&guest(50, |pfn| pfn));
    let limits = IncomingLimits {
        free_bytes_min: u64::MAX,
        ..IncomingLimits::default()
    };
    let manifest = one.manifest().clone();
    let refused = Incoming::begin(&there.store, &name("beta"), manifest, limits);
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("are free in"), "{refused}");
}

#[test]
fn what_has_arrived_is_kept_from_who_frees_space() {
    let (here, there) = (Lab::new(), Lab::new());
    let stream = guest(300, |pfn| pfn);
    let one = here.snapshot(&stream);
    // All but the last step, as if it was killed there.
    let limits = IncomingLimits::default();
    let manifest = one.manifest().clone();
    let begun = Incoming::begin(&there.store, &name("beta"), manifest, limits);
    let mut incoming = begun.unwrap().unwrap();
    let web = name("web-1");
    incoming.begin_member(&web).unwrap();
    for (file, bytes) in one.files_to_copy(&web).unwrap() {
        incoming.file(&web, file, 0, &bytes).unwrap();
    }
    let mut outgoing = one.member_to_copy(&web).unwrap();
    let batch = outgoing.next_batch().unwrap();
    let lacking = incoming.batch(&web, &batch.bytes).unwrap();
    for frame in outgoing.read(&batch, &lacking).unwrap() {
        incoming.frame(&web, &frame.bytes, frame.count).unwrap();
    }
    let last = outgoing.close_frame().unwrap().unwrap();
    incoming.frame(&web, &last.bytes, last.count).unwrap();
    incoming.end_member(&web).unwrap();
    drop(incoming);
    assert_eq!(there.store.catalogue().sweep().unwrap().packs_removed, 0);
    let (sent, received) = copy(&one, &there.store).unwrap();
    assert_eq!(sent.frames, 0);
    assert_eq!(received.unwrap().members, [web]);
    is_good(&there.store);
}

#[test]
fn stores_with_different_keys_or_none_have_the_same_guest_afterwards() {
    let keys = [None, Some(Key::new([1; 32])), Some(Key::new([2; 32]))];
    for from in &keys {
        for to in &keys {
            let here = Lab::new().with_key(from.clone());
            let there = Lab::new().with_key(to.clone());
            let stream = guest(1000, |pfn| pfn);
            let one = here.snapshot(&stream);
            send(&one, &there.store, "beta", 5).unwrap();
            let (sent, _) = copy(&one, &there.store).unwrap();
            assert_eq!(sent.pages, 1000 - 5 * 64);
            let copied = there.store.catalogue().newest(&name("lab")).unwrap();
            assert!(stream_of(&copied).unwrap() == stream);
            is_good(&there.store);
            // And with a page more, of which alone it asks.
            let two = here.snapshot(&guest(1001, |pfn| pfn));
            let (sent, _) = copy(&two, &there.store).unwrap();
            assert_eq!(sent.pages, 1);
            is_good(&there.store);
        }
    }
}
