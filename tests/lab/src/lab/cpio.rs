//! Initial RAM disks: the `newc` cpio format, as the kernel unpacks it.

use std::collections::BTreeSet;

/// An archive under construction.
#[derive(Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
    folders: BTreeSet<String>,
}

impl Cpio {
    /// Adds a folder, and those above it.
    pub fn folder(&mut self, path: &str) {
        if let Some((above, _)) = path.rsplit_once('/') {
            self.folder(above);
        }
        if self.folders.insert(path.to_owned()) {
            self.entry(path, 0o040_755, (0, 0), &[]);
        }
    }

    /// Adds a file, and the folders above it.
    pub fn file(&mut self, path: &str, executable: bool, content: &[u8]) {
        if let Some((above, _)) = path.rsplit_once('/') {
            self.folder(above);
        }
        let mode = if executable { 0o100_755 } else { 0o100_644 };
        self.entry(path, mode, (0, 0), content);
    }

    /// Adds a symbolic link, and the folders above it.
    pub fn link(&mut self, path: &str, target: &str) {
        if let Some((above, _)) = path.rsplit_once('/') {
            self.folder(above);
        }
        self.entry(path, 0o120_777, (0, 0), target.as_bytes());
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, 0o020_600, (major, minor), &[]);
    }

    /// Ends the archive. Several may follow one another in one RAM disk.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        pad(&mut self.bytes, 512);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let fields = [
            self.entries,         // inode
            mode,                 //
            0,                    // user
            0,                    // group
            1,                    // links
            0,                    // time
            content.len() as u32, //
            0,                    // device it's on
            0,                    //
            device.0,             // device it is
            device.1,             //
            path.len() as u32 + 1,
            0, // checksum, unused
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        pad(&mut self.bytes, 4);
        self.bytes.extend_from_slice(content);
        pad(&mut self.bytes, 4);
    }
}

fn pad(bytes: &mut Vec<u8>, unit: usize) {
    bytes.resize(bytes.len().next_multiple_of(unit), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_before_what_is_in_them_and_once() {
        let mut cpio = Cpio::default();
        cpio.file("a/b/c", true, b"xyz");
        cpio.file("a/b/d", false, b"");
        let bytes = cpio.finish();
        assert_eq!(bytes.len() % 512, 0);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let names: Vec<&str> = text
            .split("070701")
            .skip(1)
            .filter_map(|entry| entry.get(104..)?.split('\0').next())
            .collect();
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/b/d", "TRAILER!!!"]);
    }
}
