//! Recorded frames, and the file that they are kept in: pcapng, so that any
//! packet analyser opens it.
//!
//! Format: IETF draft "PCAP Next Generation (pcapng) Capture File Format". Only
//! what [`encode`] writes is read: one little-endian section, Ethernet
//! interfaces called `vif.DEVID`, one Enhanced Packet Block a frame. What the
//! sender left to its card is in a comment of each block that has any, as
//! pcapng has no place for it: `offload FLAGS GSO_TYPE HEADER_BYTES GSO_BYTES
//! CHECKSUM_START CHECKSUM_OFFSET`, the fields of Linux's `struct
//! virtio_net_hdr`, in decimal.

use super::Error;

/// Bytes of a frame, at most: a 64 KiB packet to be segmented, and headers.
pub const FRAME_BYTES_MAX: usize = (64 << 10) + 64;
/// Bytes of `struct virtio_net_hdr`.
pub const OFFLOAD_BYTES: usize = 10;

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const PACKET: u32 = 6;
const BYTE_ORDER: u32 = 0x1a2b_3c4d;
const ETHERNET: u16 = 1;
const END_OF_OPTIONS: u16 = 0;
const COMMENT: u16 = 1;
const NAME: u16 = 2;
const RESOLUTION: u16 = 9;
/// Timestamps are in 10⁻⁹ s.
const NANOSECONDS: u8 = 9;
const NAME_PREFIX: &str = "vif.";

/// One recorded frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Which of the member's vifs, Xen's device number.
    pub devid: u32,
    /// Unix time in ns.
    pub at_ns: u64,
    /// What the sender left to the card: checksum and segmentation (`struct
    /// virtio_net_hdr` in this machine's byte order).
    pub offload: [u8; OFFLOAD_BYTES],
    /// From the destination address on; a VLAN tag stands in its place.
    pub bytes: Vec<u8>,
}

/// The file's contents.
pub fn encode(frames: &[Frame]) -> Vec<u8> {
    let mut file = Vec::new();
    let section = [
        &BYTE_ORDER.to_le_bytes()[..],
        &1u16.to_le_bytes(),
        &0u16.to_le_bytes(),
        // The section's length: not said.
        &u64::MAX.to_le_bytes(),
    ];
    block(&mut file, SECTION, &section.concat());
    let mut interfaces = Vec::new();
    for frame in frames {
        let known = interfaces.iter().position(|devid| *devid == frame.devid);
        let interface = known.unwrap_or_else(|| {
            block(&mut file, INTERFACE, &interface(frame.devid));
            interfaces.push(frame.devid);
            interfaces.len() - 1
        });
        block(&mut file, PACKET, &packet(interface as u32, frame));
    }
    file
}

fn interface(devid: u32) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(ETHERNET.to_le_bytes());
    body.extend([0; 2]);
    // No frame is cut short.
    body.extend(0u32.to_le_bytes());
    option(&mut body, NAME, format!("{NAME_PREFIX}{devid}").as_bytes());
    option(&mut body, RESOLUTION, &[NANOSECONDS]);
    option(&mut body, END_OF_OPTIONS, &[]);
    body
}

fn packet(interface: u32, frame: &Frame) -> Vec<u8> {
    let length = (frame.bytes.len() as u32).to_le_bytes();
    let mut body = Vec::with_capacity(frame.bytes.len() + 64);
    body.extend(interface.to_le_bytes());
    body.extend(((frame.at_ns >> 32) as u32).to_le_bytes());
    body.extend((frame.at_ns as u32).to_le_bytes());
    body.extend(length);
    body.extend(length);
    body.extend(&frame.bytes);
    pad(&mut body);
    if frame.offload != [0; OFFLOAD_BYTES] {
        option(&mut body, COMMENT, comment(&frame.offload).as_bytes());
        option(&mut body, END_OF_OPTIONS, &[]);
    }
    body
}

fn comment(offload: &[u8; OFFLOAD_BYTES]) -> String {
    let [flags, kind, fields @ ..] = offload;
    let mut text = format!("offload {flags} {kind}");
    for field in fields.chunks_exact(2) {
        let number = field.try_into().map_or(0, u16::from_ne_bytes);
        text.push_str(&format!(" {number}"));
    }
    text
}

