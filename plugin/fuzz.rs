//! What fuzzers call (`tests/fuzz`), and a short run of the same in this crate's tests:
//! readers of what comes from guests, peers and disks take any bytes without a panic,
//! and what they accept makes sense.

use std::convert::Infallible;

use crate::image::fuzz as image;
use crate::stream::{
    is_save_file, Ingest, Page, PageType, Place, SaveHeader, Sink, Writer, XcHeader,
};

/// A reader that is tried, by the name of its corpus.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 9] = [
    ("stream", stream),
    ("save", save),
    ("pack", image::pack),
    ("index", image::index),
    ("index-1", image::index_1),
    ("records", image::records),
    ("manifest", image::manifest),
    ("batch", image::batch),
    ("sealed", image::sealed),
];

/// Writes a stream again, as it's read.
struct Again(Writer<Vec<u8>>);

impl Sink for Again {
    type Error = Infallible;

    fn xl_header(&mut self, legacy: bool) -> Result<(), Infallible> {
        let _ = self.0.xl_header(legacy);
        Ok(())
    }

    fn xc_header(&mut self, header: &XcHeader) -> Result<(), Infallible> {
        let _ = self.0.xc_header(header);
        Ok(())
    }

    fn record(&mut self, place: Place, kind: u32, body: &[u8]) -> Result<(), Infallible> {
        let _ = self.0.record(place, kind, body);
        Ok(())
    }

    fn page(&mut self, pfn: u64, kind: PageType, data: Option<&Page>) -> Result<(), Infallible> {
        let _ = self.0.page(pfn, kind, data);
        Ok(())
    }

    fn end(&mut self) -> Result<(), Infallible> {
        let _ = self.0.end();
        Ok(())
    }
}

/// A migration stream.
fn stream(bytes: &[u8]) {
    // What is no stream ends in an error, and that is all there is to it.
    let _ = Ingest::new(bytes).run(&mut Again(Writer::new(Vec::new())));
}

/// A file of `xl save`.
fn save(mut bytes: &[u8]) {
    let is_one = is_save_file(bytes);
    if let Ok(header) = SaveHeader::read(&mut bytes) {
        assert!(is_one, "a header was read that isn't recognised");
        let mut again = Vec::new();
        if header.write(&mut again).is_ok() {
            let mut again = again.as_slice();
            assert!(SaveHeader::read(&mut again).is_ok_and(|read| read == header));
        }
        stream(bytes);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::stream::testenc;

    fn corpus(target: &str) -> PathBuf {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
        corpus.join(target)
    }

    /// Small steps of a generator that is the same everywhere.
    struct Random(u64);

    impl Random {
        fn below(&mut self, limit: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 16) as usize % limit.max(1)
        }
    }

    /// One small change: as a fuzzer makes them, without its eyes.
    fn change(bytes: &mut Vec<u8>, random: &mut Random) {
        let at = random.below(bytes.len());
        match random.below(6) {
            _ if bytes.is_empty() => bytes.push(0),
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            2 => bytes.truncate(at),
            3 => {
                let end = (at + random.below(64)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            4 => {
                let end = (at + random.below(64)).min(bytes.len());
                bytes.drain(at..end);
            }
            _ => {
                let number = [0, 1, u32::MAX, 1 << 31, 4096][random.below(5)];
                let end = (at + 4).min(bytes.len());
                bytes[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
            }
        }
    }

    #[test]
    fn no_reader_panics_at_what_fuzzers_have_found_or_at_small_changes_of_it() {
        for (name, target) in TARGETS {
            let mut seeds: Vec<PathBuf> = std::fs::read_dir(corpus(name))
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .collect();
            seeds.sort();
            assert!(!seeds.is_empty(), "{name} has no corpus");
            let mut random = Random(0x5eed);
            for seed in seeds {
                let seed = std::fs::read(seed).unwrap();
                target(&seed);
                let rounds = (2 << 20) / (seed.len() + 4096);
                for _ in 0..rounds.clamp(20, 300) {
                    let mut bytes = seed.clone();
                    for _ in 0..=random.below(3) {
                        change(&mut bytes, &mut random);
                    }
                    target(&bytes);
                }
            }
        }
    }

    #[test]
    #[ignore = "writes the beginnings of the corpus into $VNE_CORPUS"]
    fn write_corpus() {
        let Some(root) = std::env::var_os("VNE_CORPUS") else {
            return;
        };
        let put = |target: &str, name: &str, bytes: &[u8]| {
            let dir = Path::new(&root).join(target);
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join(name), bytes).unwrap();
        };
        // Two pages are enough, and each type of frame.
        let few = |rounds: &[Vec<testenc::Entry>]| -> Vec<Vec<testenc::Entry>> {
            let few = |round: &Vec<testenc::Entry>| round.iter().take(4).copied().collect();
            rounds.iter().take(2).map(few).collect()
        };
        let plain: Vec<testenc::Entry> = (0..3).map(|pfn| (pfn, 0, Some([7; 4096]))).collect();
        let streams = [
            ("pv", testenc::pv_stream(1030, &few(&testenc::pv_rounds()))),
            ("pvh", testenc::pvh_stream(std::slice::from_ref(&plain))),
            ("hvm", testenc::hvm_stream(&[plain])),
        ];
        for (name, stream) in &streams {
            put("stream", name, stream);
            let header = SaveHeader {
                config_json: Some(String::from("{\"c_info\": {}}")),
            };
            let mut file = Vec::new();
            header.write(&mut file).unwrap();
            file.extend_from_slice(stream);
            put("save", name, &file);
        }
        for (target, name, bytes) in image::seeds() {
            put(target, name, &bytes);
        }
    }
}
