//! Hosts, members, the network between them, and time: all that the protocol
//! doesn't do itself, and the invariants.
//!
//! The machines under test are the product's own (`xl_vne::cut`). What is
//! modelled is what they act on: workers and guests, holds, disks, vned's
//! life, and frames between members.

use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use fastrand::Rng;
use xl_vne::cut::{
    unattended, Action, Coordinator, FromHost, Host, HostAction, HostInput, HostLimits, Input,
    Limits, Mutant, OnDivergence, Order, Phase, Session, TakeId, ToHost,
};

use crate::schedule::{Fault, Schedule, MS};

const LIMITS: Limits = Limits {
    prepare_ns: 2_000 * MS,
    precopy_ns: 1_500 * MS,
    approach_ns: 100 * MS,
    drain_ns: 5 * MS,
    hold_ns: 600 * MS,
    lease_ns: 900 * MS,
    repeat_ns: 100 * MS,
    abort_ns: 1_000 * MS,
};
const HOST_LIMITS: HostLimits = HostLimits {
    hold_ns: 600 * MS,
    lease_ns: 900 * MS,
    ask_ns: 150 * MS,
};
/// A guard cleans up after a killed vned within this.
const GUARD_NS: u64 = 1_200 * MS;
/// Undoing takes this long at most.
const UNDO_NS: u64 = 60 * MS;
/// What a clock may be off, on top: see [`Schedule::drift`].
const DRIFT_SLACK: f64 = 1.06;
/// When faults are over and all is mended.
const MENDED_NS: u64 = 7_000 * MS;
/// When all must have come to an end.
const END_NS: u64 = 14_000 * MS;
/// A run with more events than this goes round in circles.
const EVENTS_MAX: u64 = 400_000;

/// An invariant that didn't hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which, in words.
    pub what: String,
    /// When, in ns.
    pub at_ns: u64,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Takes that made a snapshot.
    pub committed: u64,
    /// Takes that didn't.
    pub failed: u64,
    /// Messages between hosts.
    pub messages: u64,
}

/// A frame from one member to another.
#[derive(Debug, Clone, Copy)]
struct Frame {
    from: usize,
    to: usize,
    /// The step in which it was sent.
    step: u64,
}

#[derive(Debug, Clone)]
enum Wire {
    ToHost { coordinator: usize, message: ToHost },
    FromHost { host: usize, message: FromHost },
}

#[derive(Debug, Clone)]
enum Event {
    Arrive {
        node: usize,
        wire: Wire,
    },
    Tick {
        node: usize,
    },
    /// A step of a host's own is over.
    Step {
        node: usize,
        epoch: u32,
        take: TakeId,
        session: Session,
        step: Step,
    },
    Decided {
        node: usize,
        epoch: u32,
        take: TakeId,
        good: bool,
    },
    Frame(Frame),
    Traffic,
    Fault(usize),
    Hear {
        node: usize,
    },
    Speak {
        node: usize,
    },
    Guard {
        node: usize,
        epoch: u32,
    },
    Start {
        node: usize,
        epoch: u32,
    },
    Ask {
        node: usize,
        take: TakeId,
    },
    Mend,
}

/// Something that takes a host a while.
#[derive(Debug, Clone)]
enum Step {
    Tell(HostInput),
    Lock,
    Block,
    Suspend(usize),
    Resume(usize),
    Release,
    Store(usize),
    Vote,
    Commit,
    Undo,
}

struct Timed {
    at_ns: u64,
    order: u64,
    event: Event,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}
impl Eq for Timed {}
impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.at_ns, other.order).cmp(&(self.at_ns, self.order))
    }
}

/// What survives on a host's disk.
#[derive(Debug, Default)]
struct Disk {
    /// Members' parts, by take, with the session that wrote them.
    parts: BTreeMap<TakeId, BTreeMap<usize, Session>>,
    /// Parts that wait for the outcome, and who knows it.
    votes: BTreeMap<TakeId, (Session, usize)>,
    /// Snapshots that are listed.
    listed: BTreeMap<TakeId, Session>,
}

struct Part {
    host: Host,
    coordinator: usize,
}

struct Lead {
    machine: Coordinator,
    /// Who asked for it sees it end once.
    counted: bool,
}

