//! `vm-run cp`: between a container and the caller's own files, by docker's rules for what
//! a path means. `export` is the same of a whole container.
//!
//! What comes out of a guest is unpacked as the calling user, below the directory that was
//! named and under the one name that was asked for, without links being followed, and
//! without setuid bits, attributes and devices.

use super::engine::Engine;
use super::files::{Errand, Files, TaskFailed};
use anyhow::{Context, Result, bail};
use fork::task::{PathStat, Task};
use indicatif::DecimalBytes;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use vm_run_archive::{Mounts, Pack, Plain, Resolve, TarReader, TarWriter, Unpack, pack, unpack};

/// What is copied at once.
const BUFFER: usize = 64 << 10;

/// What can be typed after `cp`.
#[derive(Debug, clap::Args)]
pub struct CopyArgs {
    /// Keep the owners of what is copied into a container; else they are root
    #[arg(short, long)]
    archive: bool,
    /// Follow a link at the end of SOURCE
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// Say nothing of what was done
    #[arg(short, long)]
    quiet: bool,
    /// CONTAINER:PATH, a path, or - for a tar on standard input
    #[arg(value_name = "SOURCE")]
    from: OsString,
    /// CONTAINER:PATH, a path, or - for a tar on standard output
    #[arg(value_name = "DESTINATION")]
    to: OsString,
}

/// One side of a copy.
enum Side {
    /// A name of a container, and a path in it.
    Container(String, Vec<u8>),
    Ours(PathBuf),
    /// A tar on a standard stream.
    Stream,
}

impl Side {
    /// A path that begins with a dot or a slash is ours, whatever colons it has.
    fn parse(word: &OsStr) -> Result<Self> {
        let bytes = word.as_bytes();
        if bytes == b"-" {
            return Ok(Self::Stream);
        }
        let colon = bytes.iter().position(|byte| *byte == b':');
        match colon {
            Some(at) if !matches!(bytes[0], b'.' | b'/' | b':') => {
                let name = String::from_utf8_lossy(&bytes[..at]).into_owned();
                if bytes.len() == at + 1 {
                    bail!("no path after {name}:");
                }
                Ok(Self::Container(name, bytes[at + 1..].to_vec()))
            }
            _ if bytes.is_empty() => bail!("a path cannot be empty"),
            _ => Ok(Self::Ours(PathBuf::from(word))),
        }
    }
}

/// `vm-run cp`
///
/// # Errors
/// One line.
pub fn copy(engine: &Engine, args: &CopyArgs) -> Result<()> {
    let (name, copied, what) = match (Side::parse(&args.from)?, Side::parse(&args.to)?) {
        (Side::Container(..), Side::Container(..)) => {
            bail!("copying from one container to another is not supported: go by a directory")
        }
        (Side::Container(name, path), to) => {
            let record = engine.find(&name)?;
            let files = Files::of(engine, &record)?;
            let copied = copy_out(&files, &path, &to, args.follow_link);
            (name, closed(files, copied)?, "from")
        }
        (from, Side::Container(name, path)) => {
            let record = engine.find(&name)?;
            let files = Files::of(engine, &record)?;
            let copied = files
                .check_kept()
                .and_then(|()| copy_in(&files, &from, &path, args));
            (name, closed(files, copied)?, "to")
        }
        _ => bail!("one of the two has to be in a container: CONTAINER:PATH"),
    };
    if !args.quiet && io::stderr().is_terminal() {
        eprintln!("vm-run: {} {what} {name}", DecimalBytes(copied));
    }
    Ok(())
}

/// Closes the files, whatever has come of it. What was done comes first.
fn closed<T>(files: Files<'_>, done: Result<T>) -> Result<T> {
    let closed = files.close();
    let done = done?;
    closed.map(|()| done)
}

/// `vm-run export`: a tar of everything, to a file that appears when all is in it, or to
/// standard output.
///
/// # Errors
/// One line.
pub fn export(engine: &Engine, wanted: &str, output: Option<&Path>) -> Result<()> {
    if output.is_none() {
        check_no_terminal("-o FILE")?;
    }
    let record = engine.find(wanted)?;
    let files = Files::of(engine, &record)?;
    let exported = export_to(&files, output);
    closed(files, exported)
}

