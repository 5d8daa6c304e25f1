//! libxl as this program uses it: a thin, safe face over `libxl-sys`. All
//! `unsafe` that concerns domains is here.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use libxl_sys as sys;

use super::{DomainFacts, HostFacts};
use crate::cpu::CpuFeatures;

/// KiB of a page.
const PAGE_KIB: u64 = 4;

extern "C" {
    /// `c-shim/recover.h`.
    fn vne_cancel_suspend_request(domid: u32) -> libc::c_int;
    /// `c-shim/recover.h`.
    fn vne_logdirty_off(domid: u32) -> libc::c_int;
}

/// What can go wrong with a domain.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such domain.
    #[error("no domain is called '{0}' (see 'xl list')")]
    NoSuchDomain(String),
    /// There was such a domain, or its number is another domain's now.
    #[error("domain {0} is gone")]
    Gone(u32),
    /// It can't be captured in the state that it is in.
    #[error("domain '{name}' is {state}: {way_out}")]
    State {
        /// The domain.
        name: String,
        /// Its state, as an adjective.
        state: &'static str,
        /// What the admin can do about it.
        way_out: &'static str,
    },
    /// Its configuration can't be used.
    #[error("{0}")]
    Config(String),
    /// libxl reported a failure.
    #[error("libxl cannot {what}: {name} ({code})")]
    Libxl {
        /// The call, as a verb phrase.
        what: &'static str,
        /// libxl's name of the error.
        name: &'static str,
        /// libxl's number of it.
        code: i32,
    },
    /// A system call below libxl failed.
    #[error("cannot {what}")]
    System {
        /// What was tried, as a verb phrase.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// Where a domain stands right now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainState {
    /// Its UUID in the usual notation.
    pub uuid: String,
    /// Its memory in KiB.
    pub memory_kib: u64,
    /// Paused by a toolstack.
    pub paused: bool,
    /// On its way out.
    pub dying: bool,
    /// Shut down for whatever reason, suspended included.
    pub shutdown: bool,
    /// Shut down by its answer to a suspend request.
    pub suspended: bool,
}

/// The libxl context that xl made for this process.
pub struct Xl {
    ctx: *mut sys::libxl_ctx,
}

// SAFETY: libxl locks its context in each call, and lets go of it while a synchronous
// one waits: libxl.h says that it is threadsafe, and so threads may make calls beside
// each other. Nothing else is in here.
unsafe impl Sync for Xl {}

impl Xl {
    /// Takes the context of the host table.
    ///
    /// # Safety
    ///
    /// `ctx` is a live libxl context that stays so for as long as the value is
    /// used, and no other thread uses it meanwhile except under libxl's own
    /// locking.
    pub unsafe fn from_host(ctx: *mut sys::libxl_ctx) -> Option<Self> {
        (!ctx.is_null()).then_some(Self { ctx })
    }

    /// The number of the domain with this name.
    pub fn find(&self, name: &str) -> Result<u32, Error> {
        let absent = || Error::NoSuchDomain(name.to_owned());
        let c_name = CString::new(name).map_err(|_| absent())?;
        let mut domid = 0;
        // SAFETY: ctx is live (from_host); the name is NUL-terminated and
        // domid is writable, both for the whole call.
        let rc = unsafe { sys::libxl_name_to_domid(self.ctx, c_name.as_ptr(), &mut domid) };
        if rc == 0 {
            Ok(domid)
        } else {
            Err(absent())
        }
    }

    /// The name of a domain.
    pub fn name(&self, domid: u32) -> Option<String> {
        // SAFETY: ctx is live; the answer is NULL or the caller's to free.
        take_string(unsafe { sys::libxl_domid_to_name(self.ctx, domid) })
    }

