//! The containers there are: one database in the state directory.

use super::record::{Record, Spec, State};
use crate::database;
use crate::unfit::Unfit;
use anyhow::{Context, Result, bail};
use rusqlite::{Connection, OptionalExtension, Row};
use std::path::Path;

const TABLES: &str = "CREATE TABLE container (
    id    TEXT PRIMARY KEY,
    name  TEXT NOT NULL UNIQUE,
    spec  TEXT NOT NULL,
    state TEXT NOT NULL
) STRICT;";

/// The fewest digits of an id that stand for it.
const SHORTEST_PREFIX: usize = 2;

/// The database.
pub struct Store(Connection);

impl Store {
    /// Opens the database of the state directory `root`, making it if need be.
    ///
    /// # Errors
    /// One line: a file that is no database of ours, or of a newer vm-run.
    pub fn open(root: &Path) -> Result<Self> {
        database::open(&root.join("containers.db"), TABLES).map(Self)
    }

    /// Enters a container.
    ///
    /// # Errors
    /// A name that another has.
    pub fn insert(&self, record: &Record) -> Result<()> {
        let done = self.0.execute(
            "INSERT INTO container (id, name, spec, state) VALUES (?1, ?2, ?3, ?4)",
            (
                &record.id,
                &record.name,
                serde_json::to_string(&record.spec)?,
                serde_json::to_string(&record.state)?,
            ),
        );
        taken(done, &record.name)
    }

    /// Whether a container has this name.
    ///
    /// # Errors
    /// The database's.
    pub fn has_name(&self, name: &str) -> Result<bool> {
        let mut ask = self.0.prepare("SELECT 1 FROM container WHERE name = ?1")?;
        Ok(ask.exists([name])?)
    }

    /// Whether a container has exactly this id.
    ///
    /// # Errors
    /// The database's.
    pub fn has_id(&self, id: &str) -> Result<bool> {
        let mut ask = self.0.prepare("SELECT 1 FROM container WHERE id = ?1")?;
        Ok(ask.exists([id])?)
    }

    /// The container of a name, an id, or an unambiguous beginning of an id.
    ///
    /// # Errors
    /// None, or several.
    pub fn find(&self, wanted: &str) -> Result<Record> {
        let select = "SELECT id, name, spec, state FROM container WHERE";
        let by_name = self
            .0
            .query_row(&format!("{select} name = ?1 OR id = ?1"), [wanted], parts)
            .optional()?;
        if let Some(found) = by_name {
            return record(found);
        }
        let is_prefix =
            wanted.len() >= SHORTEST_PREFIX && wanted.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_prefix {
            return Err(Unfit::missing(format!("no such container: {wanted}")).into());
        }
        let mut ask = self
            .0
            .prepare(&format!("{select} substr(id, 1, length(?1)) = ?1 LIMIT 2"))?;
        let mut found = ask
            .query_map([wanted.to_ascii_lowercase()], parts)?
            .collect::<rusqlite::Result<Vec<_>>>()?;
        match (found.pop(), found.pop()) {
            (Some(one), None) => record(one),
            (Some(_), Some(_)) => {
                bail!("{wanted} is the beginning of more than one id: give more of it")
            }
            (None, _) => Err(Unfit::missing(format!("no such container: {wanted}")).into()),
        }
    }

    /// All containers, the newest first.
    ///
    /// # Errors
    /// The database's.
    pub fn list(&self) -> Result<Vec<Record>> {
        let mut ask = self
            .0
            .prepare("SELECT id, name, spec, state FROM container ORDER BY rowid DESC")?;
        let found = ask
            .query_map([], parts)?
            .collect::<rusqlite::Result<Vec<_>>>()?;
        found.into_iter().map(record).collect()
    }

    /// Replaces a container's state. One that was removed stays so.
    ///
    /// # Errors
    /// The database's.
    pub fn set_state(&self, id: &str, state: &State) -> Result<()> {
        self.0.execute(
            "UPDATE container SET state = ?2 WHERE id = ?1",
            (id, serde_json::to_string(state)?),
        )?;
        Ok(())
    }

    /// Replaces what was asked for. Of a container that was removed nothing is written.
    ///
    /// # Errors
    /// The database's.
    pub fn set_spec(&self, id: &str, spec: &Spec) -> Result<()> {
        self.0.execute(
            "UPDATE container SET spec = ?2 WHERE id = ?1",
            (id, serde_json::to_string(spec)?),
        )?;
        Ok(())
    }

    /// Gives it another name.
    ///
    /// # Errors
    /// A name that another has.
    pub fn rename(&self, id: &str, name: &str) -> Result<()> {
        let done = self
            .0
            .execute("UPDATE container SET name = ?2 WHERE id = ?1", (id, name));
        taken(done, name)
    }

    /// Forgets it.
    ///
    /// # Errors
    /// The database's.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.0
            .execute("DELETE FROM container WHERE id = ?1", [id])?;
        Ok(())
    }
}

type Parts = (String, String, String, String);

fn parts(row: &Row<'_>) -> rusqlite::Result<Parts> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
}

fn record((id, name, spec, state): Parts) -> Result<Record> {
    let spoilt = || format!("the record of container {id} is spoilt");
    let spec: Spec = serde_json::from_str(&spec).with_context(spoilt)?;
    let state: State = serde_json::from_str(&state).with_context(spoilt)?;
    Ok(Record {
        id,
        name,
        spec,
        state,
    })
}

/// That another container has a name.
pub fn name_taken(name: &str) -> Unfit {
    Unfit::conflict(format!(
        "the name {name} is taken by another container: remove or rename it first"
    ))
}

/// Says in plain words that a name is taken.
fn taken(done: rusqlite::Result<usize>, name: &str) -> Result<()> {
    match done {
        Ok(_) => Ok(()),
        Err(rusqlite::Error::SqliteFailure(error, _))
            if error.code == rusqlite::ErrorCode::ConstraintViolation =>
        {
            Err(name_taken(name).into())
        }
        Err(error) => Err(error.into()),
    }
}
