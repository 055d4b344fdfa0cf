//! vm-run.
mod image;
mod progress;

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "vm-run", version, about)]
struct Args {
    /// The state directory
    #[arg(long, global = true, default_value = "/var/lib/vm-run")]
    root: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Work with images
    #[command(subcommand)]
    Image(image::cli::ImageCommand),
}

fn main() -> ExitCode {
    let args = Args::parse();
    let Command::Image(command) = args.command;
    match image::cli::run(command, &args.root) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vm-run: {error:#}");
            ExitCode::from(125)
        }
    }
}
