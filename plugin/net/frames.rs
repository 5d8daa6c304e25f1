//! The frames that a member had sent when it was captured and that nobody had
//! received.

/// One recorded frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Which of the member's vifs, Xen's device number.
    pub devid: u32,
    /// Unix time in ns.
    pub at_ns: u64,
    /// What the sender left to the card: checksum and segmentation (`struct virtio_net_hdr`, 10
    /// bytes, native order).
    pub offload: [u8; 10],
    /// From the destination address on; VLAN tag inline.
    pub bytes: Vec<u8>,
}
