//! One token that goes round by UDP and is never sent again: whoever restores
//! the stations from different moments makes two tokens of it, or none, or
//! numbers that nobody has sent yet; and here it shows.
//!
//! Station 0 sends number 0 to station 1; a station that receives n sends n+1
//! on. So each station knows exactly which number comes next.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::args::Args;
use crate::card::Card;
use crate::json::Json;
use crate::peers::{Message, Peers};
use crate::status::{self, lock, Status};
use crate::workload::Run;

const PORT: u16 = 7001;
/// Violations that are printed; all are counted.
const PRINTED_MAX: u64 = 20;

/// What a received number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// The one that had to come.
    Good,
    /// One that was here already: a second token.
    Past,
    /// One that this station can't have been due yet.
    Future,
}

/// What a station wrote down.
#[derive(Debug, Default)]
struct Station {
    index: u64,
    stations: u64,
    received: u64,
    sent: u64,
    last_received: Option<u64>,
    last_sent: Option<u64>,
    past: u64,
    future: u64,
    send_failures: u64,
    /// How often it had to wait for the guest's card.
    waited: u64,
}

impl Station {
    fn expected(&self) -> u64 {
        match self.last_received {
            Some(last) => last + self.stations,
            None => (self.index + self.stations - 1) % self.stations,
        }
    }

    fn receive(&mut self, number: u64) -> Verdict {
        let expected = self.expected();
        self.received += 1;
        if number < expected {
            self.past += 1;
            return Verdict::Past;
        }
        self.last_received = Some(number);
        if number > expected {
            self.future += 1;
            return Verdict::Future;
        }
        Verdict::Good
    }

    fn tell(&self) -> Json {
        let mut json = Json::new();
        json.number("index", self.index)
            .number("stations", self.stations)
            .number("received", self.received)
            .number("sent", self.sent)
            .maybe("last_received", self.last_received)
            .maybe("last_sent", self.last_sent)
            .flag("holding", self.last_received > self.last_sent)
            .number("violations", self.past + self.future)
            .number("past", self.past)
            .number("future", self.future)
            .number("send_failures", self.send_failures)
            .number("waited", self.waited);
        json
    }
}

/// See [`crate::workload::prepare`].
pub fn prepare(line: &[String], status: &Status) -> Result<Run, String> {
    let args = Args::parse(
        line,
        &["index", "peers", "hold-us", "rest-every", "rest-ms"],
    )?;
    let pace = Pace {
        hold: Duration::from_micros(args.or("hold-us", 1000)?),
        rest_every: args.or("rest-every", 0)?,
        rest: Duration::from_millis(args.or("rest-ms", 0)?),
    };
    let peers = Peers::open(&args, PORT)?;
    let station = status::shared(
        status,
        "ring",
        Station {
            index: peers.index as u64,
            stations: peers.all.len() as u64,
            ..Station::default()
        },
        Station::tell,
    );
    Ok(Box::new(move || run(&peers, &station, pace)))
}

/// How long a station keeps the token.
///
/// A snapshot holds frames for much longer than a station keeps the token, so
/// that it would always be caught on its way; with a rest it is as often caught
/// in a station's memory.
#[derive(Clone, Copy, Debug)]
struct Pace {
    hold: Duration,
    /// Each number that this divides is kept for `rest` instead; 0 for none.
    rest_every: u64,
    rest: Duration,
}

impl Pace {
    fn of(&self, number: u64) -> Duration {
        match number.checked_rem(self.rest_every) {
            Some(0) => self.rest,
            _ => self.hold,
        }
    }
}

fn run(peers: &Peers, station: &Arc<Mutex<Station>>, pace: Pace) -> Result<(), String> {
    let card = Card::open();
    if peers.index == 0 {
        gather(peers)?;
        pass(peers, &card, station, 0);
    }
    peers.set_wait(None)?;
    loop {
        let (from, number) = match peers.receive() {
            Some(Message::Number(from, number)) => (from, number),
            Some(Message::Again(from, number)) if number >= lock(station).expected() => {
                (from, number)
            }
            _ => continue,
        };
        let (verdict, expected, counted) = {
            let mut station = lock(station);
            let expected = station.expected();
            let verdict = station.receive(number);
            (verdict, expected, station.past + station.future)
        };
        if verdict != Verdict::Good && counted <= PRINTED_MAX {
            println!(
                "RING-VIOLATION {verdict:?}: received {number} from {from}, expected {expected}"
            );
        }
        // A second token ends here; it's been counted.
        if verdict != Verdict::Past {
            let keep = pace.of(number);
            if !keep.is_zero() {
                std::thread::sleep(keep);
            }
            pass(peers, &card, station, number + 1);
        }
    }
}

/// Waits until every other station answers.
fn gather(peers: &Peers) -> Result<(), String> {
    let mut here = vec![false; peers.all.len()];
    here[peers.index] = true;
    peers.set_wait(Some(Duration::from_millis(200)))?;
    while let Some(absent) = here.iter().position(|here| !here) {
        // It's repeated until it's answered.
        let _ = peers.send(absent, Message::Hello(peers.me()));
        if let Some(Message::Here(from)) = peers.receive() {
            if let Some(here) = here.get_mut(from as usize) {
                *here = true;
            }
        }
    }
    Ok(())
}

fn pass(peers: &Peers, card: &Card, station: &Arc<Mutex<Station>>, number: u64) {
    let to = (peers.index + 1) % peers.all.len();
    let (waited, sent) = peers.send_number(card, to, number);
    let mut station = lock(station);
    station.waited += u64::from(waited);
    match sent {
        Ok(()) => {
            station.sent += 1;
            station.last_sent = Some(number);
        }
        Err(why) => {
            station.send_failures += 1;
            println!("RING-SEND-FAILED {number}: {why}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn station(index: u64) -> Station {
        Station {
            index,
            stations: 3,
            ..Station::default()
        }
    }

    #[test]
    fn the_token_rests_where_it_should() {
        let (hold, rest) = (Duration::ZERO, Duration::from_secs(1));
        let pace = |rest_every| Pace {
            hold,
            rest_every,
            rest,
        };
        assert_eq!(pace(32).of(64), rest);
        assert_eq!(pace(32).of(65), hold);
        assert_eq!(pace(0).of(64), hold);
    }

    #[test]
    fn each_station_knows_its_first_and_next_number() {
        for (index, first) in [(0, 2), (1, 0), (2, 1)] {
            let mut station = station(index);
            assert_eq!(station.receive(first), Verdict::Good);
            assert_eq!(station.receive(first + 3), Verdict::Good);
        }
    }

    #[test]
    fn a_second_token_is_a_violation_and_changes_nothing_else() {
        let mut station = station(1);
        station.receive(0);
        assert_eq!(station.receive(0), Verdict::Past);
        assert_eq!(station.last_received, Some(0));
        assert_eq!(station.receive(3), Verdict::Good);
    }

    #[test]
    fn a_number_from_the_future_is_a_violation() {
        let mut station = station(1);
        station.receive(0);
        assert_eq!(station.receive(6), Verdict::Future);
        assert_eq!(station.receive(9), Verdict::Good);
    }
}
