//! `vm-run diff` and `vm-run top`: what a container's guest says of it, as docker shows
//! it. Whatever it says was written by a guest, and does nothing to a terminal.

use super::engine::Engine;
use super::files::Files;
use super::record::{Record, Status};
use super::show;
use crate::unfit::Unfit;
use anyhow::Result;
use fork::task::{Change, ChangeKind, ProcessRow, Task};
use jiff::Timestamp;
use std::io::Write;

/// `vm-run diff`
///
/// # Errors
/// One line.
pub fn diff(engine: &Engine, wanted: &str, out: &mut impl Write) -> Result<()> {
    for change in changes(engine, &engine.find(wanted)?)? {
        let letter = match change.kind {
            ChangeKind::Changed => 'C',
            ChangeKind::Added => 'A',
            ChangeKind::Deleted => 'D',
        };
        writeln!(out, "{letter} {}", shown(&change.path))?;
    }
    Ok(())
}

/// What a container has changed of its image.
///
/// # Errors
/// One whose files cannot be reached.
pub fn changes(engine: &Engine, record: &Record) -> Result<Vec<Change>> {
    let files = Files::of(engine, record)?;
    let changes = files.ask(Task::Changes);
    files.close()?;
    changes
}

/// `vm-run top`
///
/// # Errors
/// A container that does not run.
pub fn top(engine: &Engine, wanted: &str, out: &mut impl Write) -> Result<()> {
    show::columns(&processes(engine, &engine.find(wanted)?)?, out)
}

/// The processes of a container as a table, its header first.
///
/// # Errors
/// A container that does not run.
pub fn processes(engine: &Engine, record: &Record) -> Result<Vec<[String; 8]>> {
    if record.state.status != Status::Running {
        let (name, status) = (&record.name, record.state.status.word());
        return Err(Unfit::conflict(format!(
            "container {name} is {status}: only one that runs has processes to show"
        ))
        .into());
    }
    let rows: Vec<ProcessRow> = Files::of(engine, record)?.ask(Task::Processes)?;
    let header = ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"];
    let mut table = vec![header.map(str::to_owned)];
    table.extend(rows.iter().map(columns_of));
    Ok(table)
}

fn columns_of(row: &ProcessRow) -> [String; 8] {
    let share = row.ran.saturating_mul(100) / row.age.max(1);
    let seconds = row.ran / 100;
    let started = Timestamp::from_second(row.started).unwrap_or_default();
    let terminal = match shown(row.terminal.as_bytes()) {
        none if none.is_empty() => "?".to_owned(),
        terminal => terminal,
    };
    [
        row.uid.to_string(),
        row.pid.to_string(),
        row.parent.to_string(),
        share.min(99).to_string(),
        started.strftime("%H:%M").to_string(),
        terminal,
        format!(
            "{:02}:{:02}:{:02}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60
        ),
        shown(&row.command),
    ]
}

/// A guest's words, on one line of a terminal.
fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut shown = String::with_capacity(text.len());
    for char in text.chars() {
        if char.is_control() {
            shown.extend(char.escape_default());
        } else {
            shown.push(char);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_a_row_and_nothing_for_the_terminal_to_obey() {
        let row = ProcessRow {
            uid: 7,
            pid: 1,
            parent: 0,
            started: 1_700_000_000,
            age: 1000,
            ran: 366_100,
            terminal: String::new(),
            command: b"sh -c \x1b[2J\xff".to_vec(),
        };
        let expected = [
            "7",
            "1",
            "0",
            "99",
            "22:13",
            "?",
            "01:01:01",
            "sh -c \\u{1b}[2J\u{fffd}",
        ];
        assert_eq!(columns_of(&row), expected);
    }
}
