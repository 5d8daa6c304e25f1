//! The project's task runner, and the lab that runs real Xen under QEMU.

pub mod cli;
pub mod lab;
