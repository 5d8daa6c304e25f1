//! A host's part in one take.

use serde::{Deserialize, Serialize};

use super::{mutated, FromHost, Order, Phase, Reply, Session, TakeId, ToHost};

/// What a host waits for at most, in ns on its own clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLimits {
    /// How long frames may be held, and members be suspended, whatever the
    /// coordinator does. Shorter than libxl's own 60 s for a guest that doesn't
    /// answer.
    pub hold_ns: u64,
    /// How long to wait for a word of the coordinator's.
    pub lease_ns: u64,
    /// How often to ask for the outcome when it's in doubt.
    pub ask_ns: u64,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostInput {
    /// An order came.
    Heard(ToHost),
    /// All is built.
    Armed,
    /// A member has sent a round.
    Round {
        /// Which.
        member: usize,
        /// Whether what is left is little enough.
        converged: bool,
    },
    /// A member has sent what got dirty since, or can't get nearer.
    Near(usize),
    /// All members' frames wait.
    Blocked,
    /// A member was cut: it's suspended, and what it had sent by then is counted.
    Cut(usize),
    /// A member runs again.
    Runs(usize),
    /// The frames go, and none was lost.
    Released,
    /// A member's part is durable.
    Stored(usize),
    /// That the part waits for the outcome is durable.
    Voted,
    /// The snapshot is visible.
    Committed,
    /// Nothing is left.
    Undone,
    /// Something here failed.
    Failed(String),
    /// Nothing but time has passed.
    Tick,
}

/// What is to be done now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostAction {
    /// Tell the coordinator.
    Say(FromHost),
    /// Look, lock, write the journal, build the holds open: then
    /// [`HostInput::Armed`].
    Arm,
    /// Tell all members to begin pre-copy.
    StartPrecopy,
    /// Slow down the members that haven't converged, more and more each time.
    Throttle,
    /// Have all members send what got dirty: then [`HostInput::Near`] of each.
    Approach,
    /// Block all holds: then [`HostInput::Blocked`].
    Block,
    /// Tell all members to suspend, save the rest and resume.
    Cut,
    /// Release all holds and see that none overflowed: then
    /// [`HostInput::Released`].
    Release,
    /// Tell all members to write their parts out.
    Finalise,
    /// Make durable that the part waits: then [`HostInput::Voted`].
    Vote,
    /// Make the snapshot visible: then [`HostInput::Committed`].
    Commit,
    /// Undo everything: frames go, guests run, nothing stays. Then
    /// [`HostInput::Undone`].
    Undo,
}

#[derive(Debug, Clone, Copy, Default)]
struct Member {
    converged: bool,
    near: bool,
    cut: bool,
    runs: bool,
    stored: bool,
}

/// One host's part in one take.
#[derive(Debug)]
pub struct Host {
    take: TakeId,
    session: Session,
    phase: Phase,
    /// What the phase asks for has been done.
    done: bool,
    members: Vec<Member>,
    limits: HostLimits,
    heard_ns: u64,
    /// When frames go, and members run, whatever happens.
    hold_until_ns: Option<u64>,
    /// Frames go.
    released: bool,
    asked_ns: u64,
    why: Option<String>,
    #[cfg(feature = "mutants")]
    pub(crate) mutant: Option<super::Mutant>,
}

impl Host {
    /// Begins a part with this many members, as [`Order::Prepare`] asks for.
    pub fn begin(
        take: TakeId,
        session: Session,
        members: usize,
        limits: HostLimits,
        now_ns: u64,
    ) -> (Self, Vec<HostAction>) {
        let host = Self {
            take,
            session,
            phase: Phase::Prepare,
            done: false,
            members: vec![Member::default(); members],
            limits,
            heard_ns: now_ns,
            hold_until_ns: None,
            released: false,
            asked_ns: now_ns,
            why: None,
            #[cfg(feature = "mutants")]
            mutant: None,
        };
        (host, vec![HostAction::Arm])
    }

    /// Goes on after a restart with a part that had been voted for.
    pub fn in_doubt(take: TakeId, session: Session, limits: HostLimits, now_ns: u64) -> Self {
        let (mut host, _) = Self::begin(take, session, 0, limits, now_ns);
        host.phase = Phase::Finalise;
        host.done = true;
        host.asked_ns = now_ns.saturating_sub(limits.ask_ns);
        host
    }

