//! Clones on real file systems: xfs and btrfs in files, on loop devices. Where these
//! can't be had, the tests say so and check nothing.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::exchange::{self, Change, Exchange};
use super::*;

const DISK_BYTES: usize = 3 << 20;
const TAKE: u64 = 0x00c0_ffee;

/// A mounted file system that can share extents.
pub(super) struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    fn new(kind: &str) -> Option<Self> {
        let made = Self::make(kind);
        if let Err(why) = &made {
            eprintln!("NOT TESTED on {kind}: {why}");
        }
        made.ok()
    }

    fn make(kind: &str) -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        let image = dir.path().join("image");
        let run = |command: &mut Command| match command.output() {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            Err(error) => Err(error.to_string()),
        };
        let file = File::create(&image).map_err(|error| error.to_string())?;
        file.set_len(512 << 20).map_err(|error| error.to_string())?;
        run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&image))?;
        let mounted = Self { dir };
        std::fs::create_dir(mounted.path()).map_err(|error| error.to_string())?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .args([&image, &mounted.path()]))?;
        Ok(mounted)
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// A disk with these bytes all over it.
    fn disk(&self, name: &str, fill: u8) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, vec![fill; DISK_BYTES]).unwrap();
        path
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Not mounted if it couldn't be.
        let _ = Command::new("umount").arg(self.path()).output();
    }
}

pub(super) fn on_each(test: impl Fn(&Mounted)) {
    for kind in ["xfs", "btrfs"] {
        if let Some(mounted) = Mounted::new(kind) {
            test(&mounted);
        }
    }
}

fn source<'a>(target: &'a str, format: &'a str) -> Source<'a> {
    Source {
        vdev: "xvda",
        target,
        format,
        script: None,
        elsewhere: false,
        domid: 1,
        emulated: false,
    }
}

fn planned(disk: &Path) -> Piece {
    let target = disk.to_str().unwrap();
    let source = source(target, "raw");
    Piece::planned(&source, look(&source).unwrap(), TAKE, 0)
}

/// Captures a disk for the snapshot whose directory is `dir`.
fn captured(disk: &Path, dir: &Path) -> Piece {
    let piece = planned(disk);
    write_list(dir, std::slice::from_ref(&piece)).unwrap();
    let driver = piece.driver().unwrap();
    driver.prepare(&piece).unwrap();
    let now = Moment {
        domid: 1,
        lock: &File::open(dir).unwrap(),
        deadline: Instant::now() + Duration::from_secs(10),
    };
    driver.capture(&piece, &now).unwrap();
    driver.settle(&piece).unwrap();
    piece
}

fn filled_with(disk: &Path) -> u8 {
    let bytes = std::fs::read(disk).unwrap();
    assert_eq!(bytes.len(), DISK_BYTES);
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "it's mixed");
    bytes[0]
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_clone_keeps_what_the_disk_was_and_is_only_roots_to_read() {
    on_each(|mounted| {
        let dir = tempfile::tempdir().unwrap();
        let disk = mounted.disk("web.img", 1);
        let piece = captured(&disk, dir.path());
        mounted.disk("web.img", 2);
        assert_eq!(filled_with(&piece.kept), 1);
        piece.check().unwrap();
        let facts = std::fs::metadata(&piece.kept).unwrap();
        assert_eq!(facts.permissions().mode() & 0o7777, 0o600);
        let folder = std::fs::metadata(piece.kept.parent().unwrap()).unwrap();
        assert_eq!(folder.permissions().mode() & 0o7777, 0o700);
        remove_listed(dir.path()).unwrap();
        assert_eq!(names_in(&mounted.path()), ["web.img"]);
        assert!(piece.check().is_err());
        // Whoever was killed in the middle of it does it again.
        remove_listed(dir.path()).unwrap();
    });
}

#[test]
fn clones_are_not_put_where_somebody_else_wants_them() {
    on_each(|mounted| {
        let piece = planned(&mounted.disk("web.img", 1));
        let folder = piece.kept.parent().unwrap();
        let theirs = mounted.path().join("theirs");
        std::fs::create_dir(&theirs).unwrap();
        std::os::unix::fs::symlink(&theirs, folder).unwrap();
        let told = piece.driver().unwrap().prepare(&piece).unwrap_err();
        assert!(told.to_string().contains("only root may use"), "{told}");
        std::fs::remove_file(folder).unwrap();
        std::fs::create_dir(folder).unwrap();
        std::fs::set_permissions(folder, PermissionsExt::from_mode(0o777)).unwrap();
        assert!(piece.driver().unwrap().prepare(&piece).is_err());
        assert!(names_in(&theirs).is_empty());
    });
}

#[test]
fn looking_at_a_disk_leaves_nothing() {
    on_each(|mounted| {
        let disk = mounted.disk("web.img", 1);
        let piece = planned(&disk);
        assert_eq!(piece.bytes, DISK_BYTES as u64);
        assert_eq!(names_in(&mounted.path()), ["web.img"]);
    });
}

