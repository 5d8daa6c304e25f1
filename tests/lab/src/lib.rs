//! The project's task runner, and the lab that runs real Xen under QEMU.

pub mod bench;
mod builder;
pub mod check;
pub mod cli;
pub mod demo;
pub mod lab;
pub mod package;
pub mod product;
mod scale;
pub mod suite;
pub mod test;
