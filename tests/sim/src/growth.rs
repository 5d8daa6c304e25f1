//! What a take costs as its hosts and members get more, with the product's own
//! machines in virtual time: nothing fails here.
//!
//! What can be measured is: the processor time in which the coordinator decodes,
//! handles and encodes messages is added to the virtual clock, as it leads in one
//! thread. TLS and JSON-RPC's frame around a message aren't in it.

use std::collections::BTreeMap;
use std::time::Duration;

use fastrand::Rng;
use rustix::time::{clock_gettime, ClockId};
use serde::Serialize;
use xl_vne::cut::{
    Action, Coordinator, FromHost, Host, HostAction, HostInput, HostLimits, Input, Limits,
    OnDivergence, Order, Phase, Session, TakeId, ToHost,
};

use crate::schedule::MS;

/// The product's own for takes over several hosts.
const LIMITS: Limits = Limits {
    prepare_ns: 30_000 * MS,
    precopy_ns: 300_000 * MS,
    approach_ns: 3_000 * MS,
    drain_ns: 5 * MS,
    hold_ns: 10_000 * MS,
    lease_ns: 20_000 * MS,
    repeat_ns: 1_000 * MS,
    abort_ns: 15_000 * MS,
};
const HOST_LIMITS: HostLimits = HostLimits {
    hold_ns: 10_000 * MS,
    lease_ns: 20_000 * MS,
    ask_ns: 1_000 * MS,
};
/// From the emulated lab: how long a guest takes to answer the request to suspend,
/// at least and at most, and to run again after that.
const SUSPEND_NS: (u64, u64) = (45 * MS, 110 * MS);
const RESUME_NS: u64 = 45 * MS;
/// Blocking or releasing a hold: one netlink message a vif.
const HOLD_NS: u64 = 20_000;
/// Longest pre-copy of a member.
const PRECOPY_NS: u64 = 8_000 * MS;
/// What a run may take, in virtual time.
const END_NS: u64 = 60_000 * MS;

/// One size of a take.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Hosts, at least one.
    pub hosts: usize,
    /// Members on all of them.
    pub members: usize,
    /// From one host to another, in ns.
    pub latency_ns: u64,
    /// Whether guests and holds take the time that they take in the lab, or none.
    pub works: bool,
}

/// What it came to.
#[derive(Debug, Clone, Serialize)]
pub struct Cost {
    pub hosts: usize,
    pub members: usize,
    pub latency_ns: u64,
    pub works: bool,
    /// From the first order to hold until the last host has said that its frames
    /// go and its members run, in ns.
    pub cut_ns: u64,
    /// The coordinator's processor time of the whole take, in ns.
    pub cpu_ns: u64,
    /// Orders and replies, of the whole take.
    pub messages: u64,
    /// Orders and replies between the first `hold` and the last `released`.
    pub cut_messages: u64,
    /// The most orders that one host got in one phase of the cut.
    pub orders_a_phase_max: u64,
}

#[derive(Debug)]
enum Event {
    Order(usize, String),
    Reply(usize, String),
    Step(usize, HostInput),
    Decided,
    Tick,
}

struct Run {
    size: Size,
    rng: Rng,
    queue: BTreeMap<(u64, u64), Event>,
    order: u64,
    coordinator: Coordinator,
    hosts: Vec<Option<Host>>,
    /// The coordinator's thread does something else until then.
    busy_ns: u64,
    began: BTreeMap<Phase, u64>,
    orders: BTreeMap<(Phase, usize), u64>,
    cost: Cost,
}

/// Simulates one take.
///
/// # Errors
///
/// If it makes no snapshot, which would be a mistake of the simulation.
pub fn run(size: Size) -> Result<Cost, String> {
    let names = names(size.hosts);
    let (coordinator, actions) =
        Coordinator::begin(TakeId(1), &names, LIMITS, OnDivergence::Abort, 0);
    let mut run = Run {
        size,
        rng: Rng::with_seed(7),
        queue: BTreeMap::new(),
        order: 0,
        coordinator,
        hosts: names.iter().map(|_| None).collect(),
        busy_ns: 0,
        began: BTreeMap::new(),
        orders: BTreeMap::new(),
        cost: Cost {
            hosts: size.hosts,
            members: size.members,
            latency_ns: size.latency_ns,
            works: size.works,
            cut_ns: 0,
            cpu_ns: 0,
            messages: 0,
            cut_messages: 0,
            orders_a_phase_max: 0,
        },
    };
    run.lead(0, actions)?;
    run.finish()
}

fn names(hosts: usize) -> Vec<String> {
    (0..hosts).map(|host| format!("host{host}")).collect()
}

/// Bytes that a coordinator of so many hosts takes, by what the process has grown
/// when it made many.
pub fn coordinator_bytes(hosts: usize) -> Result<u64, String> {
    const MANY: usize = 200;
    let names = names(hosts);
    let before = resident_bytes()?;
    let many: Vec<Coordinator> = (0..MANY)
        .map(|_| Coordinator::begin(TakeId(1), &names, LIMITS, OnDivergence::Abort, 0).0)
        .collect();
    let after = resident_bytes()?;
    drop(std::hint::black_box(many));
    Ok(after.saturating_sub(before) / MANY as u64)
}

