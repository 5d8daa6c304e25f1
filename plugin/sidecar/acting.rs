//! A host's side of one take: runs the protocol's host machine, and has this
//! host's [`Part`] carry out what that asks for.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::error::Error;
use super::lead::{self, Link, Offset};
use super::part::{Part, Place};
use super::wire::{Attached, News, Order, Plan};
use crate::clock::now_ns;
use crate::cut::{FromHost, Host, HostAction, HostInput, Phase, Reply, Session, TakeId};
use crate::domain::messages::Event;
use crate::image::Manifest;
use crate::sentence::sentence;

/// How often a member's rounds are told, in ns: for people that's enough.
const ROUND_INTERVAL_NS: u64 = 300_000_000;
/// How long a failed part still answers with its reason, in ns.
const LINGER_NS: u64 = 5_000_000_000;

/// Told whether the decision is durable, or why it couldn't be made.
pub(super) type Decided = Box<dyn FnOnce(Result<(), String>) + Send>;

/// What a host's side of a take hears.
pub(super) enum Heard {
    /// An order of the leader's.
    Order(Box<Order>),
    /// The leader is this host, and all hosts have stored their parts: make
    /// the snapshot exist.
    Decide(Box<Manifest>, Decided),
    /// This process is being stopped, and why.
    Stop(String),
    /// A worker said something.
    Event(usize, Event),
    /// A worker's end of the socket is closed: it has ended.
    Gone(usize),
}

/// Which take, and which time that it was prepared here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Which {
    pub take: TakeId,
    pub session: Session,
}

impl Which {
    /// A time that a take is prepared here.
    pub fn new(take: TakeId) -> Result<Self, Error> {
        let number = crate::random::number();
        let session = Session(number.map_err(Error::start("get a random number"))?);
        Ok(Self { take, session })
    }
}

/// The way to a side that works on this host.
#[derive(Clone)]
pub(super) struct HereLink(pub Sender<Heard>);

impl Link for HereLink {
    fn order(&self, order: Order) {
        // It has ended: that's for the leases to find out.
        let _ = self.0.send(Heard::Order(Box::new(order)));
    }

    fn offset(&self) -> Offset {
        Offset::default()
    }
}

impl HereLink {
    /// For the leader on this host: has this side decide, and reports to `said`.
    pub fn decider(&self, said: Sender<lead::Heard>) -> Box<dyn Fn(Manifest)> {
        let to = self.0.clone();
        Box::new(move |manifest| {
            let report = said.clone();
            let decided: Decided = Box::new(move |result| {
                let _ = report.send(lead::Heard::Decided(result));
            });
            if to.send(Heard::Decide(Box::new(manifest), decided)).is_err() {
                let why = String::from("this host's part of the take is gone");
                let _ = said.send(lead::Heard::Decided(Err(why)));
            }
        })
    }
}

/// A side that works.
pub(super) struct Side {
    /// The way to it.
    pub link: HereLink,
    /// Ends when the take is over here.
    pub thread: JoinHandle<()>,
    /// Whether it has voted, and waits for the outcome.
    pub in_doubt: Arc<AtomicBool>,
}

/// Starts this host's side of a take, for a leader of any kind.
pub(super) fn start(
    place: Place,
    plan: Plan,
    which: Which,
    say: impl Fn(News) + Send + 'static,
) -> Result<Side, Error> {
    let (to, heard) = mpsc::channel();
    let part = Part::new(place, plan, which)?;
    let own = to.clone();
    let in_doubt = Arc::new(AtomicBool::new(false));
    let doubt = Arc::clone(&in_doubt);
    let thread = std::thread::Builder::new()
        .name(String::from("part"))
        .spawn(move || act(part, which, (own, &heard), &doubt, &say))
        .map_err(Error::start("start a thread"))?;
    Ok(Side {
        link: HereLink(to),
        thread,
        in_doubt,
    })
}

struct Acting<'a> {
    part: Part,
    host: Host,
    todo: VecDeque<HostAction>,
    /// What the workers have seen was taken in.
    looked: bool,
    over_since_ns: Option<u64>,
    /// It ends here, before the take is over.
    stopped: bool,
    /// When each member's last round was told, and whether it had converged.
    rounds_told: Vec<Option<(u64, bool)>>,
    /// The phase that was logged last.
    logged: Phase,
    in_doubt: &'a AtomicBool,
    say: &'a dyn Fn(News),
}

/// Carries out a part until the take is over here. Whatever is left of it then
/// is undone.
fn act(
    mut part: Part,
    which: Which,
    (said, heard): (Sender<Heard>, &Receiver<Heard>),
    in_doubt: &AtomicBool,
    say: &dyn Fn(News),
) {
    let plan = part.plan();
    let (members, limits) = (plan.members.len(), plan.limits);
    let (host, todo) = Host::begin(which.take, which.session, members, limits, now_ns());
    let started = part.start_workers(&said);
    // The workers' threads have senders of their own.
    drop(said);
    let mut acting = Acting {
        part,
        host,
        todo: todo.into(),
        looked: false,
        over_since_ns: None,
        stopped: false,
        rounds_told: vec![None; members],
        logged: Phase::Prepare,
        in_doubt,
        say,
    };
    if let Err(error) = started {
        acting.tell(HostInput::Failed(sentence(&error)));
    }
    acting.run(heard);
    acting.part.bring_back();
}

