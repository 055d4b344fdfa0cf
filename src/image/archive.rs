//! The outside of an image: an archive file, a stream, or an OCI layout directory,
//! seen as named members.

use super::error::{Context, ImageError, Result, printable};
use super::layer::{Compression, Metered, Scratch, decompress};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use vm_run_archive::{Kind, Stream, TarReader};

/// Symbolic links from member to member, as old `docker save` made them for layers.
const MOST_LINKS: usize = 8;

/// Where an image comes from.
pub enum Input<'a> {
    /// A file or a directory.
    Path(&'a Path),
    /// A stream, such as standard input.
    Reader(&'a mut dyn Read),
}

/// An opened source of members.
pub enum Archive {
    /// A directory.
    Directory(OwnedFd),
    /// A plain tar.
    Tar {
        /// The tar.
        file: File,
        /// Its members by name, without a leading `./`.
        members: HashMap<Vec<u8>, Member>,
    },
}

/// A member of a tar.
pub enum Member {
    /// A file: where its bytes begin, and how many there are.
    File(u64, u64),
    /// Another member's name.
    Link(Vec<u8>),
}

/// An open member.
pub struct Opened {
    file: File,
    position: u64,
    left: u64,
}

impl Archive {
    /// Opens an image's outside. A stream, and an archive that is compressed as a
    /// whole, is first copied to an unnamed temporary file.
    ///
    /// # Errors
    /// [`ImageError`] when it is neither a directory nor a tar.
    pub fn open(input: Input<'_>, scratch: &Scratch<'_>) -> Result<Archive> {
        let file = match input {
            Input::Reader(reader) => spool(reader, scratch)?,
            Input::Path(path) => {
                let shown = || format!("open {}", path.display());
                let mut file = File::open(path).context(shown)?;
                let kind = file.metadata().context(shown)?;
                if kind.is_dir() {
                    return Ok(Archive::Directory(file.into()));
                }
                let plain =
                    kind.is_file() && Compression::of(&first_bytes(&file)?) == Compression::None;
                if plain {
                    file
                } else {
                    spool(&mut file, scratch)?
                }
            }
        };
        let length = file
            .metadata()
            .context(|| "stat the archive".to_owned())?
            .len();
        let mut stream = &file;
        stream
            .seek(SeekFrom::Start(0))
            .context(|| "read the archive".to_owned())?;
        let members = index(
            Seeking {
                file: stream,
                left: length,
            },
            scratch.limits.members,
        )?;
        Ok(Archive::Tar { file, members })
    }

    /// Opens a member; `None` when there is none of this name.
    ///
    /// # Errors
    /// [`ImageError::Io`] when it cannot be read, [`ImageError::Archive`] when it is
    /// no file.
    pub fn member(&self, name: &str) -> Result<Option<Opened>> {
        match self {
            Archive::Directory(root) => {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
                let file = match openat2(root, name, flags, Mode::empty(), beneath) {
                    Err(rustix::io::Errno::NOENT) => return Ok(None),
                    other => File::from(
                        other
                            .map_err(io::Error::from)
                            .context(|| format!("open {name}"))?,
                    ),
                };
                let meta = file.metadata().context(|| format!("stat {name}"))?;
                if !meta.is_file() {
                    return Err(ImageError::Archive(format!("{name} is not a file")));
                }
                Ok(Some(Opened {
                    file,
                    position: 0,
                    left: meta.len(),
                }))
            }
            Archive::Tar { file, members } => {
                let Some((position, left)) = find(members, name.as_bytes())? else {
                    return Ok(None);
                };
                let file = file
                    .try_clone()
                    .context(|| "share the archive's file".to_owned())?;
                Ok(Some(Opened {
                    file,
                    position,
                    left,
                }))
            }
        }
    }

    /// The whole of a small member; `None` when there is none of this name.
    ///
    /// # Errors
    /// [`ImageError::Limit`] when it has more than `most` bytes, and those of
    /// [`Archive::member`].
    pub fn document(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>> {
        let Some(mut member) = self.member(name)? else {
            return Ok(None);
        };
        if member.left > most {
            return Err(ImageError::Limit(format!(
                "{} has more than {most} bytes",
                printable(name.as_bytes())
            )));
        }
        let mut bytes = Vec::new();
        member
            .read_to_end(&mut bytes)
            .context(|| format!("read {}", printable(name.as_bytes())))?;
        Ok(Some(bytes))
    }
}

impl Opened {
    /// Bytes not yet read.
    pub fn left(&self) -> u64 {
        self.left
    }
}

impl Read for Opened {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut buffer[..most], self.position)?;
        if count == 0 && most > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.position += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

/// A tar in a file, whose members are passed over without reading them.
struct Seeking<'a> {
    file: &'a File,
    left: u64,
}

impl Read for Seeking<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.left = self.left.saturating_sub(count as u64);
        Ok(count)
    }
}

