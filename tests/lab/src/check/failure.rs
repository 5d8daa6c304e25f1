//! Whatever is killed, and whenever: within 5 s everybody runs and talks, no
//! hold is left, no snapshot is listed, and the next take works.

use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure, Context, Result};

use super::pace;
use super::vne::{Vne, NAME};

/// Runs a take and kills one of its processes with -9 as soon as it says that
/// a phase has begun. Doesn't wait for the take to end, but until no hold is left,
/// all members answer and all run, and prints how long after the kill each was so:
/// it looks from within dom0, as a look from outside takes a good part of a second.
const KILL: &str = r#"
victim=$1 phase=$2 log=/tmp/killed.log; shift 2; rm -f /tmp/killed.*
(xl vne-snapshot take lab & echo $! >/tmp/killed.pid; wait $!; echo $? >/tmp/killed.status) \
    </dev/null >$log 2>&1 &
until pid=$(cat /tmp/killed.pid 2>/dev/null) && test "$pid"; do sleep 0.01; done
case $victim in
command) target=$pid ;;
worker) pattern='vne-worker capture' ;;
helper) pattern='[b]in/vne-save-helper' ;;
esac
if test "$pattern"; then
    until target=$(pgrep -f "$pattern" | head -n 1); test "$target"; do
        kill -0 $pid 2>/dev/null || break; sleep 0.01
    done
fi
until grep -q "^$phase$" $log; do kill -0 $pid 2>/dev/null || break; done
start=${EPOCHREALTIME/[.,]/}
kill -9 $target
no_hold() { ! { ip -br link | grep 'vne[hp]'; nft list tables | grep -vE 'netdev (lab|cut)$'; }; }
answer() { for ip; do vne-guest ask $ip || return; done; }
run() {
    test "$(pgrep -fc '/xl (create|restore) ')" = 4 &&
        xl list | awk 'NR > 2 { n++ } NR > 2 && $5 ~ /[spcd]/ { n = 0; exit } END { exit n != 4 }'
}
for condition in no_hold answer run; do
    until $condition "$@" >/dev/null 2>&1; do
        test $((${EPOCHREALTIME/[.,]/} - start)) -lt 30000000 || break
        sleep 0.02
    done
    echo "$condition" $(((${EPOCHREALTIME/[.,]/} - start) / 1000))
done
"#;

/// The promise.
const LIMIT: Duration = Duration::from_secs(5);
/// Until its processes and files are gone as well.
const GUARD_LIMIT: Duration = Duration::from_secs(15);
/// Builders are waited for, and then killed.
const RESTORE_LIMIT: Duration = Duration::from_secs(40);

const VICTIMS: [&str; 3] = ["command", "worker", "helper"];
/// The helper has ended after the cut.
const PHASES: [&str; 4] = ["precopy", "hold", "cut", "finalise"];

/// Every victim at every phase.
pub fn killed_at_each_phase(vne: &Vne) -> Result<String> {
    vne.remove_all()?;
    vne.sh(&format!("cat > /root/kill.sh <<'END'\n{KILL}\nEND"))?;
    let mut kills = 0;
    let mut longest = (Duration::ZERO, String::new());
    for phase in PHASES {
        for victim in VICTIMS {
            if (victim, phase) == ("helper", "finalise") {
                continue;
            }
            longest = longest.max(one(vne, victim, phase)?);
            kills += 1;
        }
    }
    vne.take()?;
    vne.remove_all()?;
    vne.no_violations()?;
    Ok(format!(
        "  {kills} kills: {} at {}; all ran and talked after {:.1} s at most ({})",
        VICTIMS.join(", "),
        PHASES.join(", "),
        longest.0.as_secs_f64(),
        longest.1
    ))
}

