//! The launcher that packages put in place of the distribution's xl.

use std::error::Error;
use std::path::Path;
use std::process::Command;

#[test]
fn with_other_libraries_than_it_was_built_for_xl_is_the_distributions() -> Result<(), Box<dyn Error>>
{
    let test = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/launcher/test");
    let output = Command::new(test).output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    Ok(())
}
