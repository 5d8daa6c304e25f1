//! The two symbols that xl looks for, and the two commands behind them.
//!
//! No panic crosses into xl: each entry catches it and turns it into a failed
//! command.

use std::ffi::{c_char, c_int, CStr, CString, OsString};
use std::os::unix::ffi::OsStringExt;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::cli::Host;

#[allow(
    non_camel_case_types,
    non_upper_case_globals,
    missing_docs,
    dead_code,
    clippy::all
)]
mod sys {
    include!(concat!(env!("OUT_DIR"), "/xl_plugin.rs"));
}

/// The release of Xen that this was built for: libxl's ABI is that release's.
const XEN_VERSION: &str = env!("VNE_XEN_VERSION");

/// What xl handed in; it lives as long as the process (`xl_plugin.h`).
static HOST: AtomicPtr<sys::xl_plugin_host> = AtomicPtr::new(ptr::null_mut());

/// Read before anything is called.
#[no_mangle]
#[allow(non_upper_case_globals)]
pub static xl_plugin_abi_version: u32 = sys::XL_PLUGIN_ABI_MAJOR << 16 | sys::XL_PLUGIN_ABI_MINOR;

struct Static<T>(T);

// SAFETY: the tables hold pointers to static strings and are never written.
unsafe impl<T> Sync for Static<T> {}

static COMMANDS: Static<[sys::xl_plugin_command; 2]> = Static([
    sys::xl_plugin_command {
        name: c"vne-snapshot".as_ptr(),
        main: Some(vne_snapshot),
        can_dryrun: 1,
        modifies: 1,
        desc: c"Consistent live snapshots of a set of networked domains".as_ptr(),
        usage: c"take|list|show|status|restore|remove|export|peer [options]".as_ptr(),
        options: c"'xl vne-snapshot --help' lists the verbs, 'xl vne-snapshot VERB --help' \
                   their options;\nsee also xl-vne-snapshot(1).\n"
            .as_ptr(),
    },
    sys::xl_plugin_command {
        name: c"vne-worker".as_ptr(),
        main: Some(vne_worker),
        can_dryrun: 0,
        modifies: 1,
        desc: ptr::null(),
        usage: ptr::null(),
        options: ptr::null(),
    },
]);

static PLUGIN: Static<sys::xl_plugin> = Static(sys::xl_plugin {
    struct_size: size_of::<sys::xl_plugin>(),
    name: c"vne".as_ptr(),
    version: VERSION.as_ptr(),
    ncommands: 2,
    command_size: size_of::<sys::xl_plugin_command>(),
    commands: COMMANDS.0.as_ptr(),
});

const VERSION: &CStr =
    match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => c"?",
    };

/// Called once by xl, before any command.
///
/// # Safety
///
/// `host` points to a host table as `xl_plugin.h` describes it, that lives as
/// long as the process.
#[no_mangle]
pub unsafe extern "C" fn xl_plugin_init(host: *const sys::xl_plugin_host) -> *const sys::xl_plugin {
    let accepted = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the caller's promise, checked for NULL by as_ref.
        let Some(host) = (unsafe { host.as_ref() }) else {
            return false;
        };
        // All fields used here are in version 1.0, and the major is ours.
        if host.struct_size < size_of::<sys::xl_plugin_host>() {
            return refuse(host, "this xl's host table is too short");
        }
        match text(host.xl_version) {
            Some(version) if version == XEN_VERSION => true,
            version => refuse(
                host,
                &format!(
                    "built for Xen {XEN_VERSION}, but this is xl {}",
                    version.as_deref().unwrap_or("of no version")
                ),
            ),
        }
    }));
    if !matches!(accepted, Ok(true)) {
        return ptr::null();
    }
    HOST.store(host.cast_mut(), Ordering::Release);
    &PLUGIN.0
}

fn refuse(host: &sys::xl_plugin_host, why: &str) -> bool {
    if let Ok(why) = CString::new(why) {
        let bytes = why.as_bytes_with_nul();
        if !host.error.is_null() && bytes.len() <= host.error_size {
            // SAFETY: xl gives error_size writable bytes at error for the
            // call of xl_plugin_init, which this is part of.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr().cast(), host.error, bytes.len()) };
        }
    }
    false
}

