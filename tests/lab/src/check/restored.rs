//! What members send that are being restored: it waits until all are connected
//! again, whatever dies meanwhile.

use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};

use super::pace;
use super::vne::{Vne, NAME};

/// Has the kernel tell of holds that come and go. Looking again and again would take the
/// processor that guests need to connect.
const COUNT: &str = r#"
rm -f /tmp/holds.*
ip -o monitor link </dev/null >/tmp/holds.log 2>/dev/null &
echo $! >/tmp/holds.pid
until grep -q 'vneh-armed' /tmp/holds.log; do
    ip link add vneh-armed type ifb; ip link del vneh-armed; sleep 0.1
done
"#;

/// The most there were at a time.
const COUNTED: &str = r#"
kill $(cat /tmp/holds.pid)
grep -o '^.*vneh[^:@]*' /tmp/holds.log | grep -v vneh-armed | awk '
    /^Deleted/ { if ($NF in there) { delete there[$NF]; n-- }; next }
    !($NF in there) { there[$NF]; if (++n > most) most = n }
    END { print most + 0 }'
"#;

/// Kills a process with -9 a moment after members were told to run, while their
/// frames may wait.
const KILL: &str = r#"
victim=$1 delay=$2; rm -f /tmp/waiting.*
(
    touch /tmp/waiting.armed
    until grep -qs '"restore":"releasing"' /var/run/xen/vne/*/journal.json; do
        test -e /tmp/waiting.end && exit
    done
    sleep $delay
    case $victim in
    command) pkill -9 -f '^[^ ]*/xl vne-snapshot restore' ;;
    vned) pkill -9 -x vned ;;
    esac
    touch /tmp/waiting.killed
) </dev/null >/dev/null 2>&1 &
until test -e /tmp/waiting.armed; do sleep 0.05; done
"#;

const DELAYS: [&str; 2] = ["0", "0.4"];
const TURNING_LIMIT: Duration = Duration::from_secs(12);
/// A guard, or a host that waits for another one's word, is done by then.
const LIMIT: Duration = Duration::from_secs(45);

/// All vifs of a restore have a hold, none has afterwards, and the ring turns.
pub fn frames_wait(vne: &Vne) -> Result<String> {
    vne.remove_all()?;
    vne.take()?;
    vne.destroy()?;
    vne.everywhere(COUNT)?;
    let start = Instant::now();
    let told = vne.sh(&format!("xl vne-snapshot restore {NAME} 2>&1"))?;
    let took = start.elapsed().as_secs_f64();
    let most = vne.everywhere(COUNTED)?;
    vne.intact().with_context(|| told.clone())?;
    ensure!(!told.contains("isn't connected"), "{told}");
    for (host, most) in most.iter().enumerate() {
        let members = vne.members_on(host).count();
        ensure!(
            most.trim() == members.to_string(),
            "host {host}: {} holds at a time for {members} members: {told}",
            most.trim()
        );
    }
    vne.turning(TURNING_LIMIT).with_context(|| told.clone())?;
    vne.no_violations()?;
    vne.remove_all()?;
    let hosts: Vec<&str> = most.iter().map(|most| most.trim()).collect();
    Ok(format!(
        "  restored in {took:.1} s, with {} vifs held; the ring goes on; {}",
        hosts.join(" and "),
        told.lines().last().unwrap_or_default()
    ))
}

/// Whatever is killed while restored members run and their frames may wait: all
/// run, talk, and no hold stays.
pub fn killed_while_frames_wait(vne: &Vne) -> Result<String> {
    vne.remove_all()?;
    vne.take()?;
    vne.everywhere(&format!("cat > /root/waiting.sh <<'END'\n{KILL}\nEND"))?;
    let mut victims = vec![(0, "command")];
    let mut delays = DELAYS.as_slice();
    if vne.hosts() > 1 {
        victims.extend((0..vne.hosts()).map(|host| (host, "vned")));
        // With one processor a host it takes longer.
        delays = &DELAYS[1..];
    }
    let mut told = String::new();
    let mut in_time = 0;
    for (host, victim) in victims {
        for delay in delays {
            let name = format!("host {host}: {victim} killed after {delay} s");
            let (status, took) = killed(vne, host, victim, delay)
                .with_context(|| format!("{name}: {}", log(vne)))?;
            in_time += u32::from(status != "0");
            told.push_str(&format!(
                "  {name}: the restore's status is {status}, all is well after {:.1} s\n",
                took.as_secs_f64()
            ));
        }
    }
    ensure!(in_time > 0, "nothing was killed in time:\n{told}");
    vne.remove_all()?;
    // Tokens may have been lost.
    vne.start_afresh()?;
    Ok(told.trim_end().to_owned())
}

fn killed(vne: &Vne, host: usize, victim: &str, delay: &str) -> Result<(String, Duration)> {
    vne.destroy()?;
    vne.sh_on(host, &format!("bash /root/waiting.sh {victim} {delay}"))?;
    let status = vne.sh(&format!(
        "xl vne-snapshot restore {NAME} </dev/null >/tmp/restore.log 2>&1; echo $?"
    ))?;
    let start = Instant::now();
    vne.sh_on(host, "touch /tmp/waiting.end")?;
    let well = || {
        vne.sh_on(host, "test -e /tmp/waiting.killed")?;
        vne.intact()?;
        vne.stations()
    };
    while let Err(error) = well() {
        ensure!(start.elapsed() < pace::here(LIMIT), "{error:#}");
        std::thread::sleep(Duration::from_millis(100));
    }
    vne.no_violations()?;
    if vne.hosts() > 1 {
        super::peers::reach(vne, 0)?;
    }
    Ok((status.trim().to_owned(), start.elapsed()))
}

fn log(vne: &Vne) -> String {
    vne.sh("cat /tmp/restore.log").unwrap_or_default()
}
