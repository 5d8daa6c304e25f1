//! What the hotplug script does, in which order, with Xen's own functions replaced
//! by ones that write down that they were called.

use std::error::Error;
use std::path::Path;
use std::process::Command;

type TestResult = Result<(), Box<dyn Error>>;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/hotplug/vif-vne");

/// In place of Xen's: what it offers to scripts, with all of its strictness.
const COMMON: &str = r#"
did() { echo "$*" >>"$WORK/done"; }
command=$1 type_if=${type_if:-vif} dev=${vif:-$INTERFACE}
xenstore_read_default() { echo "$BRIDGE"; }
fatal() { did "fatal $*"; exit 1; }
success() { did success; }
log() { did "log $*"; }
do_or_die() { "$@" || fatal "$@ failed"; }
do_without_error() { "$@" 2>/dev/null || log debug "$@ failed"; }
claim_lock() { did "claim_lock $*"; }
release_lock() { did "release_lock $*"; }
setup_virtual_bridge_port() { did "setup $*"; }
set_mtu() { did "set_mtu $*"; }
add_to_bridge() { did "add_to_bridge $*"; }
call_hooks() { :; }
trap 'fatal "error detected"' ERR
"#;

/// Runs the script; whether it succeeded, and what it did but for debugging.
fn run(
    command: &str,
    bridge: &str,
    environment: &[(&str, &str)],
    xl: &str,
) -> Result<(bool, Vec<String>), Box<dyn Error>> {
    let work = tempfile::tempdir()?;
    let put = |name: &str, text: &str| std::fs::write(work.path().join(name), text);
    put("vif-common.sh", COMMON)?;
    put("done", "")?;
    put(
        "xl",
        &format!("#!/bin/sh\necho \"xl $*\" >> \"$WORK/done\"\n{xl}\n"),
    )?;
    std::fs::copy(SCRIPT, work.path().join("vif-vne"))?;
    let made = Command::new("chmod")
        .arg("755")
        .arg(work.path().join("xl"))
        .status()?;
    assert!(made.success());
    let path = std::env::var("PATH").unwrap_or_default();
    let status = Command::new("bash")
        .arg(work.path().join("vif-vne"))
        .arg(command)
        .envs(environment.iter().copied())
        .env("WORK", work.path())
        .env("BRIDGE", bridge)
        .env("XENBUS_PATH", "backend/vif/5/0")
        .env("PATH", format!("{}:{path}", work.path().display()))
        .status()?;
    let told = std::fs::read_to_string(Path::new(work.path()).join("done"))?;
    let told = told.lines().filter(|line| !line.starts_with("log debug"));
    Ok((status.success(), told.map(str::to_owned).collect()))
}

const VIF: &[(&str, &str)] = &[("vif", "vif5.0")];
const TAP: &[(&str, &str)] = &[("INTERFACE", "vif5.0-emu"), ("type_if", "tap")];

#[test]
fn a_card_goes_on_a_network_that_is_made_under_the_lock() -> TestResult {
    for (command, environment, dev, last) in [
        ("online", VIF, "vif5.0", Some("success")),
        ("add", TAP, "vif5.0-emu", None),
    ] {
        let (good, done) = run(command, "lab", environment, "echo vne-lab")?;
        let type_if = if command == "add" { "tap" } else { "vif" };
        let mut expected = vec![
            String::from("claim_lock vne-lab"),
            String::from("xl vne-worker net-up -- lab"),
            format!("setup {dev}"),
            format!("set_mtu vne-lab {dev} {type_if}"),
            format!("add_to_bridge vne-lab {dev}"),
            String::from("release_lock vne-lab"),
        ];
        expected.extend(last.map(str::to_owned));
        assert!(good);
        assert_eq!(done, expected);
    }
    Ok(())
}

#[test]
fn a_network_is_removed_under_the_lock_and_a_guest_goes_whatever_becomes_of_it() -> TestResult {
    for (command, environment) in [("offline", VIF), ("remove", TAP)] {
        let (good, done) = run(command, "lab", environment, "")?;
        assert!(good);
        let expected = [
            "claim_lock vne-lab",
            "xl vne-worker net-down -- lab",
            "release_lock vne-lab",
        ];
        assert_eq!(done, expected);
        let (good, done) = run(command, "lab", environment, "exit 1")?;
        assert!(
            good && done.iter().any(|line| line.starts_with("log err")),
            "{done:?}"
        );
    }
    Ok(())
}

#[test]
fn why_there_is_no_network_is_told_and_warnings_are_logged() -> TestResult {
    let xl = "echo 'a warning' >&2; echo 'cannot create vne-lab' >&2; exit 1";
    let (good, done) = run("online", "lab", VIF, xl)?;
    assert!(!good);
    let tail = &done[2..];
    assert_eq!(
        tail,
        [
            "log warning a warning",
            "fatal vif5.0: cannot create vne-lab"
        ]
    );
    let xl = "echo 'a warning' >&2; echo vne-lab";
    let (good, done) = run("online", "lab", VIF, xl)?;
    assert!(good && done.contains(&String::from("log warning a warning")));
    Ok(())
}

#[test]
fn what_cannot_name_a_vne_is_refused_before_anything_is_done() -> TestResult {
    for bridge in ["", "../x", "a/b", "-x", "a b", "a;b", ".a"] {
        let (good, done) = run("online", bridge, VIF, "")?;
        assert!(!good && done.len() == 1, "{bridge:?}: {done:?}");
        assert!(done[0].starts_with("fatal vif5.0: "), "{done:?}");
    }
    Ok(())
}
