//! What the kernel itself counts of TCP: only it knows what was sent again, as
//! a stream that was disturbed looks the same to its two ends.

use crate::json::Json;

/// Name to be told, file, the file's table, and name in it.
const COUNTERS: &[(&str, &str, &str, &str)] = &[
    ("retransmitted", SNMP, "Tcp:", "RetransSegs"),
    ("timeouts", NETSTAT, "TcpExt:", "TCPTimeouts"),
    ("loss_probes", NETSTAT, "TcpExt:", "TCPLossProbes"),
    ("connections_reset", SNMP, "Tcp:", "EstabResets"),
    ("resets_sent", SNMP, "Tcp:", "OutRsts"),
];

const SNMP: &str = "/proc/net/snmp";
const NETSTAT: &str = "/proc/net/netstat";

/// The counters since the guest booted; null for one that the kernel hasn't.
pub fn tell() -> Json {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let (snmp, netstat) = (read(SNMP), read(NETSTAT));
    let mut json = Json::new();
    for (name, file, table, column) in COUNTERS {
        let text = if *file == SNMP { &snmp } else { &netstat };
        json.maybe(name, counter(text, table, column));
    }
    json
}

/// A number from a file in which each table is a line of names and one of
/// values.
fn counter(text: &str, table: &str, column: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(table));
    let (names, values) = (lines.next()?, lines.next()?);
    let at = names.split_whitespace().position(|name| name == column)?;
    values.split_whitespace().nth(at)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_found_under_its_name_in_its_own_table() {
        let text = "Ip: A B\nIp: 1 2\nTcp: MaxConn B C\nTcp: -1 3 4\n";
        assert_eq!(counter(text, "Tcp:", "B"), Some(3));
        assert_eq!(counter(text, "Ip:", "B"), Some(2));
        assert_eq!(counter(text, "Tcp:", "A"), None);
        assert_eq!(counter(text, "Udp:", "B"), None);
        assert_eq!(counter("", "Tcp:", "B"), None);
    }
}
