//! Eight members on two hosts: how far apart their cuts lie, what becomes of the
//! frames between them, and of a TCP stream.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use super::figures::Book;
use super::Scale;
use crate::check::peers;
use crate::check::vne::{self, number, Member, Vne};
use crate::check::whole::{downtimes_ms, ms};

/// What this part measures.
pub const TARGETS: &[&str] = &[
    "skew_over_downtime",
    "frames_dropped",
    "tcp_retransmits_caused",
];

/// Takes of all members.
const TAKES: usize = 20;
/// Takes of fewer, of each number.
const FEWER: usize = 5;
/// How long nothing is done, for comparison.
const QUIET: Duration = Duration::from_secs(40);
const PORT: u16 = 7003;
const NAME: &str = "eight";

const fn on(host: usize, name: &'static str, ip: &'static str) -> Member {
    Member { name, host, ip }
}

/// All to all, numbered datagrams.
const MESH: [Member; 6] = [
    on(0, "mesh0", "10.77.1.50"),
    on(1, "mesh1", "10.77.1.51"),
    on(0, "mesh2", "10.77.1.52"),
    on(1, "mesh3", "10.77.1.53"),
    on(0, "mesh4", "10.77.1.54"),
    on(1, "mesh5", "10.77.1.55"),
];
const SERVER: Member = on(1, "tcp-server", "10.77.1.57");
const CLIENT: Member = on(0, "tcp-client", "10.77.1.56");

/// What all guests have counted.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    datagrams: u64,
    missing: u64,
    retransmitted: u64,
    timeouts: u64,
    bytes: u64,
}

/// Measures it on two hosts without guests.
pub fn run(vne: &Vne, scale: &Scale, book: &mut Book) -> Result<()> {
    start(vne)?;
    let measured = through_takes(vne, scale, book);
    let fewer = match scale.quick {
        true => Ok(()),
        false => of_fewer(vne, book),
    };
    vne.remove_all()?;
    let names: Vec<&str> = members().map(|member| member.name).collect();
    vne.everywhere(&format!(
        "for d in {}; do xl domid $d >/dev/null 2>&1 && xl destroy $d; done; true",
        names.join(" ")
    ))?;
    measured.and(fewer)
}

/// In the VNE's order: hosts take turns, so that the first few are on both.
fn members() -> impl Iterator<Item = &'static Member> {
    MESH.iter().chain([&CLIENT, &SERVER])
}

fn start(vne: &Vne) -> Result<()> {
    for host in 0..2 {
        peers::identify(vne, host)?;
    }
    let ips = MESH.map(|member| member.ip).join(",");
    let mut guests = Vec::new();
    for (index, member) in MESH.iter().enumerate() {
        let line = format!("mesh --index {index} --peers {ips} --interval-us 50000");
        guests.push((member.host, vne::guest(member, 200, &line)?));
    }
    let line = format!("tcp-server --port {PORT}");
    guests.push((SERVER.host, vne::guest(&SERVER, 200, &line)?));
    vne.lab.guests(&guests)?;
    // Last, so that it doesn't knock in vain.
    let line = format!("tcp-client --to {}:{PORT} --interval-us 5000", SERVER.ip);
    vne.lab
        .guest(CLIENT.host, &vne::guest(&CLIENT, 200, &line)?)?;

    let listed = |member: &Member| format!("\"host{}:{}\"", member.host, member.name);
    let listed: Vec<String> = members().map(listed).collect();
    vne.everywhere(&format!(
        "mkdir -p /etc/xen/vne; echo 'members = [ {} ]' > /etc/xen/vne/{NAME}.cfg",
        listed.join(", ")
    ))?;
    peers::trust_for(vne, &[NAME])?;
    for host in 0..2 {
        peers::reach(vne, host)?;
    }
    Ok(())
}

fn account(vne: &Vne) -> Result<Account> {
    let mut account = Account::default();
    for member in &MESH {
        let told = vne.ask(member)?;
        let links = told.pointer("/mesh/links").and_then(Value::as_array);
        for link in links.with_context(|| format!("no links in {told}"))? {
            account.datagrams += number(link, "/received")?;
            account.missing += number(link, "/missing")?;
        }
    }
    for (member, bytes) in [(&CLIENT, None), (&SERVER, Some("/tcp_server/bytes"))] {
        let told = vne.ask(member)?;
        account.retransmitted += number(&told, "/tcp/retransmitted")?;
        account.timeouts += number(&told, "/tcp/timeouts")?;
        if let Some(path) = bytes {
            account.bytes += number(&told, path)?;
        }
    }
    Ok(account)
}

