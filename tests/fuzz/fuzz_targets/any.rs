//! One reader, called by the name of the program: each target is this file.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let name = env!("CARGO_BIN_NAME");
    for (target, run) in xl_vne::fuzz::TARGETS {
        if target == name {
            run(bytes);
        }
    }
});