/// Returns how long it took until all ran and talked, and what came when.
fn one(vne: &Vne, victim: &str, phase: &str) -> Result<(Duration, String)> {
    let ips: Vec<&str> = vne.ring().iter().map(|member| member.ip).collect();
    let kill = format!("bash /root/kill.sh {victim} {phase} {}", ips.join(" "));
    let told = vne.sh(&kill)?;
    let start = Instant::now();
    let told: Vec<&str> = told.split_ascii_whitespace().collect();
    let took = told.last().copied();
    let told = format!("{victim} killed at {phase}, ms: {}", told.join(" "));
    let context = |error: anyhow::Error| {
        let log = vne.sh("cat /tmp/killed.log").unwrap_or_default();
        error.context(format!("{told}; {log}"))
    };
    let took = took.and_then(|word| word.parse().ok());
    let took = Duration::from_millis(took.context("no time").map_err(context)?);
    if took >= pace::here(LIMIT) {
        return Err(context(anyhow!("that is too late")));
    }
    vne.no_hold()
        .and_then(|()| vne.all_run())
        .map_err(context)?;
    vne.turning(GUARD_LIMIT)?;
    let listed = vne.listed()?;
    ensure!(
        listed.is_empty(),
        "{victim} at {phase}: {listed:?} is listed"
    );
    // The guard stays for a while, should a guest that was asked to suspend
    // only do it now.
    while let Err(error) = vne.intact() {
        if start.elapsed() > pace::here(GUARD_LIMIT) {
            return Err(context(error));
        }
    }
    let status = vne.sh("cat /tmp/killed.status")?;
    ensure!(
        status.trim() != "0",
        "{victim} at {phase}: the take ended well"
    );
    Ok((took, told))
}

/// Runs a restore and ends it with a signal when the first member is built.
const END_RESTORE: &str = r#"
signal=$1 log=/tmp/ended.log; rm -f /tmp/ended.*
(xl vne-snapshot restore lab & echo $! >/tmp/ended.pid; wait $!; echo $? >/tmp/ended.status) \
    </dev/null >$log 2>&1 &
until pid=$(cat /tmp/ended.pid 2>/dev/null) && test "$pid"; do sleep 0.01; done
until grep -q ': built$' $log; do kill -0 $pid 2>/dev/null || break; done
kill -$signal $pid
"#;

/// A restore that is interrupted or killed leaves no member, and works after.
pub fn restore_is_all_or_none(vne: &Vne) -> Result<String> {
    vne.remove_all()?;
    vne.take()?;
    vne.sh(&format!("cat > /root/end.sh <<'END'\n{END_RESTORE}\nEND"))?;
    let mut told = String::new();
    for signal in ["INT", "KILL"] {
        vne.destroy()?;
        vne.sh(&format!("bash /root/end.sh {signal} 2>&1"))?;
        let start = Instant::now();
        while let Err(error) = vne.nothing_there() {
            if start.elapsed() > pace::here(RESTORE_LIMIT) {
                let log = vne.sh("cat /tmp/ended.log")?;
                return Err(error.context(format!("a restore ended by SIG{signal}: {log}")));
            }
        }
        let status = vne.sh("cat /tmp/ended.status")?;
        ensure!(status.trim() != "0", "SIG{signal}: the restore ended well");
        told.push_str(&format!(
            "  SIG{signal} when the first was built: none of them was left after {:.1} s\n",
            start.elapsed().as_secs_f64()
        ));
    }
    vne.sh(&format!("xl vne-snapshot restore -q {NAME}"))?;
    vne.all_run()?;
    vne.remove_all()?;
    vne.start_afresh()?;
    told.push_str("  and the next restore brought them back");
    Ok(told)
}

/// No space from the start, and space that runs out on the way.
pub fn full_disk(vne: &Vne) -> Result<String> {
    vne.sh("mkdir -p -m 700 /mnt/small; mount -t tmpfs -o size=64m,mode=700 none /mnt/small")?;
    let told = (|| {
        let take = format!("xl vne-snapshot take -q --store /mnt/small {NAME}");
        let (status, refused) = vne.sh_fails(&take)?;
        ensure!(
            status == 1 && refused.contains("not enough space"),
            "{refused}"
        );
        vne.intact()?;
        // Sparse at first: what it claims to have is taken away meanwhile.
        vne.sh("mount -o remount,size=600m /mnt/small")?;
        let (status, full) = vne.sh_fails(&format!(
            "{take} & pid=$!; \
             until ls /mnt/small/tmp/*/* >/dev/null 2>&1; do kill -0 $pid || break; sleep 0.05; done; \
             sleep 0.5; mount -o remount,size=40m /mnt/small || \
             fallocate -l 560m /mnt/small/ballast; wait $pid"
        ))?;
        ensure!(status == 1, "exit status {status}: {full}");
        ensure!(full.contains("No space left"), "{full}");
        vne.turning(Duration::from_secs(10))?;
        let left = vne.sh("ls -A /mnt/small/tmp /mnt/small/snapshots")?;
        ensure!(!left.contains("take."), "left in the store: {left}");
        Ok(format!("  {}\n  {}", refused.trim(), full.trim()))
    })();
    vne.sh("umount /mnt/small")?;
    told
}
