//! What a container has said, kept in files of bounded size.
//!
//! Docker's `json-file` format, a line each, so that tools which read that can read
//! this: `{"log":"text\n","stream":"stdout","time":"2026-01-01T00:00:00.000000000Z"}`.
//! Text that ends without a newline is part of a longer line. Bytes that are not
//! UTF-8 become U+FFFD, as with docker. `log` is written; when it is full it becomes
//! `log.1`, that `log.2`, and the last goes.

use super::record::LogLimits;
use anyhow::{Context, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

/// The longest text of one entry, in bytes: docker's.
const LINE_MAX: usize = 16 << 10;

/// Which of its outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Output {
    /// Its standard output, or its terminal.
    Stdout,
    /// Its standard error.
    Stderr,
}

/// One line, or a part of a long one.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry<'a> {
    /// What was said.
    #[serde(rename = "log", borrow)]
    pub text: Cow<'a, str>,
    /// Where.
    pub stream: Output,
    /// When.
    pub time: Timestamp,
}

impl Entry<'_> {
    /// As it is shown, perhaps with the time before it.
    pub fn line(&self, timestamps: bool) -> String {
        match timestamps {
            true => format!("{:.9} {}", self.time, self.text),
            false => self.text.clone().into_owned(),
        }
    }
}

/// The writer: one for each container.
pub struct Log {
    path: PathBuf,
    limits: LogLimits,
    file: File,
    size: u64,
    /// Of each output, what has not ended with a newline yet.
    pending: HashMap<Output, Vec<u8>>,
}

impl Log {
    /// Opens the log at `path`, and goes on with what is there.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(path: PathBuf, limits: LogLimits) -> Result<Self> {
        let file = append(&path)?;
        let size = file
            .metadata()
            .with_context(|| format!("cannot look at {}", path.display()))?
            .len();
        let mut this = Self {
            path,
            limits,
            file,
            size,
            pending: HashMap::new(),
        };
        this.mend()?;
        Ok(this)
    }

    /// Cuts off a line that a killed writer has left half-written.
    fn mend(&mut self) -> Result<()> {
        if self.size == 0 {
            return Ok(());
        }
        let bytes = fs::read(&self.path).context("cannot read the log")?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n');
        let len = whole.map_or(0, |at| at as u64 + 1);
        if len != self.size {
            self.file.set_len(len).context("cannot mend the log")?;
            self.size = len;
        }
        Ok(())
    }

    /// Takes what was said. It is with the kernel when this returns, line by line: it
    /// survives the death of this process.
    ///
    /// # Errors
    /// A disk that is full.
    pub fn write(&mut self, output: Output, bytes: &[u8]) -> Result<()> {
        let time = Timestamp::now();
        let mut pending = self.pending.remove(&output).unwrap_or_default();
        pending.extend_from_slice(bytes);
        let mut rest = &pending[..];
        let mut lines = Vec::new();
        while let Some(at) = rest.iter().position(|byte| *byte == b'\n') {
            let (line, after) = rest.split_at(at + 1);
            for part in line.chunks(LINE_MAX) {
                encode(&mut lines, output, part, time)?;
            }
            rest = after;
        }
        while rest.len() >= LINE_MAX {
            let (part, after) = rest.split_at(LINE_MAX);
            encode(&mut lines, output, part, time)?;
            rest = after;
        }
        if !rest.is_empty() {
            self.pending.insert(output, rest.to_vec());
        }
        self.append(&lines)
    }

    /// Writes what has not ended with a newline: there will be no more.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn finish(&mut self) -> Result<()> {
        let time = Timestamp::now();
        let mut lines = Vec::new();
        for (output, text) in std::mem::take(&mut self.pending) {
            encode(&mut lines, output, &text, time)?;
        }
        self.append(&lines)
    }

    fn append(&mut self, lines: &[u8]) -> Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        if self.size > 0 && self.size + lines.len() as u64 > self.limits.max_size {
            self.rotate()?;
        }
        self.file
            .write_all(lines)
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        self.size += lines.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> Result<()> {
        let what = || format!("cannot rotate {}", self.path.display());
        for older in (1..self.limits.max_files.max(1)).rev() {
            let from = numbered(&self.path, older - 1);
            match fs::rename(from, numbered(&self.path, older)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(what);
                }
                _ => {}
            }
        }
        if self.limits.max_files <= 1 {
            fs::remove_file(&self.path).with_context(what)?;
        }
        self.file = append(&self.path)?;
        self.size = 0;
        Ok(())
    }
}

fn encode(lines: &mut Vec<u8>, stream: Output, text: &[u8], time: Timestamp) -> Result<()> {
    let text = String::from_utf8_lossy(text);
    serde_json::to_writer(&mut *lines, &Entry { text, stream, time })?;
    lines.push(b'\n');
    Ok(())
}

