//! `--tmpfs PATH[:OPTIONS]` (moby/sys/mount, `MergeTmpfsOptions`).

use crate::args::size;
use crate::container::Memory;
use anyhow::{Result, bail};

/// Flags of mount(2) by docker's names, and whether the name sets or clears it.
const FLAGS: [(&str, u32, bool); 20] = [
    ("ro", 1, true),
    ("rw", 1, false),
    ("nosuid", 2, true),
    ("suid", 2, false),
    ("nodev", 4, true),
    ("dev", 4, false),
    ("noexec", 8, true),
    ("exec", 8, false),
    ("sync", 16, true),
    ("async", 16, false),
    ("dirsync", 128, true),
    ("nosymfollow", 256, true),
    ("noatime", 1024, true),
    ("atime", 1024, false),
    ("nodiratime", 2048, true),
    ("diratime", 2048, false),
    ("relatime", 1 << 21, true),
    ("norelatime", 1 << 21, false),
    ("strictatime", 1 << 24, true),
    ("nostrictatime", 1 << 24, false),
];

/// Docker's: nosuid, nodev, noexec.
const DEFAULT_FLAGS: u32 = 2 | 4 | 8;

/// Reads one.
///
/// # Errors
/// In docker's words.
pub fn parse(text: &str) -> Result<(String, Memory)> {
    let (path, options) = text.split_once(':').unwrap_or((text, ""));
    if !path.starts_with('/') {
        bail!("invalid mount path: {path:?} mount path must be absolute");
    }
    let mut parts = path.split('/').filter(|part| !part.is_empty()).peekable();
    if parts.peek().is_none() {
        bail!("invalid specification: destination can't be '/'");
    }
    if path.contains('\0') || parts.any(|part| part == "..") {
        bail!("invalid mount path: {path:?}");
    }
    let mut flags = DEFAULT_FLAGS;
    let mut data = Vec::new();
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match FLAGS.iter().find(|(name, ..)| *name == option) {
            Some((_, flag, true)) => flags |= flag,
            Some((_, flag, false)) => flags &= !flag,
            None if is_data(option) => data.push(option),
            None => bail!("invalid tmpfs option {option:?}"),
        }
    }
    let memory = Memory {
        options: options.to_owned(),
        flags,
        data: data.join(","),
    };
    Ok((path.to_owned(), memory))
}

/// Whether that is an option of tmpfs itself (Documentation/filesystems/tmpfs.rst).
fn is_data(option: &str) -> bool {
    let Some((name, value)) = option.split_once('=') else {
        return false;
    };
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match name {
        "size" => {
            let percent = value.strip_suffix('%').is_some_and(is_number);
            percent || size(value).is_ok()
        }
        "nr_inodes" | "nr_blocks" => size(value).is_ok(),
        "mode" => value.len() <= 5 && value.bytes().all(|b| (b'0'..=b'7').contains(&b)),
        "uid" | "gid" => is_number(value) && value.parse::<u32>().is_ok(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split_between_the_mount_and_the_file_system() {
        let read = |text: &str| {
            let (path, memory) = parse(text).expect(text);
            (path, memory.flags, memory.data)
        };
        let run = || "/run".to_owned();
        assert_eq!(read("/run"), (run(), 2 | 4 | 8, String::new()));
        assert_eq!(
            read("/run:rw,exec,ro,size=64k,mode=1777,uid=5"),
            (run(), 1 | 2 | 4, "size=64k,mode=1777,uid=5".to_owned())
        );
        assert_eq!(read("/run:size=50%").2, "size=50%");
        for (bad, why) in [
            ("run", "must be absolute"),
            ("/", "can't be '/'"),
            ("//", "can't be '/'"),
            ("/a/../..", "invalid mount path"),
            ("/run:fast", "invalid tmpfs option"),
            ("/run:size=x", "invalid tmpfs option"),
            ("/run:mode=9", "invalid tmpfs option"),
            ("/run:huge=always", "invalid tmpfs option"),
        ] {
            let error = parse(bad).expect_err(bad).to_string();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }
}
