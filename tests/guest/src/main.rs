//! The one program of the lab's guests: their init, their workloads, and in
//! dom0 the tool that listens to and asks them.

mod args;
mod ask;
mod await_ready;
mod card;
mod clock;
mod cpu;
mod dirty;
mod frames;
mod init;
mod json;
mod marks;
mod memory;
mod mesh;
mod peers;
mod ring;
mod sequence;
mod sink;
mod status;
mod stream;
mod sys;
mod tcp_client;
mod tcp_counters;
mod tcp_server;
mod tcp_stream;
mod workload;
mod writer;

use std::process::ExitCode;

const HELP: &str = "\
vne-guest: workloads of the lab's guests

  ring --index I --peers IP,IP,… [--hold-us N] [--rest-every N --rest-ms N]
                                                    pass one token round
  mesh --index I --peers IP,IP,… [--interval-us N]  numbered datagrams, all to all
  stream --to IP:PORT [--interval-us N]             numbered datagrams to a sink
  tcp-server [--port P]                             verify a byte stream
  tcp-client --to IP:PORT [--interval-us N] [--chunk N]
                                                    send a byte stream
  marks --word W --to IP [--bytes N] [--interval-us N]
                                                    full datagrams that say whose
                                                    they are, to one other station
  cpu                                               count work done
  writer [--device D] [--interval-us N]             keep a log on a disk, and compare
                                                    it with memory
  memory [--mib N] [--written-pages N]              read memory, write some, and count it
  sink --port P [--seconds N]                       report on a stream, in JSON
  frames INTERFACE … --seconds N                    count frames by the word in them
  ask IP [--timeout-ms N] [--tries N]               print a guest's counters, in JSON
  await-ready LOG --from BYTE --seconds N           wait for a guest's console log
                                                    to say that it's ready

--peers lists all stations in their order, the one itself included. Every
workload answers datagrams at UDP port 7007 with all counters, in JSON. sink
reports after N seconds or when interrupted.";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let mut words = std::env::args();
    let called = words.next().unwrap_or_default();
    let words: Vec<String> = words.collect();
    let result = match words.split_first() {
        _ if called == "/sbin/poweroff" => sys::power_off(),
        None => Err(HELP.to_owned()),
        Some((verb, _)) if verb == "--help" || verb == "help" => {
            println!("{HELP}");
            Ok(())
        }
        Some((verb, rest)) if verb == "ask" => ask::run(rest),
        Some((verb, rest)) if verb == "await-ready" => await_ready::run(rest),
        Some((verb, rest)) if verb == "frames" => frames::run(rest),
        Some((verb, rest)) if verb == "sink" => sink::run(rest),
        Some(_) => tool(&words),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("vne-guest: {why}");
            ExitCode::from(1)
        }
    }
}

/// Runs a workload outside a guest.
fn tool(words: &[String]) -> Result<(), String> {
    let status = status::Status::default();
    let run = workload::prepare(words, &status)?;
    status.serve()?;
    run()
}
