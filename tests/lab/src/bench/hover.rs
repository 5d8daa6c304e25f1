//! What a guest loses while its memory is being copied, and while it hovers.
//!
//! A second member is kept from getting on, by a signal to its worker, so that the
//! first one hovers for as long as it takes to measure it.

use anyhow::{ensure, Context, Result};
use serde_json::Value;

use super::figures::{median, Book};
use super::Scale;
use crate::check::vne::Vne;
use crate::check::whole::ms;
use crate::lab::{Guest, DOM0_WEIGHT};

/// What this part measures.
pub const TARGETS: &[&str] = &["hover_slowdown_cpu", "hover_slowdown_memory"];

const WORKER: &str = "works";
const PARTNER: &str = "partner";
/// How long the work is counted for, in s.
const COUNTED_S: u32 = 6;
/// The first round's pages are packed within so many seconds after it. Until then
/// a guest loses processors to that, and not to hovering.
const PACKED_S: u32 = 40;
/// A worker that takes less of a second, in hundredths, packs nothing.
const IDLE_TICKS: u32 = 20;

/// A workload, and where its counter is.
struct Work {
    what: String,
    line: &'static str,
    counter: &'static str,
    dirty: u32,
    target: Option<&'static str>,
}

fn works(scale: &Scale) -> Vec<Work> {
    let cpu = |dirty: u32, target| Work {
        what: format!("processor-bound, {dirty} pages/s"),
        line: "cpu",
        counter: "/cpu/units",
        dirty,
        target,
    };
    let mut works = vec![
        cpu(500, Some("hover_slowdown_cpu")),
        Work {
            what: String::from("memory-bound, 256 of 8,192 pages written"),
            line: "memory --mib 32 --written-pages 256",
            counter: "/touched/units",
            dirty: 0,
            target: Some("hover_slowdown_memory"),
        },
    ];
    if !scale.quick {
        // The interval between two looks follows from how much gets dirty.
        works.extend([0, 2000, 10_000].map(|dirty| cpu(dirty, None)));
    }
    works
}

/// Measures it on one host without guests.
pub fn run(vne: &Vne, scale: &Scale, book: &mut Book) -> Result<()> {
    let partner = Guest {
        memory_mib: 128,
        ip: Some("10.77.1.61".parse()?),
        ..Guest::new(PARTNER)
    };
    vne.sh("xl sched-credit2 -d Domain-0 -w 512")?;
    vne.lab.guest(0, &partner)?;
    let mut done = Ok(());
    for work in works(scale) {
        let guest = Guest {
            memory_mib: 256,
            working_set_mib: 32,
            dirty_pages_per_s: work.dirty,
            ip: Some("10.77.1.60".parse()?),
            workload: work.line.split(' ').map(str::to_owned).collect(),
            ..Guest::new(WORKER)
        };
        vne.lab.guest(0, &guest)?;
        let measured = slowdown(vne, &work, scale, book);
        vne.sh(&format!("xl destroy {WORKER}"))?;
        done = done.and(measured);
    }
    vne.sh(&format!(
        "xl destroy {PARTNER}; xl sched-credit2 -d Domain-0 -w {DOM0_WEIGHT}"
    ))?;
    done
}

