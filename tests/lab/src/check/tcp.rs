//! A byte stream by TCP from a guest on one host to one on the other, and what
//! the two kernels know of it.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{ensure, Result};
use serde_json::Value;

use super::vne::{self, number, Member, Vne};
use super::whole::recorded;
use super::{across, peers};
use crate::scale;

const SERVER: Member = Member {
    name: "tcp-server",
    host: 1,
    ip: "10.77.1.31",
};
const CLIENT: Member = Member {
    name: "tcp-client",
    host: 0,
    ip: "10.77.1.30",
};
const PORT: u16 = 7003;

/// What both ends tell of a stream, from its start on.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    /// Bytes that arrived.
    pub received: u64,
    /// Places where a wrong byte arrived.
    pub mismatches: u64,
    /// Connections that the client made; more than one when one broke.
    pub connections: u64,
    /// Connections that broke, as the programs or the kernels saw it.
    pub resets: u64,
    /// Segments that either kernel sent again.
    pub retransmitted: u64,
    /// How often either kernel waited for an answer in vain.
    pub timeouts: u64,
    /// The longest time that the server waited for the next byte, in ms of its own
    /// clock, which stands still while it does.
    pub longest_wait_ms: u64,
    /// The longest time from the moment that the server had its network card back
    /// after a restore to the first byte that it got by it, in ms.
    pub longest_after_card_ms: u64,
}

impl Account {
    /// Fails unless it's still the first connection, and every byte was right.
    pub fn sound(&self) -> Result<()> {
        ensure!(
            (self.connections, self.resets, self.mismatches) == (1, 0, 0),
            "the stream broke: {self:?}"
        );
        Ok(())
    }
}

/// Starts the two guests beside the VNE's members.
pub fn start(vne: &Vne) -> Result<()> {
    stop(vne)?;
    // First, so that the client doesn't knock in vain.
    let server = format!("tcp-server --port {PORT}");
    vne.lab
        .guest(SERVER.host, &vne::guest(&SERVER, 0, &server)?)?;
    let client = format!("tcp-client --to {}:{PORT} --interval-us 5000", SERVER.ip);
    vne.lab
        .guest(CLIENT.host, &vne::guest(&CLIENT, 0, &client)?)
}

/// Destroys the two guests.
pub fn stop(vne: &Vne) -> Result<()> {
    for Member { name, host, .. } in [CLIENT, SERVER] {
        vne.sh_on(
            host,
            &format!("xl domid {name} >/dev/null 2>&1 && xl destroy {name}; true"),
        )?;
    }
    Ok(())
}

/// Asks both ends, each over its own host.
pub fn account(vne: &Vne) -> Result<Account> {
    let client = vne.ask(&CLIENT)?;
    let server = vne.ask(&SERVER)?;
    let both = |path: &str| -> Result<u64> { Ok(number(&client, path)? + number(&server, path)?) };
    let resets = |end: &Value, program: &str| number(end, &format!("/{program}/resets"));
    Ok(Account {
        received: number(&server, "/tcp_server/bytes")?,
        mismatches: number(&server, "/tcp_server/mismatches")?,
        connections: number(&client, "/tcp_client/connections")?,
        resets: resets(&client, "tcp_client")?
            + resets(&server, "tcp_server")?
            + both("/tcp/connections_reset")?,
        retransmitted: both("/tcp/retransmitted")?,
        timeouts: both("/tcp/timeouts")?,
        longest_wait_ms: number(&server, "/tcp_server/longest_wait_ms")?,
        longest_after_card_ms: number(&server, "/tcp_server/longest_after_card_ms")?,
    })
}

/// Snapshots of both ends, in a short run and in a full one.
const TAKES: (usize, usize) = (6, 20);
/// For comparison, since each takes seconds.
const SAVES: usize = 2;

/// Snapshots of the stream's two ends, and beside them what `xl save -c`
/// of the same guests does to it.
pub fn stream_goes_on(vne: &Vne) -> Result<String> {
    let told = start(vne).and_then(|()| through_snapshots(vne));
    stop(vne)?;
    vne.remove_all()?;
    told
}

/// Makes the two ends a VNE of their own, and lets them talk for a while.
fn describe(vne: &Vne) -> Result<Account> {
    let ends = format!(
        "host{}:{} host{}:{}",
        CLIENT.host, CLIENT.name, SERVER.host, SERVER.name
    );
    vne.everywhere(&format!(
        "printf 'members = [ \"%s\", \"%s\" ]\\n' {ends} > /etc/xen/vne/tcp.cfg"
    ))?;
    peers::trust_for(vne, &["lab", "tcp"])?;
    std::thread::sleep(Duration::from_secs(3));
    account(vne)
}