struct Node {
    runs: bool,
    epoch: u32,
    rate: f64,
    deaf: bool,
    mute: bool,
    parts: BTreeMap<TakeId, Part>,
    leads: BTreeMap<TakeId, Lead>,
    disk: Disk,
    tick_ns: Option<u64>,
    heard: Vec<Wire>,
    killed_ns: u64,
}

#[derive(Default)]
struct Member {
    host: usize,
    lives: bool,
    locked: Option<TakeId>,
    held: Option<(TakeId, u64)>,
    suspended: Option<(TakeId, u64)>,
    /// When it was cut, as a step, and in which session.
    cuts: BTreeMap<TakeId, (u64, Session)>,
    queue: Vec<Frame>,
}

/// One run.
pub struct World {
    schedule: Schedule,
    mutant: Option<Mutant>,
    rng: Rng,
    now_ns: u64,
    step: u64,
    order: u64,
    queue: BinaryHeap<Timed>,
    nodes: Vec<Node>,
    members: Vec<Member>,
    /// Takes in which a member received what its sender sent after its cut.
    orphans: BTreeSet<TakeId>,
    decided: BTreeSet<TakeId>,
    outcome: Outcome,
    violation: Option<Violation>,
    mended: bool,
    /// What happened, if somebody wants to read it.
    trace: Option<Vec<String>>,
}

impl World {
    /// A world before anything happens.
    pub fn new(schedule: &Schedule, mutant: Option<Mutant>, traced: bool) -> Self {
        let mut rng = Rng::with_seed(schedule.seed ^ 0x5eed);
        let drift = schedule.drift as f64 / 1_000.0;
        let nodes = (0..schedule.hosts)
            .map(|_| Node {
                runs: true,
                epoch: 0,
                rate: 1.0 + drift * (2.0 * rng.f64() - 1.0),
                deaf: false,
                mute: false,
                parts: BTreeMap::new(),
                leads: BTreeMap::new(),
                disk: Disk::default(),
                tick_ns: None,
                heard: Vec::new(),
                killed_ns: 0,
            })
            .collect();
        let busy_hosts = schedule.hosts - usize::from(schedule.idle);
        let members = (0..busy_hosts * schedule.members)
            .map(|index| Member {
                host: index / schedule.members,
                lives: true,
                ..Member::default()
            })
            .collect();
        let mut world = Self {
            schedule: schedule.clone(),
            mutant,
            rng,
            now_ns: 0,
            step: 0,
            order: 0,
            queue: BinaryHeap::new(),
            nodes,
            members,
            orphans: BTreeSet::new(),
            decided: BTreeSet::new(),
            outcome: Outcome::default(),
            violation: None,
            mended: false,
            trace: traced.then(Vec::new),
        };
        for (index, take) in schedule.takes.iter().enumerate() {
            let event = Event::Ask {
                node: take.host,
                take: TakeId(index as u64 + 1),
            };
            world.at(take.at_ns, event);
        }
        for (index, fault) in schedule.faults.iter().enumerate() {
            world.at(fault.at_ns, Event::Fault(index));
        }
        world.at(0, Event::Traffic);
        world.at(MENDED_NS, Event::Mend);
        world
    }

    /// Runs to the end, or to the first violation.
    pub fn run(&mut self) -> Result<Outcome, Violation> {
        while let Some(next) = self.queue.pop() {
            if next.at_ns > END_NS {
                break;
            }
            self.now_ns = next.at_ns;
            self.step += 1;
            self.happen(next.event);
            self.check();
            if self.step > EVENTS_MAX {
                self.violate(String::from("it goes round in circles"));
            }
            if let Some(violation) = self.violation.take() {
                return Err(violation);
            }
        }
        self.check_end();
        match self.violation.take() {
            Some(violation) => Err(violation),
            None => Ok(self.outcome),
        }
    }

    /// What happened, line by line.
    pub fn trace(&self) -> &[String] {
        self.trace.as_deref().unwrap_or_default()
    }

    fn at(&mut self, at_ns: u64, event: Event) {
        self.order += 1;
        self.queue.push(Timed {
            at_ns,
            order: self.order,
            event,
        });
    }

