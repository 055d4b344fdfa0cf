//! Extended attributes, which stand behind their inode.

use crate::image::error::{ImageError, Result};
use crate::image::tree::Xattrs;

/// Name prefixes that have a number (`EROFS_XATTR_INDEX_*`). Other names cannot be
/// kept; nothing in Linux reads them from a disk.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];
/// Bytes of `struct erofs_xattr_ibody_header`.
const HEADER: usize = 12;
/// The whole body is counted in words of four bytes, in 16 bits.
const LONGEST_BODY: usize = HEADER + (u16::MAX as usize - 1) * 4;

/// The attributes as they stand behind the inode; empty when there are none.
///
/// # Errors
/// [`ImageError::Limit`] when they are too large for the format.
pub fn encode(xattrs: &Xattrs) -> Result<Vec<u8>> {
    let mut out = vec![0; HEADER];
    for (name, value) in xattrs {
        let prefix = PREFIXES
            .iter()
            .find_map(|(prefix, index)| Some((name.strip_prefix(*prefix)?, *index)));
        let Some((rest, index)) = prefix else {
            continue;
        };
        let too_large = || ImageError::Limit("an extended attribute is too large".to_owned());
        out.push(u8::try_from(rest.len()).map_err(|_| too_large())?);
        out.push(index);
        out.extend(
            u16::try_from(value.len())
                .map_err(|_| too_large())?
                .to_le_bytes(),
        );
        out.extend(rest);
        out.extend(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    if out.len() == HEADER {
        out.clear();
    }
    if out.len() > LONGEST_BODY {
        return Err(ImageError::Limit(
            "one file's extended attributes are too large".to_owned(),
        ));
    }
    Ok(out)
}

/// A body's size as `i_xattr_icount` has it.
pub fn count(body: &[u8]) -> u16 {
    match body.len() {
        0 => 0,
        length => ((length - HEADER) / 4 + 1) as u16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capability_is_a_numbered_prefix_a_name_and_a_value() {
        let xattrs = Xattrs::from([(b"security.capability".to_vec(), vec![1, b'\n', 3, 4, 5])]);
        let body = encode(&xattrs).unwrap();
        assert_eq!(body[HEADER..HEADER + 4], [10, 6, 5, 0]);
        assert_eq!(&body[HEADER + 4..HEADER + 14], b"capability");
        assert_eq!(body.len(), HEADER + 4 + 16);
        assert_eq!(count(&body), 6);
    }

    #[test]
    fn none_take_no_room_and_unknown_ones_are_left_out() {
        assert!(encode(&Xattrs::new()).unwrap().is_empty());
        assert!(
            encode(&Xattrs::from([(b"system.nfs4_acl".to_vec(), vec![])]))
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn too_many_are_refused() {
        let many = (0..5u8)
            .map(|i| (format!("user.{i}").into_bytes(), vec![0; 65_535]))
            .collect();
        assert!(matches!(encode(&many), Err(ImageError::Limit(_))));
    }
}
