//! Bad input: one clear line, exit status as xl's, nothing touched.

use anyhow::{ensure, Result};

use super::vne::{Vne, NAME};

/// A command, its exit status, and what its one line has to contain.
const CASES: &[(&str, i32, &str)] = &[
    ("take nosuch", 1, "/etc/xen/vne/nosuch.cfg"),
    (
        "take x nosuchdomain",
        1,
        "no domain is called 'nosuchdomain'",
    ),
    ("take x ring0 ring0", 1, "member 'ring0' is named twice"),
    ("take x Domain-0", 1, "the host's own"),
    ("take x frozen", 1, "'frozen' is paused"),
    ("take ../x ring0", 2, "invalid value '../x'"),
    ("take broken", 1, "/etc/xen/vne/broken.cfg:1"),
    ("take memberless", 1, "'members' is missing"),
    ("take empty", 1, "has no members"),
    ("take x ring0 --hold 1", 2, "16..=1048576"),
    ("take", 2, "<VNE>"),
    ("conjure", 2, "conjure"),
    ("restore nosuch", 1, "nosuch"),
    ("restore lab@20010101T000000Z", 1, "20010101T000000Z"),
    ("restore lab@yesterday", 2, "yesterday"),
    ("remove lab", 2, "lab@latest"),
    ("remove lab@yesterday", 2, "yesterday"),
    ("show lab@yesterday", 2, "yesterday"),
    (
        "export lab@20010101T000000Z ring0 /tmp/x",
        1,
        "20010101T000000Z",
    ),
];

/// All of the above, and members that are in two takes.
pub fn bad_input(vne: &Vne) -> Result<String> {
    vne.sh(
        "cd /etc/xen/vne; echo 'members = [ \"a\"' > broken.cfg; echo 'store = \"/x\"' > \
         memberless.cfg; echo 'members = [ ]' > empty.cfg; \
         sed 's/^name.*/name = \"frozen\"/; /^vif/d' /var/lib/xl-vne-lab/ring0.cfg > /root/frozen.cfg; \
         xl create -q -p /root/frozen.cfg >/dev/null",
    )?;
    let told = CASES.iter().try_for_each(|case| one(vne, case));
    vne.sh("xl destroy frozen; cd /etc/xen/vne; rm broken.cfg memberless.cfg empty.cfg")?;
    told?;
    vne.intact()?;
    two_takes(vne)?;
    Ok(format!(
        "  {} commands refused, and a member in two takes",
        CASES.len()
    ))
}

fn one(vne: &Vne, (arguments, expected, part): &(&str, i32, &str)) -> Result<()> {
    // Without progress, all that is left to say is the error.
    let quiet = match arguments.split(' ').next() {
        Some("take" | "restore") => " -q",
        _ => "",
    };
    let (status, told) = vne.sh_fails(&format!("xl vne-snapshot {arguments}{quiet}"))?;
    ensure!(status == *expected, "'{arguments}' exits {status}: {told}");
    ensure!(told.contains(part), "'{arguments}' says: {told}");
    if *expected == 1 {
        ensure!(
            told.trim().lines().count() == 1,
            "'{arguments}' says more than a line: {told}"
        );
    }
    Ok(())
}

/// The second take of a member says who has it; the first ends well.
fn two_takes(vne: &Vne) -> Result<()> {
    let script = format!(
        "xl vne-snapshot take -q {NAME} > /tmp/first 2>&1 & first=$!; \
         until ls /var/run/xen/vne | grep -q -v register; do sleep 0.05; done; \
         xl vne-snapshot take -q other ring1 2>&1; echo \"status $?\"; \
         wait $first; echo \"first $?\"; cat /tmp/first"
    );
    let told = vne.sh(&script)?;
    ensure!(
        told.contains("'ring1' is in use by a take of VNE 'lab'")
            && told.contains("status 1")
            && told.contains("first 0"),
        "{told}"
    );
    vne.remove_all()
}
