//! The workloads by name.

use crate::status::Status;
use crate::{cpu, marks, memory, mesh, ring, stream, tcp_client, tcp_server, writer};

/// A workload, ready to run; most never end.
pub type Run = Box<dyn FnOnce() -> Result<(), String> + Send>;

/// Reads a workload's command line and opens what it needs, so that mistakes
/// show before the guest reports that it's ready.
pub fn prepare(words: &[String], status: &Status) -> Result<Run, String> {
    let (name, rest) = words.split_first().ok_or("no workload is named")?;
    match name.as_str() {
        "ring" => ring::prepare(rest, status),
        "marks" => marks::prepare(rest, status),
        "mesh" => mesh::prepare(rest, status),
        "stream" => stream::prepare(rest, status),
        "tcp-server" => tcp_server::prepare(rest, status),
        "tcp-client" => tcp_client::prepare(rest, status),
        "cpu" => cpu::prepare(rest, status),
        "writer" => writer::prepare(rest, status),
        "memory" => memory::prepare(rest, status),
        _ => Err(format!("there's no workload {name}")),
    }
}
