//! What members that are being restored send: recorded frames are played back
//! before all others, and none goes anywhere until all members can receive again.
//!
//! ```text
//!  built, paused ─► holds, blocked ─► recorded frames in ─► members run ─► front ends connect
//!                                                                  └─► the frames go
//! ```
//!
//! A vif whose front end isn't connected is a port of its bridge that is down. So
//! without this, what the first members send is lost to the last ones.

use std::process::Stdio;
use std::time::{Duration, Instant};

use super::error::Error;
use super::journal::{Journal, Record};
use super::workers::Program;
use crate::domain::{DomainFacts, Vif};
use crate::net::announce::{self, Mac};
use crate::net::frames::Frame;
use crate::net::{self, Hold, HoldRecord, Nft, Player, Rtnl, BACKLOG_MAX};
use crate::sentence::sentence;

/// How long a front end may take to connect before the others go on without.
pub const CONNECT_MAX: Duration = Duration::from_secs(20);
/// The same where the guest may be using its emulated card instead: then this one
/// never connects.
const CONNECT_EMULATED_MAX: Duration = Duration::from_secs(3);
/// Each look at all interfaces keeps those that connect from doing so.
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// How long frames may take from being played back to waiting.
const QUEUED_MAX: Duration = Duration::from_secs(2);
/// What a hold has room for, besides what is played back.
const HOLD_BYTES: u32 = 8 << 20;
/// What a worker may say of the members, in bytes.
const FACTS_BYTES_MAX: u64 = 64 << 20;

/// One member's recorded frames, in the order of sending.
#[derive(Debug)]
pub struct Recorded {
    /// The member.
    pub member: String,
    /// What it had sent.
    pub frames: Vec<Frame>,
}

/// The blocked holds of members that are built.
pub struct Held {
    rtnl: Rtnl,
    /// Owns the redirects into the holds.
    nft: Nft,
    holds: Vec<Hold>,
    waited_for: Vec<WaitedFor>,
}

/// A vif that has to be connected.
struct WaitedFor {
    member: String,
    domid: u32,
    devid: u32,
    vif: String,
    emulated: bool,
    /// The guest's address, if libxl says it.
    mac: Option<Mac>,
}

impl Held {
    /// Holds what all these members send, of which nothing runs yet, and plays
    /// back what is recorded of them. Where this fails, what was built is in the
    /// journal; see [`discard`].
    pub fn build(
        program: &Program,
        journal: &mut Journal,
        recorded: &[Recorded],
    ) -> Result<Option<Self>, Error> {
        let names: Vec<&str> = recorded.iter().map(|one| one.member.as_str()).collect();
        let members = facts(program, &names)?;
        let mut planned = Vec::new();
        let mut waited_for = Vec::new();
        for (member, vif) in vifs(&members) {
            let emulated = HoldRecord::of_emulated(member.domid, vif.devid, &vif.ifname);
            waited_for.push(WaitedFor {
                member: member.name.clone(),
                domid: member.domid,
                devid: vif.devid,
                vif: vif.ifname.clone(),
                emulated: emulated.is_some(),
                mac: announce::parse_mac(&vif.mac),
            });
            planned.push(HoldRecord::new(member.domid, vif.devid, &vif.ifname));
            planned.extend(emulated);
        }
        if planned.is_empty() && recorded.iter().all(|one| one.frames.is_empty()) {
            return Ok(None);
        }
        journal.update(|record| record.holds.clone_from(&planned))?;
        let mut held = Self {
            rtnl: Rtnl::open()?,
            nft: Nft::open()?,
            holds: Vec::new(),
            waited_for,
        };
        for record in &planned {
            let limit = HOLD_BYTES.saturating_add(room_for(record, &members, recorded));
            let hold = Hold::prepare(&mut held.rtnl, &mut held.nft, record, limit)?;
            held.holds.push(hold);
        }
        for hold in &held.holds {
            hold.block(&mut held.rtnl)?;
        }
        for one in recorded {
            let member = members.iter().find(|member| member.name == one.member);
            held.play(member, one)?;
        }
        Ok(Some(held))
    }

