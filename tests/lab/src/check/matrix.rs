//! Everything that can fail in a take over two hosts, at each of its phases. The
//! results are written to `tests/lab/failures.md`.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};

use super::pace;
use super::peers;
use super::vne::{Vne, NAME};
use crate::lab::workspace;
use crate::scale;

/// Waits until this host's side of a take comes to a phase, by the daemon's log,
/// and does something at once. `now` waits for nothing.
const AT: &str = r#"
phase=$1 rm=/tmp/at.fired; shift; rm -f $rm
if test $phase != now; then
    exec 3< <(exec tail -n 0 -f /var/log/vned.log)
    tail=$!
    touch /tmp/at.armed
    while read -r line <&3; do [[ $line == *"lab@"*": $phase" ]] && break; done
fi
eval "$1"
touch $rm /tmp/at.armed
test "$tail" && kill $tail
eval "$2"
"#;

/// Frames on the wire between the hosts, lost inside of dom0: at once, where the
/// lab's own wire would take a while to hear of it.
const HOOK: &str = "type filter hook {} device eth1 priority 0; policy drop;";

/// A host resumes its members and lets frames go by itself 10 s after it has
/// begun to hold them; then what was suspended is brought back.
const RUN_LIMIT: Duration = Duration::from_secs(16);
/// A take is over by then: a lease, undoing, and waiting for who can't be told.
const TAKE_LIMIT: Duration = Duration::from_secs(75);
/// Guards and daemons that have just started are done by then.
const CLEAN_LIMIT: Duration = Duration::from_secs(40);
const HEALED_S: u64 = 20;

/// What goes wrong.
#[derive(Clone, Copy)]
enum Fault {
    /// A process is killed with -9.
    Kill { host: usize, process: &'static str },
    /// No frame passes from the first host to the second (`egress`), back
    /// (`ingress`), or both, for 20 s.
    Cut(&'static [&'static str]),
    /// A host loses power.
    Power { host: usize },
}

const PHASES: [&str; 4] = ["precopy", "hold", "cut", "finalise"];
const BOTH: &[&str] = &["ingress", "egress"];
const THERE: &[&str] = &["egress"];
const BACK: &[&str] = &["ingress"];

/// A fault and when, and whether a short run has it as well.
type Scenario = (Fault, &'static str, bool);

fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for (host, often) in [(0, ["hold", "finalise"]), (1, ["precopy", "cut"])] {
        let process = "vned";
        let kill = Fault::Kill { host, process };
        all.extend(PHASES.map(|phase| (kill, phase, often.contains(&phase))));
    }
    for (host, process, often) in [
        (0, "command", true),
        (0, "worker", false),
        (1, "worker", true),
    ] {
        all.push((Fault::Kill { host, process }, "cut", often));
    }
    all.push((Fault::Cut(BOTH), "now", false));
    let often = ["hold", "finalise"];
    all.extend(PHASES.map(|phase| (Fault::Cut(BOTH), phase, often.contains(&phase))));
    for (ways, phase, often) in [
        (THERE, "hold", true),
        (THERE, "finalise", false),
        (BACK, "precopy", false),
        (BACK, "cut", true),
    ] {
        all.push((Fault::Cut(ways), phase, often));
    }
    all.push((Fault::Power { host: 1 }, "cut", true));
    all.push((Fault::Power { host: 0 }, "cut", true));
    all
}

impl Fault {
    fn what(&self) -> String {
        match self {
            Self::Kill { host, process } => {
                let role = ["leader", "follower"][*host];
                format!("kill -9 of the {role}'s {process}")
            }
            Self::Cut(BOTH) => String::from("link cut both ways"),
            Self::Cut(THERE) => String::from("link cut from leader to follower"),
            Self::Cut(_) => String::from("link cut from follower to leader"),
            Self::Power { host: 0 } => String::from("leader's host powered off"),
            Self::Power { .. } => String::from("follower's host powered off"),
        }
    }

