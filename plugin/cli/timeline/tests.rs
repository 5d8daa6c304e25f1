use super::*;
use crate::image::{Cut, DomainType, Downtime, MemberImage, MemberStats, Name, TimelineRound};

const MS: u64 = 1_000_000;

fn member(name: &str, rounds: &[(u64, u64, u64)]) -> Member {
    let rounds = rounds
        .iter()
        .map(|&(before, duration, pages)| TimelineRound {
            before_ns: before * MS,
            duration_ns: duration * MS,
            pages,
            count: 1,
        });
    Member {
        name: Name::new(name).unwrap(),
        domid: 1,
        uuid: String::new(),
        host: Name::new("alpha").unwrap(),
        domain_type: DomainType::Pvh,
        memory_kib: 262_144,
        vcpus: 1,
        ran_on: None,
        downtime: Downtime {
            suspend_ns: 60 * MS,
            last_pages_ns: 20 * MS,
            device_state_ns: 9 * MS,
            disks_ns: 0,
            resume_ns: 14 * MS,
        },
        rounds: 3,
        pages_sent: 70_000,
        pages_final_dirty: 160,
        stream_bytes: 0,
        diverged: false,
        throttled_to: None,
        uncaptured_disks: Vec::new(),
        read_only_disks: Vec::new(),
        disks: Vec::new(),
        late_frames: 0,
        recorded: None,
        timeline: Some(Timeline {
            rounds: rounds.collect(),
            hover_ns: Some(1_000 * MS),
            held_ns: 70 * MS,
            released_ns: 5 * MS,
            finalise_ns: 60 * MS,
            stored_ns: 800 * MS,
        }),
        image: MemberImage {
            stats: MemberStats::default(),
            files: Vec::new(),
            packs: Vec::new(),
            cpu_features: None,
        },
    }
}

pub fn manifest() -> Manifest {
    let rounds = [(3_000, 1_500, 65_536), (1_500, 400, 2_000), (900, 20, 150)];
    let short = [(2_500, 900, 32_768), (1_400, 100, 900), (500, 10, 40)];
    Manifest {
        format: 1,
        vne: Name::new("lab").unwrap(),
        id: "20261121T023652Z".parse().unwrap(),
        take: String::new(),
        created: String::from("2026-11-21T02:36:52Z"),
        tool_version: String::new(),
        xen_version: String::from("4.17.5"),
        host: Name::new("alpha").unwrap(),
        hosts: vec![Name::new("alpha").unwrap()],
        label: Some(String::from("<b>&\"label\"")),
        cut: Cut {
            at_ns: vec![0, 12 * MS],
            ..Cut::default()
        },
        stored: Vec::new(),
        members: vec![member("db", &rounds), member("web1", &short)],
    }
}

#[test]
fn phases_follow_each_other_without_a_gap_from_hovering_to_running() {
    let drawing = Drawing::of(&manifest()).unwrap();
    for lane in &drawing.lanes {
        let after_precopy = |span: &&Span| !matches!(span.kind, Kind::Round | Kind::Finalise);
        let spans: Vec<&Span> = lane.spans.iter().filter(after_precopy).collect();
        assert_eq!(spans.len(), 5);
        for pair in spans.windows(2) {
            assert_eq!(pair[0].to_ns, pair[1].from_ns);
        }
        // It stands still from its cut on.
        assert_eq!(spans[2].from_ns, lane.cut_ns);
        assert_eq!(spans[4].to_ns - lane.cut_ns, 43e6);
    }
    assert_eq!(drawing.lanes[1].cut_ns, 12e6);
    assert_eq!(drawing.whole, (-3_000e6, 812e6));
}

#[test]
fn the_terminal_shows_every_member_and_phase_within_its_width() {
    let drawing = Drawing::of(&manifest()).unwrap();
    for width in [60, 100, 200] {
        let text = text::draw(&drawing, width);
        let lines: Vec<&str> = text.lines().collect();
        let too_long = lines
            .iter()
            .take_while(|line| !line.starts_with("Pages that"))
            .find(|line| line.chars().count() > width);
        assert_eq!(too_long, None, "{text}");
        let of = |what: &str| lines.iter().filter(|line| line.contains(what)).count();
        assert_eq!(of("hhh"), 2, "{text}");
        for letters in ["~~", "ss", "ww", "="] {
            assert!(of(letters) >= 2, "{letters}: {text}");
        }
        assert!(text.contains("65536 2000 150; 160 at the cut"), "{text}");
    }
}

#[test]
fn the_page_is_sound_and_says_nothing_that_it_was_not_told() {
    let drawing = Drawing::of(&manifest()).unwrap();
    let page = svg::page(&drawing);
    assert!(
        page.contains("&lt;b&gt;&amp;&quot;label&quot;"),
        "the label"
    );
    assert!(!page.contains("<b>"));
    // Nothing is fetched from anywhere.
    let addresses = page.matches("http").count();
    assert_eq!(
        addresses,
        page.matches("http://www.w3.org/2000/svg").count()
    );
    for kind in Kind::ALL {
        let drawn = page.matches(&format!("class=\"{}\"", kind.name())).count();
        assert!(drawn >= 3, "{kind:?}: a legend and two members");
    }
    assert!(!page.contains("NaN") && !page.contains("inf"));
}

#[test]
fn times_that_nobody_can_have_meant_are_drawn_all_the_same() {
    let mut odd = manifest();
    let times = odd.members[0].timeline.as_mut().unwrap();
    times.held_ns = u64::MAX;
    times.stored_ns = 0;
    times.rounds[0].before_ns = u64::MAX;
    times.rounds.extend(vec![times.rounds[1]; 100_000]);
    odd.cut.at_ns[1] = u64::MAX;
    let drawing = Drawing::of(&odd).unwrap();
    assert!(drawing
        .lanes
        .iter()
        .all(|lane| lane.rounds.len() <= ROUNDS_MAX));
    let texts = [text::draw(&drawing, 80), svg::page(&drawing)];
    assert!(texts
        .iter()
        .all(|text| !text.contains("NaN") && text.len() < 200_000));
}

#[test]
fn a_snapshot_without_times_has_no_timeline() {
    let mut old = manifest();
    for member in &mut old.members {
        member.timeline = None;
    }
    assert!(Drawing::of(&old).is_none());
}

#[test]
fn ticks_are_round_numbers_with_0_among_them() {
    let found = ticks(-3_000e6, 812e6, 8);
    assert!(found.contains(&0.0) && found.len() >= 5, "{found:?}");
    assert!(found.iter().all(|at| at % 500e6 == 0.0), "{found:?}");
    assert_eq!(time(-500e6), "-500 ms");
    assert_eq!(time(12.34e6), "12.3 ms");
}