    /// Plays back one member's frames. An HVM guest's come in on its
    /// paravirtual card.
    fn play(&mut self, member: Option<&DomainFacts>, recorded: &Recorded) -> Result<(), Error> {
        let mut devids: Vec<u32> = recorded.frames.iter().map(|frame| frame.devid).collect();
        devids.sort_unstable();
        devids.dedup();
        for devid in devids {
            let found = member.and_then(|member| {
                let vif = member.vifs.iter().find(|vif| vif.devid == devid)?;
                let hold = self.holds.iter().find(|hold| hold.vif() == vif.ifname)?;
                Some((member.domid, vif, hold))
            });
            let Some((domid, vif, hold)) = found else {
                return Err(Error::Failed(format!(
                    "'{}' has no interface {devid}, and frames of it are recorded ('restore \
                     --paused' goes without them)",
                    recorded.member
                )));
            };
            let mut player = Player::open(&mut self.rtnl, domid, devid, &vif.ifname)?;
            let mut played = 0;
            for frame in recorded.frames.iter().filter(|frame| frame.devid == devid) {
                player.play(frame)?;
                played += 1;
                if played % BACKLOG_MAX == 0 {
                    await_queued(&mut self.rtnl, hold, played)?;
                }
            }
            await_queued(&mut self.rtnl, hold, played)?;
        }
        Ok(())
    }

    /// Waits until all front ends are connected, but not for ever, and not if
    /// `enough` says so, and tells the network where they are. Says which members'
    /// interfaces aren't connected.
    pub fn wait_connected(&mut self, enough: impl FnMut() -> bool) -> Vec<String> {
        let late = self.await_front_ends(enough);
        let is_late = |one: &&WaitedFor| late.contains(&one.vif);
        let (late, connected): (Vec<_>, Vec<_>) = self.waited_for.iter().partition(is_late);
        // A bridge refuses to be told of a port that is down.
        let places: Vec<(&str, Mac)> = connected
            .iter()
            .filter_map(|one| Some((one.vif.as_str(), one.mac?)))
            .collect();
        if let Err(error) = announce::announce(&mut self.rtnl, &places) {
            // They are found when they have sent something.
            log::warn!("{}", sentence(&error));
        }
        let said = |one: &&WaitedFor| format!("{} of '{}'", one.vif, one.member);
        late.iter().map(said).collect()
    }

    /// The vifs of those that aren't connected in the end.
    fn await_front_ends(&mut self, mut enough: impl FnMut() -> bool) -> Vec<String> {
        let start = Instant::now();
        loop {
            let late = self.late(start.elapsed());
            if late.is_empty() || start.elapsed() > CONNECT_MAX || enough() {
                return late.iter().map(|one| one.vif.clone()).collect();
            }
            std::thread::sleep(CONNECT_INTERVAL);
        }
    }

    /// Those that aren't connected, of which that is still expected.
    fn late(&mut self, waited: Duration) -> Vec<&WaitedFor> {
        let expected = |one: &&WaitedFor| !(one.emulated && waited > CONNECT_EMULATED_MAX);
        let expected: Vec<_> = self.waited_for.iter().filter(expected).collect();
        let has_none = |one: &&&WaitedFor| !net::hold::has_front_end(one.domid, one.devid);
        let late: Vec<_> = expected.iter().filter(has_none).copied().collect();
        if !late.is_empty() {
            return late;
        }
        let names: Vec<&str> = expected.iter().map(|one| one.vif.as_str()).collect();
        match net::hold::links_down(&mut self.rtnl, &names) {
            Ok(down) => {
                let is_down = |one: &&&WaitedFor| down.contains(&one.vif.as_str());
                expected.iter().filter(is_down).copied().collect()
            }
            Err(error) => {
                log::warn!("{}", sentence(&error));
                Vec::new()
            }
        }
    }

    /// Lets all frames go, in order, and takes the holds down. What can't be is
    /// left to the guard, with the journal.
    pub fn release(mut self) -> Result<(), net::Error> {
        let mut result = Ok(());
        for hold in &self.holds {
            let released = hold.release(&mut self.rtnl);
            result = result.and(released);
        }
        for hold in &self.holds {
            let counters = hold.counters(&mut self.rtnl);
            // Lost as on any network: nobody was promised these.
            match counters.and_then(|counters| hold.check_overflow(counters)) {
                Err(error @ net::Error::Overflow { .. }) => log::warn!("{}", sentence(&error)),
                Err(error) => log::debug!("{}", sentence(&error)),
                Ok(()) => {}
            }
        }
        net::hold::remove_redirects(&self.holds, &mut self.rtnl, self.nft);
        for hold in self.holds {
            let removed = hold.remove(&mut self.rtnl);
            result = result.and(removed);
        }
        result
    }
}

