//! `vm-run image ...`: from words to a call, from its result to lines.

use super::archive::Input;
use super::changes::StartConfig;
use super::name::Name;
use super::reference::{Reference, familiar};
use super::registry::{Access, Login, pull, push};
use super::store::{Format, ImageSummary, Import, Removed, Store};
use crate::output;
use crate::progress::{Bar, Bars};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, IsTerminal, Read, Write};
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
    /// Get an image from its registry
    Pull {
        /// NAME[:TAG], or NAME@sha256:DIGEST
        image: String,
        /// Print the image's full name and nothing else
        #[arg(short, long)]
        quiet: bool,
        #[command(flatten)]
        access: AccessArgs,
    },
    /// Give an image to the registry of its name
    Push {
        /// NAME[:TAG]
        image: String,
        /// Print the image's full name and nothing else
        #[arg(short, long)]
        quiet: bool,
        #[command(flatten)]
        access: AccessArgs,
    },
    /// Write images into an archive, to standard output if it is no terminal
    Save {
        /// Names, ids, or beginnings of ids
        #[arg(required = true)]
        images: Vec<String>,
        /// The file, or for oci-dir the directory, to write
        #[arg(short, long, value_name = "PATH")]
        output: Option<PathBuf>,
        /// What to write
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Make an image of a root file system's tar
    Import {
        /// The tar, compressed or not; `-` for standard input
        file: PathBuf,
        /// The image's name
        name: Option<String>,
        /// A Dockerfile's instruction, such as 'CMD ["/bin/sh"]'
        #[arg(short, long, value_name = "INSTRUCTION")]
        change: Vec<String>,
        /// A line for the image's history
        #[arg(short, long)]
        message: Option<String>,
    },
    /// Give an image one more name
    Tag {
        /// A name, an id, or the beginning of an id
        image: String,
        /// The new name
        name: String,
    },
    /// Print all that is known of images, as a JSON array in docker's form
    Inspect {
        /// Names, ids, or beginnings of ids
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Remove images that have no name, and unfinished downloads
    Prune {
        /// Every image that no container uses
        #[arg(short, long)]
        all: bool,
        /// Do not ask
        #[arg(short, long)]
        force: bool,
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

/// How a registry is to be reached.
#[derive(Debug, clap::Args)]
pub struct AccessArgs {
    /// Log in as this user [default: what docker's config.json says]
    #[arg(long, value_name = "NAME", requires = "password_stdin")]
    username: Option<String>,
    /// Read the password from standard input
    #[arg(long, requires = "username")]
    password_stdin: bool,
    /// Without TLS. localhost and 127.0.0.1 are reached so in any case
    #[arg(long)]
    plain_http: bool,
}

impl AccessArgs {
    fn access(self) -> Result<Access> {
        let login = match self.username {
            Some(user) => Some(Login {
                user,
                password: read_password()?,
            }),
            None => None,
        };
        Ok(Access {
            plain_http: self.plain_http,
            login,
        })
    }
}

/// One line of standard input.
fn read_password() -> Result<String> {
    const LONGEST: u64 = 64 << 10;
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .take(LONGEST)
        .read_line(&mut line)
        .context("cannot read the password")?;
    let password = line.trim_end_matches(['\r', '\n']);
    if password.is_empty() {
        bail!("no password on standard input");
    }
    Ok(password.to_owned())
}

/// Does it. `root` is the state directory.
///
/// # Errors
/// One line that says what failed.
pub fn run(command: ImageCommand, root: &Path) -> Result<()> {
    let store = Store::open(root)?;
    match command {
        ImageCommand::Load { file, input } => load(&store, file.or(input)),
        ImageCommand::Pull {
            image,
            quiet,
            access,
        } => pull_image(&store, &image, quiet, &access.access()?),
        ImageCommand::Push {
            image,
            quiet,
            access,
        } => push_image(&store, &image, quiet, &access.access()?),
        ImageCommand::Save {
            images,
            output,
            format,
        } => save(&store, &images, output.as_deref(), format)
            .with_context(|| format!("cannot save {}", images.join(" "))),
        ImageCommand::Import {
            file,
            name,
            change,
            message,
        } => {
            let mut config = StartConfig::default();
            change.iter().try_for_each(|line| config.apply(line))?;
            let name = name.as_deref().map(Name::parse).transpose()?;
            let import = Import {
                config,
                message,
                name,
            };
            import_tar(&store, &file, &import)
        }
        ImageCommand::Tag { image, name } => Ok(store.tag(&image, &name)?),
        ImageCommand::Inspect { images } => inspect(&store, &images),
        ImageCommand::Prune { all, force } => prune(&store, all, force),
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

fn bars(quiet: bool) -> Bars {
    if quiet { Bars::hidden() } else { Bars::shown() }
}

fn pull_image(store: &Store, image: &str, quiet: bool, access: &Access) -> Result<()> {
    let reference = Reference::parse(image)?;
    let bar = Bar::default();
    let pulled = pull(store, &reference, access, (&bars(quiet), &bar))
        .with_context(|| format!("cannot pull {image}"))?;
    drop(bar);
    let mut out = std::io::stdout().lock();
    if !quiet {
        let shown = familiar(&pulled.name);
        writeln!(out, "Digest: {}", pulled.digest)?;
        match pulled.is_known {
            true => writeln!(out, "Status: Image is up to date for {shown}")?,
            false => writeln!(out, "Status: Downloaded newer image for {shown}")?,
        }
    }
    writeln!(out, "{}", pulled.name)?;
    Ok(())
}

fn push_image(store: &Store, image: &str, quiet: bool, access: &Access) -> Result<()> {
    let name = Name::parse(image)?;
    let digest =
        push(store, &name, access, &bars(quiet)).with_context(|| format!("cannot push {image}"))?;
    let mut out = std::io::stdout().lock();
    if !quiet {
        writeln!(out, "Digest: {digest}")?;
    }
    writeln!(out, "{name}")?;
    Ok(())
}

fn save(store: &Store, images: &[String], output: Option<&Path>, format: Format) -> Result<()> {
    let bar = Bar::default();
    if format == Format::OciDir {
        let path = output.context("a directory has a name: give it with -o")?;
        return Ok(store.save_directory(images, path, &bar)?);
    }
    output::write_archive(output, |out| {
        Ok(store.save_archive(images, format, out, &bar)?)
    })
}

fn import_tar(store: &Store, file: &Path, import: &Import) -> Result<()> {
    let progress = Bar::default();
    let id = if file == Path::new("-") {
        let mut stdin = std::io::stdin().lock();
        store
            .import(Input::Reader(&mut stdin), import, &progress)
            .context("cannot import standard input")?
    } else {
        store
            .import(Input::Path(file), import, &progress)
            .with_context(|| format!("cannot import {}", file.display()))?
    };
    writeln!(std::io::stdout().lock(), "{id}")?;
    Ok(())
}

fn inspect(store: &Store, images: &[String]) -> Result<()> {
    let all = images
        .iter()
        .map(|image| Ok(store.inspect(image)?))
        .collect::<Result<Vec<serde_json::Value>>>()?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
    Ok(())
}

fn prune(store: &Store, all: bool, force: bool) -> Result<()> {
    if !force && !is_sure(all)? {
        return Ok(());
    }
    let removed = store.prune(all).context("cannot prune the images")?;
    let mut out = std::io::stdout().lock();
    print_removed(&mut out, &removed)?;
    let reclaimed = indicatif::DecimalBytes(removed.reclaimed);
    writeln!(out, "Total reclaimed space: {reclaimed}")?;
    Ok(())
}

fn is_sure(all: bool) -> Result<bool> {
    let which = if all {
        "every image that no container uses"
    } else {
        "every image that has no name"
    };
    let mut out = std::io::stdout().lock();
    write!(out, "This removes {which}. Go on? [y/N] ")?;
    out.flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().take(64).read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
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
        print_removed(&mut out, &removed)?;
    }
    Ok(())
}

fn print_removed(out: &mut dyn Write, removed: &Removed) -> Result<()> {
    for name in &removed.untagged {
        writeln!(out, "Untagged: {name}")?;
    }
    for id in &removed.deleted {
        writeln!(out, "Deleted: {id}")?;
    }
    Ok(())
}
