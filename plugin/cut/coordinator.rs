//! The coordinator's state machine.

use serde::{Deserialize, Serialize};

use super::{mutated, FromHost, Order, Phase, Reply, Session, TakeId, ToHost};

/// What to do about members that don't converge within the bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDivergence {
    /// Cut all the same: those members are down for longer.
    Go,
    /// Slow them down until they have, for as long again; then give up.
    Throttle,
    /// Give up; no guest is harmed.
    Abort,
}

/// How long each phase may take, in ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Until all hosts have prepared.
    pub prepare_ns: u64,
    /// Until all members have converged.
    pub precopy_ns: u64,
    /// How long members may take to come near: after that they are cut as they are.
    pub approach_ns: u64,
    /// What the drain waits.
    pub drain_ns: u64,
    /// From the order to hold until all frames have been let go. Shorter than
    /// libxl's own 60 s for a guest that doesn't answer.
    pub hold_ns: u64,
    /// How long nothing may be heard of a host before it's given up.
    pub lease_ns: u64,
    /// How often an order is repeated while it isn't answered.
    pub repeat_ns: u64,
    /// How long to wait for hosts to have undone an aborted take.
    pub abort_ns: u64,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A host said something.
    Heard(usize, FromHost),
    /// The decision is durable: the snapshot exists.
    Decided,
    /// Something failed here.
    Failed(String),
    /// The user wants no more of it.
    Interrupted,
    /// Nothing but time has passed.
    Tick,
}

/// What is to be done now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send this to a host.
    Send(usize, ToHost),
    /// Make the decision durable: then [`Input::Decided`], or [`Input::Failed`].
    Decide,
}

#[derive(Debug, Clone)]
struct Host {
    name: String,
    session: Option<Session>,
    /// It has answered the phase's order.
    answered: bool,
    converged: bool,
    heard_ns: u64,
}

/// Leads one take.
#[derive(Debug)]
pub struct Coordinator {
    take: TakeId,
    phase: Phase,
    hosts: Vec<Host>,
    limits: Limits,
    on_divergence: OnDivergence,
    deadline_ns: Option<u64>,
    repeat_at_ns: u64,
    diverged: bool,
    throttling: bool,
    /// The decision is durable, so that hosts may be told.
    decided: bool,
    why: Option<String>,
    #[cfg(feature = "mutants")]
    mutant: Option<super::Mutant>,
}

