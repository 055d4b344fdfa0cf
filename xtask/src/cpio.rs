//! Initramfs archives: cpio's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst
//! in Linux), written and not read.

/// `S_IFDIR`, `S_IFCHR`, `S_IFREG` of `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const CHARACTER: u32 = 0o020_000;
const REGULAR: u32 = 0o100_000;

/// An archive that grows by one entry a call; everything in it belongs to root and
/// has no time stamp, so equal contents make equal bytes.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds the directory `path` (relative, its parents added before), mode 0755.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, [0, 0], &[]);
    }

    /// Adds the character device `path` with its permission bits and its major and
    /// minor numbers.
    pub fn character(&mut self, path: &str, permissions: u32, device: [u32; 2]) {
        self.entry(path, CHARACTER | permissions, device, &[]);
    }

    /// Adds the file `path` with its permission bits. Contents are at most 4 GiB, the
    /// format's own bound.
    pub fn file(&mut self, path: &str, permissions: u32, contents: &[u8]) {
        self.entry(path, REGULAR | permissions, [0, 0], contents);
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, [0, 0], &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: [u32; 2], contents: &[u8]) {
        self.entries += 1;
        let fields = [
            self.entries, // ino
            mode,
            0, // uid
            0, // gid
            1, // nlink
            0, // mtime
            contents.len() as u32,
            0, // devmajor
            0, // devminor
            device[0],
            device[1],
            path.len() as u32 + 1,
            0, // check
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    /// Names and contents end on a multiple of 4 bytes.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_the_trailer_is_last() {
        let mut archive = Archive::default();
        archive.directory("bin");
        archive.file("bin/five", 0o755, b"12345");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        // 110 bytes of header, "bin\0", padded to 116; the next header follows at once.
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(&bytes[110..114], b"bin\0");
        assert_eq!(&bytes[116..122], b"070701");
        assert_eq!(&bytes[116 + 14..116 + 22], b"000081ed");
        assert_eq!(&bytes[116 + 54..116 + 62], b"00000005");
        // 110 + 9 of name is 119, padded to 120.
        assert_eq!(&bytes[236..241], b"12345");
        assert_eq!(&bytes[244 + 110..244 + 121], b"TRAILER!!!\0");
    }
}
