//! Who gets dom0's processors first.

/// What a thread gets that others wait for, while frames are held.
const URGENT: i32 = -15;

/// Has the calling thread run before what copies memory at the same time, or no
/// longer. Processes that it starts meanwhile would inherit that.
pub fn urgent(yes: bool) {
    let nice = if yes { URGENT } else { 0 };
    // On Linux a priority is a thread's, and no process means the calling one.
    if let Err(error) = rustix::process::setpriority_process(None, nice) {
        log::debug!("cannot set a thread's priority: {error}");
    }
}

/// What a thread gets whose work nobody waits for.
const BACKGROUND: i32 = 10;

/// Has the calling thread leave the processors to all others.
pub fn background() {
    // Unless it leaves them more already.
    let now = rustix::process::getpriority_process(None).unwrap_or(0);
    if now >= BACKGROUND {
        return;
    }
    if let Err(error) = rustix::process::setpriority_process(None, BACKGROUND) {
        log::debug!("cannot set a thread's priority: {error}");
    }
}
