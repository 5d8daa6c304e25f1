//! The coordinator's state machine.

use super::Phase;

/// What to do about members that don't converge within the bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDivergence {
    /// Cut all the same: those members are down for longer.
    Go,
    /// Give up; no guest is harmed.
    Abort,
}

/// How long each phase may take, in ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Until all members have answered.
    pub prepare_ns: u64,
    /// Until all members have converged.
    pub precopy_ns: u64,
    /// What the drain waits.
    pub drain_ns: u64,
    /// From the order to cut until all members run again. Shorter than
    /// libxl's own 60 s for a guest that doesn't answer.
    pub cut_ns: u64,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A member exists and can be captured.
    Prepared(usize),
    /// Journal, guard and holds are in place.
    Armed,
    /// A member has sent a pre-copy round.
    Round {
        /// Which.
        member: usize,
        /// Whether what is left is little enough.
        converged: bool,
    },
    /// All members' frames wait.
    Blocked,
    /// A member was cut and runs again.
    Cut(usize),
    /// All frames have been let go.
    Released,
    /// A member's part is stored.
    Stored(usize),
    /// The snapshot exists.
    Committed,
    /// Something failed: a member, the network, the store.
    Failed(String),
    /// The user wants no more of it.
    Interrupted,
    /// Nothing but time has passed.
    Tick,
}

/// What is to be done now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Write the journal, start the guard, build the holds open.
    Arm,
    /// Tell all members to begin pre-copy.
    StartPrecopy,
    /// Block all holds.
    Block,
    /// Tell all members to suspend, save the rest and resume.
    Cut,
    /// Release all holds.
    Release,
    /// Tell all members to write their parts out.
    Finalise,
    /// Write the manifest and make the snapshot visible.
    Commit,
    /// Undo everything: frames go, guests run, nothing stays.
    Abort(String),
}

#[derive(Debug, Clone, Copy, Default)]
struct Member {
    prepared: bool,
    converged: bool,
    cut: bool,
    stored: bool,
}

/// Leads one take.
#[derive(Debug)]
pub struct Coordinator {
    phase: Phase,
    members: Vec<Member>,
    limits: Limits,
    on_divergence: OnDivergence,
    deadline_ns: Option<u64>,
    diverged: bool,
}

