//! Compiles c-shim. The preloaded policy and the helper's wrapper are a shared
//! object and a program of their own: `cargo xtask build` collects them from
//! this script's output folder.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    for source in [
        "policy_wire.h",
        "save_policy.c",
        "save_helper.c",
        "recover.h",
        "recover.c",
    ] {
        println!("cargo:rerun-if-changed=c-shim/{source}");
    }
    if let Err(error) = run() {
        eprintln!("xl-vne: {error}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), String> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    for package in ["xenstore", "xencontrol"] {
        pkg_config::probe_library(package)
            .map_err(|error| format!("{package} not found (Debian: libxen-dev): {error}"))?;
    }

    base().file("c-shim/recover.c").compile("vne_recover");
    link(
        &out.join("vne-save-policy.so"),
        "c-shim/save_policy.c",
        &["-shared", "-fPIC", "-Wl,-z,defs", "-ldl", "-lc"],
    )?;
    link(
        &out.join("vne-save-helper"),
        "c-shim/save_helper.c",
        &["-fPIE", "-pie"],
    )
}

fn base() -> cc::Build {
    let mut build = cc::Build::new();
    build
        .warnings_into_errors(true)
        .extra_warnings(true)
        .flag("-Wno-unused-parameter")
        .flag("-fvisibility=default")
        .std("gnu99");
    build
}

/// Compiles and links one C file with the compiler and flags that cc chose.
fn link(target: &Path, source: &str, arguments: &[&str]) -> Result<(), String> {
    let compiler = base()
        .try_get_compiler()
        .map_err(|error| format!("no C compiler: {error}"))?;
    let mut command: Command = compiler.to_command();
    let status = command
        .arg("-o")
        .arg(target)
        .arg(source)
        .args(arguments)
        .args(["-Wl,-z,relro", "-Wl,-z,now"])
        .status()
        .map_err(|error| format!("cannot run the C compiler: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{source}: the C compiler failed ({status})"))
    }
}
