//! What each machine does by itself. What they do together is the simulator's
//! (`tests/sim`).

use super::*;

const TAKE: TakeId = TakeId(7);
const SESSION: Session = Session(9);
const LIMITS: Limits = Limits {
    prepare_ns: 100,
    precopy_ns: 1_000,
    approach_ns: 300,
    drain_ns: 10,
    hold_ns: 50,
    lease_ns: 10_000,
    repeat_ns: 500,
    abort_ns: 100,
};
const HOST_LIMITS: HostLimits = HostLimits {
    hold_ns: 50,
    lease_ns: 1_000,
    ask_ns: 100,
};

fn order(order: Order) -> HostInput {
    HostInput::Heard(ToHost {
        take: TAKE,
        session: Some(SESSION),
        order,
    })
}

fn said(reply: Reply) -> HostAction {
    HostAction::Say(heard(reply))
}

fn heard(reply: Reply) -> FromHost {
    FromHost {
        take: TAKE,
        session: Some(SESSION),
        reply,
    }
}

/// A host with two members, and its way up to some phase.
fn host(until: Phase) -> Host {
    let (mut host, actions) = Host::begin(TAKE, SESSION, 2, HOST_LIMITS, 0);
    assert_eq!(actions, [HostAction::Arm]);
    let way = [
        (Phase::Prepare, vec![HostInput::Armed]),
        (Phase::Precopy, vec![order(Order::Precopy)]),
        (
            Phase::Approach,
            vec![
                order(Order::Approach),
                HostInput::Near(1),
                HostInput::Near(0),
            ],
        ),
        (Phase::Hold, vec![order(Order::Hold), HostInput::Blocked]),
        (
            Phase::Cut,
            vec![
                order(Order::Cut),
                HostInput::Cut(1),
                HostInput::Runs(1),
                HostInput::Cut(0),
            ],
        ),
        (
            Phase::Release,
            vec![
                order(Order::Release),
                HostInput::Released,
                HostInput::Runs(0),
            ],
        ),
        (
            Phase::Finalise,
            vec![
                order(Order::Finalise),
                HostInput::Stored(0),
                HostInput::Stored(1),
                HostInput::Voted,
            ],
        ),
    ];
    for (phase, inputs) in way {
        for input in inputs {
            host.handle(1, input);
        }
        assert_eq!(host.phase(), phase);
        if phase == until {
            break;
        }
    }
    host
}

fn fails(actions: &[HostAction]) -> bool {
    matches!(
        actions,
        [
            HostAction::Undo,
            HostAction::Say(FromHost {
                reply: Reply::Failed(_),
                ..
            })
        ]
    )
}

#[test]
fn a_host_says_cut_and_stored_only_when_all_members_are() {
    let mut host = host(Phase::Hold);
    assert_eq!(host.handle(1, order(Order::Cut)), [HostAction::Cut]);
    assert_eq!(host.handle(1, HostInput::Cut(1)), []);
    // Twice the same member is still one.
    assert_eq!(host.handle(1, HostInput::Cut(1)), []);
    assert_eq!(host.handle(1, HostInput::Cut(0)), [said(Reply::Cut)]);
    assert_eq!(host.handle(1, order(Order::Release)), [HostAction::Release]);
    // Frames go while a member's last pages are being copied.
    assert_eq!(host.handle(1, HostInput::Runs(0)), []);
    assert_eq!(host.handle(1, HostInput::Released), []);
    assert!(host.deadline_ns() < Some(HOST_LIMITS.lease_ns));
    assert_eq!(host.handle(1, HostInput::Runs(1)), [said(Reply::Released)]);
    host.handle(1, order(Order::Finalise));
    assert_eq!(host.handle(1, HostInput::Stored(0)), []);
    assert_eq!(host.handle(1, HostInput::Stored(1)), [HostAction::Vote]);
    assert_eq!(host.handle(1, HostInput::Voted), [said(Reply::Stored)]);
}