    fn after(&mut self, from_ns: u64, to_ns: u64, event: Event) {
        let at_ns = self.now_ns + self.rng.u64(from_ns..=to_ns);
        self.at(at_ns, event);
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let text = text();
            trace.push(format!("{:9.3} ms  {text}", self.now_ns as f64 / MS as f64));
        }
    }

    fn violate(&mut self, what: String) {
        self.note(|| format!("VIOLATION: {what}"));
        let at_ns = self.now_ns;
        self.violation.get_or_insert(Violation { what, at_ns });
    }

    fn one_in_a_thousand(&mut self, often: u64) -> bool {
        !self.mended && self.rng.u64(..1_000) < often
    }

    /// A node's own clock.
    fn clock(&self, node: usize) -> u64 {
        (self.now_ns as f64 * self.nodes[node].rate) as u64
    }

    fn members_of(&self, node: usize) -> std::ops::Range<usize> {
        let first = (node * self.schedule.members).min(self.members.len());
        first..(first + self.schedule.members).min(self.members.len())
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrive { node, wire } => self.arrive(node, wire),
            Event::Tick { node } => self.tick(node),
            Event::Step {
                node,
                epoch,
                take,
                session,
                step,
            } => {
                if self.nodes[node].runs && self.nodes[node].epoch == epoch {
                    self.host_step(node, take, session, step);
                }
            }
            Event::Decided {
                node,
                epoch,
                take,
                good,
            } => {
                if self.nodes[node].runs && self.nodes[node].epoch == epoch {
                    self.decide(node, take, good);
                }
            }
            Event::Frame(frame) => self.receive(frame),
            Event::Traffic => self.traffic(),
            Event::Fault(index) => self.fault(index),
            Event::Hear { node } => self.nodes[node].deaf = false,
            Event::Speak { node } => self.nodes[node].mute = false,
            Event::Guard { node, epoch } => {
                // A start has done it already, and a guard leaves alone what
                // was begun since.
                if self.nodes[node].epoch == epoch && !self.nodes[node].runs {
                    self.clean_up(node);
                }
            }
            Event::Start { node, epoch } => {
                if self.nodes[node].epoch == epoch && !self.nodes[node].runs {
                    self.start(node);
                }
            }
            Event::Ask { node, take } => self.ask(node, take),
            Event::Mend => self.mend(),
        }
    }

    // The network.

    fn send(&mut self, from: usize, to: usize, wire: Wire) {
        self.outcome.messages += 1;
        if from != to {
            if self.nodes[from].mute || self.one_in_a_thousand(self.schedule.lost) {
                self.note(|| format!("lost: {from} to {to}: {wire:?}"));
                return;
            }
            if self.one_in_a_thousand(self.schedule.repeated) {
                let again = Event::Arrive {
                    node: to,
                    wire: wire.clone(),
                };
                self.after(MS / 5, 50 * MS, again);
            }
            if self.one_in_a_thousand(self.schedule.late) {
                let late_ns = self.schedule.late_ns;
                self.after(MS, late_ns, Event::Arrive { node: to, wire });
                return;
            }
        }
        self.after(MS / 10, 2 * MS, Event::Arrive { node: to, wire });
    }

    fn arrive(&mut self, node: usize, wire: Wire) {
        let state = &mut self.nodes[node];
        let from = match &wire {
            Wire::ToHost { coordinator, .. } => *coordinator,
            Wire::FromHost { host, .. } => *host,
        };
        if !state.runs || (state.deaf && from != node) {
            return;
        }
        if self
            .schedule
            .faults
            .iter()
            .any(|fault| matches!(fault.fault, Fault::Replay { .. }))
        {
            self.nodes[node].heard.push(wire.clone());
        }
        match wire {
            Wire::ToHost {
                coordinator,
                message,
            } => self.hear_order(node, coordinator, message),
            Wire::FromHost { host, message } => self.hear_reply(node, host, message),
        }
    }

    fn hear_order(&mut self, node: usize, coordinator: usize, message: ToHost) {
        self.note(|| {
            format!(
                "host {node} hears {:?} of take {}",
                message.order, message.take.0
            )
        });
        let now = self.clock(node);
        let take = message.take;
        if let Some(part) = self.nodes[node].parts.get_mut(&take) {
            let actions = part.host.handle(now, HostInput::Heard(message));
            self.host_acts(node, take, actions);
            return;
        }
        let committed = self.nodes[node].disk.listed.contains_key(&take);
        if message.order == Order::Prepare && !committed {
            let session = Session(self.rng.u64(..));
            let members = self.members_of(node).len();
            let (mut host, actions) = Host::begin(take, session, members, HOST_LIMITS, now);
            host.mutate(self.mutant);
            self.nodes[node]
                .parts
                .insert(take, Part { host, coordinator });
            self.host_acts(node, take, actions);
            return;
        }
        if let Some(message) = unattended::as_host(&message, committed) {
            self.send(
                node,
                coordinator,
                Wire::FromHost {
                    host: node,
                    message,
                },
            );
        }
    }

    fn hear_reply(&mut self, node: usize, host: usize, message: FromHost) {
        self.note(|| {
            format!(
                "coordinator {node} hears {:?} of host {host}",
                message.reply
            )
        });
        let now = self.clock(node);
        let take = message.take;
        if let Some(lead) = self.nodes[node].leads.get_mut(&take) {
            if !lead.machine.phase().is_over() {
                let actions = lead.machine.handle(now, Input::Heard(host, message));
                self.lead_acts(node, take, actions);
                return;
            }
        }
        let committed = self.decided.contains(&take);
        if let Some(message) = unattended::as_coordinator(&message, committed) {
            self.send(
                node,
                host,
                Wire::ToHost {
                    coordinator: node,
                    message,
                },
            );
        }
    }

    // The coordinator.

    fn ask(&mut self, node: usize, take: TakeId) {
        if !self.nodes[node].runs {
            return;
        }
        self.note(|| format!("take {} is asked for on host {node}", take.0));
        let divergence = match self.rng.u8(..3) {
            0 => OnDivergence::Go,
            1 => OnDivergence::Throttle,
            _ => OnDivergence::Abort,
        };
        let now = self.clock(node);
        let names: Vec<String> = (0..self.schedule.hosts).map(|n| n.to_string()).collect();
        let (mut machine, actions) = Coordinator::begin(take, &names, LIMITS, divergence, now);
        machine.mutate(self.mutant);
        self.nodes[node].leads.insert(
            take,
            Lead {
                machine,
                counted: false,
            },
        );
        self.lead_acts(node, take, actions);
    }

    fn lead_acts(&mut self, node: usize, take: TakeId, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send(host, message) => {
                    self.send(
                        node,
                        host,
                        Wire::ToHost {
                            coordinator: node,
                            message,
                        },
                    );
                }
                Action::Decide => {
                    let epoch = self.nodes[node].epoch;
                    let good = !self.one_in_a_thousand(self.schedule.failing);
                    self.after(
                        MS,
                        20 * MS,
                        Event::Decided {
                            node,
                            epoch,
                            take,
                            good,
                        },
                    );
                }
            }
        }
        if let Some(lead) = self.nodes[node].leads.get_mut(&take) {
            let phase = lead.machine.phase();
            if phase.is_over() && !lead.counted {
                lead.counted = true;
                let why = lead.machine.why().unwrap_or_default().to_owned();
                match phase {
                    Phase::Done => self.outcome.committed += 1,
                    _ => self.outcome.failed += 1,
                }
                self.note(|| format!("take {} is {phase} {why}", take.0));
            }
        }
        self.wake(node);
    }

    fn decide(&mut self, node: usize, take: TakeId, good: bool) {
        let now = self.clock(node);
        let input = if good {
            self.check_decision(take);
            self.decided.insert(take);
            Input::Decided
        } else {
            Input::Failed(String::from("no space"))
        };
        self.note(|| format!("coordinator {node}: {input:?}"));
        if let Some(lead) = self.nodes[node].leads.get_mut(&take) {
            let actions = lead.machine.handle(now, input);
            self.lead_acts(node, take, actions);
        }
    }

    // The hosts.

    fn host_acts(&mut self, node: usize, take: TakeId, actions: Vec<HostAction>) {
        let Some(part) = self.nodes[node].parts.get(&take) else {
            return;
        };
        let (session, coordinator) = (part.host.session(), part.coordinator);
        let epoch = self.nodes[node].epoch;
        for action in actions {
            let failing = self.schedule.failing;
            let step = |step| Event::Step {
                node,
                epoch,
                take,
                session,
                step,
            };
            let fails = |why: &str| step(Step::Tell(HostInput::Failed(why.to_owned())));
            match action {
                HostAction::Say(message) => {
                    self.note(|| format!("host {node} says {:?}", message.reply));
                    self.send(
                        node,
                        coordinator,
                        Wire::FromHost {
                            host: node,
                            message,
                        },
                    );
                }
                HostAction::Arm => self.after(MS, 60 * MS, step(Step::Lock)),
                HostAction::StartPrecopy => self.start_precopy(node, epoch, take, session),
                HostAction::Approach => {
                    for (at, _) in self.members_of(node).enumerate() {
                        if self.one_in_a_thousand(failing) {
                            // Takes too long.
                            continue;
                        }
                        self.after(5 * MS, 60 * MS, step(Step::Tell(HostInput::Near(at))));
                    }
                }
                HostAction::Block if self.one_in_a_thousand(failing) => {
                    self.after(MS / 10, MS, fails("netlink"));
                }
                HostAction::Block => self.after(MS / 10, 3 * MS, step(Step::Block)),
                HostAction::Cut => {
                    for member in self.members_of(node) {
                        if self.one_in_a_thousand(failing) {
                            // A guest that doesn't answer.
                            continue;
                        }
                        self.after(5 * MS, 120 * MS, step(Step::Suspend(member)));
                    }
                }
                HostAction::Release if self.one_in_a_thousand(failing) => {
                    self.after(MS / 10, MS, fails("overflow"));
                }
                HostAction::Release => self.after(MS / 10, 3 * MS, step(Step::Release)),
                HostAction::Finalise => {
                    for member in self.members_of(node) {
                        if self.one_in_a_thousand(failing) {
                            self.after(MS, 300 * MS, fails("no space"));
                        } else {
                            self.after(5 * MS, 500 * MS, step(Step::Store(member)));
                        }
                    }
                }
                HostAction::Throttle => {
                    for (at, _) in self.members_of(node).enumerate() {
                        if self.rng.u8(..4) == 0 {
                            let converged = HostInput::Round {
                                member: at,
                                converged: true,
                            };
                            self.after(20 * MS, 400 * MS, step(Step::Tell(converged)));
                        }
                    }
                }
                HostAction::Vote => self.after(MS, 20 * MS, step(Step::Vote)),
                HostAction::Commit => self.after(MS, 20 * MS, step(Step::Commit)),
                HostAction::Undo => self.after(MS / 10, UNDO_NS, step(Step::Undo)),
            }
        }
        self.wake(node);
    }

    fn start_precopy(&mut self, node: usize, epoch: u32, take: TakeId, session: Session) {
        for (at, _) in self.members_of(node).enumerate() {
            if self.one_in_a_thousand(self.schedule.failing) {
                // Never converges.
                continue;
            }
            let round = |converged| Event::Step {
                node,
                epoch,
                take,
                session,
                step: Step::Tell(HostInput::Round {
                    member: at,
                    converged,
                }),
            };
            self.after(20 * MS, 400 * MS, round(true));
            if self.rng.u8(..4) == 0 {
                self.after(100 * MS, 500 * MS, round(false));
                self.after(500 * MS, 900 * MS, round(true));
            }
        }
    }

    fn host_step(&mut self, node: usize, take: TakeId, session: Session, step: Step) {
        let Some(part) = self.nodes[node].parts.get(&take) else {
            return;
        };
        if part.host.session() != session {
            return;
        }
        let phase = part.host.phase();
        // What was begun is called off when the take is.
        let off = matches!(phase, Phase::Abort | Phase::Failed);
        if off && !matches!(step, Step::Undo) {
            return;
        }
        let first = node * self.schedule.members;
        let input = match step {
            Step::Tell(input) => input,
            Step::Lock => self.lock(node, take),
            Step::Block => {
                for member in self.members_of(node) {
                    self.members[member].held = Some((take, self.now_ns));
                }
                self.note(|| format!("host {node} holds"));
                HostInput::Blocked
            }
            Step::Suspend(member) => {
                self.suspend(member, take, session);
                let epoch = self.nodes[node].epoch;
                let step = Step::Resume(member);
                self.after(
                    MS,
                    60 * MS,
                    Event::Step {
                        node,
                        epoch,
                        take,
                        session,
                        step,
                    },
                );
                HostInput::Cut(member - first)
            }
            Step::Resume(member) => {
                self.members[member].suspended = None;
                HostInput::Runs(member - first)
            }
            Step::Release => {
                self.let_go(node, take);
                HostInput::Released
            }
            Step::Store(member) => {
                let parts = self.nodes[node].disk.parts.entry(take).or_default();
                parts.insert(member, session);
                HostInput::Stored(member - first)
            }
            Step::Vote => {
                let coordinator = self.nodes[node].parts[&take].coordinator;
                self.nodes[node]
                    .disk
                    .votes
                    .insert(take, (session, coordinator));
                HostInput::Voted
            }
            Step::Commit => {
                let disk = &mut self.nodes[node].disk;
                disk.votes.remove(&take);
                disk.listed.insert(take, session);
                self.unlock(node, take);
                HostInput::Committed
            }
            Step::Undo => {
                self.undo(node, take);
                HostInput::Undone
            }
        };
        let now = self.clock(node);
        let Some(part) = self.nodes[node].parts.get_mut(&take) else {
            return;
        };
        let actions = part.host.handle(now, input);
        let over = part.host.phase().is_over();
        self.host_acts(node, take, actions);
        if over {
            self.nodes[node].parts.remove(&take);
        }
    }

    fn lock(&mut self, node: usize, take: TakeId) -> HostInput {
        let all = self.members_of(node);
        let busy = self.members[all.clone()]
            .iter()
            .any(|member| !member.lives || member.locked.is_some());
        if busy {
            return HostInput::Failed(String::from("a member is gone, or in another take"));
        }
        for member in all {
            self.members[member].locked = Some(take);
        }
        HostInput::Armed
    }

    fn unlock(&mut self, node: usize, take: TakeId) {
        for member in self.members_of(node) {
            let member = &mut self.members[member];
            if member.locked == Some(take) {
                member.locked = None;
            }
        }
    }

    fn suspend(&mut self, member: usize, take: TakeId, session: Session) {
        self.note(|| format!("member {member} is cut"));
        let (now, step) = (self.now_ns, self.step);
        let state = &mut self.members[member];
        if !state.lives {
            return;
        }
        let other = state.suspended.replace((take, now)).is_some();
        let unlocked = state.locked != Some(take);
        state.cuts.insert(take, (step, session));
        if other || unlocked {
            self.violate(format!(
                "member {member} is cut twice at a time, or unlocked"
            ));
        }
    }

    fn let_go(&mut self, node: usize, take: TakeId) {
        let mut frames = Vec::new();
        for member in self.members_of(node) {
            let member = &mut self.members[member];
            if member.held.is_some_and(|(by, _)| by == take) {
                member.held = None;
                frames.append(&mut member.queue);
            }
        }
        self.note(|| format!("host {node} lets frames go"));
        for frame in frames {
            self.fly(frame);
        }
    }

    fn resume(&mut self, node: usize, take: Option<TakeId>) {
        for member in self.members_of(node) {
            let member = &mut self.members[member];
            if member
                .suspended
                .is_some_and(|(by, _)| take.is_none_or(|take| by == take))
            {
                member.suspended = None;
            }
        }
    }

    fn undo(&mut self, node: usize, take: TakeId) {
        self.note(|| format!("host {node} undoes take {}", take.0));
        self.let_go(node, take);
        self.resume(node, Some(take));
        self.unlock(node, take);
        let disk = &mut self.nodes[node].disk;
        disk.parts.remove(&take);
        disk.votes.remove(&take);
    }

    fn tick(&mut self, node: usize) {
        if self.nodes[node].tick_ns != Some(self.now_ns) {
            return;
        }
        self.nodes[node].tick_ns = None;
        if !self.nodes[node].runs {
            return;
        }
        let now = self.clock(node);
        let takes: Vec<TakeId> = self.nodes[node].parts.keys().copied().collect();
        for take in takes {
            if let Some(part) = self.nodes[node].parts.get_mut(&take) {
                let actions = part.host.handle(now, HostInput::Tick);
                self.host_acts(node, take, actions);
            }
        }
        self.tell_leads(node, &Input::Tick);
        self.wake(node);
    }

    fn tell_leads(&mut self, node: usize, input: &Input) {
        let now = self.clock(node);
        let takes: Vec<TakeId> = self.nodes[node].leads.keys().copied().collect();
        for take in takes {
            if let Some(lead) = self.nodes[node].leads.get_mut(&take) {
                let actions = lead.machine.handle(now, input.clone());
                self.lead_acts(node, take, actions);
            }
        }
    }

    /// Sees to it that the node's next deadline isn't missed.
    fn wake(&mut self, node: usize) {
        let state = &self.nodes[node];
        let hosts = state
            .parts
            .values()
            .filter_map(|part| part.host.deadline_ns());
        let leads = state
            .leads
            .values()
            .filter_map(|lead| lead.machine.deadline_ns());
        let Some(deadline) = hosts.chain(leads).min() else {
            return;
        };
        let at_ns = ((deadline as f64 / state.rate) as u64 + 1).max(self.now_ns + 1);
        if state
            .tick_ns
            .is_none_or(|before| at_ns < before || before <= self.now_ns)
        {
            self.nodes[node].tick_ns = Some(at_ns);
            self.at(at_ns, Event::Tick { node });
        }
    }

    // The members' own network.

    fn traffic(&mut self) {
        if self.members.len() > 1 {
            for _ in 0..2 {
                let from = self.rng.usize(..self.members.len());
                let to = self.rng.usize(..self.members.len());
                let sender = &mut self.members[from];
                if from == to || !sender.lives || sender.suspended.is_some() {
                    continue;
                }
                let frame = Frame {
                    from,
                    to,
                    step: self.step,
                };
                match sender.held {
                    Some(_) => sender.queue.push(frame),
                    None => self.fly(frame),
                }
            }
        }
        // Nobody is cut when nobody takes a snapshot.
        let quiet = self.members.iter().all(|member| member.locked.is_none());
        let pause = if quiet { 40 * MS } else { 4 * MS };
        if self.now_ns < END_NS - pause {
            self.after(pause / 4, pause, Event::Traffic);
        }
    }

    fn fly(&mut self, frame: Frame) {
        self.after(MS / 10, MS, Event::Frame(frame));
    }

    fn receive(&mut self, frame: Frame) {
        let receiver = &self.members[frame.to];
        if !receiver.lives {
            return;
        }
        let sender = &self.members[frame.from];
        for (take, (cut, _)) in &sender.cuts {
            if frame.step > *cut && !receiver.cuts.contains_key(take) {
                self.orphans.insert(*take);
            }
        }
    }

    // What goes wrong.

    fn fault(&mut self, index: usize) {
        let planned = self.schedule.faults[index];
        let node = planned.host;
        self.note(|| format!("FAULT at host {node}: {:?}", planned.fault));
        match planned.fault {
            Fault::Kill { restart_ns } => self.kill(node, restart_ns),
            Fault::PowerOff { restart_ns } => {
                self.kill(node, restart_ns);
                for member in self.members_of(node) {
                    let host = self.members[member].host;
                    self.members[member] = Member {
                        host,
                        ..Member::default()
                    };
                }
            }
            Fault::Mute { for_ns } => {
                self.nodes[node].mute = true;
                self.after(for_ns, for_ns, Event::Speak { node });
            }
            Fault::Deaf { for_ns } => {
                self.nodes[node].deaf = true;
                self.after(for_ns, for_ns, Event::Hear { node });
            }
            Fault::Replay { gap_ns } => {
                let heard = std::mem::take(&mut self.nodes[node].heard);
                for (index, wire) in heard.into_iter().take(200).enumerate() {
                    let at_ns = self.now_ns + gap_ns * (index as u64 + 1);
                    if at_ns > MENDED_NS {
                        break;
                    }
                    self.at(at_ns, Event::Arrive { node, wire });
                }
            }
            Fault::Interrupt => self.tell_leads(node, &Input::Interrupted),
        }
    }

    fn kill(&mut self, node: usize, restart_ns: u64) {
        let state = &mut self.nodes[node];
        state.runs = false;
        state.epoch += 1;
        state.parts.clear();
        state.leads.clear();
        state.tick_ns = None;
        state.killed_ns = self.now_ns;
        let epoch = state.epoch;
        self.after(MS, GUARD_NS, Event::Guard { node, epoch });
        self.after(restart_ns, restart_ns, Event::Start { node, epoch });
    }

    /// What guard and start have in common.
    fn clean_up(&mut self, node: usize) {
        self.note(|| format!("host {node} cleans up"));
        let takes: BTreeSet<TakeId> = self
            .members_of(node)
            .filter_map(|member| self.members[member].held.map(|(take, _)| take))
            .collect();
        for take in takes {
            self.let_go(node, take);
        }
        self.resume(node, None);
        for member in self.members_of(node) {
            self.members[member].locked = None;
        }
    }

    fn start(&mut self, node: usize) {
        self.note(|| format!("host {node} starts"));
        self.clean_up(node);
        let now = self.clock(node);
        let state = &mut self.nodes[node];
        state.runs = true;
        let Disk {
            parts,
            votes,
            listed,
        } = &mut state.disk;
        parts.retain(|take, _| votes.contains_key(take) || listed.contains_key(take));
        for (&take, &(session, coordinator)) in votes.iter() {
            let mut host = Host::in_doubt(take, session, HOST_LIMITS, now);
            host.mutate(self.mutant);
            state.parts.insert(take, Part { host, coordinator });
        }
        self.wake(node);
    }

    fn mend(&mut self) {
        self.note(|| String::from("all is mended"));
        self.mended = true;
        for node in 0..self.nodes.len() {
            self.nodes[node].deaf = false;
            self.nodes[node].mute = false;
            if !self.nodes[node].runs {
                self.start(node);
            }
        }
    }

    // The invariants.

    /// The snapshot comes to exist: it must be consistent and whole.
    fn check_decision(&mut self, take: TakeId) {
        if self.orphans.contains(&take) {
            self.violate(format!(
                "take {} has an orphan frame and is decided",
                take.0
            ));
        }
        for (index, member) in self.members.iter().enumerate() {
            let disk = &self.nodes[member.host].disk;
            let part = disk.parts.get(&take).and_then(|parts| parts.get(&index));
            let waits = disk.votes.contains_key(&take);
            if part.is_none() || !waits {
                self.violate(format!(
                    "take {} is decided without the part of member {index}",
                    take.0
                ));
                return;
            }
        }
    }

    fn check(&mut self) {
        let now = self.now_ns;
        let mut wrong = None;
        for (index, member) in self.members.iter().enumerate() {
            let node = &self.nodes[member.host];
            for (what, since) in [
                ("held", member.held.map(|(_, since)| since)),
                ("suspended", member.suspended.map(|(_, since)| since)),
            ] {
                let Some(since) = since else { continue };
                let limit = (HOST_LIMITS.hold_ns as f64 * DRIFT_SLACK) as u64 + UNDO_NS + 5 * MS;
                let killed = node.killed_ns + GUARD_NS + 5 * MS;
                if now > since + limit && now > killed {
                    wrong = Some(format!("member {index} is {what} for too long"));
                }
            }
        }
        if let Some(what) = wrong {
            self.violate(what);
        }
        let unheard = self.nodes.iter().flat_map(|node| node.disk.listed.keys());
        if let Some(take) = unheard.copied().find(|take| !self.decided.contains(take)) {
            self.violate(format!("take {} is listed and was never decided", take.0));
        }
    }

    /// All hosts have been up and reachable for long.
    fn check_end(&mut self) {
        for index in 0..self.members.len() {
            let member = &self.members[index];
            if member.held.is_some() || member.suspended.is_some() || member.locked.is_some() {
                self.violate(format!(
                    "member {index} is held, suspended or locked at the end"
                ));
            }
        }
        for take in self.decided.clone() {
            for index in 0..self.members.len() {
                let member = &self.members[index];
                let disk = &self.nodes[member.host].disk;
                let listed = disk.listed.get(&take);
                let part = disk.parts.get(&take).and_then(|parts| parts.get(&index));
                if listed.is_none() || listed != part {
                    self.violate(format!(
                        "take {} was decided, and member {index}'s part isn't there at the end",
                        take.0
                    ));
                    return;
                }
            }
        }
        let doubt = self
            .nodes
            .iter()
            .position(|node| !node.disk.votes.is_empty());
        if let Some(node) = doubt {
            self.violate(format!("host {node} is still in doubt at the end"));
        }
        let leading = self
            .nodes
            .iter()
            .flat_map(|node| node.leads.values())
            .any(|lead| !lead.machine.phase().is_over());
        if leading {
            self.violate(String::from("a take has no end"));
        }
    }
}
