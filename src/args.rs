//! What can be typed.

use crate::bench::BenchCommand;
use crate::container::cli::ContainerCommand;
use crate::image::cli::ImageCommand;
use crate::net::cli::NetworkCommand;
use crate::templates::TemplateCommand;
use crate::volume::cli::VolumeCommand;
use clap::{Parser, Subcommand};
use std::path::PathBuf;

/// Containers in forked virtual machines.
#[derive(Debug, Parser)]
#[command(name = "vm-run", version, max_term_width = 100)]
pub struct Args {
    /// Where images, templates and containers live [default: /var/lib/vm-run as root, else
    /// the XDG state directory]
    #[arg(long, value_name = "DIR", global = true)]
    pub root: Option<PathBuf>,
    /// What to log on standard error: off, error, warn, info, debug, trace
    #[arg(long, value_name = "LEVEL", default_value = "warn", global = true)]
    pub log: log::LevelFilter,
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Fork a virtual machine and run one container in it
    Run(Box<crate::run::RunArgs>),
    /// Make a container, and do not start it
    Create(Box<crate::run::CreateArgs>),
    #[command(flatten)]
    Container(ContainerCommand),
    /// Own a container; for vm-run itself
    #[command(hide = true)]
    Supervise {
        /// The container's id
        id: String,
    },
    /// Load, list and remove images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Make, list, inspect and remove networks, and put containers on them
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Make, list, inspect and remove volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Build, list, inspect and remove templates
    #[command(subcommand)]
    Template(TemplateCommand),
    /// Serve docker's API, so that docker is a client
    Daemon(crate::daemon::DaemonArgs),
    /// Measure
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Say what this host can do, each finding with its cure
    Doctor {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Try everything on this host in under two minutes, and write a report
    Selftest {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// Reads a size as docker does: a number and b, k, m or g.
///
/// # Errors
/// Anything else, in one line.
pub fn size(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &lower[digits.len()..] {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => return Err("a size is a number and b, k, m or g".into()),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| "a size is a number and b, k, m or g".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn sizes_are_read_as_docker_does() {
        assert_eq!(size("256m"), Ok(256 << 20));
        assert_eq!(size("4G"), Ok(4 << 30));
        assert_eq!(size("1048576"), Ok(1 << 20));
        for bad in ["", "m", "-1", "1t", "1.5g", "99999999999g"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
