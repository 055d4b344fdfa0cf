//! What a guest printed: the tail of it, for reports of its death.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of output kept; older ones are dropped.
pub const CAPACITY: usize = 64 * 1024;

/// Longest line passed to the log in one record; longer ones are cut in pieces.
const LOG_LINE_MAX: usize = 1024;

/// A bounded buffer of a guest's console output. Clones share one buffer.
#[derive(Clone, Debug, Default)]
pub struct Console {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    bytes: VecDeque<u8>,
    /// Set: each finished line goes to `log::debug!` under this name.
    log_as: Option<String>,
    line: Vec<u8>,
}

impl Console {
    /// An empty console that keeps its output to itself.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty console that also passes each line to `log::debug!`, as
    /// `name: line`.
    pub fn with_log(name: impl Into<String>) -> Self {
        let console = Self::default();
        console.lock().log_as = Some(name.into());
        console
    }

    /// Appends what the guest printed; the oldest bytes make room.
    pub fn push(&self, bytes: &[u8]) {
        let mut inner = self.lock();
        let newest = &bytes[bytes.len().saturating_sub(CAPACITY)..];
        let excess = (inner.bytes.len() + newest.len()).saturating_sub(CAPACITY);
        inner.bytes.drain(..excess);
        inner.bytes.extend(newest);
        inner.log_lines(bytes);
    }

    /// The last `lines` lines, oldest first, without empty ones. Bytes that are
    /// not UTF-8 become U+FFFD; control characters (escape sequences of a hostile
    /// guest among them) are removed, tabs become spaces.
    pub fn tail(&self, lines: usize) -> Vec<String> {
        let mut inner = self.lock();
        let text = inner.bytes.make_contiguous();
        let mut tail: Vec<String> = text
            .rsplit(|&byte| byte == b'\n')
            .map(printable)
            .filter(|line| !line.is_empty())
            .take(lines)
            .collect();
        tail.reverse();
        tail
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // The buffer is consistent between any two statements: a panic elsewhere
        // must not cost the guest's last words.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn log_lines(&mut self, bytes: &[u8]) {
        let Some(name) = &self.log_as else { return };
        if !log::log_enabled!(log::Level::Debug) {
            return;
        }
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
            }
            if byte == b'\n' || self.line.len() == LOG_LINE_MAX {
                let line = printable(&self.line);
                self.line.clear();
                if !line.is_empty() {
                    log::debug!("{name}: {line}");
                }
            }
        }
    }
}

fn printable(line: &[u8]) -> String {
    String::from_utf8_lossy(line)
        .chars()
        .map(|c| if c == '\t' { ' ' } else { c })
        .filter(|c| !c.is_control())
        .collect::<String>()
        .trim_end()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_gives_the_last_lines_in_order() {
        let console = Console::new();
        console.push(b"one\r\ntwo\r\n\r\nthr");
        console.push(b"ee");
        assert_eq!(console.tail(2), ["two", "three"]);
        assert_eq!(console.tail(9), ["one", "two", "three"]);
        assert!(console.tail(0).is_empty());
    }

    #[test]
    fn control_characters_and_bad_utf8_do_not_reach_a_terminal() {
        let console = Console::new();
        console.push(b"\x1b[2Jred\x07\tfox \xff\n");
        assert_eq!(console.tail(1), ["[2Jred fox \u{fffd}"]);
    }

    #[test]
    fn output_is_bounded() {
        let console = Console::new();
        for _ in 0..3 * CAPACITY / 8 {
            console.push(b"1234567\n");
        }
        console.push(&vec![b'x'; 2 * CAPACITY]);
        assert_eq!(console.lock().bytes.len(), CAPACITY);
        assert_eq!(console.tail(5).len(), 1);
    }
}