#[test]
fn a_repeated_order_is_answered_again_and_a_late_one_is_not() {
    let mut host = host(Phase::Hold);
    assert_eq!(host.handle(1, order(Order::Hold)), [said(Reply::Held)]);
    assert_eq!(host.handle(1, order(Order::Prepare)), []);
    assert_eq!(host.phase(), Phase::Hold);
}

#[test]
fn an_order_that_skips_a_phase_is_refused() {
    let mut early = host(Phase::Precopy);
    assert!(fails(&early.handle(1, order(Order::Cut))));
    let mut busy = host(Phase::Approach);
    assert_eq!(busy.handle(1, order(Order::Hold)), [HostAction::Block]);
    // Not blocked yet.
    assert!(fails(&busy.handle(1, order(Order::Cut))));
}

#[test]
fn a_host_is_near_when_all_members_are_and_holds_even_if_they_are_not() {
    let mut host = host(Phase::Precopy);
    assert_eq!(
        host.handle(1, order(Order::Approach)),
        [HostAction::Approach]
    );
    assert_eq!(host.handle(1, HostInput::Near(1)), []);
    assert_eq!(
        host.handle(1, order(Order::Approach)),
        [said(Reply::Working)]
    );
    let mut late = self::host(Phase::Precopy);
    late.handle(1, order(Order::Approach));
    assert_eq!(late.handle(1, order(Order::Hold)), [HostAction::Block]);
    assert_eq!(late.handle(1, HostInput::Near(0)), []);
    assert_eq!(late.handle(1, HostInput::Near(1)), []);
    assert_eq!(host.handle(1, HostInput::Near(0)), [said(Reply::Near)]);
    // It isn't held yet: the limit on that doesn't run.
    assert!(host.deadline_ns() > Some(HOST_LIMITS.hold_ns + 1));
}

#[test]
fn members_that_do_not_come_near_are_cut_as_they_are() {
    let mut coordinator = coordinator(Phase::Approach);
    coordinator.handle(2, Input::Heard(0, heard(Reply::Near)));
    let told = coordinator.handle(1 + LIMITS.approach_ns, Input::Tick);
    assert_eq!(orders(&told), [(0, Order::Hold), (1, Order::Hold)]);
    // Late.
    assert_eq!(
        coordinator.handle(302, Input::Heard(1, heard(Reply::Near))),
        []
    );
    assert_eq!(coordinator.phase(), Phase::Hold);
}

#[test]
fn orders_of_another_session_or_take_mean_nothing() {
    let mut host = host(Phase::Hold);
    for (take, session) in [
        (TAKE, Some(Session(1))),
        (TAKE, None),
        (TakeId(1), Some(SESSION)),
    ] {
        let order = Order::Cut;
        let message = ToHost {
            take,
            session,
            order,
        };
        assert_eq!(host.handle(1, HostInput::Heard(message)), []);
    }
    assert_eq!(host.phase(), Phase::Hold);
}

#[test]
fn frames_are_let_go_at_the_deadline_whatever_comes_with_it() {
    for input in [HostInput::Tick, HostInput::Cut(0), order(Order::Cut)] {
        let mut host = host(Phase::Hold);
        assert_eq!(host.deadline_ns(), Some(51));
        assert!(fails(&host.handle(51, input)));
        // And it's never said that they were held.
        assert_eq!(host.handle(52, HostInput::Undone), [said(Reply::Aborted)]);
        let late = host.handle(53, order(Order::Release));
        let failed = |reply: &Reply| matches!(reply, Reply::Failed(_));
        assert!(matches!(&late[..], [HostAction::Say(message)] if failed(&message.reply)));
    }
}

#[test]
fn a_host_that_hears_nothing_gives_up_unless_it_has_voted() {
    let mut alone = host(Phase::Precopy);
    assert!(fails(&alone.handle(1_001, HostInput::Tick)));
    let mut voted = host(Phase::Finalise);
    assert_eq!(voted.handle(90, HostInput::Tick), []);
    // It asks, and asks again.
    for time in [101, 201, 1_000_000] {
        assert_eq!(voted.handle(time, HostInput::Tick), [said(Reply::Stored)]);
    }
    assert_eq!(
        voted.handle(1_000_001, order(Order::Commit)),
        [HostAction::Commit]
    );
}

