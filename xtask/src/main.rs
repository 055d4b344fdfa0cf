//! The project's own tools: `cargo xtask NAME`. What CI calls is what is called
//! at home.

mod agent;
mod guest;
mod host;
mod images;
mod kernel;
mod vmhost;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's own tools")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build the guest's agent and pack it as an initramfs (cached by content)
    Agent(agent::Args),
    /// Build the guest: kernel, agent and the empty writable disk
    Guest,
    /// Make the demo's images from Debian packages (cached by content)
    Images,
    /// Build the guest kernel (cached by content)
    Kernel(kernel::Args),
    /// Run a command where KVM can run Linux: here, or on an emulated host
    Vmhost(vmhost::Args),
}

fn main() -> Result<()> {
    match Args::parse().task {
        Task::Agent(args) => agent::run(&args),
        Task::Guest => guest::ensure().map(|dir| println!("{}", dir.display())),
        Task::Images => images::run(),
        Task::Kernel(args) => kernel::run(&args),
        Task::Vmhost(args) => vmhost::run(&args),
    }
}
