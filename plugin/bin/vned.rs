//! vned: snapshots of VNEs that span several Xen hosts. Described in vned(8).

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use xl_vne::sentence;
use xl_vne::sidecar::{vned, Program};

/// Takes part in snapshots of VNEs that span several Xen hosts.
#[derive(Debug, Parser)]
#[command(name = "vned", version)]
struct Arguments {
    /// The xl that has xl-vne's plugin
    #[arg(long, value_name = "PATH", default_value = "/usr/sbin/xl")]
    xl: PathBuf,
    /// Read the configuration, say what is wrong with it, and end
    #[arg(long)]
    check_config: bool,
    /// Say more; twice for everything
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    start_log(arguments.verbose);
    let result = if arguments.check_config {
        let program = Program {
            xl: arguments.xl,
            verbosity: 0,
        };
        vned::describe(&program, None).map(drop)
    } else {
        vned::run(&vned::Options { xl: arguments.xl })
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{}", sentence(&error));
            ExitCode::FAILURE
        }
    }
}

/// One line a message, with the level as systemd's journal understands it.
fn start_log(verbose: u8) {
    let level = match verbose {
        0 => log::LevelFilter::Info,
        1 => log::LevelFilter::Debug,
        _ => log::LevelFilter::Trace,
    };
    let for_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    env_logger::Builder::new()
        .filter_module("xl_vne", level)
        .filter_module("vned", level)
        .filter_level(log::LevelFilter::Warn)
        .format(move |out, record| {
            let priority = match record.level() {
                log::Level::Error => 3,
                log::Level::Warn => 4,
                log::Level::Info => 6,
                log::Level::Debug | log::Level::Trace => 7,
            };
            if for_journal {
                writeln!(out, "<{priority}>{}", record.args())
            } else {
                let level = record.level().as_str().to_lowercase();
                writeln!(out, "vned: {level}: {}", record.args())
            }
        })
        .init();
}