#[test]
fn what_is_committed_is_not_aborted() {
    let mut host = host(Phase::Finalise);
    host.handle(1, order(Order::Commit));
    assert_eq!(host.handle(1, order(Order::Abort)), []);
    assert_eq!(
        host.handle(1, HostInput::Committed),
        [said(Reply::Committed)]
    );
    assert_eq!(host.handle(1, order(Order::Abort)), []);
    assert_eq!(
        host.handle(1, order(Order::Commit)),
        [said(Reply::Committed)]
    );
    assert_eq!(host.phase(), Phase::Done);
}

fn orders(actions: &[Action]) -> Vec<(usize, Order)> {
    let sent = actions.iter().map(|action| match action {
        Action::Send(host, message) => (*host, message.order),
        Action::Decide => panic!("not to be decided yet"),
    });
    sent.collect()
}

/// A coordinator of two hosts that have answered up to some phase.
fn coordinator(until: Phase) -> Coordinator {
    let abort = OnDivergence::Abort;
    let (mut coordinator, first) = Coordinator::begin(TAKE, &names(2), LIMITS, abort, 0);
    assert_eq!(orders(&first), [(0, Order::Prepare), (1, Order::Prepare)]);
    let replies = [
        Reply::Prepared,
        Reply::Converged(true),
        Reply::Near,
        Reply::Held,
        Reply::Cut,
        Reply::Released,
        Reply::Stored,
    ];
    for reply in replies {
        if coordinator.phase() == until {
            break;
        }
        for host in 0..2 {
            coordinator.handle(1, Input::Heard(host, heard(reply.clone())));
        }
        if coordinator.phase() == Phase::Drain && until != Phase::Drain {
            assert_eq!(coordinator.handle(10, Input::Tick), []);
            let cut = coordinator.handle(11, Input::Tick);
            assert_eq!(orders(&cut), [(0, Order::Cut), (1, Order::Cut)]);
        }
    }
    assert_eq!(coordinator.phase(), until);
    coordinator
}

#[test]
fn every_host_is_waited_for_in_every_phase() {
    for (phase, reply) in [
        (Phase::Prepare, Reply::Prepared),
        (Phase::Precopy, Reply::Converged(true)),
        (Phase::Approach, Reply::Near),
        (Phase::Hold, Reply::Held),
        (Phase::Cut, Reply::Cut),
        (Phase::Release, Reply::Released),
        (Phase::Finalise, Reply::Stored),
    ] {
        let mut coordinator = coordinator(phase);
        for _ in 0..3 {
            let again = Input::Heard(1, heard(reply.clone()));
            assert_eq!(coordinator.handle(12, again), [], "{phase}");
        }
        assert_eq!(coordinator.phase(), phase);
        coordinator.handle(12, Input::Heard(0, heard(reply)));
        assert!(coordinator.phase() > phase);
    }
}

#[test]
fn nobody_is_told_to_commit_before_the_decision_is_durable() {
    let mut coordinator = coordinator(Phase::Finalise);
    coordinator.handle(1, Input::Heard(0, heard(Reply::Stored)));
    let decide = coordinator.handle(1, Input::Heard(1, heard(Reply::Stored)));
    assert_eq!(decide, [Action::Decide]);
    assert_eq!(coordinator.handle(100_000, Input::Tick), []);
    // Too late to give up, and nothing to be said either.
    assert_eq!(coordinator.handle(100_000, Input::Interrupted), []);
    let told = coordinator.handle(100_001, Input::Decided);
    assert_eq!(orders(&told), [(0, Order::Commit), (1, Order::Commit)]);
    // A host that doesn't answer is told again, for as long as it takes.
    coordinator.handle(100_002, Input::Heard(1, heard(Reply::Committed)));
    let told = coordinator.handle(200_000, Input::Tick);
    assert_eq!(orders(&told), [(0, Order::Commit)]);
    coordinator.handle(200_001, Input::Heard(0, heard(Reply::Committed)));
    assert_eq!(coordinator.phase(), Phase::Done);
}

