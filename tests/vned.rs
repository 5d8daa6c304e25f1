//! The daemon and whoever comes to it: the real program, on loopback addresses,
//! with an xl that only describes. No Xen is needed.

#[path = "vned/client.rs"]
mod client;
#[path = "vned/copies.rs"]
mod copies;
#[path = "vned/host.rs"]
mod host;
#[path = "vned/moves.rs"]
mod moves;

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{json, Value};
use xl_vne::sidecar::admin::Daemon;
use xl_vne::sidecar::lead::{Progress, Told};

use client::{config, connect_from, forged, knock, nameless, prepare, rest, Client, Ear, HERE};
use host::{name, wait_for, Fallible, Host};

type TestResult = Fallible<()>;

/// The id that all snapshots here have.
const ID: &str = "20261121T023652Z";
const TAKE: &str = "00000000c0ffee00";

/// A daemon that runs, and a host that it lists for some VNEs.
fn alpha_and_beta(vnes: &[&str]) -> Fallible<(Host, Host)> {
    let (mut alpha, beta) = (Host::new("alpha")?, Host::new("beta")?);
    alpha.trusts(&[beta.listed_for(vnes)?])?;
    alpha.knows("lab", &["web", "db"])?;
    alpha.knows("other", &["mail"])?;
    alpha.start()?;
    Ok((alpha, beta))
}

/// Serves a good peer, as if nothing had been.
fn serves(alpha: &Host, beta: &Host) -> TestResult {
    let mut client = Client::of(&beta.identity, alpha)?;
    let hello = client.greet("beta")??;
    assert_eq!(hello["host"], "alpha");
    assert!(client.call("peer_clock", json!([]))??.is_u64());
    Ok(())
}

/// Lines about strangers are one a second at most.
fn until_the_next_line() {
    std::thread::sleep(Duration::from_millis(1100));
}

#[test]
fn daemons_that_list_each_other_greet_each_other() -> TestResult {
    let (mut alpha, mut beta) = (Host::new("alpha")?, Host::new("beta")?);
    alpha.trusts(&[beta.listed_for(&["lab"])?])?;
    beta.trusts(&[alpha.listed_for(&["lab"])?])?;
    alpha.start()?;
    beta.start()?;
    let version = Ok(String::from(env!("CARGO_PKG_VERSION")));
    assert_eq!(alpha.tries(&beta)?, version);
    assert_eq!(beta.tries(&alpha)?, version);
    let status = alpha.admin()?.status()?;
    assert_eq!(status.host, alpha.name);
    assert_eq!(status.fingerprint, Some(alpha.identity.fingerprint()));
    assert_eq!(status.listen.as_ref(), Some(&alpha.address));

    // One that is another than expected is told nothing but who knocks.
    let mut wrong = beta.listed_for(&["lab"])?;
    wrong.fingerprint = alpha.identity.fingerprint();
    alpha.trusts(&[wrong])?;
    alpha.reload()?;
    let refused = alpha.tries(&beta)?.err().ok_or("it was trusted")?;
    let fingerprint = beta.identity.fingerprint().to_string();
    assert!(refused.contains(&fingerprint), "{refused}");
    Ok(())
}

#[test]
fn a_new_identity_is_the_one_that_is_shown_after_a_reload() -> TestResult {
    let (mut alpha, mut beta) = (Host::new("alpha")?, Host::new("beta")?);
    alpha.trusts(&[beta.listed_for(&["lab"])?])?;
    beta.trusts(&[alpha.listed_for(&["lab"])?])?;
    alpha.start()?;
    beta.start()?;
    alpha.tries(&beta)??;
    alpha.renew_identity()?;
    alpha.reload()?;
    beta.trusts(&[alpha.listed_for(&["lab"])?])?;
    beta.reload()?;
    alpha.tries(&beta)??;
    beta.tries(&alpha)??;
    Ok(())
}

#[test]
fn somebody_without_a_certificate_is_refused_and_logged() -> TestResult {
    let (alpha, beta) = alpha_and_beta(&["lab"])?;
    assert_eq!(knock(&alpha, nameless(&alpha)?)?, b"");
    alpha.logged(&["refused 127.0.0.1", "it has no certificate"])?;
    serves(&alpha, &beta)
}

