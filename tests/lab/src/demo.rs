//! `cargo xtask demo`: the main job, from nothing, on real Xen.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::check::Vne;
use crate::lab::{Lab, Life, Shape};
use crate::product;

/// Sets everything up, takes a snapshot of a VNE that is busy talking,
/// destroys its domains and brings them back.
pub fn run() -> Result<()> {
    say("Building xl-vne and a patched xl.");
    let shape = Shape::default();
    let stage = product::stage(shape.suite)?;
    say("Booting a Xen host (real Xen and dom0, in QEMU's software emulation).");
    let lab = Lab::up(&shape, Life::Tied)?;
    product::install(&lab, 0, &stage)?;
    say(
        "Starting four domains. ring0, ring1 and ring2 pass one UDP token round and never send it \
         again; stream sends a numbered datagram every two milliseconds.",
    );
    let vne = Vne::start(lab)?;
    show(&vne, "xl list")?;
    show(&vne, "cat /etc/xen/vne/lab.cfg")?;

    say("Taking a snapshot while they run. dom0 listens to the stream meanwhile.");
    let ((), heard) = vne.listening(|| show(&vne, "xl vne-snapshot take --label demo lab"))?;
    vne.turning(Duration::from_secs(10))?;
    vne.no_violations()?;
    say(&format!(
        "All domains run on and the token goes round. Of the stream {} datagrams arrived: {} \
         missing, {} doubled, {} out of order; the longest silence was {:.0} ms.",
        heard["received"],
        heard["missing"],
        heard["duplicate"],
        heard["reordered"],
        heard["max_gap_us"].as_f64().unwrap_or_default() / 1e3
    ));
    show(&vne, "xl vne-snapshot list")?;

    say("Destroying all four.");
    vne.destroy()?;
    show(&vne, "xl list")?;

    say("Bringing them back.");
    let start = Instant::now();
    show(&vne, "xl vne-snapshot restore lab")?;
    say(&format!(
        "That took {:.1} s.",
        start.elapsed().as_secs_f64()
    ));
    show(&vne, "xl list")?;
    std::thread::sleep(Duration::from_secs(1));
    vne.all_run()?;
    vne.no_violations()?;
    for station in vne.stations()? {
        say(&format!(
            "{}: went on from number {}, {} violations, {} corrupt pages",
            station["guest"]["name"].as_str().unwrap_or("?"),
            station["ring"]["last_received"],
            station["ring"]["violations"],
            station["memory"]["corrupt"]
        ));
    }
    say(
        "The domains are back in the moment of the snapshot: no number was seen twice, and none \
         that hadn't been sent.",
    );
    vne.turning(Duration::from_secs(8))?;
    say("The token goes round again. If it was on the wire, that was recorded and played back.");
    vne.remove_all()
}

fn say(text: &str) {
    println!("\n=== {text}");
}

/// Runs a command in dom0 as an admin would, and shows it.
fn show(vne: &Vne, command: &str) -> Result<()> {
    println!("host0# {command}");
    print!("{}", vne.sh(&format!("{command} 2>&1"))?);
    Ok(())
}