fn export_to(files: &Files<'_>, output: Option<&Path>) -> Result<()> {
    let errand = files.task(Task::Pack {
        path: b"/".to_vec(),
        name: Vec::new(),
        follow: false,
        one_mount: true,
    })?;
    let Some(path) = output else {
        return drain(errand, &mut io::stdout().lock()).map(drop);
    };
    let failed = || format!("cannot write {}", path.display());
    let beside = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(beside).with_context(failed)?;
    drain(errand, file.as_file_mut()).with_context(failed)?;
    file.persist(path).with_context(failed)?;
    Ok(())
}

fn check_no_terminal(instead: &str) -> Result<()> {
    if io::stdout().is_terminal() {
        bail!("an archive is nothing for a terminal: redirect it, or give {instead}");
    }
    Ok(())
}

/// Copies all that a task says; how much that was.
fn drain(mut errand: Errand, to: &mut impl Write) -> Result<u64> {
    let mut to = BufWriter::with_capacity(BUFFER, to);
    let copied = io::copy(&mut errand, &mut to).and_then(|copied| to.flush().map(|()| copied));
    let copied = copied.context("cannot copy the archive")?;
    errand.finish()?;
    Ok(copied)
}

/// What a path says of itself, before anything is looked at.
struct Words<'a> {
    /// Its last part; empty if it is what is in a directory that is meant.
    base: &'a [u8],
    /// What is before that.
    parent: &'a [u8],
    /// Whether it ends as only a directory's may.
    is_directory: bool,
}

impl<'a> Words<'a> {
    fn of(path: &'a [u8]) -> Self {
        let is_contents = path.ends_with(b"/.") || matches!(path, b"." | b"..");
        let is_contents = is_contents || path.ends_with(b"/..");
        let end = path.iter().rposition(|byte| *byte != b'/');
        let trimmed = end.map_or(&b""[..], |end| &path[..=end]);
        let (parent, base) = match trimmed.iter().rposition(|byte| *byte == b'/') {
            Some(0) => (&b"/"[..], &trimmed[1..]),
            Some(at) => (&trimmed[..at], &trimmed[at + 1..]),
            None => (&b""[..], trimmed),
        };
        Self {
            base: if is_contents { b"" } else { base },
            parent,
            is_directory: is_contents || trimmed.len() < path.len(),
        }
    }
}

/// What lies at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    Directory,
    /// Anything else.
    File,
}

/// Where a copy goes: whether into what is at the destination, or beside it; and its name
/// there, empty for what is in a directory.
fn aim<'a>(
    from: &Words<'a>,
    source: Found,
    to: &Words<'a>,
    there: Found,
) -> Result<(bool, &'a [u8])> {
    if source != Found::Directory && from.is_directory {
        bail!("the source is no directory, and its path ends like one's");
    }
    match (source, there) {
        (_, Found::Directory) => Ok((true, from.base)),
        (Found::Directory, Found::File) => {
            bail!("a directory cannot be copied over a file")
        }
        (_, Found::File | Found::Nothing) if source != Found::Directory && to.is_directory => {
            bail!("the destination is no directory, and its path ends like one's")
        }
        (_, Found::File | Found::Nothing) if to.base.is_empty() => {
            bail!("the destination is not there")
        }
        (_, Found::File | Found::Nothing) => Ok((false, to.base)),
    }
}

fn stat(files: &Files<'_>, path: &[u8]) -> Result<PathStat> {
    let path = path.to_vec();
    files.ask(Task::Stat { path })
}

fn found(stat: &PathStat) -> Found {
    const KIND: u32 = 0o170_000;
    const DIRECTORY: u32 = 0o040_000;
    const LINK: u32 = 0o120_000;
    match stat.mode & KIND {
        DIRECTORY => Found::Directory,
        LINK if stat.target.is_empty() => Found::Nothing,
        _ => Found::File,
    }
}

