//! Directories: blocks, each with an array of entries, sorted by name, and the
//! names behind it.

use super::format::{BLOCK, DIRENT};

/// One entry.
pub struct Dirent<'a> {
    /// The name.
    pub name: &'a [u8],
    /// The inode number.
    pub nid: u64,
    /// The FT_* number.
    pub file_type: u8,
}

/// How many of the names, which begin with that many bytes each, fill each block.
/// The result depends on nothing but the names' lengths, so that a directory's size
/// is known before the inode numbers in it are.
fn blocks(lengths: impl Iterator<Item = usize>) -> Vec<(usize, usize)> {
    let mut blocks = vec![(0, 0)];
    for length in lengths {
        let last = blocks.len() - 1;
        let (count, used) = &mut blocks[last];
        let needed = DIRENT + length;
        if *used + needed > BLOCK as usize {
            blocks.push((1, needed));
        } else {
            *count += 1;
            *used += needed;
        }
    }
    blocks
}

/// The size in bytes of a directory with names of these lengths, `.` and `..`
/// included.
pub fn size(lengths: impl Iterator<Item = usize>) -> u64 {
    let blocks = blocks(lengths);
    let last = blocks.last().map_or(0, |(_, used)| *used);
    (blocks.len() as u64 - 1) * BLOCK + last as u64
}

/// The directory's data. `entries` are sorted by name.
pub fn encode(entries: &[Dirent<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = entries;
    for (count, _) in blocks(entries.iter().map(|entry| entry.name.len())) {
        out.resize(out.len().next_multiple_of(BLOCK as usize), 0);
        let (here, later) = rest.split_at(count);
        rest = later;
        // The first name's offset tells readers how many entries there are.
        let mut name_at = count * DIRENT;
        for entry in here {
            out.extend(entry.nid.to_le_bytes());
            out.extend((name_at as u16).to_le_bytes());
            out.extend([entry.file_type, 0]);
            name_at += entry.name.len();
        }
        for entry in here {
            out.extend(entry.name);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_told_is_the_size_written() {
        for count in [0, 1, 2, 50, 100, 1000] {
            let names: Vec<String> = (0..count)
                .map(|i| format!("{i:0>width$}", width = 1 + i % 255))
                .collect();
            let entries: Vec<Dirent<'_>> = names
                .iter()
                .map(|name| Dirent {
                    name: name.as_bytes(),
                    nid: 1,
                    file_type: 1,
                })
                .collect();
            let data = encode(&entries);
            assert_eq!(data.len() as u64, size(names.iter().map(String::len)));
        }
    }

    #[test]
    fn a_full_block_ends_with_its_last_name() {
        // 12 + 4 bytes an entry: exactly 256 fill a block.
        let entries: Vec<Dirent<'_>> = (0..257)
            .map(|_| Dirent {
                name: b"abcd",
                nid: 0,
                file_type: 1,
            })
            .collect();
        let data = encode(&entries);
        assert_eq!(data.len(), 4096 + 16);
        assert_eq!(&data[4092..4096], b"abcd");
        assert_eq!(data[4096 + 8..4096 + 10], [12, 0]);
    }
}
