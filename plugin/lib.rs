//! C-ABI hooks.
