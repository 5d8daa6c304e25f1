//! What is stored once, found to be damaged, and freed.

use super::*;
use crate::image::pack::Pack;
use crate::image::seal::Vault;
use crate::image::{diff, Checker};

/// Pages of a guest of so many frames, of which `changed` says what is in each.
pub(super) fn guest(count: u64, seed: impl Fn(u64) -> u64) -> Vec<u8> {
    let entries: Vec<Entry> = (0..count)
        .map(|pfn| (pfn, 0, Some(page(seed(pfn)))))
        .collect();
    let batches: Vec<Vec<Entry>> = entries.chunks(1024).map(<[Entry]>::to_vec).collect();
    testenc::pvh_stream(&batches)
}

/// As many pages of the frame are needed as it has, one of them twice and another not.
#[test]
fn a_page_needed_twice_does_not_stand_for_one_that_nobody_needs() {
    let entry = |pfn| (pfn, 0, Some(page(if pfn == 1 { 0 } else { pfn })));
    let rounds: [Vec<Entry>; 2] = [
        (0..=64).map(entry).collect(),
        vec![(5, 0, Some([0; PAGE_SIZE]))],
    ];
    let lab = Lab::new();
    let snapshot = lab.snapshot(&testenc::pvh_stream(&rounds));
    let stats = snapshot.manifest().members[0].image.stats;
    assert_eq!((stats.pages_stored, stats.pages_new), (64, 64));
    let expected = testenc::pvh_stream(&[testenc::last_versions(&rounds)]);
    assert!(stream_of(&snapshot).unwrap() == expected);
}

pub(super) fn packs_bytes(lab: &Lab) -> u64 {
    let packs = lab.store.packs().list().unwrap();
    packs.iter().map(|(_, bytes)| bytes).sum()
}

fn remove(lab: &Lab, snapshot: Snapshot) {
    let id = snapshot.manifest().id.clone();
    drop(snapshot);
    lab.store.catalogue().remove(&name("lab"), &id).unwrap();
}

#[test]
fn a_second_snapshot_costs_what_has_changed() {
    let lab = Lab::new();
    let first = guest(4000, |pfn| pfn);
    let one = lab.snapshot(&first);
    let full = packs_bytes(&lab);
    let second = guest(4000, |pfn| pfn + if pfn % 20 == 7 { 1 << 40 } else { 0 });
    let two = lab.snapshot(&second);
    let stats = two.manifest().members[0].image.stats;
    assert_eq!((stats.pages_stored, stats.pages_new), (4000, 200));
    let index = fs::metadata(two.dir().join("members/web-1/index")).unwrap();
    let more = packs_bytes(&lab) - full + index.len();
    assert!(more * 100 < full * 8, "{more} of {full}");
    assert!(stream_of(&one).unwrap() == first);
    assert!(stream_of(&two).unwrap() == second);
}

#[test]
fn a_page_is_stored_once_across_members_and_their_frames() {
    let lab = Lab::new();
    let mut take = lab.store.begin(&name("lab")).unwrap();
    // Both come in before either is published: they don't know of each other.
    let writers: Vec<MemberWriter> = ["web-1", "web-2"]
        .iter()
        .map(|member| {
            let options = WriterOptions::default();
            let mut writer = MemberWriter::create(take.dir(), &name(member), &options).unwrap();
            let own = u64::from(*member == "web-2");
            let stream = guest(1000, |pfn| match pfn % 10 {
                0 => 0,
                1 => (own << 20) + pfn + 1,
                _ => pfn,
            });
            Ingest::new(&stream[..]).run(&mut writer).unwrap();
            writer
        })
        .collect();
    let mut manifest = take.manifest(&name("dom0"));
    for (writer, member) in writers.into_iter().zip(["web-1", "web-2"]) {
        let mut member = sample_member(member);
        member.image = writer.finish(CONFIG).unwrap();
        manifest.members.push(member);
    }
    take.commit(&manifest).unwrap();
    let new = manifest.members.iter().map(|m| m.image.stats.pages_new);
    // Of the first one's, each tenth page is the same, and each tenth one the next
    // one's; of the second one's, each tenth is its own.
    assert_eq!(new.collect::<Vec<u64>>(), [801, 100]);
    let snapshot = lab.store.catalogue().newest(&name("lab")).unwrap();
    snapshot.verify().unwrap();
}

#[test]
fn removing_frees_what_nobody_uses_and_nothing_else() {
    let lab = Lab::new();
    let first = guest(4000, |pfn| pfn);
    let second = guest(4000, |pfn| pfn + if pfn < 3000 { 1 << 40 } else { 0 });
    let one = lab.snapshot(&first);
    let two = lab.snapshot(&second);
    let three = lab.snapshot(&first);
    let all = packs_bytes(&lab);
    remove(&lab, one);
    assert_eq!(packs_bytes(&lab), all);
    // Its first 3000 pages are used by nobody, the others are: written anew.
    remove(&lab, three);
    let left = packs_bytes(&lab);
    assert!(left * 7 < all * 4 + (1 << 20), "{left} of {all}");
    assert_eq!(packs_of(&two).len(), 2);
    two.verify().unwrap();
    assert!(stream_of(&two).unwrap() == second);
    // What is left can still be referred to.
    let again = lab.snapshot(&guest(4000, |pfn| pfn + (pfn / 3000)));
    again.verify().unwrap();
    remove(&lab, again);
    remove(&lab, two);
    assert_eq!(packs_bytes(&lab), 0);
    assert_eq!(lab.tmp_count(), 0);
}