#[test]
fn an_unknown_certificate_is_refused_and_its_fingerprint_logged() -> TestResult {
    let (alpha, beta) = alpha_and_beta(&["lab"])?;
    let stranger = Host::new("beta")?;
    assert_eq!(knock(&alpha, config(&stranger.identity, &alpha)?)?, b"");
    let fingerprint = stranger.identity.fingerprint().to_string();
    let line = alpha.logged(&["refused 127.0.0.1", &fingerprint])?;
    assert!(line.ends_with("isn't one that is trusted here"), "{line}");
    serves(&alpha, &beta)
}

#[test]
fn a_peers_certificate_without_its_key_is_refused_and_logged() -> TestResult {
    let (alpha, beta) = alpha_and_beta(&["lab"])?;
    let stranger = Host::new("gamma")?;
    assert_eq!(knock(&alpha, forged(&beta, &stranger, &alpha)?)?, b"");
    alpha.logged(&["refused 127.0.0.1", "doesn't have the key"])?;
    serves(&alpha, &beta)
}

#[test]
fn who_does_not_say_which_protocol_it_speaks_is_refused_and_logged() -> TestResult {
    let (alpha, beta) = alpha_and_beta(&["lab"])?;
    let mut silent = config(&beta.identity, &alpha)?;
    silent.alpn_protocols.clear();
    assert_eq!(knock(&alpha, silent)?, b"");
    alpha.logged(&["refused 127.0.0.1", "which protocol"])?;
    until_the_next_line();
    let mut other = config(&beta.identity, &alpha)?;
    other.alpn_protocols = vec![b"h2".to_vec()];
    assert_eq!(knock(&alpha, other)?, b"");
    alpha.logged(&["refused 127.0.0.1", "any known protocol"])?;
    serves(&alpha, &beta)
}

#[test]
fn a_peer_that_calls_itself_something_else_is_told_so() -> TestResult {
    let (alpha, beta) = alpha_and_beta(&["lab"])?;
    let mut client = Client::of(&beta.identity, &alpha)?;
    let refused = client.greet("alpha")?.err().ok_or("it was greeted")?;
    assert!(refused.contains("it calls itself 'alpha'"), "{refused}");
    alpha.logged(&["peer 'beta'", "it calls itself 'alpha'"])?;
    Ok(())
}

#[test]
fn a_peer_that_is_removed_is_cut_off_and_does_not_come_in_again() -> TestResult {
    let (mut alpha, mut beta) = alpha_and_beta(&["lab"])?;
    beta.trusts(&[alpha.listed_for(&["lab"])?])?;
    beta.start()?;
    beta.tries(&alpha)??;
    let mut open = Client::of(&beta.identity, &alpha)?;
    open.greet("beta")??;

    alpha.trusts(&[])?;
    alpha.reload()?;
    assert_eq!(open.rest()?, b"");
    alpha.logged(&["'beta' is no peer any more"])?;
    // The first time it may find out that its connection is gone.
    let refused = |why: &String| why.contains("it refuses this host");
    wait_for("a refusal", || {
        beta.tries(&alpha).ok()?.err().filter(refused)
    })?;
    until_the_next_line();
    assert_eq!(knock(&alpha, config(&beta.identity, &alpha)?)?, b"");
    let fingerprint = beta.identity.fingerprint().to_string();
    alpha.logged(&["refused 127.0.0.1", &fingerprint])?;

    alpha.trusts(&[beta.listed_for(&["lab"])?])?;
    alpha.reload()?;
    beta.tries(&alpha)??;
    Ok(())
}

#[test]
fn a_reload_turns_nobody_away() -> TestResult {
    let (alpha, beta) = alpha_and_beta(&["lab"])?;
    std::thread::scope(|scope| {
        let reloading = scope.spawn(|| {
            let reload = || alpha.reload().map_err(|error| error.to_string());
            (0..50).try_for_each(|_| reload())
        });
        while !reloading.is_finished() {
            serves(&alpha, &beta)?;
        }
        let reloaded = reloading.join();
        Ok(reloaded.unwrap_or_else(|_| Err(String::from("it panicked")))?)
    })
}

