//! For the fuzz target: a server of two directories.

use super::server::{Bounds, Server};
use rustix::fs::{Mode, OFlags, open};
use std::path::Path;

/// Serves requests of any content below `root`.
///
/// # Panics
/// A directory that cannot be served.
pub fn serve(root: &Path, requests: &[Vec<u8>]) {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(root, flags, Mode::empty()).expect("a directory");
    let bounds = Bounds {
        nodes: 64,
        handles: 16,
    };
    let mut server = Server::new(root, "/proc/self/fd/", bounds).expect("a server");
    for request in requests {
        server.serve(request).ok();
    }
}
