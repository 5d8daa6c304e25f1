//! Whatever is killed, and whenever: within 5 s everybody runs and talks, no
//! hold is left, no snapshot is listed, and the next take works.

use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure, Result};

use super::vne::{Vne, NAME};

/// Runs a take and kills one of its processes with -9 as soon as it says that
/// a phase has begun. Doesn't wait for the take to end.
const KILL: &str = r#"
victim=$1 phase=$2 log=/tmp/killed.log; rm -f /tmp/killed.*
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
kill -9 $target
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
    let mut longest = Duration::ZERO;
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
        "  {kills} kills: {} at {}; all ran and talked after {:.1} s at most",
        VICTIMS.join(", "),
        PHASES.join(", "),
        longest.as_secs_f64()
    ))
}

/// Returns how long it took until all ran and talked.
fn one(vne: &Vne, victim: &str, phase: &str) -> Result<Duration> {
    vne.sh(&format!("bash /root/kill.sh {victim} {phase} 2>&1"))?;
    let start = Instant::now();
    let context = |error: anyhow::Error| {
        let told = vne.sh("cat /tmp/killed.log").unwrap_or_default();
        error.context(format!("{victim} killed at {phase}: {told}"))
    };
    // One after the other: what is well stays so, which is looked at again below,
    // and each look takes a good part of a second here.
    let conditions: [(&str, &dyn Fn() -> Result<()>); 3] = [
        ("no hold is left", &|| vne.no_hold()),
        ("all answer", &|| vne.stations().map(drop)),
        ("all run", &|| vne.all_run()),
    ];
    let mut told = String::new();
    for (name, holds) in conditions {
        while let Err(error) = holds() {
            if start.elapsed() >= LIMIT {
                return Err(context(error.context(told)));
            }
        }
        told.push_str(&format!("{name} after {:.1} s; ", start.elapsed().as_secs_f64()));
    }
    let took = start.elapsed();
    if took >= LIMIT {
        return Err(context(anyhow!("{told}that is too late")));
    }
    vne.turning(GUARD_LIMIT)?;
    let listed = vne.listed()?;
    ensure!(
        listed.is_empty(),
        "{victim} at {phase}: {listed:?} is listed"
    );
    // The guard stays for a while, should a guest that was asked to suspend
    // only do it now.
    while let Err(error) = vne.intact() {
        if start.elapsed() > GUARD_LIMIT {
            return Err(context(error));
        }
    }
    let status = vne.sh("cat /tmp/killed.status")?;
    ensure!(
        status.trim() != "0",
        "{victim} at {phase}: the take ended well"
    );
    Ok(took)
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
            if start.elapsed() > RESTORE_LIMIT {
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
            "{take} & pid=$!; sleep 1.5; mount -o remount,size=40m /mnt/small || \
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