#[test]
fn it_listens_where_it_is_told_to_by_a_reload() -> TestResult {
    let (mut alpha, beta) = alpha_and_beta(&["lab"])?;
    let before = alpha.address.clone();
    alpha.address = host::free_address()?;
    alpha.trusts(&[beta.listed_for(&["lab"])?])?;
    alpha.reload()?;
    alpha.logged(&["listening", &alpha.address])?;
    serves(&alpha, &beta)?;
    wait_for("the old port to be closed", || {
        TcpStream::connect(&before).is_err().then_some(())
    })
}

/// What becomes of a take whose members are all on another host.
fn take_of(vne: &str, from: &Host, on: &Host) -> Fallible<String> {
    struct Nobody;
    impl Progress for Nobody {
        fn tell(&mut self, _: Told) {}
    }
    let s = 1_000_000_000_u64;
    let request = serde_json::from_value(json!({
        "vne": vne,
        "members": [{"host": on.name, "name": "web"}],
        "label": null,
        "limits": {
            "prepare_ns": 5 * s, "precopy_ns": s, "approach_ns": s, "drain_ns": 0, "hold_ns": s,
            "lease_ns": 20 * s, "repeat_ns": s / 5, "abort_ns": s,
        },
        "host_limits": {"hold_ns": s, "lease_ns": 20 * s, "ask_ns": s},
        "on_divergence": "abort",
        "policy": {
            "last_copy_ns_max": s / 20, "hover_ns_min": s / 100, "hover_ns_max": s / 10,
        },
        "hold_bytes": 1 << 20,
        "memory_only": false,
        "dry_run": true,
    }))?;
    let taken = from.admin()?.take(&request, &mut Nobody);
    let error = taken.err().ok_or("there is no member, and it was taken")?;
    Ok(xl_vne::sentence(&error))
}

#[test]
fn who_leads_a_take_is_told_that_and_why_another_host_refuses() -> TestResult {
    let (mut alpha, mut beta) = (Host::new("alpha")?, Host::new("beta")?);
    alpha.trusts(&[beta.listed_for(&["lab"])?])?;
    beta.trusts(&[alpha.listed_for(&["other"])?])?;
    beta.knows("lab", &["web"])?;
    alpha.start()?;
    beta.start()?;
    let told = take_of("lab", &alpha, &beta)?;
    let expected = "host 'beta' doesn't act for 'alpha' in a VNE 'lab'";
    assert!(told.contains(expected), "{told}");
    beta.logged(&["peer 'alpha'", "VNE 'lab'", "isn't listed"])?;

    beta.trusts(&[])?;
    beta.reload()?;
    let told = take_of("lab", &alpha, &beta)?;
    let expected = "beta: it refuses this host (is it a peer there";
    assert!(told.contains(expected), "{told}");

    alpha.trusts(&[])?;
    alpha.reload()?;
    let told = take_of("lab", &alpha, &beta)?;
    assert!(told.contains("'beta' is no peer of this one"), "{told}");
    Ok(())
}

/// A snapshot of the VNE, all of which is on the other host.
fn snapshot(alpha: &Host, beta: &Host, vne: &str) -> Fallible<Value> {
    let mut take = alpha.store()?.begin_as(&name(vne)?, &ID.parse()?)?;
    let mut manifest = take.manifest(&alpha.name);
    manifest.take = TAKE.to_owned();
    manifest.hosts.push(beta.name.clone());
    let nothing = json!({
        "pages_received": 0, "pages_final": 0, "pages_unique": 0, "pages_stored": 0,
        "pages_zero": 0, "bytes_received": 0, "pages_spilled": 0, "pages_held_peak": 0,
        "pages_verify_differed": 0,
    });
    manifest.members.push(serde_json::from_value(json!({
        "name": "web",
        "domid": 7,
        "uuid": "c0ffee00-0000-4000-8000-000000000000",
        "host": beta.name,
        "type": "pv",
        "memory_kib": 1 << 17,
        "vcpus": 1,
        "downtime": {"suspend_ns": 1, "last_pages_ns": 1, "device_state_ns": 1, "resume_ns": 1},
        "rounds": 1,
        "pages_sent": 1,
        "pages_final_dirty": 1,
        "stream_bytes": 1,
        "image": {"stats": nothing, "files": []},
    }))?);
    take.commit(&manifest)?;
    Ok(serde_json::to_value(&manifest)?)
}

