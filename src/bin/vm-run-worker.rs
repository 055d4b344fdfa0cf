//! The process of one VM, and the one that starts such processes. vm-run starts it;
//! a program that embeds `fork` may, too.

use std::process::ExitCode;

fn main() -> ExitCode {
    fork::worker::main()
}