fn resident_bytes() -> Result<u64, String> {
    let text = std::fs::read_to_string("/proc/self/statm")
        .map_err(|error| format!("cannot read /proc/self/statm: {error}"))?;
    let pages = text.split(' ').nth(1).and_then(|word| word.parse().ok());
    let pages: u64 = pages.ok_or("/proc/self/statm has another layout")?;
    Ok(pages * rustix::param::page_size() as u64)
}

/// What the thread has used of a processor.
fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let time = Duration::try_from(time).unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Run {
    fn finish(mut self) -> Result<Cost, String> {
        while let Some(((now_ns, _), event)) = self.queue.pop_first() {
            if now_ns > END_NS {
                return Err(String::from("the take has no end"));
            }
            match event {
                Event::Order(host, text) => self.hear_order(now_ns, host, &text)?,
                Event::Step(host, input) => self.tell_host(now_ns, host, input)?,
                Event::Reply(host, text) => {
                    self.work(now_ns, |run, at_ns| {
                        let message: FromHost = decode(&text)?;
                        let input = Input::Heard(host, message);
                        Ok(run.coordinator.handle(at_ns, input))
                    })?;
                }
                Event::Decided => {
                    self.work(now_ns, |run, at_ns| {
                        Ok(run.coordinator.handle(at_ns, Input::Decided))
                    })?;
                }
                Event::Tick => self.tick(now_ns)?,
            }
        }
        let began = |phase: Phase| self.began.get(&phase).copied();
        let why = self.coordinator.why().unwrap_or("it stopped");
        let (Some(hold), Some(finalise), Phase::Done) = (
            began(Phase::Hold),
            began(Phase::Finalise),
            self.coordinator.phase(),
        ) else {
            return Err(format!("{:?}: {why}", self.coordinator.phase()));
        };
        self.cost.cut_ns = finalise - hold;
        let orders = self.orders.iter().filter(|((phase, _), _)| phase.holds());
        self.cost.orders_a_phase_max = orders.map(|(_, count)| *count).max().unwrap_or(0);
        Ok(self.cost)
    }

    fn at(&mut self, at_ns: u64, event: Event) {
        self.order += 1;
        self.queue.insert((at_ns, self.order), event);
    }

    /// Has the coordinator's thread do something once it has the time, and charges
    /// it for that.
    fn work(
        &mut self,
        now_ns: u64,
        what: impl FnOnce(&mut Self, u64) -> Result<Vec<Action>, String>,
    ) -> Result<(), String> {
        let start_ns = now_ns.max(self.busy_ns);
        let before = cpu_ns();
        let actions = what(self, start_ns)?;
        let used = cpu_ns().saturating_sub(before);
        self.cost.cpu_ns += used;
        self.busy_ns = start_ns + used;
        self.lead(self.busy_ns, actions)
    }

    /// Does what the coordinator asks for. Each message leaves when it's encoded.
    fn lead(&mut self, now_ns: u64, actions: Vec<Action>) -> Result<(), String> {
        let phase = self.coordinator.phase();
        self.began.entry(phase).or_insert(now_ns);
        let mut at_ns = now_ns;
        for action in actions {
            match action {
                Action::Send(host, message) => {
                    let before = cpu_ns();
                    let text = encode(&message)?;
                    let used = cpu_ns().saturating_sub(before);
                    self.cost.cpu_ns += used;
                    at_ns += used;
                    self.count(phase);
                    *self.orders.entry((phase, host)).or_default() += 1;
                    self.at(at_ns + self.size.latency_ns, Event::Order(host, text));
                }
                Action::Decide => self.at(at_ns + 10 * MS, Event::Decided),
            }
        }
        self.busy_ns = at_ns;
        if let Some(deadline_ns) = self.coordinator.deadline_ns() {
            self.at(deadline_ns.max(at_ns), Event::Tick);
        }
        Ok(())
    }

    fn tick(&mut self, now_ns: u64) -> Result<(), String> {
        // One was put down for each deadline there ever was.
        let due = self.coordinator.deadline_ns();
        if due.is_none_or(|due| due > now_ns) {
            return Ok(());
        }
        self.work(now_ns, |run, at_ns| {
            Ok(run.coordinator.handle(at_ns, Input::Tick))
        })
    }

    fn count(&mut self, phase: Phase) {
        self.cost.messages += 1;
        self.cost.cut_messages += u64::from(phase.holds());
    }

    // The hosts.

    fn members_of(&self, host: usize) -> usize {
        let (all, hosts) = (self.size.members, self.size.hosts);
        all / hosts + usize::from(host < all % hosts)
    }

    fn hear_order(&mut self, now_ns: u64, host: usize, text: &str) -> Result<(), String> {
        let message: ToHost = decode(text)?;
        let unknown = self.hosts.get(host).is_some_and(Option::is_none);
        if unknown && message.order == Order::Prepare {
            let session = Session(host as u64 + 1);
            let members = self.members_of(host);
            let (machine, actions) =
                Host::begin(message.take, session, members, HOST_LIMITS, now_ns);
            if let Some(slot) = self.hosts.get_mut(host) {
                *slot = Some(machine);
            }
            return self.act(now_ns, host, actions);
        }
        self.tell_host(now_ns, host, HostInput::Heard(message))
    }

    fn tell_host(&mut self, now_ns: u64, host: usize, input: HostInput) -> Result<(), String> {
        let Some(Some(machine)) = self.hosts.get_mut(host) else {
            return Ok(());
        };
        let actions = machine.handle(now_ns, input);
        self.act(now_ns, host, actions)
    }

    fn act(&mut self, now_ns: u64, host: usize, actions: Vec<HostAction>) -> Result<(), String> {
        let members = self.members_of(host);
        let hold_ns = match self.size.works {
            true => HOLD_NS * members as u64,
            false => 0,
        };
        for action in actions {
            match action {
                HostAction::Say(message) => {
                    let phase = self.coordinator.phase();
                    self.count(phase);
                    let text = encode(&message)?;
                    self.at(now_ns + self.size.latency_ns, Event::Reply(host, text));
                }
                HostAction::Arm => self.at(now_ns, Event::Step(host, HostInput::Armed)),
                HostAction::StartPrecopy => {
                    for member in 0..members {
                        let at_ns = now_ns + self.rng.u64(..PRECOPY_NS);
                        let converged = true;
                        let round = HostInput::Round { member, converged };
                        self.at(at_ns, Event::Step(host, round));
                    }
                }
                HostAction::Approach => {
                    for member in 0..members {
                        self.at(now_ns, Event::Step(host, HostInput::Near(member)));
                    }
                }
                HostAction::Block => {
                    self.at(now_ns + hold_ns, Event::Step(host, HostInput::Blocked));
                }
                HostAction::Cut => {
                    for member in 0..members {
                        let (cut_ns, runs_ns) = self.suspended_ns();
                        let cut = Event::Step(host, HostInput::Cut(member));
                        self.at(now_ns + cut_ns, cut);
                        let runs = Event::Step(host, HostInput::Runs(member));
                        self.at(now_ns + cut_ns + runs_ns, runs);
                    }
                }
                HostAction::Release => {
                    self.at(now_ns + hold_ns, Event::Step(host, HostInput::Released));
                }
                HostAction::Finalise => {
                    for member in 0..members {
                        self.at(now_ns, Event::Step(host, HostInput::Stored(member)));
                    }
                }
                HostAction::Vote => self.at(now_ns, Event::Step(host, HostInput::Voted)),
                HostAction::Commit => self.at(now_ns, Event::Step(host, HostInput::Committed)),
                HostAction::Throttle | HostAction::Undo => {
                    return Err(format!("host {host} is to {action:?}"));
                }
            }
        }
        Ok(())
    }

    /// Until a guest stands still, and from then until it runs.
    fn suspended_ns(&mut self) -> (u64, u64) {
        match self.size.works {
            true => (self.rng.u64(SUSPEND_NS.0..=SUSPEND_NS.1), RESUME_NS),
            false => (0, 0),
        }
    }
}

