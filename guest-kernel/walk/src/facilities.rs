//! What programs use of a kernel, done for real where a call with bad arguments
//! says too little.

mod files;
mod ipc;
mod memory;
mod network;
mod process;

use crate::kernel::{Answer, call, probe};

/// A name and what is tried.
type Probe = (&'static str, fn() -> Answer);

/// One line for each.
pub fn walk(line: &mut dyn FnMut(String, String)) {
    for probes in [
        process::PROBES,
        ipc::PROBES,
        memory::PROBES,
        files::PROBES,
        network::PROBES,
    ] {
        for (name, run) in probes {
            line((*name).to_owned(), probe(run));
        }
    }
    for path in files::PRESENT {
        line(format!("file {path}"), probe(|| files::open(path)));
    }
    for (clock, name) in process::CLOCKS {
        line(
            format!("clock_gettime {name}"),
            probe(|| process::clock(*clock)),
        );
        line(
            format!("timer_create {name}"),
            probe(|| process::timer(*clock)),
        );
    }
    for (name, kind, data) in files::MOUNTS {
        line(
            format!("mount {name} in a user namespace"),
            probe(|| files::mount_as_user(kind, data)),
        );
    }
    for (kind, name) in network::ALGORITHMS {
        line(
            format!("alg {kind} {name}"),
            probe(|| network::algorithm(kind, name)),
        );
    }
}

/// A string of this program, as the kernel reads them.
fn c(text: &std::ffi::CStr) -> u64 {
    crate::kernel::ptr(text.to_bytes_with_nul())
}

/// Fails with `errno` unless `holds`.
fn expect(holds: bool, errno: i32) -> Answer {
    if holds { Ok(0) } else { Err(errno) }
}

/// Opens a file; `flags` as open(2) has them.
fn open(path: &std::ffi::CStr, flags: i32) -> Answer {
    call(
        libc::SYS_openat,
        &[libc::AT_FDCWD as u64, c(path), flags as u64, 0o600],
    )
}