/// Everything about a VNE that a peer can ask. What it's answered, and what is
/// said to it by the way back.
fn asks(
    client: &mut Client,
    ear: &Ear,
    (alpha, beta): (&Host, &Host),
    vne: &str,
    manifest: &Value,
) -> Fallible<Vec<String>> {
    let mut manifest = manifest.clone();
    manifest["vne"] = json!(vne);
    let snapshot = json!({"vne": vne, "id": ID});
    let part = json!({"part": {"vne": vne, "id": ID, "members": []}});
    let said = json!({"take": TAKE, "session": "0000000000000001", "reply": "stored"});
    let commit = json!({"take": TAKE, "session": null, "order": "commit"});
    let mut told = Vec::new();
    for (method, params) in [
        (
            "peer_order",
            prepare(1, vne, &beta.listed_for(&[])?, &["web"]),
        ),
        (
            "peer_build",
            json!({"ticket": "t", "snapshot": snapshot.clone()}),
        ),
        ("peer_remove", json!({ "snapshot": snapshot })),
    ] {
        let refused = client.call(method, params)?.err();
        told.push(refused.ok_or_else(|| format!("{method} was done"))?);
        alpha.logged(&["peer 'beta'", &format!("VNE '{vne}'"), "isn't listed"])?;
    }
    let news = json!({"news": {"said": {"message": said, "attached": part}}});
    told.push(client.call("peer_news", news)??.to_string());
    alpha.logged(&["peer 'beta'", &format!("{vne}@"), "isn't listed"])?;
    // What is said to it first is about this one: of the news nothing came.
    let order = json!({"order": {"message": commit, "manifest": manifest}});
    told.push(client.call("peer_order", order)??.to_string());
    told.push(ear.hears()?.to_string());
    let same = |text: String| text.replace(&format!("'{vne}'"), "'VNE'");
    Ok(told.into_iter().map(same).collect())
}

#[test]
fn a_peer_of_another_vne_does_not_learn_whether_there_is_one() -> TestResult {
    let (mut alpha, beta) = alpha_and_beta(&["other"])?;
    let manifest = snapshot(&alpha, &beta, "lab")?;
    let ear = Ear::of(&beta)?;
    let mut client = Client::of(&beta.identity, &alpha)?;
    client.greet("beta")??;
    let hosts = (&alpha, &beta);
    let there = asks(&mut client, &ear, hosts, "lab", &manifest)?;
    let nowhere = asks(&mut client, &ear, hosts, "nowhere", &manifest)?;
    assert_eq!(there, nowhere);
    assert!(there[0].contains("doesn't act for 'beta' in a VNE 'VNE'"));
    assert!(there[3..].iter().all(|told| !told.contains("lab")));
    let asked = alpha.asked_of_xl()?;
    for never in ["describe lab", "describe nowhere", "capture", "sweep"] {
        assert!(!asked.contains(never), "{asked}");
    }
    let listed = alpha.store()?.catalogue().list(None)?;
    assert_eq!(listed.snapshots.len(), 1);

    // It's the list that makes the difference: the same connection, once it's
    // listed for both, hears that one exists and the other doesn't.
    alpha.trusts(&[beta.listed_for(&["lab", "nowhere"])?])?;
    alpha.reload()?;
    let part = json!({"part": {"vne": "lab", "id": ID, "members": []}});
    let said = json!({"take": TAKE, "session": "0000000000000001", "reply": "stored"});
    let news = json!({"news": {"said": {"message": said, "attached": part}}});
    client.call("peer_news", news)??;
    let heard = ear.hears()?;
    assert_eq!(heard["order"]["message"]["order"], "commit", "{heard}");
    // The same words as before, by the way that tells of a take's end.
    let plan = prepare(2, "nowhere", &beta.listed_for(&[])?, &[]);
    client.call("peer_order", plan)??;
    let heard = ear.hears()?;
    let why = heard["news"]["said"]["message"]["reply"]["failed"].as_str();
    let expected = there[0].replace("'VNE'", "'nowhere'");
    assert_eq!(why, Some(expected.as_str()), "{heard}");
    Ok(())
}