#[test]
fn what_is_being_taken_keeps_the_packs_that_it_refers_to() {
    let lab = Lab::new();
    let stream = guest(300, |pfn| pfn);
    let one = lab.snapshot(&stream);
    let take = lab.store.begin(&name("lab")).unwrap();
    let options = WriterOptions::default();
    let mut writer = MemberWriter::create(take.dir(), &name("web-1"), &options).unwrap();
    Ingest::new(&stream[..]).run(&mut writer).unwrap();
    // Its thread has looked at the store when it has the first pages.
    while std::fs::metadata(lab.store.root().join("packs/.publish")).is_ok()
        && lab.store.packs().list().unwrap().iter().any(|(id, _)| {
            let path = lab.store.packs().path(id);
            let file = fs::File::open(&path).unwrap();
            packs::try_lock_pack(&file, &path, files::Lock::Exclusive).unwrap()
        })
    {
        std::thread::yield_now();
    }
    remove(&lab, one);
    assert_ne!(packs_bytes(&lab), 0);
    let mut take = take;
    let mut manifest = take.manifest(&name("dom0"));
    let mut member = sample_member("web-1");
    member.image = writer.finish(CONFIG).unwrap();
    assert_eq!(member.image.stats.pages_new, 0);
    manifest.members.push(member);
    take.commit(&manifest).unwrap();
    drop(take);
    let two = lab.store.catalogue().newest(&name("lab")).unwrap();
    assert!(stream_of(&two).unwrap() == stream);
    remove(&lab, two);
    assert_eq!(packs_bytes(&lab), 0);
}

#[test]
fn a_take_that_is_given_up_leaves_no_pack() {
    let lab = Lab::new();
    let take = lab.store.begin(&name("lab")).unwrap();
    let options = WriterOptions::default();
    let mut writer = MemberWriter::create(take.dir(), &name("web-1"), &options).unwrap();
    Ingest::new(&guest(300, |pfn| pfn)[..])
        .run(&mut writer)
        .unwrap();
    writer.finish(CONFIG).unwrap();
    assert_ne!(packs_bytes(&lab), 0);
    drop(take);
    assert_eq!(packs_bytes(&lab), 0);
}

#[test]
fn a_damaged_snapshot_keeps_all_packs_until_it_is_removed() {
    let lab = Lab::new();
    let one = lab.snapshot(&guest(200, |pfn| pfn));
    let two = lab.snapshot(&guest(200, |pfn| pfn + 1000));
    let all = packs_bytes(&lab);
    let index = two.dir().join("members/web-1/index");
    fs::write(&index, "nonsense").unwrap();
    remove(&lab, one);
    assert_eq!(packs_bytes(&lab), all);
    remove(&lab, two);
    assert_eq!(packs_bytes(&lab), 0);
}

fn damage(lab: &Lab) -> Vec<String> {
    let mut checker = Checker::new(&lab.store);
    let mut found = Vec::new();
    for (vne, id) in lab.store.catalogue().names(None).unwrap().snapshots {
        let damage = checker.snapshot(&vne, &id, &mut |_| ()).unwrap();
        found.extend(damage.iter().map(|error| format!("{id}: {error}")));
    }
    let others = checker.other_packs(&mut |_| ()).unwrap();
    found.extend(others.iter().map(ToString::to_string));
    found
}

/// Every byte of small files, and of large ones each so many.
#[test]
fn verifying_finds_every_flipped_byte() {
    let lab = Lab::new();
    let stream = |seed: u64| guest(150, move |pfn| pfn + if pfn < 20 { seed } else { 0 });
    let one = lab.snapshot(&stream(0));
    let two = lab.snapshot(&stream(1 << 30));
    assert_eq!(damage(&lab), Vec::<String>::new());
    let mut paths = files_of(&one);
    paths.extend(files_of(&two));
    paths.sort();
    paths.dedup();
    let mut flipped = 0;
    for path in paths {
        let bytes = fs::read(&path).unwrap();
        let handle = OpenOptions::new().write(true).open(&path).unwrap();
        let step = (bytes.len() / 300).max(1);
        // The tail of a pack is its table.
        let tail = bytes.len().saturating_sub(400)..bytes.len();
        for at in (0..bytes.len()).step_by(step).chain(tail.step_by(3)) {
            handle
                .write_all_at(&[bytes[at] ^ 1 << (at % 8)], at as u64)
                .unwrap();
            let found = damage(&lab);
            assert!(!found.is_empty(), "{} byte {at}", path.display());
            handle.write_all_at(&[bytes[at]], at as u64).unwrap();
            flipped += 1;
        }
    }
    assert!(flipped > 1500, "{flipped}");
    assert_eq!(damage(&lab), Vec::<String>::new());
}

