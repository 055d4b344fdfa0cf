//! Asks the running kernel for every system call, socket family and facility that
//! programs use, each in a process of its own and in the circumstances of a
//! default docker container, and prints one line for each: `entry<TAB>answer`.
//! Two kernels serve programs alike if their walks are alike.
//!
//! `walk` enters such circumstances and walks; as PID 1 it also mounts what it
//! needs and resets the machine at the end. `walk inside` is in a container
//! already, with a tmpfs at `/tmp` and a devpts at `/tmp/pts`. `walk compare
//! REFERENCE MEASURED ALLOWED` compares two walks.

mod calls;
mod compare;
mod container;
mod facilities;
mod kernel;
mod sockets;
mod table;

use std::fs;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let init = std::process::id() == 1;
    let done = match arguments[..] {
        // The kernel gives PID 1 the words of its command line that it does not know.
        _ if init => container::be_init()
            .and_then(|()| kernel::in_child(|| container::enter().and_then(|()| walk()))),
        [] => container::enter().and_then(|()| walk()),
        ["inside"] => walk(),
        ["compare", reference, measured, allowed] => compare(reference, measured, allowed),
        _ => Err("usage: walk [inside] | walk compare REFERENCE MEASURED ALLOWED".to_owned()),
    };
    let status = match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("walk: {message}");
            ExitCode::FAILURE
        }
    };
    if init {
        container::power_off();
    }
    status
}

fn walk() -> Result<(), String> {
    let mut failed = None;
    let mut line = |entry: String, answer: String| {
        // At once: what was asked before a call that ends the machine is known.
        let mut out = std::io::stdout().lock();
        if let Err(error) = writeln!(out, "{entry}\t{answer}").and_then(|()| out.flush()) {
            failed = Some(error);
        }
    };
    calls::walk(&mut line);
    sockets::walk(&mut line);
    facilities::walk(&mut line);
    match failed {
        Some(error) => Err(format!("cannot print: {error}")),
        None => Ok(()),
    }
}

fn compare(reference: &str, measured: &str, allowed: &str) -> Result<(), String> {
    let read = |path: &str| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
    let found = compare::compare(&read(reference)?, &read(measured)?, &read(allowed)?);
    for finding in &found {
        println!("{finding}");
    }
    if found.is_empty() {
        Ok(())
    } else {
        Err(format!("{} differences", found.len()))
    }
}