#[test]
fn a_plan_is_held_against_what_is_described_here() -> TestResult {
    let (alpha, beta) = alpha_and_beta(&["lab"])?;
    let ear = Ear::of(&beta)?;
    let mut client = Client::of(&beta.identity, &alpha)?;
    client.greet("beta")??;
    let beta = beta.listed_for(&[])?;
    let with = |path: &str, value: Value| {
        let mut order = prepare(0, "lab", &beta, &["web"]);
        let place = order.pointer_mut(&format!("/order/plan/{path}"));
        place.map(|place| *place = value).ok_or("no such field")?;
        Fallible::Ok(order)
    };
    let minute = 60_000_000_000_u64;
    let many = vec!["web"; 1025];
    let cases = [
        (
            with("members", json!(["web", "mail"]))?,
            "'mail' is no member",
        ),
        (with("members", json!(["web", "../web"]))?, ""),
        (with("members", json!(["web", "db", "web"]))?, "'web' twice"),
        (with("members", json!(many))?, "more than 1024 members"),
        (
            with("leader", json!("gamma"))?,
            "leads no takes for 'gamma'",
        ),
        (with("limits/hold_ns", json!(minute))?, "make no sense"),
        (with("limits/lease_ns", json!(u64::MAX))?, "make no sense"),
        (with("limits/ask_ns", json!(1))?, "make no sense"),
        (with("hold_bytes", json!(u32::MAX))?, "make no sense"),
        (with("policy/hover_ns_min", json!(0))?, "make no sense"),
        (
            with("policy/last_copy_ns_max", json!(u64::MAX))?,
            "make no sense",
        ),
    ];
    for (number, (mut order, expected)) in cases.into_iter().enumerate() {
        order["order"]["message"]["take"] = json!(format!("{number:016x}"));
        let taken_in = client.call("peer_order", order)?;
        if expected.is_empty() {
            // Not even a plan.
            assert!(taken_in.is_err(), "{taken_in:?}");
            continue;
        }
        taken_in?;
        let heard = ear.hears()?;
        let reply = &heard["news"]["said"]["message"]["reply"];
        let why = reply["failed"].as_str().unwrap_or_default();
        assert!(why.contains(expected), "{expected}: {heard}");
        alpha.logged(&["peer 'beta'", expected])?;
    }
    assert!(!alpha.asked_of_xl()?.contains("capture"));
    // Each take has a folder there.
    for left in fs::read_dir(alpha.path("run/vne"))? {
        assert!(!left?.file_type()?.is_dir());
    }
    Ok(())
}

#[test]
fn bytes_that_are_no_handshake_are_refused_and_logged() -> TestResult {
    let (alpha, beta) = alpha_and_beta(&["lab"])?;
    // Reproducible, and no TLS record.
    let noise: Vec<u8> = (0..100_000_u32)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8 | 0x80)
        .collect();
    // A handshake's record, as long as one can say it is.
    let mut record = vec![22, 3, 1, 0xff, 0xff];
    record.resize(0x1_0004, 1);
    // A hello that goes on for 16 MiB, in records of the greatest length.
    let mut hello = Vec::new();
    for at in 0..64 {
        hello.extend([22, 3, 1, 0x40, 0]);
        let from = hello.len();
        hello.resize(from + 0x4000, 0);
        if at == 0 {
            hello[from..from + 4].copy_from_slice(&[1, 0xff, 0xff, 0xff]);
        }
    }
    for bytes in [&noise, &record, &hello, &b"GET / HTTP/1.1\r\n\r\n".to_vec()] {
        let lines = alpha.log().matches("refused 127.0.0.1").count();
        let mut stream = connect_from(HERE, &alpha)?;
        // It needn't be read to the end.
        let _ = stream.write_all(bytes);
        let came = rest(&mut stream)?;
        // An alert, at most.
        assert!(
            came.is_empty() || (came[0] == 21 && came.len() == 7),
            "{came:?}"
        );
        wait_for("a line", || {
            (alpha.log().matches("refused 127.0.0.1").count() > lines).then_some(())
        })?;
        serves(&alpha, &beta)?;
        until_the_next_line();
    }
    Ok(())
}

