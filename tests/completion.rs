//! The shell's completion knows the command: its verbs, its options, and what
//! it prints as JSON.

use std::collections::BTreeSet;
use std::error::Error;
use std::path::Path;
use std::process::Command;

use xl_vne::image::{
    Cut, DomainType, Downtime, Manifest, Member, MemberImage, MemberStats, Name, FORMAT,
};
use xl_vne::sidecar::conf::Peer;

type TestResult = Result<(), Box<dyn Error>>;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/bash-completion");

/// What bash would offer for a line.
fn offered(line: &str) -> Result<BTreeSet<String>, Box<dyn Error>> {
    const SCRIPT: &str = r#"
        . "$1/xl-vne-snapshot"
        compopt() { :; }
        COMP_LINE=$2 COMP_POINT=${#2} COMPREPLY=()
        _xl_with_vne xl
        printf '%s\n' "${COMPREPLY[@]}""#;
    let output = Command::new("bash")
        .args(["-c", SCRIPT, "bash", FOLDER, line])
        .output()?;
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && complaints.is_empty(),
        "{complaints}"
    );
    let words = String::from_utf8(output.stdout)?;
    Ok(words.split_whitespace().map(str::to_owned).collect())
}

#[test]
fn completion_has_all_verbs_and_options_and_no_others() -> TestResult {
    let command = xl_vne::cli::command();
    let verbs = command.get_subcommands().map(|verb| verb.get_name());
    assert_eq!(
        offered("xl vne-snapshot ")?,
        verbs.map(str::to_owned).collect()
    );
    for (name, verb) in all_verbs(&command) {
        let options = verb.get_arguments().filter_map(clap::Arg::get_long);
        let mut options: BTreeSet<String> = options.map(|long| format!("--{long}")).collect();
        options.insert(String::from("--help"));
        assert_eq!(
            offered(&format!("xl vne-snapshot {name} --"))?,
            options,
            "{name}"
        );
        let verbs: BTreeSet<_> = verb
            .get_subcommands()
            .map(clap::Command::get_name)
            .collect();
        if !verbs.is_empty() {
            let offered = offered(&format!("xl vne-snapshot {name} "))?;
            assert_eq!(offered, verbs.into_iter().map(str::to_owned).collect());
        }
    }
    Ok(())
}

/// The verbs, and those that some of them have, as they are typed.
fn all_verbs(command: &clap::Command) -> Vec<(String, &clap::Command)> {
    let mut verbs = Vec::new();
    for verb in command.get_subcommands() {
        let name = verb.get_name();
        let nested = verb.get_subcommands();
        verbs.push((name.to_owned(), verb));
        verbs.extend(nested.map(|nested| (format!("{name} {}", nested.get_name()), nested)));
    }
    verbs
}

#[test]
fn completion_has_all_values_of_an_option() -> TestResult {
    let command = xl_vne::cli::command();
    let mut seen = 0;
    for (name, verb) in all_verbs(&command) {
        for argument in verb.get_arguments() {
            let values = argument.get_possible_values();
            let (Some(long), false) = (argument.get_long(), values.is_empty()) else {
                continue;
            };
            if !argument.get_action().takes_values() {
                continue;
            }
            let values = values.iter().map(|value| value.get_name().to_owned());
            let line = format!("xl vne-snapshot {name} --{long} ");
            assert_eq!(offered(&line)?, values.collect(), "{line}");
            seen += 1;
        }
    }
    assert!(seen > 0);
    Ok(())
}

#[test]
fn completion_offers_what_a_user_wants_to_type() -> TestResult {
    let first = manifest("20261121T023652Z")?;
    let second = manifest("20261122T101500Z")?;
    let json = tempfile::tempdir()?;
    let write = |name: &str, text: String| std::fs::write(json.path().join(name), text);
    write("show.json", serde_json::to_string_pretty(&second)?)?;
    write(
        "list.json",
        serde_json::to_string_pretty(&[&first, &second])?,
    )?;
    let peers = [peer("beta")?, peer("gamma")?];
    write("peers.json", serde_json::to_string_pretty(&peers)?)?;
    let output = Command::new("bash")
        .arg(Path::new(FOLDER).join("test"))
        .arg(json.path())
        .output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    Ok(())
}

fn peer(name: &str) -> Result<Peer, Box<dyn Error>> {
    Ok(Peer {
        name: Name::new(name)?,
        address: String::from("10.0.0.2:7791"),
        fingerprint: "3f2a-90c1-0000-ffff-1234-5678-9abc-def0".parse()?,
        vnes: vec![Name::new("lab")?],
    })
}

fn manifest(id: &str) -> Result<Manifest, Box<dyn Error>> {
    Ok(Manifest {
        format: FORMAT,
        vne: Name::new("lab")?,
        id: id.parse()?,
        created: String::from("2026-11-21T02:36:52Z"),
        tool_version: String::from("0.1.0"),
        xen_version: String::from("4.17.5"),
        take: String::from("00000000c0ffee00"),
        host: Name::new("dom0")?,
        hosts: vec![Name::new("dom0")?],
        // Must not be taken for a snapshot.
        label: Some(String::from("\"vne\": \"bad\", \"id\": \"bad\"")),
        cut: Cut::default(),
        stored: Vec::new(),
        members: vec![member("db")?, member("web1")?],
    })
}

fn member(name: &str) -> Result<Member, Box<dyn Error>> {
    Ok(Member {
        name: Name::new(name)?,
        domid: 7,
        uuid: String::from("c0ffee00-0000-4000-8000-000000000000"),
        host: Name::new("dom0")?,
        domain_type: DomainType::Pvh,
        memory_kib: 262_144,
        vcpus: 1,
        ran_on: None,
        downtime: Downtime::default(),
        rounds: 3,
        pages_sent: 70_000,
        pages_final_dirty: 160,
        stream_bytes: 300_000_000,
        diverged: false,
        throttled_to: None,
        late_frames: 0,
        recorded: None,
        timeline: None,
        uncaptured_disks: Vec::new(),
        read_only_disks: Vec::new(),
        disks: Vec::new(),
        image: MemberImage {
            stats: MemberStats::default(),
            files: vec![xl_vne::image::FileFacts {
                name: String::from("pages"),
                length: 4096,
                blake3: None,
            }],
            packs: Vec::new(),
            cpu_features: None,
        },
    })
}
