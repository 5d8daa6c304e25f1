//! xl's own configuration syntax, by xl's own parser (libxlutil).

use std::ffi::{CStr, CString};
use std::ptr;

use libxl_sys as sys;

/// Larger than any description of a VNE; libxlutil takes a C int.
pub const CONFIG_BYTES_MAX: usize = 1 << 20;

/// A parsed configuration.
pub struct XlConfig {
    config: *mut sys::XLU_Config,
    source: String,
}

/// A `FILE` that collects what the parser complains about.
struct Complaints {
    file: *mut libc::FILE,
    text: Box<(*mut libc::c_char, libc::size_t)>,
}

impl Complaints {
    fn new() -> Option<Self> {
        let mut text = Box::new((ptr::null_mut(), 0));
        // SAFETY: both pointers stay valid until close, in a box that moves
        // with the stream.
        let file = unsafe { libc::open_memstream(&mut text.0, &mut text.1) };
        (!file.is_null()).then_some(Self { file, text })
    }

    fn close(mut self) -> String {
        // SAFETY: the stream is open and is closed once; then text holds a
        // NUL-terminated string from malloc, copied and freed once.
        unsafe {
            libc::fclose(self.file);
            if self.text.0.is_null() {
                return String::new();
            }
            let told = CStr::from_ptr(self.text.0)
                .to_string_lossy()
                .trim()
                .to_owned();
            libc::free(self.text.0.cast());
            self.text.0 = ptr::null_mut();
            told
        }
    }
}

impl XlConfig {
    /// Parses `text`, which came from `source`.
    pub fn parse(source: &str, text: &[u8]) -> Result<Self, String> {
        let c_source = CString::new(source).map_err(|_| format!("{source}: NUL in its name"))?;
        let length = libc::c_int::try_from(text.len())
            .ok()
            .filter(|_| text.len() <= CONFIG_BYTES_MAX)
            .ok_or_else(|| format!("{source}: larger than {CONFIG_BYTES_MAX} bytes"))?;
        let complaints = Complaints::new().ok_or("out of memory")?;
        // SAFETY: the stream stays open until after the parse; libxlutil
        // copies the name.
        let config = unsafe { sys::xlu_cfg_init(complaints.file.cast(), c_source.as_ptr()) };
        if config.is_null() {
            complaints.close();
            return Err(String::from("out of memory"));
        }
        // SAFETY: config is live; text has length bytes for the whole call.
        let rc = unsafe { sys::xlu_cfg_readdata(config, text.as_ptr().cast(), length) };
        let told = complaints.close();
        let parsed = Self {
            config,
            source: source.to_owned(),
        };
        // The parser keeps the stream's pointer, but every getter below is
        // told not to warn, so it's never used again.
        if rc == 0 {
            Ok(parsed)
        } else {
            Err(if told.is_empty() {
                format!("{source}: not xl's syntax")
            } else {
                told
            })
        }
    }

    /// A string, if it's there.
    pub fn string(&self, key: &CStr) -> Result<Option<String>, String> {
        let mut value = ptr::null();
        // SAFETY: config is live; key is NUL-terminated; value is writable.
        let rc = unsafe { sys::xlu_cfg_get_string(self.config, key.as_ptr(), &mut value, 1) };
        self.found(key, rc, "a string")?
            .then(|| {
                // SAFETY: set by libxlutil to a string that config owns.
                unsafe { text_at(value) }
            })
            .map_or(Ok(None), |text| Ok(Some(text)))
    }

    /// A number within bounds, if it's there.
    pub fn number(&self, key: &CStr, min: u32, max: u32) -> Result<Option<u32>, String> {
        let mut value: libc::c_long = 0;
        // SAFETY: config is live; key is NUL-terminated; value is writable.
        let rc = unsafe { sys::xlu_cfg_get_long(self.config, key.as_ptr(), &mut value, 1) };
        if !self.found(key, rc, "a number")? {
            return Ok(None);
        }
        u32::try_from(value)
            .ok()
            .filter(|value| (min..=max).contains(value))
            .map(Some)
            .ok_or_else(|| {
                let (key, source) = (key.to_string_lossy(), &self.source);
                format!("{source}: '{key}' is {value}, but must be from {min} to {max}")
            })
    }

    /// A list of strings, if it's there.
    pub fn list(&self, key: &CStr) -> Result<Option<Vec<String>>, String> {
        let mut list = ptr::null_mut();
        let mut count = 0;
        // SAFETY: config is live; key is NUL-terminated; the rest is writable.
        let rc =
            unsafe { sys::xlu_cfg_get_list(self.config, key.as_ptr(), &mut list, &mut count, 1) };
        if !self.found(key, rc, "a list")? {
            return Ok(None);
        }
        let mut items = Vec::new();
        for at in 0..count {
            // SAFETY: list is config's and at is below its length; what comes
            // back is NULL or config's string.
            let item = unsafe { sys::xlu_cfg_get_listitem(list, at) };
            if item.is_null() {
                let (key, source) = (key.to_string_lossy(), &self.source);
                return Err(format!("{source}: '{key}' must hold strings only"));
            }
            // SAFETY: not NULL, and a string that config owns.
            items.push(unsafe { text_at(item) });
        }
        Ok(Some(items))
    }

    fn found(&self, key: &CStr, rc: libc::c_int, expected: &str) -> Result<bool, String> {
        match rc {
            0 => Ok(true),
            libc::ESRCH => Ok(false),
            _ => {
                let (key, source) = (key.to_string_lossy(), &self.source);
                Err(format!("{source}: '{key}' must be {expected}"))
            }
        }
    }
}

impl Drop for XlConfig {
    fn drop(&mut self) {
        // SAFETY: from xlu_cfg_init, destroyed once.
        unsafe { sys::xlu_cfg_destroy(self.config) };
    }
}

/// # Safety
///
/// `from` points to a NUL-terminated string.
unsafe fn text_at(from: *const libc::c_char) -> String {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(from) }
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_xls_syntax() -> Result<(), String> {
        let text = b"# a VNE\nmembers = [ \"a\", 'b' ]\nstore = \"/srv\"\nhold_kib = 64\n";
        let config = XlConfig::parse("lab.cfg", text)?;
        assert_eq!(config.list(c"members")?, Some(vec!["a".into(), "b".into()]));
        assert_eq!(config.string(c"store")?, Some("/srv".into()));
        assert_eq!(config.number(c"hold_kib", 1, 100)?, Some(64));
        assert_eq!(config.number(c"absent", 1, 100)?, None);
        assert!(config.number(c"hold_kib", 1, 10).is_err());
        assert!(config
            .list(c"store")
            .is_err_and(|e| e.contains("must be a list")));
        Ok(())
    }

    #[test]
    fn a_syntax_error_names_file_and_line() {
        let error = XlConfig::parse("lab.cfg", b"members = [ \"a\"\nstore = \n").err();
        assert!(
            error.as_ref().is_some_and(|e| e.contains("lab.cfg:2")),
            "{error:?}"
        );
    }
}