    /// Where it's triggered, what is done there, and what undoes it.
    fn lines(&self) -> (usize, String, String) {
        match self {
            Self::Kill { host, process } => {
                let line = match *process {
                    "vned" => "pkill -9 -x vned",
                    "worker" => "kill -9 $(pgrep -f '[v]ne-worker capture' | head -n 1)",
                    _ => "pkill -9 -f '^[^ ]*/xl vne-snapshot take'",
                };
                (*host, line.to_owned(), String::new())
            }
            Self::Cut(ways) => {
                let mut table = String::from("add table netdev cut\n");
                for way in *ways {
                    let hook = HOOK.replace("{}", way);
                    let _ = writeln!(table, "add chain netdev cut {way} {{ {hook} }}");
                }
                let heal = format!("sleep {HEALED_S}; nft delete table netdev cut");
                (0, format!("nft -f - <<< '{table}'"), heal)
            }
            // The plug is pulled from outside.
            Self::Power { host } => (*host, String::from("true"), String::new()),
        }
    }
}

/// All of them or some, on the two-host VNE; fails if one of them did harm.
pub fn all(vne: &Vne) -> Result<String> {
    vne.remove_all()?;
    vne.everywhere(&format!("cat > /root/at.sh <<'END'\n{AT}\nEND"))?;
    let mut table = String::new();
    let mut bad = Vec::new();
    let only = std::env::var("VNE_MATRIX").unwrap_or_default();
    let scenarios = scenarios();
    let mut done = 0;
    for (fault, phase, often) in &scenarios {
        let what = fault.what();
        let name = format!("{what}, {}", place(phase));
        let wanted = match only.is_empty() {
            true => *often || scale::is_full(),
            false => only.split(';').any(|part| name.contains(part)),
        };
        if !wanted {
            continue;
        }
        done += 1;
        let row = match one(vne, *fault, phase) {
            Ok(row) => row,
            Err(error) => {
                println!("  {name}: {error:#}\n{}", vne.state_for_humans());
                bad.push(format!("{name}: {error:#}"));
                repair(vne, *fault)?;
                String::from("**failed** | | |")
            }
        };
        println!("  {name}: {row}");
        let _ = writeln!(table, "| {what} | {} | {row}", place(phase));
    }
    // Tokens may have been lost on a cut wire.
    vne.start_afresh()?;
    if only.is_empty() && scale::is_full() {
        write_down(&table)?;
    }
    ensure!(
        bad.is_empty(),
        "{} of {done}:\n{}",
        bad.len(),
        bad.join("\n")
    );
    Ok(format!(
        "  {done} faults of {}, none of which harmed anybody (tests/lab/failures.md)",
        scenarios.len()
    ))
}

fn place(phase: &str) -> String {
    match phase {
        "now" => String::from("before prepare"),
        phase => format!("at {phase}"),
    }
}

fn write_down(table: &str) -> Result<()> {
    let text = format!(
        "# What fails, and what comes of it\n\n\
         Written by the lab test `whatever_fails_over_two_hosts_harms_nobody`: a take of four \
         members on two hosts, and one fault each. Cut links heal after {HEALED_S} s; a host \
         without power gets it back, boots, and what is left is counted from then on. In each \
         case the guests on hosts that have power run and answer, no hold and no other leftover \
         stays, both hosts list the same whole snapshots, and the next take works.\n\n\
         | fault | when | the take | all run and talk after | all is clean after |\n\
         |---|---|---|---|---|\n{table}"
    );
    std::fs::write(workspace().join("tests/lab/failures.md"), text).context("failures.md")
}