    /// Breaks it.
    #[cfg(feature = "mutants")]
    pub fn mutate(&mut self, mutant: Option<super::Mutant>) {
        self.mutant = mutant;
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The take.
    pub fn take(&self) -> TakeId {
        self.take
    }

    /// The session.
    pub fn session(&self) -> Session {
        self.session
    }

    /// Why it failed, if it did.
    pub fn why(&self) -> Option<&str> {
        self.why.as_deref()
    }

    /// It has said `stored` and doesn't know the outcome.
    pub fn is_in_doubt(&self) -> bool {
        self.phase == Phase::Finalise && self.done
    }

    /// When to come back with [`HostInput::Tick`] at the latest, in ns.
    pub fn deadline_ns(&self) -> Option<u64> {
        if self.is_in_doubt() {
            return Some(self.asked_ns.saturating_add(self.limits.ask_ns));
        }
        if mutated!(self, ResumeNever) {
            return None;
        }
        let lease = match self.phase {
            Phase::Commit | Phase::Done | Phase::Abort | Phase::Failed => return None,
            _ => self.heard_ns.saturating_add(self.limits.lease_ns),
        };
        Some(self.hold_until_ns.map_or(lease, |hold| hold.min(lease)))
    }

    /// Takes in what happened and says what to do.
    pub fn handle(&mut self, now_ns: u64, input: HostInput) -> Vec<HostAction> {
        if let HostInput::Heard(message) = input {
            return self.hear(now_ns, message);
        }
        match self.phase {
            Phase::Abort if input == HostInput::Undone => {
                self.phase = Phase::Failed;
                return vec![self.say(Reply::Aborted)];
            }
            Phase::Done | Phase::Abort | Phase::Failed => return Vec::new(),
            _ => {}
        }
        // A deadline that has passed has passed, whatever comes with it.
        if let Some(actions) = self.overdue(now_ns) {
            return actions;
        }
        match input {
            // What was voted for is safe from whatever fails here later.
            HostInput::Failed(_) if self.is_in_doubt() => Vec::new(),
            HostInput::Failed(why) => self.fail(why),
            HostInput::Tick => self.tick(now_ns),
            HostInput::Armed => self.confirm(Phase::Prepare, Reply::Prepared),
            HostInput::Blocked => self.confirm(Phase::Hold, Reply::Held),
            HostInput::Released
                if mutated!(self, ForgetRelease) && self.phase != Phase::Release =>
            {
                Vec::new()
            }
            HostInput::Released if self.phase == Phase::Release => {
                self.released = true;
                self.all_run()
            }
            HostInput::Released => self.confirm(Phase::Release, Reply::Released),
            HostInput::Voted => {
                self.asked_ns = now_ns;
                self.confirm(Phase::Finalise, Reply::Stored)
            }
            HostInput::Committed => {
                let said = self.confirm(Phase::Commit, Reply::Committed);
                self.phase = Phase::Done;
                said
            }
            HostInput::Round { member, converged } => self.round(member, converged),
            HostInput::Near(at) => match self.members.get_mut(at) {
                Some(member) => {
                    member.near = true;
                    self.all_near()
                }
                None => self.no_such_member(),
            },
            HostInput::Cut(at) => match self.members.get_mut(at) {
                Some(member) => {
                    member.cut = true;
                    self.all_cut()
                }
                None => self.no_such_member(),
            },
            HostInput::Runs(at) => match self.members.get_mut(at) {
                Some(member) => {
                    member.runs = true;
                    self.all_run()
                }
                None => self.no_such_member(),
            },
            HostInput::Stored(at) => match self.members.get_mut(at) {
                Some(member) => {
                    member.stored = true;
                    self.all_stored()
                }
                None => self.no_such_member(),
            },
            HostInput::Heard(_) | HostInput::Undone => Vec::new(),
        }
    }

    fn hear(&mut self, now_ns: u64, message: ToHost) -> Vec<HostAction> {
        if message.take != self.take {
            return Vec::new();
        }
        // A coordinator that doesn't know the session yet can only prepare, or
        // give up.
        let sessionless = matches!(message.order, Order::Prepare | Order::Abort);
        let ours =
            message.session == Some(self.session) || (message.session.is_none() && sessionless);
        if !ours {
            return Vec::new();
        }
        if let (Some(actions), true) = (self.overdue(now_ns), message.order != Order::Abort) {
            return actions;
        }
        self.heard_ns = now_ns;
        if message.order == Order::Abort {
            return self.abort();
        }
        match self.phase {
            Phase::Done => {
                return match message.order {
                    Order::Commit => vec![self.say(Reply::Committed)],
                    _ => Vec::new(),
                }
            }
            Phase::Abort | Phase::Failed => {
                let why = self.why.clone();
                let why = why.unwrap_or_else(|| String::from("aborted before"));
                return vec![self.say(Reply::Failed(why))];
            }
            _ => {}
        }
        let asked = phase_of(message.order);
        if asked < self.phase {
            // Repeated, and late.
            return Vec::new();
        }
        if asked == self.phase {
            return match reply_of(message.order) {
                _ if self.phase == Phase::Precopy => {
                    let said = self.say(Reply::Converged(self.converged()));
                    match message.order {
                        Order::Throttle => vec![HostAction::Throttle, said],
                        _ => vec![said],
                    }
                }
                Some(reply) if self.done => vec![self.say(reply)],
                // Making it visible may have failed: tried again.
                _ if self.phase == Phase::Commit => vec![HostAction::Commit],
                _ => vec![self.say(Reply::Working)],
            };
        }
        // These two last for as long as the coordinator wants.
        let ready = self.done || matches!(self.phase, Phase::Precopy | Phase::Approach);
        if !ready || Some(asked) != next(self.phase) {
            return self.fail(format!(
                "the order to {asked} came during {}, which isn't over",
                self.phase
            ));
        }
        self.obey(asked, now_ns)
    }

    fn obey(&mut self, asked: Phase, now_ns: u64) -> Vec<HostAction> {
        self.phase = asked;
        self.done = false;
        // A host without members has nothing to wait for.
        let nobody = self.members.is_empty();
        match asked {
            Phase::Precopy if nobody => {
                vec![HostAction::StartPrecopy, self.say(Reply::Converged(true))]
            }
            Phase::Precopy => vec![HostAction::StartPrecopy],
            Phase::Approach if nobody => self.confirm(Phase::Approach, Reply::Near),
            Phase::Approach => vec![HostAction::Approach],
            Phase::Hold => {
                self.hold_until_ns = Some(now_ns.saturating_add(self.limits.hold_ns));
                if mutated!(self, SkipHold) {
                    return self.confirm(Phase::Hold, Reply::Held);
                }
                vec![HostAction::Block]
            }
            Phase::Cut if nobody => self.confirm(Phase::Cut, Reply::Cut),
            Phase::Cut => vec![HostAction::Cut],
            Phase::Release => vec![HostAction::Release],
            Phase::Finalise if nobody => vec![HostAction::Finalise, HostAction::Vote],
            Phase::Finalise => vec![HostAction::Finalise],
            Phase::Commit => vec![HostAction::Commit],
            Phase::Prepare | Phase::Drain | Phase::Done | Phase::Abort | Phase::Failed => {
                Vec::new()
            }
        }
    }

    /// What was ordered has been done.
    fn confirm(&mut self, phase: Phase, reply: Reply) -> Vec<HostAction> {
        if self.phase != phase || self.done {
            return self.fail(format!("{reply:?} during {}", self.phase));
        }
        self.done = true;
        vec![self.say(reply)]
    }

    fn round(&mut self, member: usize, converged: bool) -> Vec<HostAction> {
        let before = self.converged();
        match self.members.get_mut(member) {
            Some(member) => member.converged = converged,
            None => return self.no_such_member(),
        }
        let after = self.converged();
        if self.phase == Phase::Precopy && before != after {
            return vec![self.say(Reply::Converged(after))];
        }
        Vec::new()
    }

    fn converged(&self) -> bool {
        self.members.iter().all(|member| member.converged)
    }

    fn all_near(&mut self) -> Vec<HostAction> {
        if self.phase == Phase::Approach && !self.done && self.members.iter().all(|m| m.near) {
            return self.confirm(Phase::Approach, Reply::Near);
        }
        Vec::new()
    }

    fn all_cut(&mut self) -> Vec<HostAction> {
        if self.phase == Phase::Cut && !self.done && self.members.iter().all(|m| m.cut) {
            return self.confirm(Phase::Cut, Reply::Cut);
        }
        Vec::new()
    }

    fn all_run(&mut self) -> Vec<HostAction> {
        let run = self.members.iter().all(|member| member.runs);
        if self.phase == Phase::Release && !self.done && self.released && run {
            self.hold_until_ns = None;
            return self.confirm(Phase::Release, Reply::Released);
        }
        Vec::new()
    }

    fn all_stored(&self) -> Vec<HostAction> {
        if self.phase == Phase::Finalise && !self.done && self.members.iter().all(|m| m.stored) {
            return vec![HostAction::Vote];
        }
        Vec::new()
    }

    fn no_such_member(&mut self) -> Vec<HostAction> {
        self.fail(String::from("a message from a member that doesn't exist"))
    }

    fn tick(&mut self, now_ns: u64) -> Vec<HostAction> {
        if self.is_in_doubt() && now_ns >= self.asked_ns.saturating_add(self.limits.ask_ns) {
            self.asked_ns = now_ns;
            return vec![self.say(Reply::Stored)];
        }
        Vec::new()
    }

    fn overdue(&mut self, now_ns: u64) -> Option<Vec<HostAction>> {
        if matches!(
            self.phase,
            Phase::Commit | Phase::Done | Phase::Abort | Phase::Failed
        ) {
            return None;
        }
        if self.is_in_doubt() && !mutated!(self, GuessOutcome) {
            return None;
        }
        let held_long = self.hold_until_ns.is_some_and(|until| now_ns >= until);
        let alone = now_ns >= self.heard_ns.saturating_add(self.limits.lease_ns);
        if mutated!(self, ResumeNever) {
            return None;
        }
        if held_long && mutated!(self, ForgetRelease) {
            self.hold_until_ns = None;
            return Some(vec![HostAction::Release]);
        }
        let seconds = |ns: u64| ns as f64 / 1e9;
        if held_long {
            return Some(self.fail(format!(
                "the cut wasn't over after {} s",
                seconds(self.limits.hold_ns)
            )));
        }
        alone.then(|| {
            self.fail(format!(
                "nothing was heard of the coordinator for {} s",
                seconds(self.limits.lease_ns)
            ))
        })
    }

    fn fail(&mut self, why: String) -> Vec<HostAction> {
        // From the decision on there is nothing to fail any more: what can't be
        // made visible now will be at the next start.
        if self.phase == Phase::Commit {
            return Vec::new();
        }
        let said = self.say(Reply::Failed(why.clone()));
        self.why = Some(why);
        self.undo(said)
    }

    fn abort(&mut self) -> Vec<HostAction> {
        match self.phase {
            Phase::Failed => vec![self.say(Reply::Aborted)],
            // Nobody aborts what has been decided.
            Phase::Abort | Phase::Commit | Phase::Done => Vec::new(),
            _ => {
                self.phase = Phase::Abort;
                self.hold_until_ns = None;
                vec![HostAction::Undo]
            }
        }
    }

    fn undo(&mut self, said: HostAction) -> Vec<HostAction> {
        self.phase = Phase::Abort;
        self.hold_until_ns = None;
        // Undone first: that must not wait for a socket.
        vec![HostAction::Undo, said]
    }

    fn say(&self, reply: Reply) -> HostAction {
        HostAction::Say(FromHost {
            take: self.take,
            session: Some(self.session),
            reply,
        })
    }
}

/// The phase that an order begins.
fn phase_of(order: Order) -> Phase {
    match order {
        Order::Prepare => Phase::Prepare,
        Order::Precopy | Order::Throttle => Phase::Precopy,
        Order::Approach => Phase::Approach,
        Order::Hold => Phase::Hold,
        Order::Cut => Phase::Cut,
        Order::Release => Phase::Release,
        Order::Finalise => Phase::Finalise,
        Order::Commit => Phase::Commit,
        Order::Abort => Phase::Abort,
    }
}

/// What is said when an order has been carried out.
fn reply_of(order: Order) -> Option<Reply> {
    Some(match order {
        Order::Prepare => Reply::Prepared,
        Order::Approach => Reply::Near,
        Order::Hold => Reply::Held,
        Order::Cut => Reply::Cut,
        Order::Release => Reply::Released,
        Order::Finalise => Reply::Stored,
        Order::Commit => Reply::Committed,
        Order::Abort => Reply::Aborted,
        Order::Precopy | Order::Throttle => return None,
    })
}

/// The phase that a host goes to next. Only the coordinator drains.
fn next(phase: Phase) -> Option<Phase> {
    Some(match phase {
        Phase::Prepare => Phase::Precopy,
        Phase::Precopy => Phase::Approach,
        Phase::Approach => Phase::Hold,
        Phase::Hold => Phase::Cut,
        Phase::Cut => Phase::Release,
        Phase::Release => Phase::Finalise,
        Phase::Finalise => Phase::Commit,
        _ => return None,
    })
}
