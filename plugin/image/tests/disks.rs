//! Captured disks go with what they belong to, whatever ends it. Plain files stand
//! in for clones: removing them is the same.

use super::*;
use crate::disk::Piece;

impl Lab {
    /// A captured disk: the nth.
    fn piece(&self, nth: usize) -> Piece {
        let origin = self.dir.path().join("web.img");
        Piece {
            vdev: "xvda".to_owned(),
            driver: "reflink".to_owned(),
            target: origin.clone(),
            origin,
            bytes: 4,
            kept: self
                .dir
                .path()
                .join(format!(".vne-snapshots/vnesnap-00000000c0ffee00-{nth}")),
        }
    }

    fn capture(&self, take: &Take, pieces: &[Piece]) {
        take.add_disks(pieces).unwrap();
        for piece in pieces {
            fs::create_dir_all(piece.kept.parent().unwrap()).unwrap();
            fs::write(&piece.kept, "disk").unwrap();
        }
    }
}

/// A committed snapshot with a disk.
fn with_disk(lab: &Lab) -> (Snapshot, Piece) {
    let mut take = lab.store.begin_at(&name("lab"), noon()).unwrap();
    let piece = lab.piece(0);
    lab.capture(&take, std::slice::from_ref(&piece));
    let writer = MemberWriter::create(take.dir(), &name("web-1"), &WriterOptions::default());
    let mut writer = writer.unwrap();
    Ingest::new(&pv_once()[..]).run(&mut writer).unwrap();
    let mut manifest = take.manifest(&name("dom0"));
    let mut member = sample_member("web-1");
    member.image = writer.finish(CONFIG).unwrap();
    member.disks = vec![piece.clone()];
    manifest.members.push(member);
    take.commit(&manifest).unwrap();
    let got = lab.store.catalogue().get(&name("lab"), take.id());
    (got.unwrap(), piece)
}

#[test]
fn a_removed_snapshot_takes_its_disks_along() {
    let lab = Lab::new();
    let (snapshot, piece) = with_disk(&lab);
    assert_eq!(
        snapshot.disks(&name("web-1")).unwrap(),
        std::slice::from_ref(&piece)
    );
    snapshot.verify().unwrap();
    let id = snapshot.manifest().id.clone();
    drop(snapshot);
    lab.store.catalogue().remove(&name("lab"), &id).unwrap();
    assert!(!piece.kept.exists());
    assert_eq!(lab.tmp_count(), 0);
}

#[test]
fn a_snapshot_whose_disk_is_gone_or_elsewhere_isnt_restored_or_called_good() {
    let lab = Lab::new();
    let (snapshot, piece) = with_disk(&lab);
    fs::write(&piece.kept, "di").unwrap();
    assert!(snapshot.verify().unwrap_err().is_damage());
    fs::remove_file(&piece.kept).unwrap();
    assert!(snapshot.disks(&name("web-1")).is_err());
    // As in a copy of the snapshot in another store.
    fs::write(&piece.kept, "disk").unwrap();
    fs::remove_file(snapshot.dir().join("disks.json")).unwrap();
    snapshot.verify().unwrap();
    let told = snapshot.disks(&name("web-1")).unwrap_err();
    assert!(crate::sentence(&told).contains("where it was taken"));
}

#[test]
fn what_a_killed_take_had_captured_goes_with_it() {
    let lab = Lab::new();
    let take = lab.store.begin_at(&name("lab"), noon()).unwrap();
    let pieces = [lab.piece(0), lab.piece(1)];
    lab.capture(&take, &pieces);
    // Killed: its lock goes, its directory stays.
    take.leave();
    assert!(pieces[0].kept.exists());
    assert_eq!(lab.store.clean_tmp().unwrap().removed, 1);
    assert!(pieces.iter().all(|piece| !piece.kept.exists()));
    assert_eq!(lab.tmp_count(), 0);
}

#[test]
fn while_a_tool_still_captures_nobody_takes_the_list_for_garbage() {
    let lab = Lab::new();
    let take = lab.store.begin_at(&name("lab"), noon()).unwrap();
    lab.capture(&take, &[lab.piece(0)]);
    let tools = take.lock().unwrap();
    take.leave();
    assert_eq!(lab.store.clean_tmp().unwrap().live, 1);
    assert!(lab.store.has_captures());
    assert!(lab.piece(0).kept.exists());
    drop(tools);
    lab.store.clean_tmp().unwrap();
    assert!(!lab.piece(0).kept.exists() && !lab.store.has_captures());
}

#[test]
fn the_list_stays_for_as_long_as_there_is_a_disk_on_it() {
    let lab = Lab::new();
    let take = lab.store.begin_at(&name("lab"), noon()).unwrap();
    let stuck = lab.piece(1);
    lab.capture(&take, &[lab.piece(0)]);
    // Something that can't be removed as a file.
    fs::create_dir(&stuck.kept).unwrap();
    take.add_disks(&[stuck.clone(), lab.piece(0)]).unwrap();
    assert!(take.discard().is_err());
    assert!(!lab.piece(0).kept.exists(), "the others needn't stay");
    assert_eq!(lab.tmp_count(), 1);
    fs::remove_dir(&stuck.kept).unwrap();
    lab.store.clean_tmp().unwrap();
    assert_eq!(lab.tmp_count(), 0);
}