fn append(path: &Path) -> Result<File> {
    File::options()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// The name of the log that is so many rotations old.
fn numbered(path: &Path, age: u32) -> PathBuf {
    match age {
        0 => path.to_owned(),
        age => path.with_extension(age.to_string()),
    }
}

/// Reads a log from its oldest line on, through rotations.
pub struct Reader {
    path: PathBuf,
    /// The oldest first; the last is the one that is written.
    files: Vec<BufReader<File>>,
    line: Vec<u8>,
}

impl Reader {
    /// Opens what there is.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(path: &Path, max_files: u32) -> Result<Self> {
        let mut files = Vec::new();
        for age in (0..max_files.max(1)).rev() {
            match File::open(numbered(path, age)) {
                Ok(file) => files.push(BufReader::new(file)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot open {}", path.display()));
                }
            }
        }
        Ok(Self {
            path: path.to_owned(),
            files,
            line: Vec::new(),
        })
    }

    /// The next entry that has been written whole, or `None` if there is none as yet.
    ///
    /// # Errors
    /// What the file system says, or a line that is none.
    pub fn next(&mut self) -> Result<Option<Entry<'static>>> {
        loop {
            let Some(file) = self.files.first_mut() else {
                if !self.find_newer()? {
                    return Ok(None);
                }
                continue;
            };
            let before = self.line.len();
            // What is written while we read comes with the next call.
            let got = file
                .by_ref()
                .take(1 << 20)
                .read_until(b'\n', &mut self.line)
                .context("cannot read the log")?;
            if self.line.last() == Some(&b'\n') {
                let line = std::mem::take(&mut self.line);
                let entry: Entry<'_> = serde_json::from_slice(&line)
                    .with_context(|| format!("{} has a spoilt line", self.path.display()))?;
                return Ok(Some(Entry {
                    text: Cow::Owned(entry.text.into_owned()),
                    ..entry
                }));
            }
            debug_assert_eq!(before + got, self.line.len());
            if got == 0 && (self.files.len() > 1 || self.find_newer()?) {
                // Nothing is added to a log that was rotated away.
                self.files.remove(0);
                self.line.clear();
                continue;
            }
            return Ok(None);
        }
    }

    /// Opens the file that is written now, if that is another.
    fn find_newer(&mut self) -> Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let newest = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error).context("cannot open the log"),
        };
        let inode = newest.metadata().context("cannot look at the log")?.ino();
        if let Some(last) = self.files.last() {
            let known = last
                .get_ref()
                .metadata()
                .context("cannot look at the log")?;
            if known.ino() == inode {
                return Ok(false);
            }
        }
        self.files.push(BufReader::new(newest));
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(reader: &mut Reader) -> Vec<(Output, String)> {
        std::iter::from_fn(|| reader.next().expect("reads"))
            .map(|entry| (entry.stream, entry.text.into_owned()))
            .collect()
    }

    #[test]
    fn lines_come_back_with_their_streams() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        let mut log = Log::open(path.clone(), LogLimits::default()).expect("opens");
        log.write(Output::Stdout, b"one\ntw").expect("writes");
        log.write(Output::Stderr, b"bad \xff\n").expect("writes");
        log.write(Output::Stdout, b"o\nthree").expect("writes");
        let mut reader = Reader::open(&path, 3).expect("opens");
        let out = |text: &str| (Output::Stdout, text.to_owned());
        let bad = (Output::Stderr, "bad \u{fffd}\n".to_owned());
        assert_eq!(said(&mut reader), [out("one\n"), bad, out("two\n")]);
        log.finish().expect("writes");
        assert_eq!(said(&mut reader), [out("three")]);
    }

    #[test]
    fn a_log_is_bounded_and_is_followed_through_rotations() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        let limits = LogLimits {
            max_size: 1000,
            max_files: 2,
        };
        let mut log = Log::open(path.clone(), limits).expect("opens");
        let mut reader = Reader::open(&path, limits.max_files).expect("opens");
        let mut followed = 0;
        for i in 0..200 {
            log.write(Output::Stdout, format!("line {i}\n").as_bytes())
                .expect("writes");
            for (_, line) in said(&mut reader) {
                assert_eq!(line, format!("line {followed}\n"));
                followed += 1;
            }
        }
        assert_eq!(followed, 200);
        let files: u64 = fs::read_dir(dir.path())
            .expect("lists")
            .map(|entry| entry.and_then(|e| e.metadata()).expect("there").len())
            .sum();
        assert!(files <= 2000, "{files}");
        let left = said(&mut Reader::open(&path, 2).expect("opens"));
        assert_eq!(left.last().map(|(_, line)| &**line), Some("line 199\n"));
    }

    #[test]
    fn a_half_written_line_is_cut_off() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        let mut log = Log::open(path.clone(), LogLimits::default()).expect("opens");
        log.write(Output::Stdout, b"whole\n").expect("writes");
        drop(log);
        let mut torn = fs::read(&path).expect("reads");
        torn.extend(b"{\"log\":\"half");
        fs::write(&path, torn).expect("writes");
        let mut log = Log::open(path.clone(), LogLimits::default()).expect("opens");
        log.write(Output::Stdout, b"next\n").expect("writes");
        let lines = said(&mut Reader::open(&path, 1).expect("opens"));
        assert_eq!(lines.len(), 2);
    }

    #[test]
    fn a_long_line_is_cut_into_parts() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        let mut log = Log::open(path.clone(), LogLimits::default()).expect("opens");
        let long = vec![b'x'; 3 * LINE_MAX + 5];
        log.write(Output::Stdout, &long).expect("writes");
        log.finish().expect("writes");
        let parts = said(&mut Reader::open(&path, 1).expect("opens"));
        assert_eq!(parts.len(), 4);
        let all: usize = parts.iter().map(|(_, part)| part.len()).sum();
        assert_eq!(all, long.len());
    }
}