impl Coordinator {
    /// A take of this many members, beginning now.
    pub fn new(members: usize, limits: Limits, on_divergence: OnDivergence, now_ns: u64) -> Self {
        Self {
            phase: Phase::Prepare,
            members: vec![Member::default(); members],
            limits,
            on_divergence,
            deadline_ns: Some(now_ns.saturating_add(limits.prepare_ns)),
            diverged: false,
        }
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// When to come back with [`Input::Tick`] at the latest, in ns.
    pub fn deadline_ns(&self) -> Option<u64> {
        self.deadline_ns
    }

    /// Whether the cut was made although not all members had converged.
    pub fn diverged(&self) -> bool {
        self.diverged
    }

    /// Takes in what happened and says what to do.
    pub fn handle(&mut self, now_ns: u64, input: Input) -> Vec<Action> {
        if matches!(self.phase, Phase::Done | Phase::Failed) {
            return Vec::new();
        }
        let mark = match input {
            Input::Failed(why) => return self.fail(why),
            Input::Interrupted => return self.fail(String::from("interrupted")),
            Input::Prepared(at) => self.members.get_mut(at).map(|m| m.prepared = true),
            Input::Round { member, converged } => self
                .members
                .get_mut(member)
                .map(|m| m.converged = converged),
            Input::Cut(at) => self.members.get_mut(at).map(|m| m.cut = true),
            Input::Stored(at) => self.members.get_mut(at).map(|m| m.stored = true),
            Input::Armed => return self.confirmed(now_ns, Phase::Prepare),
            Input::Blocked => return self.confirmed(now_ns, Phase::Hold),
            Input::Released => return self.confirmed(now_ns, Phase::Release),
            Input::Committed => return self.confirmed(now_ns, Phase::Commit),
            Input::Tick => Some(()),
        };
        if mark.is_none() {
            return self.fail(String::from("a message from a member that doesn't exist"));
        }
        self.advance(now_ns)
    }

    /// The engine has done what it was told in this phase.
    fn confirmed(&mut self, now_ns: u64, phase: Phase) -> Vec<Action> {
        if self.phase != phase {
            return self.fail(format!("a confirmation for {phase} during {}", self.phase));
        }
        match phase {
            Phase::Prepare => {
                self.enter(Phase::Precopy, now_ns, Some(self.limits.precopy_ns));
                vec![Action::StartPrecopy]
            }
            Phase::Hold => {
                self.enter(Phase::Drain, now_ns, Some(self.limits.drain_ns));
                Vec::new()
            }
            Phase::Release => {
                self.enter(Phase::Finalise, now_ns, None);
                vec![Action::Finalise]
            }
            _ => {
                self.enter(Phase::Done, now_ns, None);
                Vec::new()
            }
        }
    }

    fn advance(&mut self, now_ns: u64) -> Vec<Action> {
        let late = self.deadline_ns.is_some_and(|deadline| now_ns >= deadline);
        let all = |is: fn(&Member) -> bool| self.members.iter().all(is);
        match self.phase {
            // The deadline goes once armed for: building is bounded by itself.
            Phase::Prepare if self.deadline_ns.is_some() && all(|m| m.prepared) => {
                self.deadline_ns = None;
                vec![Action::Arm]
            }
            Phase::Prepare if late => self.fail(String::from("a member didn't answer in time")),
            Phase::Precopy if all(|m| m.converged) => self.block(now_ns),
            Phase::Precopy if late => match self.on_divergence {
                OnDivergence::Go => {
                    self.diverged = true;
                    self.block(now_ns)
                }
                OnDivergence::Abort => self.fail(self.divergence()),
            },
            Phase::Drain if late => {
                self.enter(Phase::Cut, now_ns, Some(self.limits.cut_ns));
                vec![Action::Cut]
            }
            Phase::Cut if all(|m| m.cut) => {
                self.enter(Phase::Release, now_ns, None);
                vec![Action::Release]
            }
            Phase::Cut if late => self.fail(format!(
                "a guest didn't suspend and resume within {} s",
                self.limits.cut_ns / 1_000_000_000
            )),
            Phase::Finalise if all(|m| m.stored) => {
                self.enter(Phase::Commit, now_ns, None);
                vec![Action::Commit]
            }
            _ => Vec::new(),
        }
    }

    fn block(&mut self, now_ns: u64) -> Vec<Action> {
        self.enter(Phase::Hold, now_ns, None);
        vec![Action::Block]
    }

    fn divergence(&self) -> String {
        let count = self.members.iter().filter(|m| !m.converged).count();
        format!(
            "{count} of {} members did not converge within {} s: they change memory faster than \
             it can be copied (try --precopy-max, --last-copy or --diverging go)",
            self.members.len(),
            self.limits.precopy_ns / 1_000_000_000
        )
    }

    fn fail(&mut self, why: String) -> Vec<Action> {
        self.phase = Phase::Failed;
        self.deadline_ns = None;
        vec![Action::Abort(why)]
    }

    fn enter(&mut self, phase: Phase, now_ns: u64, limit_ns: Option<u64>) {
        self.phase = phase;
        self.deadline_ns = limit_ns.map(|limit| now_ns.saturating_add(limit));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        prepare_ns: 100,
        precopy_ns: 1_000,
        drain_ns: 10,
        cut_ns: 50,
    };

    fn coordinator() -> Coordinator {
        Coordinator::new(2, LIMITS, OnDivergence::Abort, 0)
    }

    fn round(member: usize, converged: bool) -> Input {
        Input::Round { member, converged }
    }

    fn until_cut(c: &mut Coordinator) {
        assert_eq!(c.handle(1, Input::Prepared(0)), []);
        assert_eq!(c.handle(1, Input::Prepared(1)), [Action::Arm]);
        assert_eq!(c.handle(2, Input::Armed), [Action::StartPrecopy]);
        assert_eq!(c.handle(3, round(0, true)), []);
        assert_eq!(c.handle(3, round(1, true)), [Action::Block]);
        assert_eq!(c.handle(4, round(1, true)), []);
        assert_eq!(c.handle(4, Input::Blocked), []);
        assert_eq!(c.handle(13, Input::Tick), []);
        assert_eq!(c.handle(14, Input::Tick), [Action::Cut]);
    }

    #[test]
    fn a_take_goes_through_its_phases_in_order() {
        let mut c = coordinator();
        until_cut(&mut c);
        assert_eq!(c.handle(20, Input::Cut(1)), []);
        assert_eq!(c.handle(21, Input::Cut(0)), [Action::Release]);
        assert_eq!(c.handle(22, Input::Released), [Action::Finalise]);
        assert_eq!(c.handle(99, Input::Stored(0)), []);
        assert_eq!(c.handle(99, Input::Stored(1)), [Action::Commit]);
        assert_eq!(c.handle(99, Input::Committed), []);
        assert_eq!(c.phase(), Phase::Done);
    }

    #[test]
    fn a_member_that_diverges_again_is_waited_for() {
        let mut c = coordinator();
        c.handle(1, Input::Prepared(0));
        c.handle(1, Input::Prepared(1));
        c.handle(2, Input::Armed);
        c.handle(3, round(0, true));
        c.handle(4, round(0, false));
        assert_eq!(c.handle(5, round(1, true)), []);
        assert_eq!(c.handle(6, round(0, true)), [Action::Block]);
    }

    #[test]
    fn frames_are_not_released_before_all_members_are_cut() {
        let mut c = coordinator();
        until_cut(&mut c);
        assert_eq!(c.handle(20, Input::Cut(0)), []);
        // Twice the same member is still one member.
        assert_eq!(c.handle(20, Input::Cut(0)), []);
        assert_eq!(c.phase(), Phase::Cut);
    }

    #[test]
    fn a_guest_that_never_suspends_does_not_hold_the_network_for_ever() {
        let mut c = coordinator();
        until_cut(&mut c);
        assert_eq!(c.deadline_ns(), Some(64));
        assert!(matches!(c.handle(64, Input::Tick)[..], [Action::Abort(_)]));
    }

    #[test]
    fn divergence_aborts_or_goes_as_asked() {
        for (choice, expected) in [(OnDivergence::Go, true), (OnDivergence::Abort, false)] {
            let mut c = Coordinator::new(1, LIMITS, choice, 0);
            c.handle(1, Input::Prepared(0));
            c.handle(2, Input::Armed);
            let actions = c.handle(1_002, round(0, false));
            assert_eq!(actions == [Action::Block], expected, "{actions:?}");
            assert_eq!(c.diverged(), expected);
        }
    }

    #[test]
    fn every_failure_aborts_once_and_nothing_follows() {
        let inputs = [
            Input::Failed(String::from("x")),
            Input::Interrupted,
            Input::Cut(7),
        ];
        for input in inputs {
            let mut c = coordinator();
            until_cut(&mut c);
            assert!(matches!(c.handle(20, input)[..], [Action::Abort(_)]));
            for late in [
                Input::Cut(0),
                Input::Cut(1),
                Input::Interrupted,
                Input::Tick,
            ] {
                assert_eq!(c.handle(9_999, late), []);
            }
            assert_eq!(c.phase(), Phase::Failed);
        }
    }

    #[test]
    fn nothing_is_committed_while_a_part_is_missing() {
        let mut c = coordinator();
        until_cut(&mut c);
        c.handle(20, Input::Cut(0));
        c.handle(20, Input::Cut(1));
        // Stored before the release is confirmed changes nothing yet.
        assert_eq!(c.handle(21, Input::Stored(0)), []);
        c.handle(22, Input::Released);
        assert_eq!(c.handle(23, Input::Stored(0)), []);
        assert_eq!(c.phase(), Phase::Finalise);
    }
}