extern "C" fn vne_snapshot(argc: c_int, argv: *mut *mut c_char) -> c_int {
    command(argc, argv, crate::cli::main)
}

extern "C" fn vne_worker(argc: c_int, argv: *mut *mut c_char) -> c_int {
    command(argc, argv, crate::cli::worker_main)
}

fn command(argc: c_int, argv: *mut *mut c_char, run: fn(&Host, Vec<OsString>) -> c_int) -> c_int {
    let status = catch_unwind(AssertUnwindSafe(|| {
        ignore_broken_pipes();
        let arguments = arguments(argc, argv);
        match host() {
            Some(host) => run(&host, arguments),
            None => 1,
        }
    }));
    // The panic's own message is on stderr already.
    status.unwrap_or(1)
}

/// As Rust's own main does: a reader of ours that has gone is an error of one
/// write, and must end neither a worker nor a guard that still has to clean up.
fn ignore_broken_pipes() {
    // SAFETY: SIG_IGN is no handler that could be called; xl has no other
    // thread at this point.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

fn arguments(argc: c_int, argv: *mut *mut c_char) -> Vec<OsString> {
    let count = usize::try_from(argc).unwrap_or(0);
    (0..count)
        .map_while(|at| {
            // SAFETY: xl passes argc pointers to NUL-terminated strings that
            // live for the whole call; each is copied.
            unsafe {
                let argument = *argv.add(at);
                (!argument.is_null())
                    .then(|| OsString::from_vec(CStr::from_ptr(argument).to_bytes().to_vec()))
            }
        })
        .collect()
}

fn host() -> Option<Host> {
    // SAFETY: NULL or the table that xl_plugin_init was given, which lives as
    // long as the process.
    let host = unsafe { HOST.load(Ordering::Acquire).as_ref() }?;
    let path = |from| text(from).map(PathBuf::from);
    Some(Host {
        // SAFETY: xl's context is live while a command runs, and xl has no
        // thread that would use it meanwhile.
        xl: unsafe { crate::domain::xl::Xl::from_host(host.ctx.cast()) }?,
        xl_path: path(host.xl_path)?,
        config_dir: path(host.config_dir)?,
        run_dir: path(host.run_dir)?,
        libexec_dir: path(host.libexec_bin_dir)?,
        dry_run: host.dryrun != 0,
        verbosity: verbosity(host.minmsglevel),
    })
}

/// xl starts at `XTL_PROGRESS` and goes one down for each `-v`.
fn verbosity(minmsglevel: i32) -> u32 {
    let default = i32::try_from(libxl_sys::XTL_PROGRESS).unwrap_or(0);
    u32::try_from(default.saturating_sub(minmsglevel)).unwrap_or(0)
}

fn text(from: *const c_char) -> Option<String> {
    if from.is_null() {
        return None;
    }
    // SAFETY: not NULL, and a NUL-terminated string of the host table.
    let text = unsafe { CStr::from_ptr(from) };
    Some(text.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(version: &CStr, error: &mut [u8; 256]) -> sys::xl_plugin_host {
        // SAFETY: all fields are numbers or pointers, for which zero is valid.
        let mut host: sys::xl_plugin_host = unsafe { std::mem::zeroed() };
        host.struct_size = size_of::<sys::xl_plugin_host>();
        host.xl_version = version.as_ptr();
        host.error = error.as_mut_ptr().cast();
        host.error_size = error.len();
        host
    }

    #[test]
    fn another_release_of_xen_is_refused_with_a_reason() {
        let mut error = [0; 256];
        let host = host(c"3.4", &mut error);
        // SAFETY: a valid table that outlives the call.
        let plugin = unsafe { xl_plugin_init(&host) };
        assert!(plugin.is_null());
        let told = CStr::from_bytes_until_nul(&error).map(CStr::to_string_lossy);
        assert!(told.is_ok_and(|told| told.contains("xl 3.4")));
    }

    #[test]
    fn no_host_at_all_is_no_crash() {
        // SAFETY: NULL is what is tested.
        assert!(unsafe { xl_plugin_init(ptr::null()) }.is_null());
    }

    #[test]
    fn a_command_without_a_host_fails() {
        let status = command(0, ptr::null_mut(), |_, _| 0);
        assert_eq!(status, 1);
    }
}
