//! What a snapshot's downtime is compared with, done with libxl alone:
//!
//! - `measure floor DOMAIN`: suspend and resume, nothing in between;
//! - `measure live DOMAIN FILE`: a live save with libxl's own pre-copy policy,
//!   then resume.
//!
//! Runs in a dom0. Prints how long the call took in all, in ms; how long the
//! guest was down is seen from outside.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::ptr;
use std::time::Instant;

use libxl_sys as xl;

extern "C" {
    static stderr: *mut libc::FILE;
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["floor", domain] => measure(domain, None),
        ["live", domain, file] => measure(domain, Some(file)),
        _ => Err(String::from("measure floor DOMAIN | live DOMAIN FILE")),
    };
    match result {
        Ok(ms) => {
            println!("{ms:.1}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("measure: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(domain: &str, save_to: Option<&str>) -> Result<f64, String> {
    let name = CString::new(domain).map_err(|error| error.to_string())?;
    let file = save_to
        .map(File::create)
        .transpose()
        .map_err(|error| error.to_string())?;
    // SAFETY: stderr is libc's open stream; ctx is allocated before it's used
    // and freed after; the name and the file outlive the calls; no ao_how
    // makes every call synchronous.
    unsafe {
        let logger = xl::xtl_createlogger_stdiostream(stderr.cast(), xl::XTL_ERROR, 0);
        let mut ctx = ptr::null_mut();
        let version = xl::LIBXL_VERSION as i32;
        check(
            "open libxl",
            xl::libxl_ctx_alloc(&mut ctx, version, 0, logger.cast()),
        )?;
        let mut domid = 0;
        check(
            "find the domain",
            xl::libxl_name_to_domid(ctx, name.as_ptr(), &mut domid),
        )?;
        let start = Instant::now();
        let suspended = match &file {
            None => xl::libxl_domain_suspend_only(ctx, domid, ptr::null()),
            Some(file) => {
                let live = xl::LIBXL_SUSPEND_LIVE as i32;
                xl::libxl_domain_suspend(ctx, domid, file.as_raw_fd(), live, ptr::null())
            }
        };
        check("suspend", suspended)?;
        check(
            "resume",
            xl::libxl_domain_resume(ctx, domid, 1, ptr::null()),
        )?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        xl::libxl_ctx_free(ctx);
        Ok(ms)
    }
}

fn check(what: &str, rc: i32) -> Result<(), String> {
    if rc == 0 {
        Ok(())
    } else {
        Err(format!("cannot {what}: libxl error {rc}"))
    }
}