impl Stream for Seeking<'_> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        // Seeking past the end would succeed and hide that the archive is cut.
        self.left = self
            .left
            .checked_sub(count)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        self.file
            .seek_relative(i64::try_from(count).map_err(|_| io::ErrorKind::UnexpectedEof)?)
    }
}

fn find(members: &HashMap<Vec<u8>, Member>, name: &[u8]) -> Result<Option<(u64, u64)>> {
    let mut name = normal(name, b"");
    for _ in 0..MOST_LINKS {
        match members.get(&name) {
            None => return Ok(None),
            Some(Member::File(position, length)) => return Ok(Some((*position, *length))),
            Some(Member::Link(target)) => name = target.clone(),
        }
    }
    Err(ImageError::Archive(format!(
        "{} links in circles",
        printable(&name)
    )))
}

/// A name without `.`, `..` and doubled slashes, taken from the folder `folder`.
/// Members are only looked up by it, never opened on a file system.
fn normal(name: &[u8], folder: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in folder
        .split(|b| *b == b'/')
        .chain(name.split(|b| *b == b'/'))
    {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            _ => parts.push(part),
        }
    }
    parts.join(&b'/')
}

fn index(stream: impl Stream, most: usize) -> Result<HashMap<Vec<u8>, Member>> {
    let mut reader = TarReader::new(stream);
    let mut members = HashMap::new();
    while let Some(entry) = reader.next_entry()? {
        let name = normal(&entry.path, b"");
        let folder = name.rsplitn(2, |b| *b == b'/').nth(1).unwrap_or_default();
        let member = match (entry.kind, entry.pieces.as_slice()) {
            (Kind::Regular, []) if entry.size == 0 => Member::File(0, 0),
            (Kind::Regular, [piece]) if piece.length == entry.size => {
                Member::File(piece.position, piece.length)
            }
            (Kind::Symlink, _) => Member::Link(normal(&entry.link, folder)),
            (Kind::HardLink, _) => Member::Link(normal(&entry.link, b"")),
            _ => continue,
        };
        members.insert(name, member);
        if members.len() > most {
            return Err(ImageError::Limit(format!(
                "the archive has more than {most} members"
            )));
        }
    }
    Ok(members)
}

fn first_bytes(file: &File) -> Result<Vec<u8>> {
    let mut first = [0; 4];
    let count = file
        .read_at(&mut first, 0)
        .context(|| "read the archive".to_owned())?;
    Ok(first[..count].to_vec())
}

/// Copies a stream, decompressed, to an unnamed temporary file.
fn spool(input: &mut dyn Read, scratch: &Scratch<'_>) -> Result<File> {
    let mut file =
        tempfile::tempfile_in(scratch.directory).context(|| "make a temporary file".to_owned())?;
    scratch.progress.begin("Reading the archive", None);
    let metered = Metered::new(input, scratch.progress);
    let count = metered.count();
    let (mut stream, compression) =
        decompress(metered).context(|| "read the archive".to_owned())?;
    let mut buffer = vec![0; 128 << 10];
    let mut total: u64 = 0;
    loop {
        let read = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if compression != Compression::None => {
                return Err(ImageError::Tar(format!(
                    "the compressed archive is damaged or cut ({error})"
                )));
            }
            Err(error) => return Err(error).context(|| "read the archive".to_owned()),
        };
        total += read as u64;
        let input = if compression == Compression::None {
            u64::MAX
        } else {
            count.get()
        };
        scratch.limits.check_unpacked(input, total)?;
        file.write_all(&buffer[..read])
            .context(|| "keep the archive in a temporary file".to_owned())?;
    }
    scratch.progress.end();
    Ok(file)
}