    /// The state of a domain.
    pub fn state(&self, domid: u32) -> Result<DomainState, Error> {
        let mut info = MaybeUninit::<sys::libxl_dominfo>::uninit();
        // SAFETY: libxl_dominfo_init writes every field of the struct.
        unsafe { sys::libxl_dominfo_init(info.as_mut_ptr()) };
        // SAFETY: ctx is live; info is initialised and stays in place.
        let rc = unsafe { sys::libxl_domain_info(self.ctx, info.as_mut_ptr(), domid) };
        // SAFETY: initialised above, and libxl keeps it valid on failure too.
        let mut info = unsafe { info.assume_init() };
        let state = DomainState {
            uuid: format_uuid(&info.uuid.uuid),
            memory_kib: info.current_memkb.saturating_add(info.outstanding_memkb),
            paused: info.paused,
            dying: info.dying,
            shutdown: info.shutdown,
            suspended: info.shutdown && info.shutdown_reason == sys::LIBXL_SHUTDOWN_REASON_SUSPEND,
        };
        // SAFETY: info was initialised by libxl and is disposed of once.
        unsafe { sys::libxl_dominfo_dispose(&mut info) };
        match rc {
            0 => Ok(state),
            sys::ERROR_DOMAIN_NOTFOUND => Err(Error::Gone(domid)),
            code => Err(failed("read a domain's state", code)),
        }
    }

    /// Everything that is known of a domain, and that it can be captured.
    pub fn examine(&self, name: &str) -> Result<DomainFacts, Error> {
        let domid = self.find(name)?;
        let unfit = |state, way_out| Error::State {
            name: name.to_owned(),
            state,
            way_out,
        };
        if domid == 0 {
            return Err(unfit("the host's own", "it can't be a member"));
        }
        let state = self.state(domid)?;
        if state.dying {
            return Err(unfit("dying", "wait until it is gone from 'xl list'"));
        }
        if state.suspended {
            return Err(unfit(
                "suspended",
                "another save or migration is under way, or one has failed; \
                 wait for it, or destroy the domain",
            ));
        }
        if state.shutdown {
            return Err(unfit("shut down", "it has no running guest to capture"));
        }
        if state.paused {
            return Err(unfit(
                "paused",
                "a guest has to run to answer a suspend request ('xl unpause')",
            ));
        }
        let mut facts = self.facts(name, domid, state)?;
        facts.cap = self.cap(domid)?;
        facts.host_cpu = Some(self.with_physinfo(|info| CpuFeatures::of_host(&info.hw_cap))?);
        Ok(facts)
    }

    /// What is known of a domain that was built and hasn't run yet.
    pub fn built_facts(&self, name: &str) -> Result<DomainFacts, Error> {
        let domid = self.find(name)?;
        self.facts(name, domid, self.state(domid)?)
    }

    fn facts(&self, name: &str, domid: u32, state: DomainState) -> Result<DomainFacts, Error> {
        let json = self.config_json(domid)?;
        let mut facts =
            DomainFacts::from_config(domid, state.memory_kib, json).map_err(Error::Config)?;
        // Both come from the hypervisor, as the check in recover does.
        facts.uuid = state.uuid;
        facts.name = name.to_owned();
        Ok(facts)
    }

    /// What a domain's virtual CPUs may use together, in percent of one physical
    /// CPU; 0 for all they want. `None` if the scheduler can't limit that.
    fn cap(&self, domid: u32) -> Result<Option<u32>, Error> {
        self.with_sched_params(|params| {
            // SAFETY: ctx is live; params is initialised and stays in place.
            match unsafe { sys::libxl_domain_sched_params_get(self.ctx, domid, params) } {
                0 => {
                    let capped = [sys::LIBXL_SCHEDULER_CREDIT, sys::LIBXL_SCHEDULER_CREDIT2];
                    let cap = u32::try_from(params.cap).ok();
                    Ok(cap.filter(|_| capped.contains(&params.sched)))
                }
                code => Err(failed("read a domain's scheduling", code)),
            }
        })
    }

    /// Limits a domain to `cap`, as `cap()` gives it; nothing else of its
    /// scheduling changes.
    pub fn set_cap(&self, domid: u32, cap: u32) -> Result<(), Error> {
        self.with_sched_params(|params| {
            params.cap = i32::try_from(cap).unwrap_or(0);
            // SAFETY: ctx is live; params is initialised, with defaults where
            // nothing is to change.
            match unsafe { sys::libxl_domain_sched_params_set(self.ctx, domid, params) } {
                0 => Ok(()),
                code => Err(failed("limit a domain's processors", code)),
            }
        })
    }

