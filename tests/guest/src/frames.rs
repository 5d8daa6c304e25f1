//! Whose frames pass through dom0's interfaces: those with a mark by its word.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::args::Args;
use crate::json::Json;
use crate::marks::word_in;
use crate::sys::PacketSocket;

/// What passed through one interface.
#[derive(Default)]
struct Passed {
    words: BTreeMap<String, u64>,
    unmarked: u64,
    longest: usize,
}

impl Passed {
    fn take(&mut self, frame: &[u8]) {
        self.longest = self.longest.max(frame.len());
        match word_in(frame) {
            Some(word) => *self.words.entry(word.to_owned()).or_default() += 1,
            None => self.unmarked += 1,
        }
    }

    fn tell(&self, interface: &str) -> Json {
        let mut words = Json::new();
        for (word, count) in &self.words {
            words.number(word, *count);
        }
        let mut json = Json::new();
        json.text("interface", interface)
            .object("words", words)
            .number("unmarked", self.unmarked)
            .number("longest", self.longest as u64);
        json
    }
}

/// Listens for a while, then prints what passed.
pub fn run(line: &[String]) -> Result<(), String> {
    let args = Args::parse(line, &["seconds"])?;
    let wait = Duration::from_secs(args.need("seconds")?);
    let sockets: Vec<(&String, PacketSocket)> = args
        .words
        .iter()
        .map(|interface| Ok((interface, PacketSocket::open(interface)?)))
        .collect::<Result<_, String>>()?;
    if sockets.is_empty() {
        return Err("frames wants interfaces".to_owned());
    }
    let end = Instant::now() + wait;
    let listen = |interface: &str, socket: &PacketSocket| {
        let mut passed = Passed::default();
        let mut buffer = vec![0u8; 65_536];
        while Instant::now() < end {
            if let Some(count) = socket.receive(&mut buffer) {
                passed.take(buffer.get(..count).unwrap_or_default());
            }
        }
        passed.tell(interface)
    };
    let told: Vec<Json> = std::thread::scope(|scope| {
        let threads: Vec<_> = sockets
            .iter()
            .map(|(interface, socket)| scope.spawn(move || listen(interface, socket)))
            .collect();
        threads
            .into_iter()
            .filter_map(|thread| thread.join().ok())
            .collect()
    });
    let mut json = Json::new();
    json.list("interfaces", told);
    println!("{}", json.finish());
    Ok(())
}
