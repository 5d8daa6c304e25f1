//! qcow2 images in files on a file system that can share extents: qemu writes out what
//! it keeps of the image, then the file is cloned as a raw one is, see `reflink.rs`.
//!
//! qemu answers a guest's write when the data is in the file, but where in the image
//! it went may be in qemu's memory only. So a clone of the file alone may lack what
//! the guest has seen completed. QMP has no command to flush a disk; `stop` does, and
//! for a guest without emulated devices has no other effect: its disks are served all
//! the same. What the back end still does of requests in the ring goes into the clone
//! or not: qemu orders its writes so that the image is sound at any moment, and the
//! guest's front end hands those requests in again (`plugin/ARCHITECTURE.md`, "Disks").
//!
//! The image's header is described in qemu's `docs/interop/qcow2.txt`, QMP in
//! `docs/interop/qmp-spec.txt`.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::reflink::Reflink;
use super::{unfit, Driver, Error, Moment, Piece, Source};

/// Bytes of the header that are looked at.
const HEADER_BYTES: usize = 80;
const MAGIC: &[u8] = b"QFI\xfb";
/// Incompatible features of version 3: qemu has found it corrupt; its data is in
/// another file.
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;

/// How long qemu may take to say that it's there.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long it may at least take to go on.
const GO_ON_MAX: Duration = Duration::from_millis(500);
/// The longest line that qemu may say.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// The driver.
pub(super) struct Qcow2;

impl Driver for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn format(&self) -> &'static str {
        "qcow2"
    }

    fn look(&self, source: &Source<'_>) -> Result<Option<(PathBuf, u64)>, Error> {
        if source.emulated {
            return unfit(
                "its format is qcow2, and the qemu that would have to write it out is the guest's \
                 other devices as well (convert it with 'qemu-img convert -O raw')",
            );
        }
        let found = Reflink.look(source)?;
        let Some((file, _)) = found.filter(|_| Path::new(source.target).is_file()) else {
            return unfit("its format is qcow2, and images are captured only if they are files");
        };
        let bytes = virtual_bytes(&file)?;
        Qmp::of(source.domid, Instant::now() + PATIENCE)?;
        Ok(Some((file, bytes)))
    }

    fn place(&self, origin: &Path, name: &str) -> PathBuf {
        Reflink.place(origin, name)
    }

    fn prepare(&self, piece: &Piece) -> Result<(), Error> {
        Reflink.prepare(piece)
    }

    fn capture(&self, piece: &Piece, now: &Moment<'_>) -> Result<(), Error> {
        clone_flushed(piece, now, Qmp::of(now.domid, now.deadline)?)
    }

    fn settle(&self, piece: &Piece) -> Result<(), Error> {
        Reflink.settle(piece)
    }

    fn check(&self, piece: &Piece) -> Result<(), Error> {
        check_size(piece, &piece.kept)
    }

    fn remove(&self, piece: &Piece) -> Result<(), Error> {
        Reflink.remove(piece)
    }

    fn check_origin(&self, piece: &Piece) -> Result<(), Error> {
        Reflink.check_same(piece)?;
        check_size(piece, &piece.origin)
    }

    fn put_back(&self, piece: &Piece, aside: &Path) -> Result<(), Error> {
        Reflink.put_back(piece, aside)
    }

    fn take_back(&self, piece: &Piece, aside: &Path) -> Result<(), Error> {
        Reflink.take_back(piece, aside)
    }

    fn forget(&self, piece: &Piece, aside: &Path) -> Result<(), Error> {
        Reflink.forget(piece, aside)
    }

    fn make(&self, piece: &Piece, new: &Path) -> Result<(), Error> {
        Reflink.make(piece, new)
    }

    fn unmake(&self, piece: &Piece, new: &Path) -> Result<(), Error> {
        Reflink.unmake(piece, new)
    }

    fn new_place(&self, piece: &Piece, name: &str) -> Result<PathBuf, Error> {
        Reflink.new_place(piece, name)
    }
}

/// Clones the image with nothing of it left in qemu's memory.
fn clone_flushed(piece: &Piece, now: &Moment<'_>, mut qemu: Qmp) -> Result<(), Error> {
    let stopped = qemu.execute("stop");
    let cloned = stopped.and_then(|()| Reflink.capture(piece, now));
    // Whatever came of it, and however late. A qemu that nobody has go on serves disks
    // as well.
    qemu.deadline = qemu.deadline.max(Instant::now() + GO_ON_MAX);
    let goes_on = qemu.execute("cont");
    cloned.and(goes_on)
}

fn check_size(piece: &Piece, image: &Path) -> Result<(), Error> {
    let bytes = virtual_bytes(image)?;
    if bytes == piece.bytes {
        return Ok(());
    }
    unfit(&format!(
        "{} is a disk of {bytes} bytes, and had {} when it was captured (give it its size again)",
        image.display(),
        piece.bytes
    ))
}

