//! Raw bindings to libxl (`xenlight`) and libxlutil (`xlutil`), generated from
//! the headers of the Xen that is installed where this is built.
//!
//! C enums are plain constants: libxl may return a value that these headers
//! don't know. libxl's own documentation (`libxl.h`) says what each function
//! does, who frees, and which calls may fork.
#![allow(
    non_upper_case_globals,
    non_camel_case_types,
    non_snake_case,
    missing_docs,
    unsafe_op_in_unsafe_fn,
    clippy::all
)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
