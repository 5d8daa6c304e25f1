//! Snapshots of eight members on one host, the first and a second one, and their
//! restore beside that of as many files by stock xl.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use serde_json::Value;

use super::figures::Book;
use super::Scale;
use crate::check::vne::Vne;
use crate::lab::Guest;

/// What this part measures.
pub const TARGETS: &[&str] = &["restore8_over_stock_sum"];

const MEMBERS: usize = 8;
const MEMORY_MIB: u32 = 128;
/// A twentieth of the memory is written all the time.
const WORKING_SET_MIB: u32 = 6;

fn name(member: usize) -> String {
    format!("r{member}")
}

fn names(members: usize) -> String {
    (0..members).map(name).collect::<Vec<_>>().join(" ")
}

/// Measures it on one host without guests.
pub fn run(vne: &Vne, scale: &Scale, book: &mut Book) -> Result<()> {
    let guests: Vec<(usize, Guest)> = (0..MEMBERS)
        .map(|member| {
            let guest = Guest {
                ip: Some(Ipv4Addr::new(10, 77, 1, 70 + member as u8)),
                memory_mib: MEMORY_MIB,
                working_set_mib: WORKING_SET_MIB,
                dirty_pages_per_s: 300,
                ..Guest::new(&name(member))
            };
            (0, guest)
        })
        .collect();
    vne.remove_all()?;
    vne.lab.guests(&guests)?;
    let measured = takes(vne, book).and_then(|()| restores(vne, scale, book));
    destroy(vne)?;
    vne.sh("rm -rf /root/stock")?;
    vne.remove_all()?;
    measured
}

fn destroy(vne: &Vne) -> Result<()> {
    let all = names(MEMBERS);
    let line =
        format!("for d in {all}; do xl domid $d >/dev/null 2>&1 && xl destroy $d; done; true");
    vne.sh(&line).map(drop)
}

/// Runs a line in dom0 and returns how long it took there, in s.
fn timed(vne: &Vne, line: &str) -> Result<f64> {
    let told = vne.sh(&format!(
        "set -e; sync; began=$(date +%s%N); {line}; echo; echo $(( $(date +%s%N) - began ))"
    ))?;
    let ns = told
        .lines()
        .last()
        .and_then(|line| line.parse::<f64>().ok());
    Ok(ns.with_context(|| format!("`{line}` printed {told}"))? / 1e9)
}

fn takes(vne: &Vne, book: &mut Book) -> Result<()> {
    for which in ["first", "second"] {
        let line = format!(
            "xl vne-snapshot take --json eight {} >/tmp/eight",
            names(MEMBERS)
        );
        let seconds = timed(vne, &line)?;
        let text = vne.sh("cat /tmp/eight")?;
        let manifest: Value = serde_json::from_str(&text).context(text)?;
        let members = manifest["members"].as_array();
        let bytes = |member: &Value| {
            member
                .pointer("/image/stats/bytes_new")
                .and_then(Value::as_f64)
        };
        let bytes: f64 = members.into_iter().flatten().filter_map(bytes).sum();
        book.add(&format!("{which} snapshot, to durable"), "s", [seconds]);
        book.add(
            &format!("{which} snapshot, new in the store"),
            "MiB",
            [bytes / f64::from(1 << 20)],
        );
    }
    Ok(())
}

fn restores(vne: &Vne, scale: &Scale, book: &mut Book) -> Result<()> {
    vne.sh("rm -rf /root/stock; mkdir -m 700 /root/stock")?;
    for member in 0..MEMBERS {
        let name = name(member);
        vne.sh(&format!(
            "xl vne-snapshot export eight@latest {name} /root/stock/{name}"
        ))?;
    }
    let counts: &[usize] = if scale.quick {
        &[MEMBERS]
    } else {
        &[1, 2, 4, MEMBERS]
    };
    // A snapshot is restored as a whole: of fewer members, it's one of those.
    for &count in counts.iter().filter(|count| **count < MEMBERS) {
        vne.sh(&format!(
            "xl vne-snapshot take -q of{count} {}",
            names(count)
        ))?;
    }
    let ours = |count: usize| format!("{count} members: ours");
    let stock = |count: usize| format!("{count} members: sum of stock xl restore");
    let at_once = |count: usize| format!("{count} members: stock xl restore, one a processor");
    let xl = format!("/{}/bin/xl.stock", vne.lab.suite().xen_folder());
    for round in 0..=scale.rounds(2, 4) {
        if scale.is_over(round) {
            break;
        }
        for &count in counts {
            let vne_name = match count {
                MEMBERS => String::from("eight"),
                fewer => format!("of{fewer}"),
            };
            destroy(vne)?;
            let line = format!("xl vne-snapshot restore -q {vne_name}");
            let ours_s = timed(vne, &line)?;
            destroy(vne)?;
            let mut stock_s = 0.0;
            for member in 0..count {
                let name = name(member);
                let line = format!("{xl} restore /root/stock/{name} >/dev/null 2>&1");
                stock_s += timed(vne, &line)?;
            }
            destroy(vne)?;
            // What the processors allow: without a pause between them, nor unpacking.
            let line = format!(
                "printf '%s\\n' {} | xargs -P $(nproc) -I NAME {xl} restore /root/stock/NAME \
                 >/dev/null 2>&1",
                names(count)
            );
            let at_once_s = timed(vne, &line)?;
            if round > 0 {
                book.add(&ours(count), "s", [ours_s]);
                book.add(&stock(count), "s", [stock_s]);
                book.add(&at_once(count), "s", [at_once_s]);
            }
        }
    }
    let ratio = book.median(&ours(MEMBERS))? / book.median(&stock(MEMBERS))?;
    book.target("restore8_over_stock_sum", ratio);
    Ok(())
}