/// The size of the disk in an image, in bytes.
fn virtual_bytes(image: &Path) -> Result<u64, Error> {
    let file = File::open(image).map_err(Error::io("open", image))?;
    let mut header = [0; HEADER_BYTES];
    let refused = |why: &str| unfit(&format!("{} {why}", image.display()));
    match file.read_exact_at(&mut header, 0) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            return refused("is too short to be a qcow2 image");
        }
        Err(error) => return Err(Error::io("read", image)(error)),
    }
    let number = |from: usize, length: usize| {
        let bytes = header.get(from..from + length).unwrap_or_default();
        bytes
            .iter()
            .fold(0, |number, &byte| (number << 8) | u64::from(byte))
    };
    let features = match number(4, 4) {
        _ if !header.starts_with(MAGIC) => return refused("isn't a qcow2 image"),
        2 => 0,
        3 => number(72, 8),
        version => return refused(&format!("is a qcow2 image of version {version}")),
    };
    if features & CORRUPT != 0 {
        return refused("is corrupt, as qemu has found (see 'qemu-img check')");
    }
    if features & EXTERNAL_DATA != 0 {
        return refused(
            "has its data in another file (convert it with 'qemu-img convert -O qcow2')",
        );
    }
    Ok(number(24, 8))
}

/// A conversation with the qemu that serves a domain's disks.
struct Qmp {
    stream: BufReader<UnixStream>,
    socket: PathBuf,
    deadline: Instant,
}

/// What qemu says: one of these.
#[derive(Deserialize)]
struct Told {
    #[serde(rename = "return")]
    done: Option<serde_json::Value>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

impl Qmp {
    /// Where libxl talks to it as well; qemu talks to one at a time.
    fn of(domid: u32, deadline: Instant) -> Result<Self, Error> {
        let socket = PathBuf::from(format!("/var/run/xen/qmp-libxl-{domid}"));
        Self::at(&socket, deadline)
    }

    fn at(socket: &Path, deadline: Instant) -> Result<Self, Error> {
        let stream = UnixStream::connect(socket).map_err(Error::io("talk to qemu at", socket))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
            socket: socket.to_owned(),
            deadline,
        };
        // The greeting.
        qmp.hear("say that it's there")?;
        qmp.execute("qmp_capabilities")?;
        Ok(qmp)
    }

    fn execute(&mut self, command: &'static str) -> Result<(), Error> {
        let left = self.left(command)?;
        let stream = self.stream.get_mut();
        let line = format!("{{\"execute\":\"{command}\"}}\r\n");
        let written = stream.set_write_timeout(Some(left));
        let written = written.and_then(|()| stream.write_all(line.as_bytes()));
        written.map_err(Error::io("talk to qemu at", &self.socket))?;
        loop {
            let told = self.hear(command)?;
            if let Some(refusal) = told.error {
                return Err(self.failed(command, refusal.desc));
            }
            if told.done.is_some() {
                return Ok(());
            }
            // An event.
        }
    }

