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

    plugin_abi(&out)?;
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

/// The plugin interface of xl, from its header, and the release of Xen whose
/// libxl this is built against.
fn plugin_abi(out: &Path) -> Result<(), String> {
    println!("cargo:rerun-if-changed=xl-ext/include/xl_plugin.h");
    bindgen::Builder::default()
        .header("xl-ext/include/xl_plugin.h")
        .allowlist_type("xl_plugin.*")
        .allowlist_var("XL_PLUGIN_.*")
        .derive_debug(false)
        .generate_comments(false)
        .generate()
        .map_err(|error| error.to_string())?
        .write_to_file(out.join("xl_plugin.rs"))
        .map_err(|error| error.to_string())?;

    let xenlight = pkg_config::probe_library("xenlight")
        .map_err(|error| format!("xenlight not found (Debian: libxen-dev): {error}"))?;
    let mut parts = xenlight.version.split('.');
    let (Some(major), Some(minor)) = (parts.next(), parts.next()) else {
        return Err(format!("xenlight has version '{}'", xenlight.version));
    };
    println!("cargo:rustc-env=VNE_XEN_VERSION={major}.{minor}");
    Ok(())
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
