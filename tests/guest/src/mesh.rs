//! Every station sends numbered datagrams to every other one, and counts what
//! it receives from each: missing, twice, late.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::args::Args;
use crate::card::Card;
use crate::clock::Pace;
use crate::json::Json;
use crate::peers::{Message, Peers};
use crate::sequence::Sequence;
use crate::status::{self, lock, Status};
use crate::workload::Run;

const PORT: u16 = 7002;
const GREETING: Duration = Duration::from_millis(200);

/// What there is between this station and another one.
#[derive(Default)]
struct Link {
    here: bool,
    sent: u64,
    send_failures: u64,
    from: Sequence,
}

/// See [`crate::workload::prepare`].
pub fn prepare(line: &[String], status: &Status) -> Result<Run, String> {
    let args = Args::parse(line, &["index", "peers", "interval-us"])?;
    let interval = Duration::from_micros(args.or("interval-us", 10_000)?);
    let peers = Arc::new(Peers::open(&args, PORT)?);
    let me = peers.index;
    let links = peers
        .all
        .iter()
        .map(|_| Link {
            from: Sequence::from_zero(),
            ..Link::default()
        })
        .collect();
    let links = status::shared(status, "mesh", links, move |links: &Vec<Link>| {
        tell(me, links)
    });
    Ok(Box::new(move || {
        let listener = (peers.clone(), links.clone());
        std::thread::spawn(move || listen(&listener.0, &listener.1));
        send(&peers, &links, interval)
    }))
}

fn tell(me: usize, links: &[Link]) -> Json {
    let mut list = Vec::new();
    for (index, link) in links.iter().enumerate().filter(|(index, _)| *index != me) {
        let mut json = Json::new();
        json.number("station", index as u64)
            .flag("here", link.here)
            .number("sent", link.sent)
            .number("send_failures", link.send_failures);
        link.from.tell(&mut json);
        list.push(json);
    }
    let mut json = Json::new();
    json.number("index", me as u64).list("links", list);
    json
}

fn listen(peers: &Peers, links: &Mutex<Vec<Link>>) {
    loop {
        match peers.receive() {
            Some(Message::Here(from)) => {
                if let Some(link) = lock(links).get_mut(from as usize) {
                    link.here = true;
                }
            }
            Some(Message::Number(from, number)) => {
                if let Some(link) = lock(links).get_mut(from as usize) {
                    link.from.take(number);
                }
            }
            Some(Message::Again(from, number)) => {
                if let Some(link) = lock(links).get_mut(from as usize) {
                    link.from.take_again(number);
                }
            }
            Some(Message::Hello(_)) | None => {}
        }
    }
}

/// Numbers for a station start once it has answered, so none is lost only
/// because it wasn't there yet.
fn send(peers: &Peers, links: &Mutex<Vec<Link>>, interval: Duration) -> Result<(), String> {
    let card = Card::open();
    let mut pace = Pace::new(interval);
    let mut greeting = Pace::new(GREETING);
    loop {
        let here: Vec<bool> = lock(links).iter().map(|link| link.here).collect();
        let mut absent = false;
        for (to, here) in here.iter().enumerate() {
            if to == peers.index {
                continue;
            }
            if !here {
                absent = true;
                // It's repeated until it's answered.
                let _ = peers.send(to, Message::Hello(peers.me()));
                continue;
            }
            let number = lock(links).get(to).map_or(0, |link| link.sent);
            let (_, sent) = peers.send_number(&card, to, number);
            if let Some(link) = lock(links).get_mut(to) {
                match sent {
                    Ok(()) => link.sent += 1,
                    Err(_) => link.send_failures += 1,
                }
            }
        }
        if absent && !here.contains(&true) {
            greeting.wait();
        } else {
            pace.wait();
        }
    }
}