impl Acting<'_> {
    fn run(&mut self, heard: &Receiver<Heard>) {
        loop {
            while let Some(action) = self.todo.pop_front() {
                self.carry_out(&action);
            }
            let phase = self.host.phase();
            if phase != self.logged {
                self.logged = phase;
                let plan = self.part.plan();
                log::info!("{}@{}: {phase}", plan.vne, plan.id);
            }
            if self.look() {
                continue;
            }
            let Some(deadline_ns) = self.deadline_ns() else {
                return;
            };
            let wait = Duration::from_nanos(deadline_ns.saturating_sub(now_ns()));
            match heard.recv_timeout(wait) {
                Ok(heard) => self.hear(heard),
                Err(RecvTimeoutError::Timeout) => self.tell(HostInput::Tick),
                // Nobody can give orders any more, and no worker lives.
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// When to look at the time again; `None` when there is nothing more to do.
    fn deadline_ns(&mut self) -> Option<u64> {
        if self.stopped {
            return None;
        }
        match self.host.phase() {
            Phase::Done => None,
            Phase::Failed => {
                let since = *self.over_since_ns.get_or_insert_with(now_ns);
                // What asked for the end has been answered.
                let until = match self.host.why() {
                    Some(_) => since.saturating_add(LINGER_NS),
                    None => since,
                };
                (now_ns() < until).then_some(until)
            }
            _ => {
                let far = || now_ns().saturating_add(3_600_000_000_000);
                Some(self.host.deadline_ns().unwrap_or_else(far))
            }
        }
    }

    fn tell(&mut self, input: HostInput) {
        let actions = self.host.handle(now_ns(), input);
        self.todo.extend(actions);
        self.in_doubt
            .store(self.host.is_in_doubt(), Ordering::Relaxed);
    }

    fn hear(&mut self, heard: Heard) {
        match heard {
            Heard::Order(order) => {
                if let Some(manifest) = order.manifest {
                    self.part.outcome(*manifest);
                }
                self.tell(HostInput::Heard(order.message));
            }
            Heard::Decide(manifest, decided) => {
                let made = self.part.decide(&manifest);
                decided(made.map_err(|error| sentence(&error)));
            }
            Heard::Stop(why) => {
                // What was voted for waits for the next daemon.
                self.stopped = self.host.is_in_doubt();
                self.tell(HostInput::Failed(why));
            }
            Heard::Event(index, event) => {
                self.pass_on(index, &event);
                if let Some(input) = self.part.hear(index, event) {
                    self.tell(input);
                }
            }
            Heard::Gone(index) => {
                if let Some(input) = self.part.gone(index) {
                    self.tell(input);
                }
            }
        }
    }

    /// For whoever watches the take.
    fn pass_on(&mut self, member: usize, event: &Event) {
        let take = self.host.take();
        let news = match event {
            Event::Round { round, converged } => {
                if !self.is_worth_telling(member, *converged) {
                    return;
                }
                News::Round {
                    take,
                    member,
                    round: *round,
                    converged: *converged,
                }
            }
            Event::Cut(times) => News::Cut {
                take,
                member,
                times: *times,
            },
            Event::Stored(_) => News::Stored { take, member },
            Event::Prepared { .. } | Event::Near | Event::Stopped(_) | Event::Failed { .. } => {
                return
            }
        };
        (self.say)(news);
    }

    fn is_worth_telling(&mut self, member: usize, converged: bool) -> bool {
        let now = now_ns();
        let Some(told) = self.rounds_told.get_mut(member) else {
            return false;
        };
        let known = told.is_some_and(|(at, before)| {
            before == converged && now < at.saturating_add(ROUND_INTERVAL_NS)
        });
        if !known {
            *told = Some((now, converged));
        }
        !known
    }

    /// Goes on with preparing once the workers have looked at the members.
    fn look(&mut self) -> bool {
        if self.looked || self.host.phase() != Phase::Prepare {
            return false;
        }
        let Some(seen) = self.part.looked_at() else {
            return false;
        };
        self.looked = true;
        let dry_run = self.part.plan().dry_run;
        let armed = seen.and_then(|()| if dry_run { Ok(()) } else { self.part.arm() });
        self.tell(match armed {
            Ok(()) => HostInput::Armed,
            Err(error) => HostInput::Failed(sentence(&error)),
        });
        true
    }

    fn carry_out(&mut self, action: &HostAction) {
        if let HostAction::Say(message) = action {
            (self.say)(News::Said {
                message: message.clone(),
                attached: self.attached(message),
            });
            return;
        }
        if *action == HostAction::Throttle {
            match self.part.throttle() {
                Ok(slowed) => {
                    let take = self.host.take();
                    for (member, cap) in slowed {
                        (self.say)(News::Throttled { take, member, cap });
                    }
                }
                Err(error) => self.tell(HostInput::Failed(sentence(&error))),
            }
            return;
        }
        match self.part.act(action) {
            Ok(Some(input)) => self.tell(input),
            Ok(None) => {}
            Err(error) => {
                log::warn!("{}", sentence(&error));
                // What is decided can't fail: the part keeps its vote, and whoever
                // finds that asks again and tries again.
                self.stopped |= *action == HostAction::Commit;
                self.tell(HostInput::Failed(sentence(&error)));
            }
        }
    }

    fn attached(&self, message: &FromHost) -> Attached {
        match message.reply {
            Reply::Prepared => self.part.looked(),
            Reply::Released => self.part.held(),
            Reply::Stored => self.part.stored(),
            _ => Attached::Nothing,
        }
    }
}
