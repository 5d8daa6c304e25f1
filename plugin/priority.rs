//! Who gets dom0's processors last.

/// What a thread gets whose work nobody waits for.
const BACKGROUND: i32 = 10;

/// Has the calling thread leave the processors to all others.
pub fn background() {
    // Unless it leaves them more already. On Linux a priority is a thread's, and no
    // process means the calling one.
    let now = rustix::process::getpriority_process(None).unwrap_or(0);
    if now >= BACKGROUND {
        return;
    }
    if let Err(error) = rustix::process::setpriority_process(None, BACKGROUND) {
        log::debug!("cannot set a thread's priority: {error}");
    }
}