#[test]
fn nonsense_of_a_peer_is_no_end_of_its_connection() -> TestResult {
    let (alpha, beta) = alpha_and_beta(&["lab"])?;
    let mut client = Client::of(&beta.identity, &alpha)?;
    client.greet("beta")??;
    let deep = "[".repeat(100_000);
    for nonsense in [
        "",
        "}",
        "null",
        "[]",
        "\"peer_clock\"",
        &deep,
        r#"{"jsonrpc":"2.0"}"#,
        r#"{"jsonrpc":"1.0","id":7,"method":"peer_clock"}"#,
        r#"[{"jsonrpc":"2.0","id":7,"method":"peer_clock"}]"#,
        "\u{fffd}\0",
    ] {
        client.say(format!("{nonsense}\n").as_bytes())?;
    }
    for (method, params) in [
        ("admin_status", json!([])),
        ("peer_nothing", json!([])),
        ("peer_hello", json!({"hello": 1})),
        ("peer_order", json!({"order": {"message": {}}})),
        (
            "peer_remove",
            json!({"snapshot": {"vne": "../..", "id": ID}}),
        ),
        (
            "peer_remove",
            json!({"snapshot": {"vne": "lab", "id": "../.."}}),
        ),
        ("peer_outcome", json!({"ticket": "../../../etc/passwd"})),
    ] {
        let answer = client.call(method, params)?;
        assert!(answer.is_err(), "{method}: {answer:?}");
    }
    assert!(client.call("peer_clock", json!([]))??.is_u64());
    Ok(())
}

#[test]
fn a_line_without_end_ends_that_connection_only() -> TestResult {
    let (alpha, beta) = alpha_and_beta(&["lab"])?;
    let mut other = Client::of(&beta.identity, &alpha)?;
    other.greet("beta")??;
    let mut client = Client::of(&beta.identity, &alpha)?;
    client.greet("beta")??;
    let much = vec![b' '; 1 << 20];
    // It's refused at some point; nothing tells exactly when.
    let said = (0..24).try_for_each(|_| client.say(&much));
    assert!(said.is_err() || client.rest()?.is_empty());
    alpha.logged(&["peer 'beta'", "a line that is too long"])?;
    assert!(other.call("peer_clock", json!([]))??.is_u64());
    serves(&alpha, &beta)
}

#[test]
fn half_open_connections_keep_no_other_address_out() -> TestResult {
    let (alpha, beta) = alpha_and_beta(&["lab"])?;
    serves(&alpha, &beta)?;
    let before = wait_for("descriptors", || alpha.descriptors().ok())?;
    let mut held: Vec<TcpStream> = (0..60)
        .map(|_| connect_from(HERE, &alpha))
        .collect::<Fallible<_>>()?;
    for (at, stream) in held.iter_mut().enumerate() {
        // Half of them begin to say something. Some are refused already.
        if at % 2 == 0 {
            let _ = stream.write_all(&[22, 3, 1, 2, 0, 1]);
        }
    }
    alpha.logged(&["refused 127.0.0.1", "too many connections"])?;
    let elsewhere = Ipv4Addr::new(127, 0, 0, 2);
    let config = config(&beta.identity, &alpha)?;
    let mut client = Client::connect(elsewhere, &alpha, config)?;
    client.greet("beta")??;
    // 8 of them wait, the rest was closed at once.
    let during = alpha.descriptors()?;
    assert!(
        during <= before + 8 + 2,
        "{during} descriptors, {before} before"
    );
    for stream in &mut held {
        assert_eq!(rest(stream)?, b"");
    }
    alpha.logged(&["refused 127.0.0.1", "no certificate within 5 s"])?;
    serves(&alpha, &beta)?;
    drop(client);
    wait_for("the descriptors to be closed", || {
        alpha.descriptors().ok().filter(|now| *now <= before)
    })?;
    Ok(())
}