/// Lines of the guest's counters: two without a take, one when its pre-copy begins
/// and one when all memory was sent once, two while it hovers and its first pages are
/// packed.
fn script() -> String {
    let ask = "vne-guest ask 10.77.1.60";
    format!(
        "set -e; {ask}; sleep {COUNTED_S}; {ask}
rm -f /tmp/hover.err
xl vne-snapshot take --precopy-max 120 hover {WORKER} {PARTNER} >/tmp/hover.out 2>/tmp/hover.err &
take=$!
said() {{ for i in $(seq 1200); do grep -q \"$1\" /tmp/hover.err && return; sleep 0.1; done
    cat /tmp/hover.err >&2; kill $take; return 1; }}
said '^precopy'
worker=$(pgrep -f '[v]ne-worker capture -- {PARTNER}')
kill -STOP $worker
{ask}
said '{WORKER}: .*round 0'
{ask}
packer=$(pgrep -f '[v]ne-worker capture -- {WORKER}')
used() {{ read -r all </proc/$packer/stat; set -- ${{all##*) }}; echo $((${{12}} + ${{13}})); }}
for i in $(seq {PACKED_S}); do
    before=$(used); sleep 1; test $(($(used) - before)) -lt {IDLE_TICKS} && break
done
{ask}; sleep {COUNTED_S}; {ask}
kill -CONT $worker
wait $take || {{ cat /tmp/hover.err >&2; exit 1; }}"
    )
}

fn slowdown(vne: &Vne, work: &Work, scale: &Scale, book: &mut Book) -> Result<()> {
    let name = |what: &str| format!("{}: {what}", work.what);
    for round in 0..=scale.rounds(3, 5) {
        if scale.is_over(round) {
            break;
        }
        let told = vne.sh(&script())?;
        let manifest = vne.sh("xl vne-snapshot show --json hover")?;
        vne.sh("xl vne-snapshot remove hover@latest")?;
        let counts: Vec<(f64, f64)> = told
            .lines()
            .map(|line| count(line, work.counter))
            .collect::<Result<_>>()?;
        ensure!(counts.len() == 6, "the guest was asked in vain: {told}");
        let rate = |from: usize| {
            (counts[from + 1].0 - counts[from].0) / (counts[from + 1].1 - counts[from].1)
        };
        let (quiet, precopy, hover) = (rate(0), rate(2), rate(4));
        if round == 0 {
            continue;
        }
        book.add(&name("undisturbed"), "units/s", [quiet]);
        book.add(
            &name("lost to pre-copy's first round"),
            "",
            [1.0 - precopy / quiet],
        );
        book.add(&name("lost to hovering"), "", [1.0 - hover / quiet]);
        let manifest: Value = serde_json::from_str(&manifest).context(manifest)?;
        if let Some(interval_ms) = interval_ms(&manifest["members"][0]) {
            book.add(&name("between two looks"), "ms", [interval_ms]);
        }
    }
    if let Some(target) = work.target {
        let lost = book.median(&name("lost to hovering"))?;
        book.target(target, lost);
    }
    Ok(())
}

/// Work done, and the guest's time in s.
fn count(line: &str, counter: &str) -> Result<(f64, f64)> {
    let told: Value = serde_json::from_str(line).context(line.to_owned())?;
    let number = |path: &str| {
        let number = told.pointer(path).and_then(Value::as_f64);
        number.with_context(|| format!("no number at {path} in {told}"))
    };
    Ok((number(counter)?, number("/boottime_ns")? / 1e9))
}

/// The usual time from one round of hovering to the next.
fn interval_ms(member: &Value) -> Option<f64> {
    let timeline = &member["timeline"];
    let since = ms(&timeline["hover_ns"]);
    let rounds = timeline["rounds"].as_array()?;
    // Several rounds may be one entry.
    let looks = |round: &Value| round["count"].as_u64().unwrap_or(1);
    let hovering: Vec<&Value> = rounds
        .iter()
        .filter(|round| ms(&round["before_ns"]) < since)
        .collect();
    let each: Vec<f64> = hovering
        .windows(2)
        .map(|pair| {
            let apart = ms(&pair[0]["before_ns"]) - ms(&pair[1]["before_ns"]);
            apart / looks(pair[0]) as f64
        })
        .collect();
    (!each.is_empty()).then(|| median(&each))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_entry_of_several_rounds_counts_as_many() {
        let round = |before_ms: u64, count: u64| json!({ "before_ns": before_ms * 1_000_000, "count": count });
        let member = json!({ "timeline": {
            "hover_ns": 500_000_000,
            "rounds": [round(900, 1), round(400, 4), round(200, 2), round(100, 1)],
        }});
        assert_eq!(interval_ms(&member), Some(50.0));
    }
}
