//! `vm-run image ...`: from words to a call, from its result to lines.

use super::archive::Input;
use super::store::{ImageSummary, Store};
use crate::progress::Bar;
use anyhow::{Context, Result, bail};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

/// Bytes of an id that people are shown, as docker does.
const SHORT_ID: usize = 12;

/// What can be done with images.
#[derive(Debug, clap::Subcommand)]
pub enum ImageCommand {
    /// Load images from a docker-archive or an OCI layout (a tar, compressed or not,
    /// or a directory)
    Load {
        /// The archive or directory; `-` or nothing for standard input
        #[arg(conflicts_with = "input")]
        file: Option<PathBuf>,
        /// The same, as docker writes it
        #[arg(short, long, value_name = "FILE")]
        input: Option<PathBuf>,
    },
    /// List images
    Ls {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
    /// Remove names, and images with their last name
    Rm {
        /// Names, ids, or beginnings of ids
        #[arg(required = true)]
        images: Vec<String>,
    },
}

/// Does it. `root` is the state directory.
///
/// # Errors
/// One line that says what failed.
pub fn run(command: ImageCommand, root: &Path) -> Result<()> {
    let store = Store::open(root)?;
    match command {
        ImageCommand::Load { file, input } => load(&store, file.or(input)),
        ImageCommand::Ls { json } => list(&store, json),
        ImageCommand::Rm { images } => remove(&store, &images),
    }
}

fn load(store: &Store, file: Option<PathBuf>) -> Result<()> {
    let progress = Bar::default();
    let loaded = match file.filter(|file| file != Path::new("-")) {
        Some(file) => store
            .load(Input::Path(&file), &progress)
            .with_context(|| format!("cannot load {}", file.display()))?,
        None => {
            let mut stdin = std::io::stdin().lock();
            if stdin.is_terminal() {
                bail!("nothing to load: give a FILE, or an archive on standard input");
            }
            store
                .load(Input::Reader(&mut stdin), &progress)
                .context("cannot load standard input")?
        }
    };
    let mut out = std::io::stdout().lock();
    for image in loaded {
        match image.name {
            Some(name) => writeln!(out, "Loaded image: {name}")?,
            None => writeln!(out, "Loaded image ID: {}", image.id)?,
        }
    }
    Ok(())
}

fn list(store: &Store, json: bool) -> Result<()> {
    let images = store.list()?;
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&images)?)?;
        return Ok(());
    }
    let header = ["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"].map(str::to_owned);
    let mut rows = vec![header];
    rows.extend(images.iter().flat_map(rows_of));
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths = [width(0), width(1), width(2), width(3)];
    for [repository, tag, id, created, size] in &rows {
        let [a, b, c, d] = widths;
        writeln!(
            out,
            "{repository:a$}   {tag:b$}   {id:c$}   {created:d$}   {size}"
        )?;
    }
    Ok(())
}

/// A line for each name, or one for an image that has none.
fn rows_of(image: &ImageSummary) -> Vec<[String; 5]> {
    const NONE: &str = "<none>";
    let id = image
        .id
        .trim_start_matches("sha256:")
        .chars()
        .take(SHORT_ID)
        .collect::<String>();
    let day = image
        .created
        .as_deref()
        .and_then(|time| time.split('T').next());
    let created = day.map_or(NONE.to_owned(), |day| {
        day.chars().flat_map(char::escape_debug).take(10).collect()
    });
    let row = |repository: &str, tag: &str| {
        let size = indicatif::DecimalBytes(image.size).to_string();
        [
            repository.to_owned(),
            tag.to_owned(),
            id.clone(),
            created.clone(),
            size,
        ]
    };
    if image.names.is_empty() {
        return vec![row(NONE, NONE)];
    }
    image
        .names
        .iter()
        .map(|name| {
            let (repository, tag) = name.rsplit_once(':').unwrap_or((name, NONE));
            row(repository, tag)
        })
        .collect()
}

fn remove(store: &Store, images: &[String]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for image in images {
        let removed = store
            .remove(image)
            .with_context(|| format!("cannot remove {image}"))?;
        for name in removed.untagged {
            writeln!(out, "Untagged: {name}")?;
        }
        if let Some(id) = removed.deleted {
            writeln!(out, "Deleted: {id}")?;
        }
    }
    Ok(())
}
