//! `vm-run volume`.

use super::Mount;
use super::store::{Store, is_anonymous};
use crate::container::{Engine, new_id};
use anyhow::{Result, bail};
use clap::Subcommand;
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;

/// What can be done with volumes.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make a volume, and print its name
    Create {
        /// Its name [default: one that is made up]
        name: Option<String>,
    },
    /// List volumes
    Ls {
        /// Print names only
        #[arg(short, long)]
        quiet: bool,
        /// Print a JSON array
        #[arg(long, conflicts_with = "quiet")]
        json: bool,
    },
    /// Print all that is known of volumes, as a JSON array
    Inspect {
        /// Names
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
    },
    /// Remove volumes that no container has
    Rm {
        /// One that is not there is no failure
        #[arg(short, long)]
        force: bool,
        /// Names
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
    },
    /// Remove volumes that no container has and nobody gave a name
    Prune {
        /// Do not ask
        #[arg(short, long)]
        force: bool,
        /// Those with a name, too
        #[arg(short, long)]
        all: bool,
    },
}

/// Does it.
///
/// # Errors
/// One line.
pub fn run(command: VolumeCommand, root: &Path) -> Result<()> {
    let store = Store::of(root);
    let mut out = std::io::stdout();
    match command {
        VolumeCommand::Create { name } => {
            let name = name.map_or_else(new_id, Ok)?;
            store.make(&name)?;
            writeln!(out, "{name}")?;
        }
        VolumeCommand::Ls { quiet, json } => {
            let names = store.names()?;
            if json {
                print(&store, &names, &mut out)?;
            } else {
                if !quiet {
                    writeln!(out, "DRIVER    VOLUME NAME")?;
                }
                let driver = if quiet { "" } else { "local     " };
                for name in names {
                    writeln!(out, "{driver}{name}")?;
                }
            }
        }
        VolumeCommand::Inspect { volumes } => {
            for name in &volumes {
                store.check_exists(name)?;
            }
            print(&store, &volumes, &mut out)?;
        }
        VolumeCommand::Rm { force, volumes } => {
            let engine = Engine::open(root)?;
            for name in volumes {
                if !force || store.exists(&name)? {
                    store.remove(&name, || mounts(&engine))?;
                }
                writeln!(out, "{name}")?;
            }
        }
        VolumeCommand::Prune { force, all } => {
            if !force {
                bail!("this removes volumes that no container has: say --force if that is meant");
            }
            let engine = Engine::open(root)?;
            store.sweep()?;
            for name in store.names()? {
                let is_wanted = all || is_anonymous(&name);
                // One that is in use is not meant.
                if is_wanted && store.remove(&name, || mounts(&engine)).is_ok() {
                    writeln!(out, "{name}")?;
                }
            }
        }
    }
    Ok(())
}

/// Which containers have which mounts.
///
/// # Errors
/// The database's.
pub fn mounts(engine: &Engine) -> Result<Vec<(String, Vec<Mount>)>> {
    let all = engine.list()?.into_iter();
    Ok(all
        .map(|record| (record.name, record.spec.mounts))
        .collect())
}

/// Docker's object of a volume.
///
/// # Errors
/// A name that is none.
pub fn object(store: &Store, name: &str) -> Result<Value> {
    Ok(json!({
        "Name": name,
        "Driver": "local",
        "Mountpoint": store.data(name)?,
        "CreatedAt": store.created(name).map(|at| at.to_string()),
        "Labels": null,
        "Options": null,
        "Scope": "local",
    }))
}

fn print(store: &Store, names: &[String], out: &mut impl Write) -> Result<()> {
    let objects = names.iter().map(|name| object(store, name));
    let objects = objects.collect::<Result<Vec<Value>>>()?;
    Ok(writeln!(
        out,
        "{}",
        serde_json::to_string_pretty(&objects)?
    )?)
}