/// Restores of a stream in the middle, over two hosts.
const RESTORES: usize = 2;

/// Both ends are destroyed and restored: the connection goes on, and nothing had
/// to be sent again.
pub fn stream_is_restored(vne: &Vne) -> Result<String> {
    let told = start(vne).and_then(|()| through_restores(vne));
    stop(vne)?;
    vne.remove_all()?;
    told
}

fn through_restores(vne: &Vne) -> Result<String> {
    let mut before = describe(vne)?;
    let mut told = String::new();
    for round in 0..RESTORES {
        let manifest = vne.take_on(round % 2, "tcp")?;
        for end in [CLIENT, SERVER] {
            vne.sh_on(end.host, &format!("xl destroy {}", end.name))?;
        }
        vne.sh_on(round % 2, "xl vne-snapshot restore -q tcp")?;
        std::thread::sleep(Duration::from_secs(3));
        let after = account(vne)?;
        after.sound()?;
        ensure!(
            after.received > before.received,
            "nothing arrived after the restore: {after:?}"
        );
        // The counters were restored with the kernels, so this is what the take
        // and the restore did together.
        let _ = writeln!(
            told,
            "  {} frames were on their way; {} segments sent again, {} timeouts; the server never \
             waited longer than {} ms (before the take: {} ms), and not longer than {} ms once it \
             had its network card back",
            recorded(&manifest),
            after.retransmitted - before.retransmitted,
            after.timeouts - before.timeouts,
            after.longest_wait_ms,
            before.longest_wait_ms,
            after.longest_after_card_ms
        );
        before = after;
    }
    Ok(told.trim_end().to_owned())
}

fn through_snapshots(vne: &Vne) -> Result<String> {
    let first = describe(vne)?;
    let mut manifests = Vec::new();
    let takes = scale::of(TAKES.0, TAKES.1);
    for round in 0..takes {
        manifests.push(vne.take_on(round % 2, "tcp")?);
        std::thread::sleep(Duration::from_millis(500));
    }
    let ours = account(vne)?;
    ours.sound()?;
    ensure!(ours.received > first.received, "nothing arrived: {ours:?}");
    for _ in 0..SAVES {
        for end in [CLIENT, SERVER] {
            vne.sh_on(
                end.host,
                &format!(
                    "xl save -c {0} /root/{0}.save 2>&1; rm -f /root/{0}.save",
                    end.name
                ),
            )?;
        }
        std::thread::sleep(Duration::from_secs(3));
    }
    let stock = account(vne)?;
    stock.sound()?;
    Ok(format!(
        "  {takes} snapshots: {} bytes arrived, no reset, no wrong byte, {} segments sent again, {} \
         timeouts\n  xl save -c of both, {SAVES} times: {} segments sent again, {} timeouts\n{}",
        ours.received - first.received,
        ours.retransmitted - first.retransmitted,
        ours.timeouts - first.timeouts,
        stock.retransmitted - ours.retransmitted,
        stock.timeouts - ours.timeouts,
        across::describe(&manifests)
    ))
}

/// An undisturbed stream shows nothing that was sent again, and one whose wire
/// was cut for a moment does: so the counters tell one from the other.
pub fn stream_tells(vne: &Vne) -> Result<String> {
    let told = start(vne).and_then(|()| watch(vne));
    // Else the next test finds guests that aren't the VNE's.
    stop(vne)?;
    told
}

fn watch(vne: &Vne) -> Result<String> {
    let first = account(vne)?;
    std::thread::sleep(Duration::from_secs(10));
    let quiet = account(vne)?;
    quiet.sound()?;
    ensure!(
        quiet.received > first.received && quiet.timeouts == first.timeouts,
        "nothing disturbs the stream: {first:?}, then {quiet:?}"
    );

    vne.lab.link(0, 1, false)?;
    std::thread::sleep(Duration::from_secs(2));
    vne.lab.link(0, 1, true)?;
    std::thread::sleep(Duration::from_secs(8));
    let cut = account(vne)?;
    cut.sound()?;
    ensure!(
        cut.received > quiet.received
            && cut.retransmitted > quiet.retransmitted
            && cut.timeouts > quiet.timeouts,
        "the wire was cut, and nothing was sent again: {quiet:?}, then {cut:?}"
    );
    // The token may have been on the cut wire.
    vne.start_afresh()?;
    Ok(format!(
        "  undisturbed: {} bytes, {} segments sent again, {} timeouts; the wire cut for 2 s: {} \
         and {}; no reset and no wrong byte",
        quiet.received - first.received,
        quiet.retransmitted - first.retransmitted,
        quiet.timeouts - first.timeouts,
        cut.retransmitted - quiet.retransmitted,
        cut.timeouts - quiet.timeouts
    ))
}