/// Just what was played back has to wait in the end: nothing runs yet.
fn await_queued(rtnl: &mut Rtnl, hold: &Hold, played: usize) -> Result<(), net::Error> {
    let start = Instant::now();
    loop {
        let queued = hold.counters(rtnl)?.queued_frames;
        if usize::try_from(queued).ok() == Some(played) {
            return Ok(());
        }
        if start.elapsed() > QUEUED_MAX {
            return Err(net::Error::PlayedBack {
                vif: hold.vif().to_owned(),
                played,
                queued,
            });
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// Removes the holds in a journal with all that is in them: the senders are
/// destroyed, or stay paused. The redirects must be gone already.
pub fn discard(record: &Record) -> Result<(), net::Error> {
    on_holds(record, HoldRecord::discard)
}

/// Does something to the holds in a journal, all of them.
pub fn on_holds(
    record: &Record,
    act: impl Fn(&HoldRecord, &mut Rtnl) -> Result<(), net::Error>,
) -> Result<(), net::Error> {
    if record.holds.is_empty() {
        return Ok(());
    }
    let mut rtnl = Rtnl::open()?;
    let mut result = Ok(());
    for hold in record.holds.iter().filter(|hold| hold.is_plausible()) {
        if let Err(error) = act(hold, &mut rtnl) {
            log::error!("{}: {}", hold.vif, sentence(&error));
            result = Err(error);
        }
    }
    result
}

fn vifs(members: &[DomainFacts]) -> impl Iterator<Item = (&DomainFacts, &Vif)> {
    members
        .iter()
        .flat_map(|member| member.vifs.iter().map(move |vif| (member, vif)))
}

/// What will be played back into a hold, in bytes: each frame for twice what it
/// is, as the kernel counts what surrounds it as well.
fn room_for(hold: &HoldRecord, members: &[DomainFacts], recorded: &[Recorded]) -> u32 {
    let owner = vifs(members).find(|(_, vif)| vif.ifname == hold.vif);
    let frames = owner.into_iter().flat_map(|(member, vif)| {
        let of_member = recorded.iter().filter(|one| one.member == member.name);
        let frames = of_member.flat_map(|one| &one.frames);
        frames.filter(|frame| frame.devid == vif.devid)
    });
    let bytes: usize = frames.map(|frame| 2 * frame.bytes.len()).sum();
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// What is known of domains that are built, from a process that has libxl.
fn facts(program: &Program, names: &[&str]) -> Result<Vec<DomainFacts>, Error> {
    use std::io::Read;
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let mut child = program
        .command(&["facts", "--"])
        .args(names)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(Error::start("look at the members"))?;
    let mut text = Vec::new();
    if let Some(out) = child.stdout.take() {
        out.take(FACTS_BYTES_MAX)
            .read_to_end(&mut text)
            .map_err(Error::start("read what is known of the members"))?;
    }
    let status = child.wait().map_err(Error::start("look at the members"))?;
    if !status.success() {
        return Err(Error::Failed(format!("looking at the members: {status}")));
    }
    let found = serde_json::from_slice(&text);
    found.map_err(|error| Error::Failed(format!("what is known of the members: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(domid: u32, name: &str) -> Result<DomainFacts, String> {
        let json = format!(
            r#"{{"c_info":{{"type":"pv","name":"{name}"}},"nics":[{{"mac":"a"}},{{"devid":3}}]}}"#
        );
        DomainFacts::from_config(domid, 1, json)
    }

    fn frame(devid: u32, length: usize) -> Frame {
        Frame {
            devid,
            at_ns: 0,
            offload: [0; 10],
            bytes: vec![0; length],
        }
    }

    #[test]
    fn a_hold_has_room_for_what_is_played_back_into_it() -> Result<(), String> {
        let members = [member(7, "a")?, member(8, "b")?];
        let recorded = [
            Recorded {
                member: String::from("a"),
                frames: vec![frame(0, 60), frame(3, 1000), frame(3, 500)],
            },
            Recorded {
                member: String::from("b"),
                frames: vec![frame(3, 9000)],
            },
        ];
        let room = |hold: &HoldRecord| room_for(hold, &members, &recorded);
        assert_eq!(room(&HoldRecord::new(7, 0, "vif7.0")), 120);
        assert_eq!(room(&HoldRecord::new(7, 3, "vif7.3")), 3000);
        assert_eq!(room(&HoldRecord::new(8, 0, "vif8.0")), 0);
        assert_eq!(room(&HoldRecord::new(8, 3, "vif8.3")), 18_000);
        Ok(())
    }
}
