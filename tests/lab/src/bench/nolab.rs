//! What needs no Xen: the protocol's growth, the stream's, and the store.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{ensure, Context, Result};
use serde::Deserialize;

use super::figures::{Book, Figure};
use super::Scale;
use crate::{lab, product};

/// What [`protocol`] measures.
pub const PROTOCOL_TARGETS: &[&str] = &["cut_10000_members_s"];
/// What [`store`] measures.
pub const STORE_TARGETS: &[&str] = &["second_bytes_over_first", "second_time_over_first"];

/// What the simulator prints, see `tests/sim/src/growth.rs`.
#[derive(Deserialize)]
struct Growth {
    coordinator: Coordinator,
    takes: Vec<Take>,
}

#[derive(Deserialize)]
struct Coordinator {
    hosts: u64,
    bytes: f64,
}

#[derive(Deserialize)]
struct Take {
    hosts: u64,
    members: u64,
    works: bool,
    cut_ns: f64,
    cpu_ns: f64,
    messages: f64,
    cut_messages: f64,
    orders_a_phase_max: f64,
}

/// Takes of up to 10,000 members on 1,000 hosts, simulated with 1 ms from host to
/// host.
pub fn protocol(_scale: &Scale, book: &mut Book) -> Result<()> {
    let output = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--release", "--package", "sim", "--"])
        .arg("--growth")
        .current_dir(lab::workspace())
        .env("CARGO_TARGET_DIR", beside("sim"))
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "the simulation fails");
    let growth: Growth =
        serde_json::from_slice(&output.stdout).context("the simulation prints something else")?;
    tell(&growth, book);
    Ok(())
}

fn tell(growth: &Growth, book: &mut Book) {
    for take in &growth.takes {
        let size = format!("{} hosts, {} members", take.hosts, take.members);
        let what = match take.works {
            true => "with what guests take in the lab",
            false => "the protocol alone",
        };
        book.add(&format!("{size}: cut, {what}"), "s", [take.cut_ns / 1e9]);
        if take.works {
            if (take.hosts, take.members) == (1_000, 10_000) {
                book.target("cut_10000_members_s", take.cut_ns / 1e9);
            }
            continue;
        }
        book.add(
            &format!("{size}: messages of the cut"),
            "",
            [take.cut_messages],
        );
        book.add(
            &format!("{size}: messages of the take"),
            "",
            [take.messages],
        );
        book.add(
            &format!("{size}: orders a host and phase of the cut"),
            "",
            [take.orders_a_phase_max],
        );
        book.add(
            &format!("{size}: coordinator's processor"),
            "ms",
            [take.cpu_ns / 1e6],
        );
    }
    let Coordinator { hosts, bytes } = growth.coordinator;
    book.add(
        &format!("{hosts} hosts: coordinator's state"),
        "KiB",
        [bytes / 1024.0],
    );
}

/// Ingest and restore of the store beside `cat` and `zstd`.
pub fn store(scale: &Scale, book: &mut Book) -> Result<()> {
    let (mib, rounds) = match scale.quick {
        true => ("512", "3"),
        false => ("2048", "5"),
    };
    let settings = [("VNE_BENCH_MIB", mib), ("VNE_BENCH_ROUNDS", rounds)];
    for figure in cargo_bench("store", &settings)? {
        book.add(&figure.name, &figure.unit, figure.values);
    }
    let second = |what: &str| book.median(&format!("{what} of the second to the first"));
    let (bytes, time) = (second("size")?, second("time")?);
    book.target("second_bytes_over_first", bytes);
    book.target("second_time_over_first", time);
    Ok(())
}

/// The stream of bigger and bigger guests into the store.
pub fn stream(scale: &Scale, book: &mut Book) -> Result<()> {
    let gib = if scale.quick { "2" } else { "64" };
    for figure in cargo_bench("growth", &[("VNE_BENCH_GIB", gib)])? {
        book.add(&figure.name, &figure.unit, figure.values);
    }
    Ok(())
}

/// A folder of its own to build in. The library has the same file name with other
/// features, so that each would have the others built anew each time.
fn beside(what: &str) -> PathBuf {
    product::target(&lab::workspace()).join("bench").join(what)
}

/// Runs one of the product's benchmarks; what it has measured.
fn cargo_bench(name: &str, settings: &[(&str, &str)]) -> Result<Vec<Figure>> {
    product::install_tools()?;
    let root = lab::workspace();
    let file = beside("benches").join(format!("{name}.json"));
    let output = Command::new(env!("CARGO"))
        .args(["bench", "--quiet", "--package", "xl-vne", "--bench", name])
        .envs(settings.iter().copied())
        .env("VNE_BENCH_JSON", &file)
        .env("CARGO_TARGET_DIR", beside("benches"))
        .current_dir(&root)
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "the benchmark {name} fails");
    let text = std::fs::read(&file).with_context(|| format!("{name} has measured nothing"))?;
    let figures = serde_json::from_slice(&text);
    figures.with_context(|| format!("{} isn't a list of figures", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_is_that_of_the_largest_take_with_guests() -> Result<()> {
        let take = |hosts: u64, works: bool, cut_ns: u64| {
            serde_json::json!({
                "hosts": hosts, "members": hosts * 10, "latency_ns": 1, "works": works,
                "cut_ns": cut_ns, "cpu_ns": 1, "messages": 1, "cut_messages": 1,
                "orders_a_phase_max": 1,
            })
        };
        let growth = serde_json::json!({
            "coordinator": { "hosts": 1000, "bytes": 1024 },
            "takes": [take(10, true, 1), take(1000, false, 2), take(1000, true, 250_000_000)],
        });
        let mut book = Book::default();
        tell(&serde_json::from_value(growth)?, &mut book);
        let json = book.json(true, 1);
        assert_eq!(
            json["targets"],
            serde_json::json!({ "cut_10000_members_s": 0.25 })
        );
        Ok(())
    }
}
