//! What a snapshot's downtime is compared with, done with libxl alone:
//!
//! - `measure floor DOMAIN`: suspend and resume, nothing in between;
//! - `measure live DOMAIN FILE`: a live save with libxl's own pre-copy policy,
//!   then resume;
//! - `measure watch DOMAIN`: looks all the time whether the domain stands still,
//!   until it's ended.
//!
//! Runs in a dom0. Prints how long the call took in all, in ms; how long the
//! guest was down is seen from outside. `watch` prints how long it stood still, in
//! ms, each time that it runs again.

use std::ffi::CString;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::ptr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use libxl_sys as xl;

/// Each look is a hypercall, which an emulated dom0 shouldn't be busy with.
const LOOK: Duration = Duration::from_millis(4);

extern "C" {
    static stderr: *mut libc::FILE;
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["floor", domain] => measure(domain, None).map(|ms| println!("{ms:.1}")),
        ["live", domain, file] => measure(domain, Some(file)).map(|ms| println!("{ms:.1}")),
        ["watch", domain] => watch(domain),
        _ => Err("measure floor DOMAIN | live DOMAIN FILE | watch DOMAIN".to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("measure: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A domain, and libxl to ask about it.
struct Domain {
    ctx: *mut xl::libxl_ctx,
    domid: u32,
}

impl Domain {
    fn find(name: &str) -> Result<Self, String> {
        let name = CString::new(name).map_err(|error| error.to_string())?;
        let mut domain = Self {
            ctx: ptr::null_mut(),
            domid: 0,
        };
        // SAFETY: stderr is libc's open stream; what is allocated is used before it's
        // freed by drop, and the name outlives the call.
        unsafe {
            let logger = xl::xtl_createlogger_stdiostream(stderr.cast(), xl::XTL_ERROR, 0);
            let version = xl::LIBXL_VERSION as i32;
            check(
                "open libxl",
                xl::libxl_ctx_alloc(&mut domain.ctx, version, 0, logger.cast()),
            )?;
            check(
                "find the domain",
                xl::libxl_name_to_domid(domain.ctx, name.as_ptr(), &mut domain.domid),
            )?;
        }
        Ok(domain)
    }

    fn stands_still(&self) -> Result<bool, String> {
        let mut info = MaybeUninit::<xl::libxl_dominfo>::uninit();
        // SAFETY: libxl_dominfo_init writes every field; ctx lives as long as self.
        unsafe {
            xl::libxl_dominfo_init(info.as_mut_ptr());
            let mut info = info.assume_init();
            let looked = xl::libxl_domain_info(self.ctx, &mut info, self.domid);
            let still = info.shutdown;
            xl::libxl_dominfo_dispose(&mut info);
            check("look at the domain", looked).map(|()| still)
        }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: it was allocated, or is null, which is nothing to free.
        unsafe { xl::libxl_ctx_free(self.ctx) };
    }
}

fn watch(name: &str) -> Result<(), String> {
    let domain = Domain::find(name)?;
    let mut since = None;
    loop {
        match (domain.stands_still()?, since) {
            (true, None) => since = Some(Instant::now()),
            (false, Some(start)) => {
                println!("{:.1}", start.elapsed().as_secs_f64() * 1e3);
                since = None;
            }
            _ => {}
        }
        sleep(LOOK);
    }
}

fn measure(name: &str, save_to: Option<&str>) -> Result<f64, String> {
    let file = save_to
        .map(File::create)
        .transpose()
        .map_err(|error| error.to_string())?;
    let domain = Domain::find(name)?;
    let (ctx, domid) = (domain.ctx, domain.domid);
    let start = Instant::now();
    // SAFETY: ctx and the file outlive the calls; no ao_how makes every call
    // synchronous.
    unsafe {
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
    }
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

fn check(what: &str, rc: i32) -> Result<(), String> {
    if rc == 0 {
        Ok(())
    } else {
        Err(format!("cannot {what}: libxl error {rc}"))
    }
}
