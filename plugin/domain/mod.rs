//! One domain and one operation on it: the worker process, in which all calls
//! of libxl are made.
//!
//! libxl forbids other children in a process while it runs an operation
//! (`libxl_event.h`, "Subprocess handling") and ends the process when memory
//! runs out. So each member of a VNE has a worker of its own, that may die
//! without taking anything along.
//!
//! ```text
//!  engine ◄── JSON lines ──► worker ── libxl_domain_suspend ──► save helper, our policy preloaded
//!                              ▲  ▲                                  │        │
//!                              │  └───────── policy_wire ────────────┘        │
//!                              └──────────── migration stream (pipe) ◄────────┘
//! ```

pub mod facts;
mod host;
pub mod messages;
mod monitor;
mod orders;
pub mod policy;
mod policy_wire;
pub mod recover;
mod restart;
pub mod worker;
pub mod xl;

pub use facts::{DomainFacts, DomainKind, Vif};
pub use host::HostFacts;
