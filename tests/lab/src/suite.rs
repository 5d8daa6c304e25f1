//! The releases of Debian that there are a lab and packages for.

use std::fs;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// A release of Debian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Suite {
    /// Debian 12, with Xen 4.17
    #[default]
    Bookworm,
    /// Debian 13, with Xen 4.20
    Trixie,
}

impl Suite {
    /// All of them, the earliest first.
    pub const ALL: &[Suite] = &[Suite::Bookworm, Suite::Trixie];

    /// As the archive, and the command line, call it.
    pub fn name(self) -> &'static str {
        match self {
            Suite::Bookworm => "bookworm",
            Suite::Trixie => "trixie",
        }
    }

    /// Its release of Xen.
    pub fn xen(self) -> &'static str {
        match self {
            Suite::Bookworm => "4.17",
            Suite::Trixie => "4.20",
        }
    }

    /// Where its Xen has private files, below the root folder.
    pub fn xen_folder(self) -> String {
        format!("usr/lib/xen-{}", self.xen())
    }

    /// What tells its packages from those of another one, in their version: later
    /// suites have to have later versions.
    pub fn suffix(self) -> &'static str {
        match self {
            Suite::Bookworm => "+deb12",
            Suite::Trixie => "+deb13",
        }
    }

    /// Whether this machine is of it.
    pub fn is_here(self) -> Result<bool> {
        let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
        let wanted = format!("VERSION_CODENAME={}", self.name());
        Ok(text.lines().any(|line| line == wanted))
    }
}

impl std::fmt::Display for Suite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn later_suites_have_later_versions() -> Result<()> {
        for pair in Suite::ALL.windows(2) {
            let [earlier, later] = pair else { continue };
            let versions = [earlier, later].map(|suite| format!("0.1.0{}", suite.suffix()));
            let [earlier, later] = versions;
            let status = Command::new("dpkg")
                .args(["--compare-versions", &earlier, "lt", &later])
                .status()?;
            assert!(status.success(), "{earlier} {later}");
        }
        Ok(())
    }

    #[test]
    fn a_suite_is_called_the_same_everywhere() -> Result<()> {
        for suite in Suite::ALL {
            let possible = clap::ValueEnum::to_possible_value(suite);
            assert_eq!(
                possible.map(|it| it.get_name().to_owned()).as_deref(),
                Some(suite.name())
            );
            assert_eq!(
                serde_json::to_string(suite)?,
                format!("\"{}\"", suite.name())
            );
        }
        Ok(())
    }
}