    /// What this host has for domains, and which of `names` are domains' already.
    pub fn host_facts(&self, names: &[String]) -> Result<HostFacts, Error> {
        let taken = names.iter().filter(|name| self.find(name).is_ok());
        let taken = taken.cloned().collect();
        let dom0_kib = self.state(0)?.memory_kib;
        let xen_version = self.xen_version();
        self.with_physinfo(|info| HostFacts {
            xen_version,
            free_kib: info.free_pages.saturating_add(info.scrub_pages) * PAGE_KIB,
            dom0_kib,
            cpu: CpuFeatures::of_host(&info.hw_cap),
            pv: info.cap_pv,
            hvm: info.cap_hvm,
            taken,
        })
    }

    fn with_physinfo<T>(&self, look: impl FnOnce(&sys::libxl_physinfo) -> T) -> Result<T, Error> {
        let mut info = MaybeUninit::<sys::libxl_physinfo>::uninit();
        // SAFETY: libxl_physinfo_init writes every field of the struct.
        unsafe { sys::libxl_physinfo_init(info.as_mut_ptr()) };
        // SAFETY: ctx is live; info is initialised and stays in place.
        let rc = unsafe { sys::libxl_get_physinfo(self.ctx, info.as_mut_ptr()) };
        // SAFETY: initialised above, and libxl keeps it valid on failure too.
        let mut info = unsafe { info.assume_init() };
        let result = check("read what the host has", rc).map(|()| look(&info));
        // SAFETY: info was initialised by libxl and is disposed of once.
        unsafe { sys::libxl_physinfo_dispose(&mut info) };
        result
    }

    fn with_sched_params<T>(
        &self,
        work: impl FnOnce(&mut sys::libxl_domain_sched_params) -> T,
    ) -> T {
        let mut params = MaybeUninit::<sys::libxl_domain_sched_params>::uninit();
        // SAFETY: libxl_domain_sched_params_init writes every field.
        unsafe { sys::libxl_domain_sched_params_init(params.as_mut_ptr()) };
        // SAFETY: initialised above.
        let mut params = unsafe { params.assume_init() };
        let result = work(&mut params);
        // SAFETY: params was initialised by libxl and is disposed of once.
        unsafe { sys::libxl_domain_sched_params_dispose(&mut params) };
        result
    }

    fn config_json(&self, domid: u32) -> Result<String, Error> {
        let mut config = MaybeUninit::<sys::libxl_domain_config>::uninit();
        // SAFETY: libxl_domain_config_init writes every field of the struct.
        unsafe { sys::libxl_domain_config_init(config.as_mut_ptr()) };
        // SAFETY: ctx is live; config is initialised; no ao_how means that
        // the call is synchronous.
        let rc = unsafe {
            sys::libxl_retrieve_domain_configuration(
                self.ctx,
                domid,
                config.as_mut_ptr(),
                std::ptr::null(),
            )
        };
        let json = if rc == 0 {
            // SAFETY: ctx is live and config was filled in by libxl.
            let text = unsafe { sys::libxl_domain_config_to_json(self.ctx, config.as_mut_ptr()) };
            take_string(text).ok_or_else(|| failed("print a configuration", sys::ERROR_FAIL))
        } else {
            Err(failed("read a domain's configuration", rc))
        };
        // SAFETY: config was initialised by libxl and is disposed of once.
        unsafe { sys::libxl_domain_config_dispose(config.as_mut_ptr()) };
        json
    }

    /// Saves a running domain into `stream`; returns when the guest is
    /// suspended and the stream is complete. libxl forks its save helper.
    pub fn suspend_live(&self, domid: u32, stream: BorrowedFd<'_>) -> Result<(), Error> {
        // SAFETY: ctx is live, the descriptor is open for the whole call, and
        // no ao_how means that the call is synchronous.
        let rc = unsafe {
            sys::libxl_domain_suspend(
                self.ctx,
                domid,
                stream.as_raw_fd(),
                sys::LIBXL_SUSPEND_LIVE as libc::c_int,
                std::ptr::null(),
            )
        };
        check("save the domain", rc)
    }