    fn hear(&mut self, what: &'static str) -> Result<Told, Error> {
        let left = self.left(what)?;
        let limited = self.stream.get_ref().set_read_timeout(Some(left));
        limited.map_err(Error::io("talk to qemu at", &self.socket))?;
        let mut line = Vec::new();
        let heard = (&mut self.stream)
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut line);
        match heard {
            Ok(0) => Err(self.failed(what, String::from("it has closed the connection"))),
            Ok(_) => serde_json::from_slice(&line)
                .map_err(|error| self.failed(what, format!("what it says can't be read: {error}"))),
            Err(error) => Err(Error::io("hear qemu at", &self.socket)(error)),
        }
    }

    /// The time left for it.
    fn left(&self, what: &'static str) -> Result<Duration, Error> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.failed(what, String::from("it has taken too long")));
        }
        Ok(left)
    }

    fn failed(&self, what: &str, why: String) -> Error {
        Error::Tool {
            tool: format!("qemu at {}, to {what}", self.socket.display()),
            why,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    use super::super::tests::on_each;
    use super::*;

    fn header(version: u32, features: u64) -> Vec<u8> {
        let mut header = vec![0; 112];
        header[..4].copy_from_slice(MAGIC);
        header[4..8].copy_from_slice(&version.to_be_bytes());
        header[24..32].copy_from_slice(&(16u64 << 20).to_be_bytes());
        header[72..80].copy_from_slice(&features.to_be_bytes());
        header
    }

    #[test]
    fn a_header_says_how_large_the_disk_is_or_why_it_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("web.qcow2");
        let found = |bytes: &[u8]| {
            std::fs::write(&image, bytes).unwrap();
            virtual_bytes(&image).map_err(|error| error.to_string())
        };
        assert_eq!(found(&header(2, CORRUPT)), Ok(16 << 20));
        assert_eq!(found(&header(3, 1)), Ok(16 << 20));
        for (bytes, why) in [
            (header(3, CORRUPT), "corrupt"),
            (header(3, EXTERNAL_DATA), "another file"),
            (header(4, 0), "version 4"),
            (vec![0; 112], "isn't a qcow2"),
            (header(3, 0)[..79].to_vec(), "too short"),
        ] {
            let told = found(&bytes).unwrap_err();
            assert!(told.contains(why), "{told}");
        }
    }

    /// A qemu that gives these answers, and what it was told.
    fn qemu(dir: &Path, answers: &'static [&'static str]) -> (PathBuf, JoinHandle<Vec<String>>) {
        let socket = dir.join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let heard = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream
                .write_all(b"{\"QMP\": {\"version\": {}}}\r\n")
                .unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let mut heard = Vec::new();
            for (answer, line) in answers.iter().zip(lines) {
                heard.push(line.unwrap());
                stream.write_all(answer.as_bytes()).unwrap();
            }
            heard
        });
        (socket, heard)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(500)
    }

    #[test]
    fn qemu_is_told_one_thing_after_the_other_and_events_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let answers = &[
            "{\"return\": {}}\n",
            "{\"event\": \"STOP\"}\n{\"return\": {}}\n",
        ];
        let (socket, heard) = qemu(dir.path(), answers);
        let mut qmp = Qmp::at(&socket, soon()).unwrap();
        qmp.execute("stop").unwrap();
        let heard = heard.join().unwrap();
        assert_eq!(
            heard,
            [r#"{"execute":"qmp_capabilities"}"#, r#"{"execute":"stop"}"#]
        );
        // It's gone, and that isn't success.
        assert!(qmp.execute("cont").is_err());
    }

    #[test]
    fn an_image_is_cloned_while_qemu_is_stopped_and_put_back_as_short_as_it_was() {
        on_each(|mounted| {
            let image = mounted.path().join("web.qcow2");
            std::fs::write(&image, header(3, 0)).unwrap();
            let place = |name: &str| Qcow2.place(&image, name);
            let piece = Piece {
                vdev: String::from("xvda"),
                driver: String::from("qcow2"),
                target: image.clone(),
                origin: image.clone(),
                bytes: 16 << 20,
                kept: place("vnesnap-0000000000c0ffee-0"),
            };
            let dir = tempfile::tempdir().unwrap();
            let done = "{\"return\": {}}\n";
            let answers: &'static [&'static str] = Box::leak(Box::new([done; 3]));
            let (socket, heard) = qemu(dir.path(), answers);
            let now = Moment {
                domid: 1,
                lock: &File::open(dir.path()).unwrap(),
                deadline: soon(),
            };
            Qcow2.prepare(&piece).unwrap();
            clone_flushed(&piece, &now, Qmp::at(&socket, soon()).unwrap()).unwrap();
            Qcow2.settle(&piece).unwrap();
            assert!(heard.join().unwrap()[1..]
                .iter()
                .zip(["stop", "cont"])
                .all(|(line, said)| line.contains(said)));

            let mut grown = header(3, 0);
            grown.resize(1 << 20, 7);
            std::fs::write(&image, &grown).unwrap();
            Qcow2.check(&piece).unwrap();
            {
                let mut open = std::process::Command::new("sleep")
                    .arg("1")
                    .stdin(File::open(&image).unwrap())
                    .spawn()
                    .unwrap();
                // It waits until nobody has it open.
                let began = Instant::now();
                Qcow2.check_origin(&piece).unwrap();
                assert!(began.elapsed() > Duration::from_millis(500));
                open.wait().unwrap();
            }
            let aside = place("vneold-0000000000c0ffee-0");
            Qcow2.put_back(&piece, &aside).unwrap();
            assert_eq!(std::fs::read(&image).unwrap(), header(3, 0));
            Qcow2.take_back(&piece, &aside).unwrap();
            assert_eq!(std::fs::read(&image).unwrap(), grown);
        });
    }

    #[test]
    fn a_qemu_that_refuses_is_silent_or_talks_nonsense_is_an_error_in_time() {
        for (answer, why) in [
            (
                "{\"error\": {\"class\": \"x\", \"desc\": \"busy now\"}}\n",
                "busy now",
            ),
            ("", "qmp"),
            ("nonsense\n", "can't be read"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let answers: &'static [&'static str] = Box::leak(Box::new([answer]));
            let (socket, heard) = qemu(dir.path(), answers);
            let told = Qmp::at(&socket, soon()).map(drop).unwrap_err();
            assert!(told.to_string().contains(why), "{told}");
            heard.join().unwrap();
        }
        let nobody = Qmp::at(Path::new("/no/such/qmp"), soon()).map(drop);
        assert!(nobody.unwrap_err().to_string().contains("/no/such/qmp"));
    }
}