/// One fault: the rest of its row.
fn one(vne: &Vne, fault: Fault, phase: &str) -> Result<String> {
    let (host, act, undo) = fault.lines();
    vne.sh_on(host, "rm -f /tmp/at.*")?;
    vne.sh_on(
        host,
        &format!(
            "setsid bash /root/at.sh {phase} \"$(cat <<'END'\n{act}\nEND\n)\" '{undo}' \
             </dev/null >/tmp/at.log 2>&1 & \
             until test -e /tmp/at.armed; do sleep 0.1; done"
        ),
    )?;
    vne.sh(&format!(
        "rm -f /tmp/matrix.*; (setsid xl vne-snapshot take {NAME}; echo $? >/tmp/matrix.status) \
         </dev/null >/tmp/matrix.log 2>&1 &"
    ))?;
    let fired = wait(pace::here(TAKE_LIMIT), || {
        vne.sh_on(host, "test -e /tmp/at.fired")
    });
    fired.with_context(|| format!("it never came to {phase}: {}", log(vne)))?;
    let start = Instant::now();
    let gone = match fault {
        Fault::Power { host } => {
            vne.lab.power_off(host)?;
            Some(host)
        }
        _ => None,
    };
    let alive: Vec<usize> = (0..2).filter(|host| Some(*host) != gone).collect();
    wait(pace::here(RUN_LIMIT), || {
        alive.iter().try_for_each(|host| well(vne, *host))
    })
    .with_context(|| format!("not all run: {}", log(vne)))?;
    let ran = start.elapsed();

    let over = wait(pace::here(TAKE_LIMIT), || match gone {
        // With it the command is gone.
        Some(0) => Ok(String::new()),
        _ => vne.sh("cat /tmp/matrix.status"),
    });
    let status = over.with_context(|| format!("the take doesn't end: {}", log(vne)))?;
    let told = match gone {
        Some(0) => String::from("gone with its host"),
        _ => match status.trim() {
            "0" => String::from("succeeded"),
            "137" => String::from("killed"),
            _ => last_line(vne)?,
        },
    };
    if let Fault::Cut(_) = fault {
        // No take may work over a cut wire.
        let healed = Duration::from_secs(HEALED_S + 10);
        wait(healed, || {
            vne.sh("! nft list table netdev cut >/dev/null 2>&1")
        })?;
    }
    let mut start = start;
    if let Some(host) = gone {
        // Without the leader it may not be known whether the snapshot exists.
        come_back(vne, host)?;
        start = Instant::now();
    }
    wait(pace::here(CLEAN_LIMIT), || {
        alive.iter().try_for_each(|host| clean(vne, *host))?;
        gone.map_or(Ok(()), |host| vne.nothing_left_on(host))
    })
    .with_context(|| format!("not clean: {}", log(vne)))?;
    let cleaned = start.elapsed();
    let each: Vec<_> = (0..2)
        .map(|host| vne.listed_on(host))
        .collect::<Result<_>>()?;
    ensure!(each[0] == each[1], "{each:?} is listed: {}", log(vne));
    let whole = each[0].len();
    ensure!(
        whole == 1 || (whole == 0 && told != "succeeded"),
        "{told}, and {each:?} is listed"
    );
    peers::reach(vne, 0)?;
    if gone.is_some() {
        // Its guests are gone with the power.
        vne.start_afresh()?;
    }
    vne.take().context("the next take")?;
    vne.remove_all()?;
    vne.intact()?;
    Ok(format!(
        "{told} | {:.0} s | {:.0} s |",
        ran.as_secs_f64(),
        cleaned.as_secs_f64()
    ))
}

/// All members on a host run and talk: what they answer isn't held. Until the take
/// is given up there may be holds, open.
fn well(vne: &Vne, host: usize) -> Result<()> {
    vne.run_on(host)?;
    for member in vne.ring().iter().filter(|member| member.host == host) {
        vne.ask(member)?;
    }
    Ok(())
}

fn clean(vne: &Vne, host: usize) -> Result<()> {
    vne.nothing_left_on(host)?;
    well(vne, host)
}

fn log(vne: &Vne) -> String {
    vne.sh("cat /tmp/matrix.log").unwrap_or_default()
}

fn last_line(vne: &Vne) -> Result<String> {
    let log = vne.sh("cat /tmp/matrix.log")?;
    let line = log
        .lines()
        .rfind(|line| line.starts_with("xl vne-snapshot: "));
    let line = line.with_context(|| format!("it doesn't say why it failed: {log}"))?;
    let line = line.trim_start_matches("xl vne-snapshot: ");
    Ok(format!("failed: {}", line.replace('|', "\\|")))
}

/// Until it's well, or for so long.
fn wait<T>(limit: Duration, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match look() {
            Ok(found) => return Ok(found),
            Err(error) if start.elapsed() > limit => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// Switches a host on again. Its daemon would begin with the boot, but this
/// host is told only then who it is.
fn come_back(vne: &Vne, host: usize) -> Result<()> {
    vne.lab.power_on(host)?;
    vne.sh_on(host, "systemctl restart vned").map(drop)
}

/// After a fault that did harm.
fn repair(vne: &Vne, fault: Fault) -> Result<()> {
    if let Fault::Power { host } = fault {
        come_back(vne, host)?;
        peers::reach(vne, 0)?;
    } else {
        vne.sh("nft delete table netdev cut 2>/dev/null; true")?;
        vne.everywhere("pkill -f at[.]sh; systemctl restart vned; true")?;
        peers::reach(vne, 0)?;
    }
    vne.start_afresh()?;
    vne.remove_all()
}
