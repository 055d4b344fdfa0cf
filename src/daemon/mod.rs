//! `vm-run daemon`: docker's API over the engine, so that `docker` is a client of ours.
//!
//! ```text
//! api        the calls of the API, and what they are of the engine's
//! describe   docker's objects of what is here
//! words      what a container is to be, as the words that `vm-run create` has for it
//! sessions   the streams of a container's process
//! waits      who waits for the end of a container
//! execs      what was made to be started in a container
//! images     images, and pulls
//! networks   networks and volumes
//! ```
//! The daemon keeps nothing that a container needs: their supervisors are processes of
//! their own, and go on when it is gone.

mod api;
mod describe;
mod execs;
mod images;
mod networks;
mod sessions;
mod waits;
mod words;

use anyhow::{Context, Result, bail};
use api::Api;
use docker_api::Limits;
use rustix::fs::{Gid, Mode};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::oneshot;

/// What can be typed after `daemon`.
#[derive(Debug, clap::Args)]
pub struct DaemonArgs {
    /// Where to listen
    #[arg(long, value_name = "PATH", value_parser = socket_path, default_value = "/run/vm-run/docker.sock")]
    socket: PathBuf,
    /// The group whose members may connect, by name or number, beside root. They can do
    /// what root can
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,
}

/// A path, or docker's `unix://` and a path.
fn socket_path(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("unix://").unwrap_or(text);
    if path.contains("://") || !path.starts_with('/') {
        return Err("the daemon listens at a path: /PATH or unix:///PATH".into());
    }
    Ok(path.into())
}

/// The most calls that block at once; more wait.
const CALLS_MAX: usize = 256;

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// One line: a socket that somebody listens at, or that cannot be made.
pub fn run(args: &DaemonArgs, root: &Path) -> Result<u8> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot catch signals")?;
    let api = Arc::new(Api::open(root)?);
    let listener = listen(&args.socket, args.group.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(CALLS_MAX)
        .build()
        .context("cannot start the event loop")?;
    let (end, ends) = oneshot::channel();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            signals.forever().next();
            end.send(()).ok();
        })
        .context("cannot start a thread")?;
    log::info!("listening at {}", args.socket.display());
    runtime.block_on(async {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let ends = async {
            ends.await.ok();
        };
        docker_api::serve(listener, api, Limits::default(), ends).await;
        anyhow::Ok(())
    })?;
    // What blocks still is for supervisors to end.
    runtime.shutdown_background();
    fs::remove_file(&args.socket).ok();
    Ok(0)
}

/// Listens at a path, which a killed daemon may have left.
fn listen(path: &Path, group: Option<&str>) -> Result<UnixListener> {
    let at = || path.display();
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    match UnixStream::connect(path) {
        Ok(_) => bail!(
            "another daemon listens at {}: end it, or give --socket",
            at()
        ),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).with_context(|| format!("cannot remove {}", at()))?;
        }
        // Nobody has it; or the next call says why not.
        Err(_) => {}
    }
    // From its first instant it is for nobody else.
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = listener.with_context(|| format!("cannot listen at {}", at()))?;
    if let Some(group) = group {
        let gid = Gid::from_raw(group_id(group)?);
        rustix::fs::chown(path, None, Some(gid))
            .and_then(|()| rustix::fs::chmod(path, Mode::from_raw_mode(0o660)))
            .with_context(|| format!("cannot give {} to the group {group}", at()))?;
    }
    Ok(listener)
}

/// A group's number (group(5)).
fn group_id(group: &str) -> Result<u32> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let all = fs::read_to_string("/etc/group").context("cannot read /etc/group")?;
    let found = all.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok())?
    });
    found.with_context(|| format!("there is no group {group}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_socket_is_a_path() {
        assert_eq!(socket_path("/a/b"), Ok("/a/b".into()));
        assert_eq!(socket_path("unix:///a/b"), Ok("/a/b".into()));
        for bad in ["tcp://1.2.3.4:5", "a/b", "", "unix://a"] {
            assert!(socket_path(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_socket_is_its_owners_and_a_groups() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("below/socket");
        let mode = || path.metadata().expect("there").mode() & 0o777;
        let first = listen(&path, None).expect("listens");
        assert_eq!(mode(), 0o600);
        let error = listen(&path, None).expect_err("is taken").to_string();
        assert!(error.contains("another daemon"), "{error}");
        // As a killed one leaves it.
        drop(first);
        let gid = rustix::process::getgid().as_raw().to_string();
        let _again = listen(&path, Some(&gid)).expect("listens");
        assert_eq!(mode(), 0o660);
        assert!(listen(&dir.path().join("x"), Some("no-such-group")).is_err());
    }
}
