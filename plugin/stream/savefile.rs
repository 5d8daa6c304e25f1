//! The header that `xl save` puts ahead of the libxl stream.
//!
//! Defined by `struct save_file_header` in Xen's `tools/xl/xl.h` and by the code
//! that writes and reads it (`xl_saverestore.c`, `xl_vmcontrol.c`): 32 bytes of
//! magic; then four 32-bit numbers in the machine's own byte order: a byte order
//! mark, mandatory flags, optional flags, and the length of what follows; then
//! optional data: a 32-bit length and the domain's configuration.

use std::io::{Read, Write};

use super::error::Error;
use super::input::Input;

const SAVE_MAGIC: [u8; 32] = *b"Xen saved domain, xl format\n \0 \r";

const BYTE_ORDER: u32 = 0x0102_0304;
/// The configuration is libxl's JSON, not xl's own syntax.
const MANDATORY_JSON: u32 = 1 << 0;
/// A libxl stream of version 2 follows.
const MANDATORY_STREAM_V2: u32 = 1 << 1;

/// Bytes in a domain's configuration, at most. A libxl configuration is a few
/// KiB of JSON; 1 MiB leaves room for thousands of devices.
pub const CONFIG_BYTES_MAX: usize = 1 << 20;

/// Whether a file that begins with `first` was written by `xl save`.
pub fn is_save_file(first: &[u8]) -> bool {
    first.starts_with(&SAVE_MAGIC)
}

/// The header of an xl save file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveHeader {
    /// The domain's configuration as libxl's JSON, without the final NUL.
    ///
    /// `None` in a file that has none: xl then wants one on its command line.
    pub config_json: Option<String>,
}

impl SaveHeader {
    /// Reads the header. The libxl stream is what follows it in `source`.
    ///
    /// # Errors
    ///
    /// [`Error::Header`] for any other kind of file, for another byte order,
    /// for flags that aren't known, for a stream from Xen 4.5 or earlier, and
    /// for a configuration that isn't JSON text; [`Error::Truncated`],
    /// [`Error::Read`].
    pub fn read(source: &mut impl Read) -> Result<Self, Error> {
        // One byte of read-ahead too many would be missing from the stream.
        let mut input = Input::unbuffered(source);
        let mut magic = [0; 32];
        input.exact(&mut magic, WHAT)?;
        if magic != SAVE_MAGIC {
            return Err(wrong("this is no xl save file".to_owned()));
        }
        let order = number(&mut input)?;
        if order != BYTE_ORDER {
            return Err(wrong("its byte order is another machine's".to_owned()));
        }
        let mandatory = number(&mut input)?;
        let _optional_flags = number(&mut input)?;
        let length = number(&mut input)? as usize;
        check_flags(mandatory)?;
        let config = read_optional_data(&mut input, length)?;
        if config.is_some() && mandatory & MANDATORY_JSON == 0 {
            let problem = "its configuration is not JSON: it is from Xen 4.4 or earlier";
            return Err(wrong(problem.to_owned()));
        }
        Ok(SaveHeader {
            config_json: config.map(config_text).transpose()?,
        })
    }

    /// Writes the header as xl does; the libxl stream is to follow.
    ///
    /// # Errors
    ///
    /// [`Error::Unwritable`] if the configuration is longer than
    /// [`CONFIG_BYTES_MAX`] or contains a NUL; [`Error::Write`].
    pub fn write(&self, output: &mut impl Write) -> Result<(), Error> {
        let mut data = Vec::new();
        let mut mandatory = MANDATORY_STREAM_V2;
        if let Some(config) = &self.config_json {
            check_config(config)?;
            mandatory |= MANDATORY_JSON;
            let with_nul = config.len() as u32 + 1; // at most 1 MiB
            data.extend_from_slice(&with_nul.to_le_bytes());
            data.extend_from_slice(config.as_bytes());
            data.push(0);
        } else {
            // xl says "a configuration of no bytes", not "no optional data".
            data.extend_from_slice(&[0; 4]);
        }
        let mut header = Vec::with_capacity(48 + data.len());
        header.extend_from_slice(&SAVE_MAGIC);
        for number in [BYTE_ORDER, mandatory, 0, data.len() as u32] {
            header.extend_from_slice(&number.to_le_bytes());
        }
        header.extend_from_slice(&data);
        output
            .write_all(&header)
            .map_err(|source| Error::Write { source })
    }
}

const WHAT: &str = "xl save file header";

fn wrong(problem: String) -> Error {
    Error::Header {
        what: WHAT,
        offset: 0,
        problem,
    }
}

fn number(input: &mut Input<impl Read>) -> Result<u32, Error> {
    let mut bytes = [0; 4];
    input.exact(&mut bytes, WHAT)?;
    Ok(u32::from_le_bytes(bytes))
}

fn check_flags(mandatory: u32) -> Result<(), Error> {
    let unknown = mandatory & !(MANDATORY_JSON | MANDATORY_STREAM_V2);
    if unknown != 0 {
        return Err(wrong(format!("its flags {unknown:#x} are of a newer xl")));
    }
    if mandatory & MANDATORY_STREAM_V2 == 0 {
        let problem = "its stream is in the format of Xen 4.5 or earlier";
        return Err(wrong(problem.to_owned()));
    }
    Ok(())
}

/// Reads `length` bytes of optional data and returns the configuration in it.
/// More may follow the configuration, and is skipped as xl does.
fn read_optional_data(
    input: &mut Input<impl Read>,
    length: usize,
) -> Result<Option<Vec<u8>>, Error> {
    if length == 0 {
        return Ok(None);
    }
    if length > CONFIG_BYTES_MAX + 5 {
        return Err(wrong(format!(
            "it claims {length} bytes of configuration, more than the {CONFIG_BYTES_MAX} that is believable"
        )));
    }
    let mut data = vec![0; length];
    input.exact(&mut data, WHAT)?;
    let too_short = || wrong("its optional data is cut short".to_owned());
    let (size, rest) = data.split_first_chunk::<4>().ok_or_else(too_short)?;
    let config = rest
        .get(..u32::from_le_bytes(*size) as usize)
        .ok_or_else(too_short)?;
    Ok((!config.is_empty()).then(|| config.to_vec()))
}

/// xl stores the C string with its NUL.
fn config_text(mut config: Vec<u8>) -> Result<String, Error> {
    if config.last() == Some(&0) {
        config.pop();
    }
    match String::from_utf8(config) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(wrong("its configuration is not text".to_owned())),
    }
}

fn check_config(config: &str) -> Result<(), Error> {
    let problem = if config.len() > CONFIG_BYTES_MAX {
        format!("the configuration is longer than {CONFIG_BYTES_MAX} bytes")
    } else if config.contains('\0') {
        "the configuration contains a NUL".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::Unwritable { problem })
}