fn copy_out(files: &Files<'_>, path: &[u8], to: &Side, follow: bool) -> Result<u64> {
    let words = Words::of(path);
    let pack = |name: &[u8]| {
        files.task(Task::Pack {
            path: path.to_vec(),
            name: name.to_vec(),
            follow,
            one_mount: false,
        })
    };
    let to = match to {
        Side::Ours(to) => to,
        _ => {
            check_no_terminal("a path")?;
            return drain(pack(words.base)?, &mut io::stdout().lock());
        }
    };
    let mut source = stat(files, path)?;
    if follow && !source.target.is_empty() {
        source = stat(files, &source.target)?;
    }
    let there = look(to)?;
    // A link to a file stays, and what it leads to is replaced.
    let real = match there {
        Found::File => fs::canonicalize(to).with_context(|| cannot("find", to))?,
        _ => to.clone(),
    };
    let mut ends = Words::of(real.as_os_str().as_bytes());
    ends.is_directory = Words::of(to.as_os_str().as_bytes()).is_directory;
    let (is_inside, name) = aim(&words, found(&source), &ends, there)?;
    let directory = match (is_inside, ends.parent) {
        (true, _) => to,
        (false, b"") => Path::new("."),
        (false, parent) => Path::new(OsStr::from_bytes(parent)),
    };
    let opened = File::open(directory).with_context(|| cannot("open", directory))?;
    let how = Unpack {
        only: name,
        resolve: Resolve::NoLinks,
        replace: false,
        owners: false,
        privileges: false,
    };
    let mut errand = pack(name)?;
    let mut counted = Counted(&mut errand, 0);
    let mut reader = TarReader::new(Plain(BufReader::with_capacity(BUFFER, &mut counted)));
    let unpacked = unpack(opened.as_fd(), &how, &mut reader);
    drop(reader);
    let copied = counted.1;
    if let Err(error) = unpacked {
        // An archive that is cut is the lesser news. One that is whole and refused has a
        // task that may have more to say than anybody reads.
        if matches!(error, vm_run_archive::Error::Tar(_)) {
            errand.finish()?;
        }
        return Err(error).with_context(|| cannot("copy to", to));
    }
    errand.finish()?;
    Ok(copied)
}

fn copy_in(files: &Files<'_>, from: &Side, path: &[u8], args: &CopyArgs) -> Result<u64> {
    let mut target = path.to_vec();
    let mut there = match stat(files, path) {
        Ok(stat) => {
            // Through a link, to what it leads to.
            if stat.target.is_empty() {
                found(&stat)
            } else {
                target.clone_from(&stat.target);
                match self::stat(files, &target) {
                    Ok(stat) => found(&stat),
                    Err(error) if TaskFailed::is_not_found(&error) => Found::Nothing,
                    Err(error) => return Err(error),
                }
            }
        }
        Err(error) if TaskFailed::is_not_found(&error) => Found::Nothing,
        Err(error) => return Err(error),
    };
    if there == Found::Nothing && target.iter().all(|byte| *byte == b'/') {
        there = Found::Directory;
    }
    let unpack_to = |directory: &[u8]| {
        files.task(Task::Unpack {
            path: directory.to_vec(),
            owners: args.archive,
            replace: false,
        })
    };
    let from = match from {
        Side::Ours(from) => from,
        _ if there != Found::Directory => {
            bail!("an archive is unpacked into a directory, and the destination is none")
        }
        _ => {
            return feed(unpack_to(&target)?, |to| {
                Ok(io::copy(&mut io::stdin(), to)?)
            });
        }
    };
    let bytes = from.as_os_str().as_bytes();
    let words = Words::of(bytes);
    let source = source_kind(from, args.follow_link || words.is_directory)?;
    let mut ends = Words::of(&target);
    ends.is_directory = Words::of(path).is_directory;
    let (is_inside, name) = aim(&words, source, &ends, there)?;
    let what = Pack {
        path: bytes,
        name,
        follow: args.follow_link || words.is_directory,
        mounts: Mounts::Real,
    };
    let directory = if is_inside { &target[..] } else { ends.parent };
    feed(unpack_to(directory)?, |to| {
        let mut counted = CountedOut(to, 0);
        let mut writer = TarWriter::new(BufWriter::with_capacity(BUFFER, &mut counted));
        pack(&what, &mut writer)?;
        // Its buffer has been flushed.
        writer.finish()?;
        Ok(counted.1)
    })
}