    /// Lets a suspended domain run on where it is.
    pub fn resume(&self, domid: u32) -> Result<(), Error> {
        // SAFETY: ctx is live; 1 asks for the guest's fast resume, in place;
        // no ao_how means that the call is synchronous.
        let rc = unsafe { sys::libxl_domain_resume(self.ctx, domid, 1, std::ptr::null()) };
        check("resume the domain", rc)
    }

    /// Lets a domain that was built paused run.
    pub fn unpause(&self, domid: u32) -> Result<(), Error> {
        // SAFETY: ctx is live; no ao_how means that the call is synchronous.
        let rc = unsafe { sys::libxl_domain_unpause(self.ctx, domid, std::ptr::null()) };
        check("unpause the domain", rc)
    }

    /// Destroys a domain.
    pub fn destroy(&self, domid: u32) -> Result<(), Error> {
        // SAFETY: ctx is live; no ao_how means that the call is synchronous.
        let rc = unsafe { sys::libxl_domain_destroy(self.ctx, domid, std::ptr::null()) };
        check("destroy the domain", rc)
    }

    /// Takes an unanswered suspend request back. `true` if there was one.
    pub fn cancel_suspend_request(&self, domid: u32) -> Result<bool, Error> {
        // SAFETY: takes a number and touches nothing of ours.
        match unsafe { vne_cancel_suspend_request(domid) } {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(system("take a suspend request back")),
        }
    }

    /// Switches log-dirty mode off.
    pub fn logdirty_off(&self, domid: u32) -> Result<(), Error> {
        // SAFETY: takes a number and touches nothing of ours.
        match unsafe { vne_logdirty_off(domid) } {
            0 => Ok(()),
            _ => Err(system("switch log-dirty mode off")),
        }
    }

    /// The version of the hypervisor, such as `4.17.6-pre`.
    pub fn xen_version(&self) -> String {
        // SAFETY: ctx is live; the answer is libxl's, cached in ctx, and
        // copied before anything else can touch it.
        unsafe {
            let info = sys::libxl_get_version_info(self.ctx);
            if info.is_null() {
                return String::from("unknown");
            }
            let extra = (*info).xen_version_extra;
            let extra = if extra.is_null() {
                String::new()
            } else {
                CStr::from_ptr(extra).to_string_lossy().into_owned()
            };
            format!(
                "{}.{}{extra}",
                (*info).xen_version_major,
                (*info).xen_version_minor
            )
        }
    }
}

fn check(what: &'static str, rc: libc::c_int) -> Result<(), Error> {
    if rc == 0 {
        Ok(())
    } else {
        Err(failed(what, rc))
    }
}

fn failed(what: &'static str, code: i32) -> Error {
    let name = match code {
        sys::ERROR_FAIL => "failed",
        sys::ERROR_NOMEM => "out of memory",
        sys::ERROR_INVAL => "invalid argument",
        sys::ERROR_GUEST_TIMEDOUT => "the guest did not answer in time",
        sys::ERROR_TIMEDOUT => "timed out",
        sys::ERROR_LOCK_FAIL => "the domain is locked",
        sys::ERROR_DOMAIN_NOTFOUND => "no such domain",
        sys::ERROR_ABORTED => "aborted",
        _ => "error",
    };
    Error::Libxl { what, name, code }
}

fn system(what: &'static str) -> Error {
    Error::System {
        what,
        source: std::io::Error::last_os_error(),
    }
}

/// Copies and frees a string that libxl allocated.
fn take_string(text: *mut libc::c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: not NULL, NUL-terminated and allocated with malloc for the
    // caller to free (libxl.h); copied before it's freed, once.
    unsafe {
        let copy = CStr::from_ptr(text).to_string_lossy().into_owned();
        libc::free(text.cast());
        Some(copy)
    }
}

fn format_uuid(bytes: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (at, byte) in bytes.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn uuid_has_its_hyphens_where_xl_prints_them() {
        let bytes = std::array::from_fn(|at| at as u8);
        assert_eq!(
            super::format_uuid(&bytes),
            "00010203-0405-0607-0809-0a0b0c0d0e0f"
        );
    }
}