fn block(file: &mut Vec<u8>, kind: u32, body: &[u8]) {
    let length = (12 + body.len().next_multiple_of(4)) as u32;
    file.extend(kind.to_le_bytes());
    file.extend(length.to_le_bytes());
    file.extend(body);
    pad(file);
    file.extend(length.to_le_bytes());
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    body.extend(code.to_le_bytes());
    body.extend((value.len() as u16).to_le_bytes());
    body.extend(value);
    pad(body);
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Reads what [`encode`] wrote.
///
/// # Errors
///
/// [`Error::Recorded`], saying where it isn't that.
pub fn decode(file: &[u8]) -> Result<Vec<Frame>, Error> {
    let mut frames = Vec::new();
    let mut interfaces = Vec::new();
    let mut rest = Reader(file);
    let mut first = true;
    while !rest.0.is_empty() {
        let at = file.len() - rest.0.len();
        let read = read_block(&mut rest, first, &mut interfaces, &mut frames);
        if read.is_none() {
            return Err(Error::Recorded { at });
        }
        first = false;
    }
    Ok(frames)
}

fn read_block(
    file: &mut Reader<'_>,
    first: bool,
    interfaces: &mut Vec<u32>,
    frames: &mut Vec<Frame>,
) -> Option<()> {
    let kind = file.u32()?;
    let length = file.u32()?;
    let body = file.take((length as usize).checked_sub(12)?)?;
    if file.u32()? != length || length % 4 != 0 || first != (kind == SECTION) {
        return None;
    }
    let mut body = Reader(body);
    match kind {
        SECTION if body.u32()? == BYTE_ORDER => {}
        INTERFACE => interfaces.push(read_interface(&mut body)?),
        PACKET => {
            let devid = *interfaces.get(body.u32()? as usize)?;
            frames.push(read_packet(&mut body, devid)?);
        }
        _ => return None,
    }
    Some(())
}

fn read_interface(body: &mut Reader<'_>) -> Option<u32> {
    if body.u16()? != ETHERNET {
        return None;
    }
    body.take(6)?;
    let options = body.options()?;
    let value = |wanted| {
        let mut options = options.iter();
        options.find_map(|(code, value)| (*code == wanted).then_some(*value))
    };
    if value(RESOLUTION)? != [NANOSECONDS] {
        return None;
    }
    let name = std::str::from_utf8(value(NAME)?).ok()?;
    name.strip_prefix(NAME_PREFIX)?.parse().ok()
}

fn read_packet(body: &mut Reader<'_>, devid: u32) -> Option<Frame> {
    let (high, low) = (body.u32()?, body.u32()?);
    let (captured, original) = (body.u32()?, body.u32()?);
    let length = captured as usize;
    if captured != original || length > FRAME_BYTES_MAX {
        return None;
    }
    let bytes = body.take(length)?.to_vec();
    body.take(length.next_multiple_of(4) - length)?;
    let comment = body
        .options()?
        .into_iter()
        .find(|(code, _)| *code == COMMENT);
    Some(Frame {
        devid,
        at_ns: u64::from(high) << 32 | u64::from(low),
        offload: match comment {
            Some((_, text)) => read_comment(std::str::from_utf8(text).ok()?)?,
            None => [0; OFFLOAD_BYTES],
        },
        bytes,
    })
}

fn read_comment(text: &str) -> Option<[u8; OFFLOAD_BYTES]> {
    let mut words = text.strip_prefix("offload ")?.split(' ');
    let mut offload = Vec::with_capacity(OFFLOAD_BYTES);
    for _ in 0..2 {
        offload.push(words.next()?.parse::<u8>().ok()?);
    }
    for _ in 0..4 {
        offload.extend(words.next()?.parse::<u16>().ok()?.to_ne_bytes());
    }
    match words.next() {
        None => offload.try_into().ok(),
        Some(_) => None,
    }
}

/// What is left to be read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    /// A block's options, which may be missing.
    fn options(&mut self) -> Option<Vec<(u16, &'a [u8])>> {
        let mut options = Vec::new();
        while !self.0.is_empty() {
            let (code, length) = (self.u16()?, usize::from(self.u16()?));
            if code == END_OF_OPTIONS {
                break;
            }
            options.push((code, self.take(length)?));
            self.take(length.next_multiple_of(4) - length)?;
        }
        Some(options)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn frames() -> Vec<Frame> {
        let frame = |devid, length: usize, offload| Frame {
            devid,
            at_ns: 0x1234_5678_9abc_def0,
            offload,
            bytes: (0..length).map(|byte| byte as u8).collect(),
        };
        vec![
            frame(0, 60, [0; OFFLOAD_BYTES]),
            frame(3, 61, [1, 4, 66, 0, 168, 5, 34, 0, 16, 0]),
            frame(0, FRAME_BYTES_MAX, [0; OFFLOAD_BYTES]),
        ]
    }

    #[test]
    fn what_is_written_is_read_back() {
        assert_eq!(decode(&encode(&frames())).unwrap(), frames());
        assert_eq!(decode(&encode(&[])).unwrap(), []);
    }

    #[test]
    fn blocks_are_as_the_specification_draws_them() {
        let file = encode(&frames()[..1]);
        let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
        assert_eq!(
            (word(0), word(4), word(8), word(24)),
            (SECTION, 28, BYTE_ORDER, 28)
        );
        let interface = word(32) as usize;
        assert_eq!(
            (word(28), word(28 + interface - 4)),
            (INTERFACE, interface as u32)
        );
        let packet = 28 + interface;
        assert_eq!((word(packet), word(packet + 4)), (PACKET, 32 + 60));
        assert_eq!((word(packet + 20), word(packet + 24)), (60, 60));
        assert_eq!(file.len(), packet + 92);
    }

    #[test]
    fn a_file_that_is_cut_off_or_changed_is_refused_and_never_panics() {
        let file = encode(&frames()[..2]);
        for length in 1..file.len() {
            // Between two blocks it's a file with fewer frames.
            if let Ok(read) = decode(&file[..length]) {
                assert!(read.len() < 2);
            }
        }
        for at in 0..file.len() {
            for bit in 0..8 {
                let mut file = file.clone();
                file[at] ^= 1 << bit;
                let _ = decode(&file);
            }
        }
        let mut long = file.clone();
        long[4] = 0xff;
        assert!(decode(&long).is_err());
    }
}