/// Gives a task its input. If both fail, it is the task that knows why.
fn feed(
    mut errand: Errand,
    give: impl FnOnce(&mut super::files::Input<'_>) -> Result<u64>,
) -> Result<u64> {
    let mut input = errand.input();
    let given = give(&mut input);
    let is_whole = given.is_ok();
    let is_refused = given.as_ref().is_err_and(is_broken_pipe);
    if is_whole {
        input.end()?;
    }
    if is_whole || is_refused {
        errand.finish()?;
    }
    // What was not whole ends with the connection.
    given
}

/// Whether the other side took no more.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = |kind: io::ErrorKind| kind == io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| {
        let cause = cause.downcast_ref::<io::Error>();
        cause.is_some_and(|cause| io(cause.kind()))
    })
}

/// What is at a path of ours, links followed.
fn look(path: &Path) -> Result<Found> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => Ok(Found::Directory),
        Ok(_) => Ok(Found::File),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Found::Nothing),
        Err(error) => Err(error).with_context(|| cannot("find", path)),
    }
}

fn source_kind(path: &Path, follow: bool) -> Result<Found> {
    let found = match follow {
        true => fs::metadata(path),
        false => fs::symlink_metadata(path),
    };
    let found = found.with_context(|| cannot("find", path))?;
    Ok(match found.is_dir() {
        true => Found::Directory,
        false => Found::File,
    })
}

fn cannot(what: &str, path: &Path) -> String {
    format!("cannot {what} {}", path.display())
}

/// A reader that counts.
struct Counted<R>(R, u64);

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let got = self.0.read(bytes)?;
        self.1 += got as u64;
        Ok(got)
    }
}

/// A writer that counts.
struct CountedOut<W>(W, u64);

impl<W: Write> Write for CountedOut<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.0.write(bytes)?;
        self.1 += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart_as_in_docker() {
        let side = |word: &str| match Side::parse(OsStr::new(word)).expect(word) {
            Side::Container(name, path) => format!("{name} {}", String::from_utf8_lossy(&path)),
            Side::Ours(path) => path.display().to_string(),
            Side::Stream => "stream".to_owned(),
        };
        assert_eq!(side("c:/a:b"), "c /a:b");
        assert_eq!(side("c:rel"), "c rel");
        for ours in ["./c:/a", "/c:/a", "plain", "../c:x"] {
            assert_eq!(side(ours), ours);
        }
        assert_eq!(side("-"), "stream");
        for bad in ["c:", ""] {
            assert!(Side::parse(OsStr::new(bad)).is_err());
        }
    }

    /// Source path and kind, destination path and what is there; whether it goes inside,
    /// and its name.
    fn aimed(from: &str, source: Found, to: &str, there: Found) -> Option<(bool, String)> {
        let (from, to) = (Words::of(from.as_bytes()), Words::of(to.as_bytes()));
        let (inside, name) = aim(&from, source, &to, there).ok()?;
        Some((inside, String::from_utf8_lossy(name).into_owned()))
    }

    #[test]
    fn destinations_are_dockers() {
        use Found::{Directory, File, Nothing};
        let inside = |name: &str| Some((true, name.to_owned()));
        let beside = |name: &str| Some((false, name.to_owned()));
        for (from, source, to, there, expected) in [
            ("/a/f", File, "/d", Directory, inside("f")),
            ("/a/f", File, "/d/new", Nothing, beside("new")),
            ("/a/f", File, "/d/new/", Nothing, None),
            ("/a/f", File, "/d/old", File, beside("old")),
            ("/a/f", File, "/d/old/", File, None),
            ("/a/f/", File, "/d", Directory, None),
            ("/a/f/.", File, "/d", Directory, None),
            ("/a/d", Directory, "/e", Directory, inside("d")),
            ("/a/d/", Directory, "/e", Directory, inside("d")),
            ("/a/d/.", Directory, "/e", Directory, inside("")),
            ("/a/d/.", Directory, "/e/new", Nothing, beside("new")),
            ("/a/d", Directory, "/e/new/", Nothing, beside("new")),
            ("/a/d", Directory, "/e/f", File, None),
            ("/", Directory, "/e", Directory, inside("")),
            (".", Directory, "new", Nothing, beside("new")),
            ("f", File, "new", Nothing, beside("new")),
        ] {
            assert_eq!(aimed(from, source, to, there), expected, "{from} {to}");
        }
        assert_eq!(Words::of(b"/new").parent, b"/");
        assert_eq!(Words::of(b"a//b/").parent, b"a/");
        assert_eq!(Words::of(b"new").parent, b"");
    }
}