#[test]
fn a_disk_behind_a_link_or_a_loop_device_is_the_file_itself() {
    on_each(|mounted| {
        let disk = mounted.disk("web.img", 1);
        let link = mounted.path().join("link");
        std::os::unix::fs::symlink(&disk, &link).unwrap();
        let real = std::fs::canonicalize(&disk).unwrap();
        assert_eq!(planned(&link).origin, real);
        let made = Command::new("losetup")
            .args(["-f", "--show"])
            .arg(&disk)
            .output();
        let made = made.unwrap();
        let device = String::from_utf8(made.stdout).unwrap();
        let piece = planned(Path::new(device.trim()));
        let undone = Command::new("losetup")
            .arg("-d")
            .arg(device.trim())
            .status();
        assert!(undone.unwrap().success());
        assert_eq!(
            (piece.origin.as_path(), piece.bytes),
            (real.as_path(), DISK_BYTES as u64)
        );
    });
}

#[test]
fn a_loop_device_that_is_in_use_is_not_put_back() {
    on_each(|mounted| {
        // The one that the file system itself is on is as good as a domain's.
        let found = Command::new("findmnt")
            .args(["-n", "-o", "SOURCE"])
            .arg(mounted.path())
            .output();
        let device = String::from_utf8(found.unwrap().stdout).unwrap();
        let image = std::fs::canonicalize(mounted.dir.path().join("image")).unwrap();
        let piece = Piece {
            vdev: "xvda".to_owned(),
            driver: "reflink".to_owned(),
            target: PathBuf::from(device.trim()),
            bytes: std::fs::metadata(&image).unwrap().len(),
            kept: image.with_file_name(".vne-snapshots/vnesnap-0000000000c0ffee-0"),
            origin: image,
        };
        let told = piece.driver().unwrap().check_origin(&piece).unwrap_err();
        assert!(told.to_string().contains("in use"), "{told}");
    });
}

#[test]
fn a_file_system_without_reflinks_is_told_at_once() {
    // What is in memory only has none.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let disk = dir.path().join("web.img");
    std::fs::write(&disk, "x").unwrap();
    let told = look(&source(disk.to_str().unwrap(), "raw")).map(drop);
    let told = told.unwrap_err().to_string();
    assert!(
        told.contains("without reflinks") && told.contains("xfs"),
        "{told}"
    );
    assert_eq!(names_in(dir.path()), ["web.img"]);
}

#[test]
fn what_isnt_raw_ours_or_named_whole_is_refused() {
    for (source, why) in [
        (source("/web.vhd", "vhd"), "qemu-img convert"),
        (source("/web.qcow2", "qcow2"), "/web.qcow2"),
        (
            Source {
                emulated: true,
                ..source("/web.qcow2", "qcow2")
            },
            "other devices",
        ),
        (source("web.img", "raw"), "absolute path"),
        (source("/no/such/disk", "raw"), "/no/such/disk"),
        (
            Source {
                script: Some("block-drbd"),
                ..source("r0", "raw")
            },
            "block-drbd",
        ),
        (
            Source {
                elsewhere: true,
                ..source("/web.img", "raw")
            },
            "driver domain",
        ),
    ] {
        let told = look(&source).map(drop).unwrap_err();
        let told = crate::sentence(&told);
        assert!(told.contains(why), "{told}");
    }
}

#[test]
fn a_list_cannot_have_somebody_elses_files_removed() {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("precious");
    std::fs::write(&own, "x").unwrap();
    let good = Piece {
        vdev: "xvda".to_owned(),
        driver: "reflink".to_owned(),
        target: dir.path().join("web.img"),
        origin: dir.path().join("web.img"),
        bytes: 1,
        kept: dir.path().join(".vne-snapshots/vnesnap-0000000000c0ffee-0"),
    };
    assert!(good.driver().is_ok());
    for kept in [
        own.clone(),
        dir.path().join("vnesnap-0000000000c0ffee-0"),
        dir.path().join(".vne-snapshots/web.img"),
        dir.path().join(".vne-snapshots/vnesnap-c0ffee-0"),
        dir.path().join(".vne-snapshots/vnesnap-0000000000c0ffee-x"),
    ] {
        let piece = Piece {
            kept,
            ..good.clone()
        };
        write_list(dir.path(), &[piece]).unwrap();
        assert!(remove_listed(dir.path()).is_err());
    }
    let later = Piece {
        driver: "lvm-thin-2".to_owned(),
        ..good
    };
    let told = later.check().unwrap_err().to_string();
    assert!(told.contains("lvm-thin-2"), "{told}");
    assert!(own.exists());
}