fn encode<T: Serialize>(message: &T) -> Result<String, String> {
    serde_json::to_string(message).map_err(|error| error.to_string())
}

fn decode<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(hosts: usize, members: usize) -> Result<Cost, String> {
        run(Size {
            hosts,
            members,
            latency_ns: MS,
            works: false,
        })
    }

    #[test]
    fn a_phase_of_the_cut_is_one_order_and_one_reply_a_host() -> Result<(), String> {
        for (hosts, members) in [(1, 1), (3, 100), (50, 50), (50, 500)] {
            let cost = cost(hosts, members)?;
            assert_eq!(cost.orders_a_phase_max, 1, "{cost:?}");
            // Hold, cut, release.
            assert_eq!(cost.cut_messages, 3 * 2 * hosts as u64, "{cost:?}");
        }
        Ok(())
    }

    #[test]
    fn the_cut_is_at_least_three_round_trips_and_the_drain() -> Result<(), String> {
        let cost = cost(2, 4)?;
        assert!(cost.cut_ns >= 3 * 2 * MS + LIMITS.drain_ns, "{cost:?}");
        Ok(())
    }

    #[test]
    fn what_guests_take_is_in_the_cut() -> Result<(), String> {
        let size = Size {
            hosts: 2,
            members: 4,
            latency_ns: MS,
            works: true,
        };
        let (with, without) = (run(size)?, cost(2, 4)?);
        assert!(with.cut_ns >= without.cut_ns + SUSPEND_NS.0, "{with:?}");
        Ok(())
    }
}
