//! Errors as one line.

use std::error::Error;
use std::fmt::Write;

/// An error and all its causes, joined by colons: each layer says only what it
/// knows (`#[source]` holds the rest).
pub fn sentence(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a String doesn't fail.
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