#[test]
fn a_restored_disk_stays_the_same_file_and_nothing_is_left_beside_it() {
    on_each(|mounted| {
        let dir = tempfile::tempdir().unwrap();
        let disk = mounted.disk("web.img", 1);
        let piece = captured(&disk, dir.path());
        mounted.disk("web.img", 2);
        let before = std::fs::metadata(&disk).unwrap().ino();
        let folder = exchange::folder(dir.path(), 7);
        let change = Change::put_back(&piece, 7, 0).unwrap();
        let exchange = Exchange::begin(&folder, vec![change]).unwrap();
        exchange.carry_out().unwrap();
        assert_eq!(filled_with(&disk), 1);
        exchange.forward().unwrap();
        assert_eq!(filled_with(&disk), 1);
        assert_eq!(std::fs::metadata(&disk).unwrap().ino(), before);
        let kept = piece.kept.file_name().unwrap().to_str().unwrap();
        assert_eq!(names_in(piece.kept.parent().unwrap()), [kept]);
        assert!(!folder.exists());
    });
}

#[test]
fn a_restore_that_ends_anywhere_leaves_the_disk_as_it_was() {
    on_each(|mounted| {
        let dir = tempfile::tempdir().unwrap();
        let disk = mounted.disk("web.img", 1);
        let piece = captured(&disk, dir.path());
        let folder = exchange::folder(dir.path(), 7);
        let change = || Change::put_back(&piece, 7, 0).unwrap();
        let aside = |name: &str| piece.kept.with_file_name(name);
        let killed_when: [&dyn Fn(); 4] = [
            &|| {},
            // Half of what is to be aside.
            &|| std::fs::write(aside("vneold-0000000000000007-0.half"), "x").unwrap(),
            // All of it, and the disk half overwritten.
            &|| {
                let name = aside("vneold-0000000000000007-0");
                std::fs::copy(&disk, name).unwrap();
                let half = File::options().write(true).open(&disk).unwrap();
                std::os::unix::fs::FileExt::write_all_at(&half, &[1; 4096], 0).unwrap();
            },
            &|| {
                let opened = Exchange::open(&folder).unwrap();
                opened.unwrap().carry_out().unwrap();
            },
        ];
        for killed in killed_when {
            mounted.disk("web.img", 2);
            drop(Exchange::begin(&folder, vec![change()]).unwrap());
            killed();
            // What a guard does, and what another one would do after it.
            exchange::end(&folder, false).unwrap();
            exchange::end(&folder, false).unwrap();
            assert_eq!(filled_with(&disk), 2);
            let kept = piece.kept.file_name().unwrap().to_str().unwrap();
            assert_eq!(names_in(piece.kept.parent().unwrap()), [kept]);
        }
    });
}

#[test]
fn after_a_restart_an_exchange_ends_the_way_that_it_was_going() {
    on_each(|mounted| {
        let dir = tempfile::tempdir().unwrap();
        let disk = mounted.disk("web.img", 1);
        let piece = captured(&disk, dir.path());
        for (decided, expected) in [(false, 2), (true, 1)] {
            mounted.disk("web.img", 2);
            let folder = exchange::folder(dir.path(), 7);
            let change = Change::put_back(&piece, 7, 0).unwrap();
            let mut exchange = Exchange::begin(&folder, vec![change]).unwrap();
            exchange.carry_out().unwrap();
            if decided {
                exchange.keep().unwrap();
            }
            drop(exchange);
            assert_eq!(
                exchange::folders(dir.path()).unwrap(),
                std::slice::from_ref(&folder)
            );
            exchange::recover(&folder).unwrap();
            assert!(!folder.exists());
            assert_eq!(filled_with(&disk), expected);
        }
    });
}

#[test]
fn a_copys_disk_is_beside_the_original_and_goes_with_a_restore_that_fails() {
    on_each(|mounted| {
        let dir = tempfile::tempdir().unwrap();
        let disk = mounted.disk("web.img", 1);
        let piece = captured(&disk, dir.path());
        mounted.disk("web.img", 2);
        let folder = exchange::folder(dir.path(), 7);
        let new = mounted.path().join("try-web.img");
        for forward in [false, true] {
            let change = Change::make(&piece, "try").unwrap();
            assert_eq!(change.made(), Some(("xvda", new.as_path())));
            let exchange = Exchange::begin(&folder, vec![change]).unwrap();
            exchange.carry_out().unwrap();
            assert_eq!((filled_with(&new), filled_with(&disk)), (1, 2));
            drop(exchange);
            exchange::end(&folder, forward).unwrap();
            assert_eq!(new.exists(), forward);
        }
        let told = Change::make(&piece, "try").unwrap_err().to_string();
        assert!(
            told.contains("try-web.img") && told.contains("exists"),
            "{told}"
        );
    });
}

#[test]
fn a_disk_that_has_another_size_is_refused_before_anything_is_touched() {
    on_each(|mounted| {
        let dir = tempfile::tempdir().unwrap();
        let disk = mounted.disk("web.img", 1);
        let piece = captured(&disk, dir.path());
        File::options()
            .write(true)
            .open(&disk)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let told = Change::put_back(&piece, 7, 0).unwrap_err().to_string();
        assert!(
            told.contains("1048576") && told.contains("web.img"),
            "{told}"
        );
        std::fs::remove_file(&disk).unwrap();
        assert!(Change::put_back(&piece, 7, 0).is_err());
    });
}
