//! C-ABI hooks: what xl's plugin loader (`xl-ext/include/xl_plugin.h`) finds in
//! this library. Everything that they do is elsewhere.

pub mod cli;
pub mod clock;
pub mod cpu;
pub mod cut;
pub mod disk;
pub mod domain;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod image;
pub mod net;
pub mod sidecar;
pub mod stream;

mod abi;
mod priority;
mod random;
mod sentence;

pub use sentence::sentence;

/// The command that users type.
pub const COMMAND: &str = "vne-snapshot";
/// The command that workers are started by, hidden from help.
pub const WORKER_COMMAND: &str = "vne-worker";
