//! What was given up, or left by who died, goes; and nothing else.

use super::*;

#[test]
fn removing_also_frees_what_others_left() {
    let (lab, snapshot) = tiny();
    let id = snapshot.manifest().id.clone();
    drop(snapshot);
    fs::create_dir(lab.tmp().join("take.dead.20261121T023652Z")).unwrap();
    lab.store.catalogue().remove(&name("lab"), &id).unwrap();
    assert_eq!(lab.tmp_count(), 0);
}

#[test]
fn an_unfinished_snapshot_is_never_listed_and_goes_away() {
    let lab = Lab::new();
    let take = lab.store.begin_at(&name("lab"), noon()).unwrap();
    let options = WriterOptions::default();
    let mut writer = MemberWriter::create(take.dir(), &name("web-1"), &options).unwrap();
    Ingest::new(&pv_live()[..]).run(&mut writer).unwrap();
    assert!(lab
        .store
        .catalogue()
        .list(None)
        .unwrap()
        .snapshots
        .is_empty());
    writer.finish(CONFIG).unwrap();
    let listing = lab.store.catalogue().list(None).unwrap();
    assert!(listing.snapshots.is_empty() && listing.damaged.is_empty());
    let newest = lab.store.catalogue().newest(&name("lab"));
    assert!(matches!(newest, Err(Error::NoSnapshots { .. })));
    drop(take);
    assert_eq!(lab.tmp_count(), 0);
}

#[test]
fn only_what_dead_processes_left_is_cleaned_away() {
    let lab = Lab::new();
    let live = lab.store.begin(&name("live")).unwrap();
    let dead = lab.tmp().join("take.dead.20261121T023652Z");
    fs::create_dir_all(dead.join("members")).unwrap();
    fs::create_dir_all(lab.tmp().join("removed.x.20261121T023652Z.1/members/a")).unwrap();
    fs::create_dir(lab.tmp().join("somebody-elses")).unwrap();
    fs::write(lab.tmp().join("take.file"), "").unwrap();
    let options = WriterOptions::default();
    // The engine is dead, its worker isn't yet.
    let worker = MemberWriter::create(&dead, &name("web-1"), &options).unwrap();
    assert_eq!(
        lab.store.clean_tmp().unwrap(),
        Cleaned {
            removed: 1,
            live: 2,
            unfinished: 0,
        }
    );
    assert!(live.dir().exists() && dead.exists());
    drop(worker);
    assert_eq!(
        lab.store.clean_tmp().unwrap(),
        Cleaned {
            removed: 1,
            live: 1,
            unfinished: 0,
        }
    );
    assert!(live.dir().exists() && !dead.exists());
    let late = MemberWriter::create(&dead, &name("web-1"), &options);
    assert!(matches!(late, Err(Error::Io { .. })));
    drop(live);
    assert_eq!(lab.tmp_count(), 2);
}

#[test]
fn cleaning_all_the_time_never_takes_a_live_snapshot_away() {
    let lab = Lab::new();
    let store = &lab.store;
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                store.clean_tmp().unwrap();
            }
        });
        let takers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(move || {
                    for _ in 0..100 {
                        let take = store.begin_at(&name("lab"), noon()).unwrap();
                        let options = WriterOptions::default();
                        let writer = MemberWriter::create(take.dir(), &name("a"), &options);
                        assert!(writer.is_ok(), "{writer:?}");
                        assert!(take.dir().join("members/a/pack").exists());
                    }
                })
            })
            .collect();
        for taker in takers {
            taker.join().unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(lab.tmp_count(), 0);
}

#[test]
fn what_was_voted_for_stays_until_the_outcome_is_known() {
    let lab = Lab::new();
    let id: SnapshotId = "20261121T023652Z".parse().unwrap();
    let part = |vne: &str| {
        let mut take = lab.store.begin_as(&name(vne), &id).unwrap();
        let options = WriterOptions::default();
        let mut writer = MemberWriter::create(take.dir(), &name("web-1"), &options).unwrap();
        Ingest::new(&pv_live()[..]).run(&mut writer).unwrap();
        let image = writer.finish(CONFIG).unwrap();
        take.vote(vne.as_bytes()).unwrap();
        image
    };
    // The process that voted is gone.
    let image = part("lab");
    part("lost.lab");
    assert!(lab.store.begin_as(&name("lab"), &id).is_err());
    lab.store.clean_tmp().unwrap();
    let mut found = lab.store.in_doubt().unwrap();
    // Nobody else takes care of them now.
    assert!(lab.store.in_doubt().unwrap().is_empty());
    found.sort_by(|a, b| a.1.cmp(&b.1));
    let (lost, vote) = found.pop().unwrap();
    assert_eq!(vote, b"lost.lab");
    lost.discard().unwrap();
    let (mut take, vote) = found.pop().unwrap();
    assert_eq!(vote, b"lab");
    assert!(lab
        .store
        .catalogue()
        .list(None)
        .unwrap()
        .snapshots
        .is_empty());

    // Another host's member isn't stored here.
    let mut manifest = take.manifest(&name("dom0"));
    let mut here = sample_member("web-1");
    here.image = image;
    let mut elsewhere = sample_member("web-2");
    elsewhere.host = name("dom1");
    manifest.members = vec![here, elsewhere];
    take.commit(&manifest).unwrap();
    assert!(lab.store.in_doubt().unwrap().is_empty());
    let snapshot = lab.store.catalogue().get(&name("lab"), &id).unwrap();
    snapshot.verify().unwrap();
    assert!(!snapshot.dir().join("vote.json").exists());
    let refused = snapshot.member(&name("web-2")).map(drop);
    assert!(matches!(refused, Err(Error::Elsewhere { .. })));
    assert!(std::fs::read_dir(lab.tmp()).unwrap().next().is_none());
}