impl Coordinator {
    /// Begins a take on these hosts, the names of which are for messages.
    pub fn begin(
        take: TakeId,
        hosts: &[String],
        limits: Limits,
        on_divergence: OnDivergence,
        now_ns: u64,
    ) -> (Self, Vec<Action>) {
        let host = |name: &String| Host {
            name: name.clone(),
            session: None,
            answered: false,
            converged: false,
            heard_ns: now_ns,
        };
        let mut coordinator = Self {
            take,
            phase: Phase::Prepare,
            hosts: hosts.iter().map(host).collect(),
            limits,
            on_divergence,
            deadline_ns: None,
            repeat_at_ns: now_ns,
            diverged: false,
            throttling: false,
            decided: false,
            why: None,
            #[cfg(feature = "mutants")]
            mutant: None,
        };
        let actions = coordinator.order(Phase::Prepare, now_ns, Some(limits.prepare_ns));
        (coordinator, actions)
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

    /// When to come back with [`Input::Tick`] at the latest, in ns.
    pub fn deadline_ns(&self) -> Option<u64> {
        if self.phase.is_over() {
            return None;
        }
        let repeat = self.repeat_at_ns;
        Some(self.deadline_ns.map_or(repeat, |other| other.min(repeat)))
    }

    /// Whether the cut was made although not all members had converged.
    pub fn diverged(&self) -> bool {
        self.diverged
    }

    /// The session in which a host prepared, once that is known.
    pub fn session(&self, host: usize) -> Option<Session> {
        self.hosts.get(host).and_then(|host| host.session)
    }

    /// Whether a host has answered the phase's order.
    pub fn answered(&self, host: usize) -> bool {
        self.hosts.get(host).is_some_and(|host| host.answered)
    }

    /// Why there is no snapshot.
    pub fn why(&self) -> Option<&str> {
        self.why.as_deref()
    }

    /// Takes in what happened and says what to do.
    pub fn handle(&mut self, now_ns: u64, input: Input) -> Vec<Action> {
        if self.phase.is_over() {
            return Vec::new();
        }
        match input {
            Input::Heard(host, message) => self.hear(now_ns, host, message),
            Input::Decided if self.phase == Phase::Commit => {
                self.decided = true;
                self.order(Phase::Commit, now_ns, None)
            }
            Input::Decided => Vec::new(),
            Input::Failed(why) if self.phase == Phase::Commit && !self.decided => {
                // The decision itself: it wasn't made.
                self.give_up(now_ns, why)
            }
            Input::Failed(why) => self.abort(now_ns, why),
            Input::Interrupted => self.abort(now_ns, String::from("interrupted")),
            Input::Tick => self.tick(now_ns),
        }
    }

    fn hear(&mut self, now_ns: u64, index: usize, message: FromHost) -> Vec<Action> {
        if message.take != self.take {
            return Vec::new();
        }
        let Some(host) = self.hosts.get_mut(index) else {
            return Vec::new();
        };
        // A host that knows nothing of the take names no session.
        let ended = matches!(message.reply, Reply::Failed(_) | Reply::Aborted);
        match (host.session, message.session) {
            (None, Some(session)) if message.reply == Reply::Prepared => {
                host.session = Some(session);
            }
            (None, Some(_)) | (Some(_), None) if ended => {}
            (None, None) if ended => {}
            // It's preparing, and will say its session when that is done.
            (None, Some(_)) if message.reply == Reply::Working => {}
            (Some(known), Some(said)) if known == said => {}
            // Late, of a session that is no more.
            _ => return Vec::new(),
        }
        host.heard_ns = now_ns;
        let answers = match message.reply {
            Reply::Failed(why) => {
                let name = host.name.clone();
                let alone = self.hosts.len() == 1;
                let why = if alone { why } else { format!("{name}: {why}") };
                return self.abort(now_ns, why);
            }
            Reply::Converged(converged) => {
                host.converged = converged;
                return match self.phase {
                    Phase::Precopy => self.precopied(now_ns),
                    _ => Vec::new(),
                };
            }
            Reply::Working => return Vec::new(),
            Reply::Prepared => Phase::Prepare,
            Reply::Near => Phase::Approach,
            Reply::Held => Phase::Hold,
            Reply::Cut => Phase::Cut,
            Reply::Released => Phase::Release,
            Reply::Stored => Phase::Finalise,
            Reply::Committed => Phase::Commit,
            Reply::Aborted => Phase::Abort,
        };
        if answers == Phase::Abort && self.phase != Phase::Abort {
            let why = format!("host '{}' aborted", host.name);
            return self.abort(now_ns, why);
        }
        if answers != self.phase {
            // Repeated: this was answered before.
            return Vec::new();
        }
        host.answered = true;
        let early = match self.phase {
            Phase::Cut => mutated!(self, ReleaseEarly),
            Phase::Finalise => mutated!(self, CommitEarly),
            _ => false,
        };
        if early || self.hosts.iter().all(|host| host.answered) {
            return self.all_answered(now_ns);
        }
        Vec::new()
    }

    fn all_answered(&mut self, now_ns: u64) -> Vec<Action> {
        match self.phase {
            Phase::Prepare => self.order(Phase::Precopy, now_ns, Some(self.limits.precopy_ns)),
            Phase::Approach => self.order(Phase::Hold, now_ns, Some(self.limits.hold_ns)),
            Phase::Hold => {
                // The limit runs on, from the order to hold.
                self.phase = Phase::Drain;
                let drained_ns = now_ns.saturating_add(self.limits.drain_ns);
                self.deadline_ns = Some(drained_ns);
                Vec::new()
            }
            Phase::Cut => self.order(Phase::Release, now_ns, Some(self.limits.hold_ns)),
            Phase::Release => self.order(Phase::Finalise, now_ns, None),
            Phase::Finalise => {
                self.phase = Phase::Commit;
                self.deadline_ns = None;
                self.repeat_at_ns = now_ns.saturating_add(self.limits.repeat_ns);
                for host in &mut self.hosts {
                    host.answered = false;
                }
                vec![Action::Decide]
            }
            Phase::Commit => {
                self.phase = Phase::Done;
                Vec::new()
            }
            Phase::Abort => {
                self.phase = Phase::Failed;
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn precopied(&mut self, now_ns: u64) -> Vec<Action> {
        if self.hosts.iter().all(|host| host.converged) {
            return self.approach(now_ns);
        }
        Vec::new()
    }

    fn approach(&mut self, now_ns: u64) -> Vec<Action> {
        self.order(Phase::Approach, now_ns, Some(self.limits.approach_ns))
    }

    fn tick(&mut self, now_ns: u64) -> Vec<Action> {
        if self.deadline_ns.is_some_and(|deadline| now_ns >= deadline) {
            return self.late(now_ns);
        }
        if self.phase < Phase::Commit {
            let lease_ns = self.limits.lease_ns;
            let silent = self
                .hosts
                .iter()
                .find(|host| now_ns >= host.heard_ns.saturating_add(lease_ns));
            if let Some(host) = silent {
                let why = format!(
                    "nothing was heard of host '{}' for {} s",
                    host.name,
                    lease_ns / 1_000_000_000
                );
                return self.abort(now_ns, why);
            }
        }
        if now_ns < self.repeat_at_ns {
            return Vec::new();
        }
        self.repeat_at_ns = now_ns.saturating_add(self.limits.repeat_ns);
        match self.phase {
            // Also those that have answered: it shows them that we live.
            phase if phase < Phase::Commit => self.send_to(phase, |_| true),
            Phase::Commit if !self.decided => Vec::new(),
            Phase::Commit | Phase::Abort => self.send_to(self.phase, |host| !host.answered),
            _ => Vec::new(),
        }
    }

    fn late(&mut self, now_ns: u64) -> Vec<Action> {
        match self.phase {
            Phase::Drain => self.order(Phase::Cut, now_ns, Some(self.limits.hold_ns)),
            // It would have made the downtime shorter, and that's all.
            Phase::Approach => self.order(Phase::Hold, now_ns, Some(self.limits.hold_ns)),
            Phase::Precopy => match self.on_divergence {
                OnDivergence::Go => {
                    self.diverged = true;
                    self.approach(now_ns)
                }
                OnDivergence::Throttle if !self.throttling => {
                    self.throttling = true;
                    self.deadline_ns = Some(now_ns.saturating_add(self.limits.precopy_ns));
                    self.repeat_at_ns = now_ns.saturating_add(self.limits.repeat_ns);
                    self.send_to(Phase::Precopy, |_| true)
                }
                OnDivergence::Abort | OnDivergence::Throttle => {
                    let (throttled, throttle) = if self.throttling {
                        (" and as long again with their processors throttled", "")
                    } else {
                        ("", ", or --diverging throttle")
                    };
                    let why = format!(
                        "not all members converged within {} s{throttled}: they change memory \
                         faster than it can be copied (try --precopy-max, --last-copy, --diverging \
                         go{throttle})",
                        self.limits.precopy_ns / 1_000_000_000
                    );
                    self.abort(now_ns, why)
                }
            },
            Phase::Abort => {
                // They undo it by themselves, and know what to say to whoever
                // asks.
                self.phase = Phase::Failed;
                Vec::new()
            }
            phase => {
                let waiting = self.hosts.iter().filter(|host| !host.answered);
                let names: Vec<&str> = waiting.map(|host| host.name.as_str()).collect();
                let names = names.join(", ");
                self.abort(now_ns, format!("{names}: not done with {phase} in time"))
            }
        }
    }

    fn abort(&mut self, now_ns: u64, why: String) -> Vec<Action> {
        match self.phase {
            // What was decided stays decided.
            Phase::Commit | Phase::Abort => Vec::new(),
            _ => self.give_up(now_ns, why),
        }
    }

    fn give_up(&mut self, now_ns: u64, why: String) -> Vec<Action> {
        self.why = Some(why);
        self.order(Phase::Abort, now_ns, Some(self.limits.abort_ns))
    }

    fn order(&mut self, phase: Phase, now_ns: u64, limit_ns: Option<u64>) -> Vec<Action> {
        self.phase = phase;
        self.deadline_ns = limit_ns.map(|limit| now_ns.saturating_add(limit));
        self.repeat_at_ns = now_ns.saturating_add(self.limits.repeat_ns);
        for host in &mut self.hosts {
            host.answered = false;
        }
        self.send_to(phase, |_| true)
    }

    fn send_to(&self, phase: Phase, whom: impl Fn(&Host) -> bool) -> Vec<Action> {
        let order = match phase {
            Phase::Prepare => Order::Prepare,
            Phase::Precopy if self.throttling => Order::Throttle,
            // Nothing new to say, but it shows them that we live.
            Phase::Precopy => Order::Precopy,
            Phase::Approach => Order::Approach,
            Phase::Hold | Phase::Drain => Order::Hold,
            Phase::Cut => Order::Cut,
            Phase::Release => Order::Release,
            Phase::Finalise => Order::Finalise,
            Phase::Commit | Phase::Done => Order::Commit,
            Phase::Abort | Phase::Failed => Order::Abort,
        };
        let hosts = self.hosts.iter().enumerate();
        hosts
            .filter(|(_, host)| whom(host))
            .map(|(index, host)| {
                let message = ToHost {
                    take: self.take,
                    session: host.session,
                    order,
                };
                Action::Send(index, message)
            })
            .collect()
    }
}
