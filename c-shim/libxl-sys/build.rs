//! Generates the bindings from the installed headers and links the libraries
//! that pkg-config names.

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=wrapper.h");

    let mut includes = Vec::new();
    for package in ["xenlight", "xlutil", "xentoollog"] {
        match pkg_config::probe_library(package) {
            Ok(library) => includes.extend(library.include_paths),
            Err(error) => {
                eprintln!("libxl-sys: {package} not found: {error}");
                eprintln!("libxl-sys: install Xen's development files (Debian: libxen-dev)");
                std::process::exit(1);
            }
        }
    }

    let mut builder = bindgen::Builder::default()
        .header("wrapper.h")
        .allowlist_function("(libxl|xlu|xtl|xentoollog)_.*")
        .allowlist_type("(libxl|xlu|XLU|xentoollog|XTL)_.*")
        .allowlist_var("(LIBXL|XTL|ERROR)_.*")
        // A Rust enum with a value that C made up is undefined behaviour.
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .derive_debug(true)
        .derive_default(false)
        .layout_tests(true)
        .generate_comments(false)
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()));
    for path in includes {
        builder = builder.clang_arg(format!("-I{}", path.display()));
    }

    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("bindings.rs");
    let written = builder
        .generate()
        .map_err(|error| error.to_string())
        .and_then(|bindings| {
            bindings
                .write_to_file(&out)
                .map_err(|error| error.to_string())
        });
    if let Err(error) = written {
        eprintln!("libxl-sys: cannot generate bindings: {error}");
        std::process::exit(1);
    }
}
