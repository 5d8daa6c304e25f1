//! A byte source that knows how far it was read.

use std::io::{BufReader, ErrorKind, Read};

use super::error::Error;

/// Read ahead of what is being parsed: a pipe's default capacity, so that the
/// small headers cost no system call of their own.
const READ_AHEAD_BYTES: usize = 64 << 10;

/// The source of a stream, and how many bytes of it were used.
#[derive(Debug)]
pub(crate) struct Input<R> {
    reader: BufReader<R>,
    offset: u64,
}

impl<R: Read> Input<R> {
    pub(crate) fn new(source: R) -> Self {
        Input {
            reader: BufReader::with_capacity(READ_AHEAD_BYTES, source),
            offset: 0,
        }
    }

    /// Without read-ahead, for a source of which only the beginning is ours.
    pub(crate) fn unbuffered(source: R) -> Self {
        Input {
            reader: BufReader::with_capacity(0, source),
            offset: 0,
        }
    }

    /// Bytes used so far.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Fills `buffer`; `what` names its contents in the error if the source
    /// ends first.
    pub(crate) fn exact(&mut self, buffer: &mut [u8], what: &'static str) -> Result<(), Error> {
        let mut rest = buffer;
        while !rest.is_empty() {
            match self.reader.read(rest) {
                Ok(0) => {
                    let offset = self.offset;
                    return Err(Error::Truncated { offset, what });
                }
                Ok(count) => {
                    self.offset += count as u64;
                    rest = rest.get_mut(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => {
                    let offset = self.offset;
                    return Err(Error::Read { offset, source });
                }
            }
        }
        Ok(())
    }
}
