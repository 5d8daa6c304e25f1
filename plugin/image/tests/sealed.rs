//! Stores that show nothing to whoever has no key.

use super::sharing::{guest, packs_bytes};
use super::*;
use crate::image::Checker;

fn key(bits: u8) -> Option<Key> {
    Some(Key::new([bits; 32]))
}

fn all_files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(all_files(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found
}

/// Whether any file below has these bytes.
fn shows(dir: &Path, needle: &[u8]) -> bool {
    all_files(dir).iter().any(|path| {
        let bytes = fs::read(path).unwrap();
        bytes.windows(needle.len()).any(|bytes| bytes == needle)
    })
}

/// A take of `lab` up to its last moment: what is staged is still there.
fn at_its_end(lab: &Lab) -> (Take, MemberWriter) {
    let mut take = lab.store.begin_at(&name("lab"), noon()).unwrap();
    let writer = MemberWriter::create(take.dir(), &name("web-1"), &lab.options());
    let mut writer = writer.unwrap();
    // Sent twice, so that the second one is staged.
    let round = |seed| -> Vec<Entry> {
        (0..600)
            .map(|pfn| (pfn, 0, Some(page(seed + pfn))))
            .collect()
    };
    let stream = testenc::pvh_stream(&[round(0), round(1000)]);
    Ingest::new(&stream[..]).run(&mut writer).unwrap();
    take.vote(b"it has a secret, too").unwrap();
    (take, writer)
}

#[test]
fn a_stolen_store_shows_neither_pages_nor_hashes_nor_configurations() {
    for sealed in [false, true] {
        let lab = Lab::new().with_key(key(1).filter(|_| sealed));
        let (mut take, writer) = at_its_end(&lab);
        let root = lab.store.root();
        let staged = shows(root, &page(1007)[..64]);
        assert_eq!(staged, !sealed, "what is staged");
        assert_eq!(shows(root, b"secret"), !sealed);
        let image = writer.finish(CONFIG).unwrap();
        let mut manifest = take.manifest(&name("dom0"));
        let mut member = sample_member("web-1");
        member.image = image;
        manifest.label = Some(String::from("before the secret upgrade"));
        manifest.members.push(member);
        take.commit(&manifest).unwrap();
        let hash = super::super::pack::hash_page(&page(1007));
        let id = manifest.members[0].image.packs[0];
        for (what, bytes) in [
            ("a page's hash", &hash[..]),
            ("the configuration", b"c_info"),
            ("the label", b"secret"),
            ("a member's name", b"web-1"),
            ("an index", b"xlvneIDX"),
            ("a pack's name in an index", &id.0[..]),
        ] {
            assert_eq!(shows(root, bytes), !sealed, "{what}");
        }
        let snapshot = lab.store.catalogue().newest(&name("lab")).unwrap();
        snapshot.verify().unwrap();
    }
}

#[test]
fn an_encrypted_store_shares_and_frees_as_a_plain_one() {
    let lab = Lab::new().with_key(key(1));
    let first = guest(4000, |pfn| pfn);
    let second = guest(4000, |pfn| pfn + if pfn < 1500 { 1 << 40 } else { 0 });
    let one = lab.snapshot(&first);
    let two = lab.snapshot(&second);
    assert_eq!(two.manifest().members[0].image.stats.pages_new, 1500);
    assert!(stream_of(&one).unwrap() == first);
    let all = packs_bytes(&lab);
    let id = one.manifest().id.clone();
    drop(one);
    let before = two.manifest().members[0].image.packs.clone();
    lab.store.catalogue().remove(&name("lab"), &id).unwrap();
    // Written anew, under its name, and with another salt.
    assert!(packs_bytes(&lab) < all);
    assert_eq!(lab.store.packs().list().unwrap().len(), before.len());
    two.verify().unwrap();
    assert!(stream_of(&two).unwrap() == second);
    assert!(Checker::new(&lab.store)
        .other_packs(&mut |_| ())
        .unwrap()
        .is_empty());
}

#[test]
fn another_key_or_none_is_said_to_be_that_and_frees_nothing() {
    let lab = Lab::new().with_key(key(1));
    lab.snapshot(&guest(300, |pfn| pfn));
    let bytes = packs_bytes(&lab);
    for (other, why) in [(key(2), "with another key"), (None, "has no key")] {
        let lab = Lab {
            dir: tempfile::tempdir().unwrap(),
            store: Store::with_key(lab.store.root(), other.clone()).unwrap(),
            key: other,
        };
        let listing = lab.store.catalogue().list(None).unwrap();
        assert!(listing.snapshots.is_empty());
        let said = listing.damaged[0].error.to_string();
        assert!(said.contains(why), "{said}");
        let swept = lab.store.catalogue().sweep().unwrap_err().to_string();
        assert!(swept.contains(why), "{swept}");
        assert_eq!(packs_bytes(&lab), bytes);
    }
    let snapshot = lab.store.catalogue().newest(&name("lab")).unwrap();
    snapshot.verify().unwrap();
}

#[test]
fn plain_and_encrypted_snapshots_share_no_page() {
    let stream = guest(300, |pfn| pfn);
    let mut lab = Lab::new();
    for key in [None, key(1), key(2), None] {
        lab = lab.with_key(key.clone());
        let stats = lab.snapshot(&stream).manifest().members[0].image.stats;
        // The last one finds what the first one has.
        let new = if lab.store.packs().list().unwrap().len() == 3 && key.is_none() {
            0
        } else {
            300
        };
        assert_eq!(stats.pages_new, new);
    }
}

#[test]
fn every_flipped_byte_of_an_encrypted_store_is_reported() {
    let lab = Lab::new().with_key(key(1));
    let stream = guest(40, |pfn| pfn);
    let snapshot = lab.snapshot(&stream);
    let mut files = all_files(snapshot.dir());
    files.extend(all_files(&lab.store.root().join("packs")));
    for path in files {
        let good = fs::read(&path).unwrap();
        let step = (good.len() / 150).max(1);
        for at in (0..good.len()).step_by(step) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(&path, &bad).unwrap();
            let found = lab
                .store
                .catalogue()
                .newest(&name("lab"))
                .and_then(|snapshot| stream_of(&snapshot));
            assert!(found.is_err(), "byte {at} of {}", path.display());
        }
        fs::write(&path, &good).unwrap();
    }
    assert!(stream_of(&snapshot).unwrap() == stream);
}