/// What has come up to now, with the time.
struct Since {
    at: Instant,
    account: Account,
}

impl Since {
    fn now(vne: &Vne) -> Result<Self> {
        Ok(Self {
            account: account(vne)?,
            at: Instant::now(),
        })
    }

    fn tell(&self, until: &Since, when: &str, book: &mut Book) -> Sums {
        let (a, b) = (&self.account, &until.account);
        let sums = Sums {
            seconds: until.at.duration_since(self.at).as_secs_f64(),
            missing: b.missing.saturating_sub(a.missing) as f64,
            retransmitted: b.retransmitted.saturating_sub(a.retransmitted) as f64,
        };
        let datagrams = b.datagrams.saturating_sub(a.datagrams) as f64;
        let timeouts = b.timeouts.saturating_sub(a.timeouts) as f64;
        let kib = b.bytes.saturating_sub(a.bytes) as f64 / 1024.0;
        book.add(&format!("{when}: lasted"), "s", [sums.seconds]);
        book.add(&format!("{when}: datagrams"), "", [datagrams]);
        book.add(&format!("{when}: datagrams missing"), "", [sums.missing]);
        book.add(&format!("{when}: TCP"), "KiB/s", [kib / sums.seconds]);
        book.add(
            &format!("{when}: TCP segments sent again"),
            "",
            [sums.retransmitted],
        );
        book.add(&format!("{when}: TCP timeouts"), "", [timeouts]);
        sums
    }
}

struct Sums {
    seconds: f64,
    missing: f64,
    retransmitted: f64,
}

fn through_takes(vne: &Vne, scale: &Scale, book: &mut Book) -> Result<()> {
    // Everybody knows everybody else by then; and one take that warms up.
    sleep(Duration::from_secs(3));
    vne.take_on(0, NAME)?;
    let first = Since::now(vne)?;
    sleep(QUIET);
    let quiet = Since::now(vne)?;
    let mut manifests = Vec::new();
    for round in 0..TAKES {
        if scale.is_over(round) {
            break;
        }
        manifests.push(vne.take_on(round % 2, NAME)?);
    }
    // What is late isn't lost.
    sleep(Duration::from_secs(2));
    let end = Since::now(vne)?;
    let usual = first.tell(&quiet, "undisturbed", book);
    let during = quiet.tell(&end, "takes", book);
    describe("8 members", &manifests, book);
    let skew = book.median("8 members: skew")? / book.median("8 members: downtime")?;
    book.target("skew_over_downtime", skew);
    if manifests.len() < TAKES {
        let why = format!("time for {} of {TAKES} takes only", manifests.len());
        book.miss(TARGETS, &why);
        return Ok(());
    }
    // Beyond what goes missing in as long a time without takes.
    let share = during.seconds / usual.seconds;
    let caused = |during: f64, usual: f64| (during - usual * share).max(0.0).round();
    book.target("frames_dropped", caused(during.missing, usual.missing));
    let retransmitted = caused(during.retransmitted, usual.retransmitted);
    book.target("tcp_retransmits_caused", retransmitted);
    Ok(())
}

/// Takes of the first two and four members.
fn of_fewer(vne: &Vne, book: &mut Book) -> Result<()> {
    for count in [2, 4] {
        let listed = |member: &Member| format!("host{}:{}", member.host, member.name);
        let listed: Vec<String> = members().take(count).map(listed).collect();
        let what = format!("{NAME} {}", listed.join(" "));
        let mut manifests = Vec::new();
        for round in 0..=FEWER {
            let manifest = vne.take_on(round % 2, &what)?;
            if round > 0 {
                manifests.push(manifest);
            }
        }
        describe(&format!("{count} members"), &manifests, book);
    }
    Ok(())
}

fn describe(which: &str, manifests: &[Value], book: &mut Book) {
    let cut = |key: &str| -> Vec<f64> { manifests.iter().map(|m| ms(&m["cut"][key])).collect() };
    let downtimes = manifests.iter().flat_map(downtimes_ms);
    book.add(&format!("{which}: downtime"), "ms", downtimes);
    book.add(&format!("{which}: skew"), "ms", cut("skew_ns"));
    book.add(
        &format!("{which}: known within"),
        "ms",
        cut("skew_error_ns"),
    );
    book.add(&format!("{which}: frames held"), "ms", cut("hold_ns"));
}
