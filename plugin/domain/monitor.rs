//! The monitor that `xl create` leaves behind for a domain: it carries out
//! `on_reboot` and the like.
//!
//! It ends when it sees its domain suspended, taking that for a migration
//! (`handle_domain_death` in `xl_vmcontrol.c`): a domain that was saved and
//! runs on has lost it, and stays dead when its guest reboots. So it's stopped
//! from before the suspend until after the resume; when it looks then, the
//! domain runs.
//!
//! xl records nowhere which process it is. It's known by its program and by
//! its log, which libxl names after the domain.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::process::{pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal};

/// The monitors of one domain: one, or none if another toolstack made it.
#[derive(Debug, Default)]
pub struct Monitors(Vec<OwnedFd>);

impl Monitors {
    /// Finds the monitors of the domain called `name`.
    pub fn find(name: &str) -> Self {
        let log = format!("/xl-{name}.log");
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let monitors = entries.filter_map(|entry| {
            let pid = entry
                .file_name()
                .to_str()?
                .parse()
                .ok()
                .and_then(Pid::from_raw)?;
            // Opened before it's looked at, so that it can't be another
            // process by the time that it gets a signal.
            let process = pidfd_open(pid, PidfdFlags::empty()).ok()?;
            is_monitor(&entry.path(), &log).then_some(process)
        });
        Self(monitors.collect())
    }

    /// Keeps them from looking at their domain. [`Self::let_go`] must follow.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets them go on. Does nothing to one that isn't stopped.
    pub fn let_go(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        for process in &self.0 {
            if let Err(error) = pidfd_send_signal(process, signal) {
                log::debug!("the domain's monitor: {error}");
            }
        }
    }
}

/// A worker that ends early lets them go too; one that is killed leaves it to
/// [`super::recover`].
impl Drop for Monitors {
    fn drop(&mut self) {
        self.let_go();
    }
}

fn is_monitor(process: &Path, log: &str) -> bool {
    let link = |name: &str| fs::read_link(process.join(name)).ok();
    // A program that was replaced meanwhile shows as "xl (deleted)".
    let is_xl = link("exe")
        .and_then(|path| Some(path.file_name()?.to_str()?.to_owned()))
        .is_some_and(|name| {
            name.split(' ')
                .next()
                .is_some_and(|n| n == "xl" || n.starts_with("xl."))
        });
    is_xl && link("fd/1").is_some_and(|path| path.to_string_lossy().ends_with(log))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_no_xl_is_left_alone() {
        assert!(Monitors::find("no-such-domain").0.is_empty());
        let own = Path::new("/proc/self");
        let out = fs::read_link(own.join("fd/1")).unwrap_or_default();
        assert!(!is_monitor(own, &out.to_string_lossy()));
    }
}
