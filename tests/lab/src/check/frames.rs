//! Holds, and what they record.

use anyhow::{ensure, Result};

use super::vne::Vne;

/// Frames of all protocols are held, recorded and let go in order; a redirect for
/// IPv4 alone wouldn't do. An overflow is noticed, and a vif may vanish.
pub fn all_protocols(vne: &Vne) -> Result<String> {
    let told = vne.sh("holds 2>&1")?;
    let (_, why) = vne.sh_fails("holds ipv4-only")?;
    ensure!(
        why.contains("wasn't held"),
        "it failed for another reason: {why}"
    );
    Ok(format!(
        "  {}; with IPv4 alone: {}",
        told.trim(),
        why.trim()
    ))
}