#[test]
fn a_decision_that_cannot_be_written_aborts() {
    let mut coordinator = coordinator(Phase::Commit);
    let told = coordinator.handle(1, Input::Failed(String::from("no space")));
    assert_eq!(orders(&told), [(0, Order::Abort), (1, Order::Abort)]);
    assert_eq!(coordinator.why(), Some("no space"));
}

#[test]
fn a_failure_anywhere_aborts_everywhere_once() {
    for phase in [Phase::Prepare, Phase::Precopy, Phase::Hold, Phase::Cut] {
        let mut coordinator = coordinator(phase);
        let failed = Reply::Failed(String::from("no"));
        let told = coordinator.handle(12, Input::Heard(1, heard(failed.clone())));
        assert_eq!(orders(&told), [(0, Order::Abort), (1, Order::Abort)]);
        assert_eq!(coordinator.handle(12, Input::Heard(0, heard(failed))), []);
        coordinator.handle(13, Input::Heard(0, heard(Reply::Aborted)));
        assert_eq!(coordinator.phase(), Phase::Abort);
        coordinator.handle(13, Input::Heard(1, heard(Reply::Aborted)));
        assert_eq!(coordinator.phase(), Phase::Failed);
        assert_eq!(coordinator.handle(14, Input::Decided), []);
    }
}

#[test]
fn divergence_aborts_or_goes_as_asked() {
    for (choice, expected) in [
        (OnDivergence::Go, Order::Approach),
        (OnDivergence::Abort, Order::Abort),
    ] {
        let (mut coordinator, _) = Coordinator::begin(TAKE, &names(1), LIMITS, choice, 0);
        coordinator.handle(1, Input::Heard(0, heard(Reply::Prepared)));
        // It was converged for a while.
        coordinator.handle(2, Input::Heard(0, heard(Reply::Converged(false))));
        let told = coordinator.handle(1_001, Input::Tick);
        assert_eq!(orders(&told), [(0, expected)]);
        assert_eq!(coordinator.diverged(), choice == OnDivergence::Go);
    }
}

#[test]
fn a_host_that_asks_about_a_take_that_nobody_leads_learns_what_was_decided() {
    let asks = heard(Reply::Stored);
    let told = |committed| unattended::as_coordinator(&asks, committed).map(|told| told.order);
    assert_eq!(told(true), Some(Order::Commit));
    assert_eq!(told(false), Some(Order::Abort));
    // What is late must not abort what is committed.
    let late = heard(Reply::Released);
    assert_eq!(unattended::as_coordinator(&late, true), None);
}

fn names(hosts: usize) -> Vec<String> {
    (0..hosts).map(|host| format!("host{host}")).collect()
}

#[test]
fn a_host_without_members_waits_for_nobody() {
    let (mut host, _) = Host::begin(TAKE, SESSION, 0, HOST_LIMITS, 0);
    let mut said = host.handle(1, HostInput::Armed);
    for (order, done) in [
        (Order::Precopy, None),
        (Order::Approach, None),
        (Order::Hold, Some(HostInput::Blocked)),
        (Order::Cut, None),
        (Order::Release, Some(HostInput::Released)),
        (Order::Finalise, Some(HostInput::Voted)),
        (Order::Commit, Some(HostInput::Committed)),
    ] {
        said.extend(host.handle(2, self::order(order)));
        said.extend(done.map(|done| host.handle(3, done)).into_iter().flatten());
    }
    let replies: Vec<_> = said
        .into_iter()
        .filter_map(|action| match action {
            HostAction::Say(message) => Some(message.reply),
            _ => None,
        })
        .collect();
    let expected = [
        Reply::Prepared,
        Reply::Converged(true),
        Reply::Near,
        Reply::Held,
        Reply::Cut,
        Reply::Released,
        Reply::Stored,
        Reply::Committed,
    ];
    assert_eq!(replies, expected);
    assert_eq!(host.phase(), Phase::Done);
}