#[test]
fn one_peer_does_not_have_more_connections_than_it_may() -> TestResult {
    let (alpha, beta) = alpha_and_beta(&["lab"])?;
    let mut open = Vec::new();
    for _ in 0..8 {
        let mut client = Client::of(&beta.identity, &alpha)?;
        client.greet("beta")??;
        open.push(client);
    }
    assert_eq!(knock(&alpha, config(&beta.identity, &alpha)?)?, b"");
    alpha.logged(&["peer 'beta' has too many connections"])?;
    open.pop();
    wait_for("a place", || serves(&alpha, &beta).ok())
}

#[test]
fn a_signal_ends_it_and_takes_its_socket_away() -> TestResult {
    let (mut alpha, beta) = alpha_and_beta(&["lab"])?;
    for signal in [Signal::TERM, Signal::INT] {
        let mut open = Client::of(&beta.identity, &alpha)?;
        open.greet("beta")??;
        let _half_open = connect_from(HERE, &alpha)?;
        let status = alpha.end(signal)?;
        assert_eq!(status.code(), Some(0), "{}", alpha.log());
        assert!(!alpha.socket().exists());
        assert_eq!(open.rest()?, b"");
        alpha.start()?;
    }
    Ok(())
}

#[test]
fn a_second_one_does_not_start_beside_the_first() -> TestResult {
    let (alpha, beta) = alpha_and_beta(&["lab"])?;
    let mut second = alpha.spawn()?;
    let status = wait_for("the second to end", || second.try_wait().transpose());
    if status.is_err() {
        second.kill()?;
    }
    assert_eq!(status??.code(), Some(1));
    alpha.logged(&["another vned is running"])?;
    alpha.admin()?.status()?;
    serves(&alpha, &beta)
}

#[test]
fn one_that_was_killed_can_be_started_again() -> TestResult {
    let (mut alpha, beta) = alpha_and_beta(&["lab"])?;
    let open = Client::of(&beta.identity, &alpha)?;
    assert_eq!(alpha.end(Signal::KILL)?.code(), None);
    assert!(alpha.socket().exists());
    assert!(Daemon::find(&alpha.path("run"))?.is_none());
    alpha.start()?;
    drop(open);
    serves(&alpha, &beta)
}

#[test]
fn only_root_may_command_it() -> TestResult {
    let (alpha, _) = alpha_and_beta(&["lab"])?;
    let mode = |path| Fallible::Ok(fs::metadata(path)?.permissions().mode() & 0o777);
    let folder = alpha.path("run/vne");
    assert_eq!(mode(&folder)?, 0o700);
    assert_eq!(mode(&alpha.socket())?, 0o600);
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let knocks = || -> std::io::Result<Vec<u8>> {
        let socket = alpha.socket();
        let nobody = rustix::process::Uid::from_raw(65534);
        let knock = move || {
            // Of this thread only, which ends.
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody)?;
            let mut stream = UnixStream::connect(socket)?;
            let _ =
                stream.write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"admin_status\"}\n");
            let mut came = Vec::new();
            // Closed with what was said unread.
            let _ = stream.read_to_end(&mut came);
            Ok(came)
        };
        let knocking = std::thread::spawn(knock).join();
        knocking.unwrap_or_else(|_| Err(std::io::Error::other("it panicked")))
    };
    let refused = knocks().map_err(|error| error.kind());
    assert_eq!(refused, Err(std::io::ErrorKind::PermissionDenied));
    // Should somebody have opened the folders and the socket to all.
    for path in [alpha.path(""), alpha.path("run"), folder, alpha.socket()] {
        fs::set_permissions(path, Permissions::from_mode(0o777))?;
    }
    assert_eq!(knocks()?, b"");
    alpha.logged(&["refused a command of somebody who isn't root"])?;
    alpha.admin()?.status()?;
    Ok(())
}