#[test]
fn verifying_names_each_member_and_range_of_all_snapshots() {
    let lab = Lab::new();
    let one = lab.snapshot(&guest(300, |pfn| pfn));
    // The same pages, elsewhere.
    let two = lab.snapshot(&guest(
        300,
        |pfn| if pfn < 100 { pfn + 200 } else { pfn - 100 },
    ));
    let path = packs_of(&one).remove(0);
    assert_eq!(packs_of(&two), std::slice::from_ref(&path));
    let frames = Pack::open(&path, None, &Vault::default())
        .unwrap()
        .table
        .frames;
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"!!", frames[3].offset + 99).unwrap();
    let found = damage(&lab);
    // Pages 192 to 255: of the second one, frames 292 to 299 and 0 to 55.
    let ranges = ["0xc0 to 0xff", "0x0 to 0x37", "0x124 to 0x12b"];
    assert_eq!(found.len(), 3, "{found:?}");
    for (found, range) in found.iter().zip(ranges) {
        assert!(found.contains("member web-1"), "{found}");
        assert!(found.contains(&format!("at pfn {range}:")), "{found}");
    }
}

#[test]
fn sizes_say_what_a_removal_frees() {
    let lab = Lab::new();
    let one = lab.snapshot(&guest(4000, |pfn| pfn));
    let two = lab.snapshot(&guest(4000, |pfn| {
        pfn + if pfn < 2000 { 1 << 40 } else { 0 }
    }));
    let catalogue = lab.store.catalogue();
    let sizes = |snapshot: &Snapshot| {
        let all = catalogue.list(None).unwrap().snapshots;
        let sizes = catalogue.sizes(&all).unwrap();
        let manifest = snapshot.manifest();
        sizes[&(manifest.vne.clone(), manifest.id.clone())]
    };
    let (first, second) = (sizes(&one), sizes(&two));
    let near = |bytes: u64, mib: u64| bytes.abs_diff(mib << 20) < 600 << 10;
    for sizes in [first, second] {
        assert!(
            near(sizes.own_bytes, 8) && near(sizes.shared_bytes, 8),
            "{sizes:?}"
        );
    }
    let before = packs_bytes(&lab);
    remove(&lab, one);
    let freed = before - packs_bytes(&lab);
    assert!(
        freed.abs_diff(first.own_bytes) < 300 << 10,
        "{freed} {first:?}"
    );
    let alone = sizes(&two);
    assert_eq!(alone.shared_bytes, 0);
    assert!(near(alone.own_bytes, 16));
}

#[test]
fn a_difference_is_counted_in_pages() {
    let lab = Lab::new();
    let one = lab.snapshot(&guest(100, |pfn| pfn));
    let two = lab.snapshot(&guest(
        110,
        |pfn| if pfn % 10 == 3 { pfn + 999 } else { pfn },
    ));
    let diffs = diff(&one, &two).unwrap();
    assert_eq!(diffs.len(), 1);
    assert_eq!((diffs[0].pages_before, diffs[0].pages_after), (100, 110));
    // Ten of the first hundred, and ten that are new.
    assert_eq!(diffs[0].pages_changed, 20);
    let same = diff(&two, &two).unwrap();
    assert_eq!(same[0].pages_changed, 0);
}

#[test]
fn takes_removals_and_readers_at_the_same_time_lose_nothing() {
    let lab = Lab::new();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let base = guest(600, |pfn| pfn);
    lab.snapshot(&base);
    std::thread::scope(|scope| {
        for taker in 0..3_u64 {
            let (lab, stop) = (&lab, &stop);
            scope.spawn(move || {
                for round in 0..12 {
                    let stream = guest(600, |pfn| match pfn % 5 {
                        0 => pfn + ((taker * 100 + round) << 20),
                        _ => pfn,
                    });
                    let take = lab.store.begin(&name(&format!("v{taker}"))).unwrap();
                    let id = take.id().clone();
                    let writer =
                        MemberWriter::create(take.dir(), &name("web-1"), &WriterOptions::default());
                    lab.commit(take, writer.unwrap(), &stream);
                    let vne = name(&format!("v{taker}"));
                    let snapshot = lab.store.catalogue().get(&vne, &id).unwrap();
                    assert!(stream_of(&snapshot).unwrap() == stream);
                    drop(snapshot);
                    if round % 4 != 3 {
                        lab.store.catalogue().remove(&vne, &id).unwrap();
                    }
                }
                stop.store(taker == 0, std::sync::atomic::Ordering::Relaxed);
            });
        }
        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
            lab.store.clean_tmp().unwrap();
            lab.store.catalogue().sweep().unwrap();
        }
    });
    assert_eq!(damage(&lab), Vec::<String>::new());
    let listing = lab.store.catalogue().list(None).unwrap();
    assert_eq!(listing.snapshots.len(), 1 + 3 * 3);
}
