//! The databases of a state directory: SQLite, written by any number of processes. Each
//! change is a transaction: a killed process leaves it done or not done, and after a crash
//! of the host the last ones may be missing, but none is torn (SQLite's write-ahead log,
//! `synchronous=normal`).

use anyhow::{Context, Result, bail};
use rusqlite::{Connection, TransactionBehavior};
use std::path::Path;
use std::time::Duration;

/// How long a process waits for others' transactions. Each takes milliseconds, but nobody
/// queues for them: SQLite looks again, at most ten times a second. A hundred containers
/// that were started at once on one slow processor found it taken for half a minute.
const PATIENCE: Duration = Duration::from_secs(300);

/// What the tables of each look like; raised with a step in [`migrate`].
const VERSION: i64 = 1;

/// Opens the database `path`, making it with these tables if need be.
///
/// # Errors
/// One line: a file that is no database of ours, or of a newer vm-run.
pub fn open(path: &Path, tables: &str) -> Result<Connection> {
    let what = || format!("cannot open {}", path.display());
    let mut connection = Connection::open(path).with_context(what)?;
    connection.busy_timeout(PATIENCE).with_context(what)?;
    // Readers do not wait for a writer, and no start of a container for the disk.
    connection
        .pragma_update(None, "journal_mode", "wal")
        .with_context(what)?;
    connection
        .pragma_update(None, "synchronous", "normal")
        .with_context(what)?;
    // A supervisor holds them open for long: it need not keep pages.
    connection
        .pragma_update(None, "cache_size", -64)
        .with_context(what)?;
    migrate(&mut connection, tables).with_context(what)?;
    Ok(connection)
}

fn migrate(connection: &mut Connection, tables: &str) -> Result<()> {
    if version(connection)? == VERSION {
        return Ok(());
    }
    let change = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Somebody else may have been faster.
    match version(&change)? {
        VERSION => return Ok(()),
        0 => change.execute_batch(tables)?,
        newer => bail!("it is of version {newer}, and this vm-run knows {VERSION}"),
    }
    change.pragma_update(None, "user_version", VERSION)?;
    Ok(change.commit()?)
}

fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each opens, writes and closes, as processes do: the last one out cleans up while
    /// the next comes in.
    #[test]
    fn many_come_and_go_at_once_and_nobody_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("db");
        let write = |number: i64| -> Result<()> {
            let connection = open(&path, "CREATE TABLE t (n INTEGER)")?;
            connection.execute("INSERT INTO t VALUES (?1)", [number])?;
            Ok(())
        };
        std::thread::scope(|scope| {
            for number in 0..100 {
                scope.spawn(move || {
                    for _ in 0..10 {
                        write(number).expect("written");
                    }
                });
            }
        });
        let connection = open(&path, "").expect("opens");
        let count: i64 = connection
            .query_row("SELECT count(*) FROM t", [], |row| row.get(0))
            .expect("counts");
        assert_eq!(count, 1000);
    }
}
