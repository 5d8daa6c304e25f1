//! What was damaged is reported, and never restored.

use super::*;
use crate::image::pack::Pack;
use crate::image::seal::Vault;

/// Everything that a restore would do.
fn restore(lab: &Lab) -> Result<()> {
    let snapshot = lab
        .store
        .catalogue()
        .get(&name("lab"), &"20261121T023652Z".parse()?)?;
    snapshot
        .member(&name("web-1"))?
        .write_save_file(std::io::sink(), None)
}

#[test]
fn every_flipped_byte_is_reported_and_never_restored() {
    let (lab, snapshot) = tiny();
    restore(&lab).unwrap();
    let mut count = 0;
    for path in files_of(&snapshot) {
        let bytes = fs::read(&path).unwrap();
        let handle = OpenOptions::new().write(true).open(&path).unwrap();
        for (at, byte) in bytes.iter().enumerate() {
            let flipped = byte ^ 1 << (at % 8);
            handle.write_all_at(&[flipped], at as u64).unwrap();
            match restore(&lab) {
                Err(
                    Error::Damaged { path: named, .. } | Error::DamagedPages { path: named, .. },
                ) => {
                    assert_eq!(named, path, "byte {at}");
                }
                other => panic!("{} byte {at}: {other:?}", path.display()),
            }
            handle.write_all_at(&[*byte], at as u64).unwrap();
            count += 1;
        }
    }
    assert!(count > 10_000);
    restore(&lab).unwrap();
}

#[test]
fn a_damaged_page_is_named_with_its_range() {
    let lab = Lab::new();
    let rounds = vec![(100..300).map(|pfn| (pfn, 0, Some(page(pfn)))).collect()];
    let snapshot = lab.snapshot(&testenc::pvh_stream(&rounds));
    let path = packs_of(&snapshot).remove(0);
    let frames = Pack::open(&path, None, &Vault::default())
        .unwrap()
        .table
        .frames;
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    for frame in [1, 3] {
        file.write_all_at(b"!!", frames[frame].offset + 99).unwrap();
    }
    let error = stream_of(&snapshot).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("member web-1: "), "{text}");
    assert!(text.contains("is damaged at pfn 0xa4 to 0xe3"), "{text}");
    assert!(snapshot.verify().is_err());
}

#[test]
fn files_cut_short_or_grown_or_missing_or_replaced_are_reported() {
    let (lab, snapshot) = tiny();
    for path in files_of(&snapshot) {
        let bytes = fs::read(&path).unwrap();
        let mut grown = bytes.clone();
        grown.push(b'\n');
        for spoiled in [
            &bytes[..bytes.len() - 1],
            &bytes[..bytes.len() / 2],
            &[],
            &grown,
        ] {
            fs::write(&path, spoiled).unwrap();
            let listing = lab.store.catalogue().list(None).unwrap();
            assert!(listing.snapshots.is_empty(), "{}", path.display());
            assert_eq!(listing.damaged.len(), 1);
            assert!(restore(&lab).is_err());
        }
        fs::remove_file(&path).unwrap();
        assert!(lab
            .store
            .catalogue()
            .list(None)
            .unwrap()
            .snapshots
            .is_empty());
        assert!(restore(&lab)
            .unwrap_err()
            .to_string()
            .contains("is damaged"));
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(restore(&lab).is_err());
        fs::remove_file(&path).unwrap();
        fs::write(&path, &bytes).unwrap();
        restore(&lab).unwrap();
    }
}

#[test]
fn a_snapshot_under_a_wrong_name_is_not_listed() {
    let (lab, snapshot) = tiny();
    let other = snapshot.dir().with_file_name("20200101T000000Z");
    fs::create_dir_all(other.join("members")).unwrap();
    fs::copy(
        snapshot.dir().join("manifest.json"),
        other.join("manifest.json"),
    )
    .unwrap();
    fs::create_dir(snapshot.dir().with_file_name("notes")).unwrap();
    fs::create_dir(lab.store.root().join("snapshots/-x")).unwrap();
    let listing = lab.store.catalogue().list(None).unwrap();
    assert_eq!(listing.snapshots.len(), 1);
    let reasons: Vec<_> = listing
        .damaged
        .iter()
        .map(|d| d.error.to_string())
        .collect();
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    assert!(reasons
        .iter()
        .any(|r| r.contains("belongs to snapshot 20261121T023652Z")));
}
