//! The directory of one container: `<root>/containers/<id>/`.
//!
//! ```text
//! lock      held by the container's supervisor for as long as it lives
//! control   its socket
//! root      the image's root file system, a hard link: it outlives the image
//! writable  the writable layer; or layers/, of one that was forked
//! log       what it has said, and log.1, log.2, ...
//! ```
//! A container without a supervisor is at rest, whatever its record says: the kernel
//! gives a lock back when its holder dies, in whatever way.

use super::layers::Layers;
use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How a directory is called that is being made, or removed.
const UNFINISHED: &str = ".tmp-";

/// A container's directory.
#[derive(Debug, Clone)]
pub struct Directory(PathBuf);

/// Proof that no other process owns the container. The kernel gives it back with the
/// descriptor.
#[derive(Debug)]
pub struct Ownership(#[expect(dead_code, reason = "held, not used")] File);

impl Directory {
    /// Of the container `id`, there or not.
    pub fn of(root: &Path, id: &str) -> Self {
        Self(shelf(root).join(id))
    }

    /// Makes it: `fill` gets the path of an unfinished one, which takes its name when
    /// everything is in it. It is owned until it is entered somewhere: what nobody
    /// knows and nobody owns is swept away.
    ///
    /// # Errors
    /// What `fill` says, or the file system. Nothing is left.
    pub fn make(
        root: &Path,
        id: &str,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<(Self, Ownership)> {
        let shelf = shelf(root);
        fs::create_dir_all(&shelf).with_context(|| format!("cannot make {}", shelf.display()))?;
        let (unfinished, lock) = unfinished(&shelf)?;
        fill(unfinished.path())?;
        File::open(unfinished.path())
            .and_then(|dir| dir.sync_all())
            .context("cannot write a container's directory")?;
        let this = Self::of(root, id);
        let unfinished = unfinished.keep();
        fs::rename(&unfinished, &this.0)
            .with_context(|| format!("cannot make {}", this.0.display()))?;
        File::open(&shelf)
            .and_then(|dir| dir.sync_all())
            .with_context(|| format!("cannot write {}", shelf.display()))?;
        Ok((this, Ownership(lock)))
    }

    /// Whether there is one.
    pub fn exists(&self) -> bool {
        self.0.is_dir()
    }

    /// The disk in it.
    pub fn layers(&self, durable: bool) -> Layers {
        Layers::of(&self.0, durable)
    }

    /// A file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Takes the container, if nobody has it. Whoever only looks (see
    /// [`Self::is_owned`]) is waited for, so long at most.
    ///
    /// # Errors
    /// A directory that is gone.
    pub fn own(&self, patience: Duration) -> Result<Option<Ownership>> {
        const PAUSE: Duration = Duration::from_millis(20);
        let lock = lock_file(&self.0)?;
        let deadline = Instant::now() + patience;
        loop {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                // It may have been removed meanwhile.
                Ok(()) if !self.0.is_dir() => bail!("the container was removed"),
                Ok(()) => return Ok(Some(Ownership(lock))),
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(PAUSE),
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot lock {}", self.0.display()));
                }
            }
        }
    }

    /// Whether somebody owns it now.
    ///
    /// # Errors
    /// A directory that is gone.
    pub fn is_owned(&self) -> Result<bool> {
        let lock = lock_file(&self.0)?;
        match flock(&lock, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(error) => Err(error).with_context(|| format!("cannot lock {}", self.0.display())),
        }
    }

    /// Listens on its socket, in the place of a dead owner's.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn listen(&self, _: &Ownership) -> Result<UnixListener> {
        match fs::remove_file(self.path(SOCKET)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).context("cannot remove an old socket");
            }
            _ => {}
        }
        let (_dir, path) = self.socket()?;
        UnixListener::bind(&path).with_context(|| format!("cannot listen in {}", self.0.display()))
    }

    /// Connects to its owner.
    ///
    /// # Errors
    /// Nobody who listens.
    pub fn connect(&self) -> Result<UnixStream> {
        let (_dir, path) = self.socket()?;
        Ok(UnixStream::connect(path)?)
    }

    /// A name for the socket that is short enough for one (unix(7): 108 bytes),
    /// however deep the state directory lies; and what it goes through.
    fn socket(&self) -> Result<(OwnedFd, String)> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = open(&self.0, flags, Mode::empty())
            .with_context(|| format!("cannot open {}", self.0.display()))?;
        let path = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
        Ok((dir, path))
    }

    /// Removes it. It is renamed first, so that nobody finds half of it.
    ///
    /// # Errors
    /// What the file system says; what is left is removed by a later [`sweep`].
    pub fn remove(&self, _: Ownership) -> Result<()> {
        let shelf = self.0.parent().unwrap_or(&self.0);
        let (away, _lock) = unfinished(shelf)?;
        fs::rename(&self.0, away.path().join("c"))
            .with_context(|| format!("cannot remove {}", self.0.display()))?;
        let away = away.keep();
        loop {
            match fs::remove_dir_all(&away) {
                Ok(()) => return Ok(()),
                // Whoever sweeps may look for a lock in it, and may take over.
                Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("cannot remove all of {}", self.0.display()));
                }
            }
        }
    }
}

const SOCKET: &str = "control";
const LOCK: &str = "lock";

fn shelf(root: &Path) -> PathBuf {
    root.join("containers")
}

/// A directory that is not to be found yet, or no more. Whoever sweeps leaves alone what
/// somebody holds; what was swept before it was held is made anew.
fn unfinished(shelf: &Path) -> Result<(TempDir, File)> {
    loop {
        let made = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(shelf)
            .with_context(|| format!("cannot write to {}", shelf.display()))?;
        let lock = match lock_file(made.path()) {
            Ok(lock) => lock,
            Err(_) if !made.path().is_dir() => continue,
            Err(error) => return Err(error),
        };
        flock(&lock, FlockOperation::LockExclusive).context("cannot lock a new directory")?;
        if made.path().is_dir() {
            return Ok((made, lock));
        }
    }
}

fn lock_file(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// Removes what killed processes have left: directories half-made or half-removed,
/// and those of which `is_known` knows nothing.
pub fn sweep(root: &Path, is_known: impl Fn(&str) -> Result<bool>) {
    for entry in fs::read_dir(shelf(root)).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let is_known = || Ok(!name.starts_with(UNFINISHED) && is_known(&name)?);
        if let Err(error) = sweep_one(&entry.path(), is_known) {
            log::warn!("cannot remove {}: {error:#}", entry.path().display());
        }
    }
}

fn sweep_one(path: &Path, is_known: impl Fn() -> Result<bool>) -> Result<()> {
    if is_known()? {
        return Ok(());
    }
    let lock = match lock_file(path) {
        Ok(lock) => lock,
        // It went by itself.
        Err(_) if !path.is_dir() => return Ok(()),
        Err(error) => return Err(error),
    };
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        // Whoever made it has let go: by now it is known, or never will be.
        Ok(()) if !is_known()? => match fs::remove_dir_all(path) {
            // Its owner was removing it too, or somebody else sweeps.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty
                ) =>
            {
                Ok(())
            }
            done => Ok(done?),
        },
        // Somebody is at it.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_being_made_is_not_swept_away() {
        let root = tempfile::tempdir().expect("a directory");
        std::thread::scope(|scope| {
            let sweeper = scope.spawn(|| {
                for _ in 0..2000 {
                    sweep(root.path(), |_| Ok(true));
                }
            });
            let mut made = 0;
            while !sweeper.is_finished() || made < 10 {
                let id = format!("{made:064}");
                let fill = |dir: &Path| Ok(fs::write(dir.join("filled"), "")?);
                let (directory, ownership) = Directory::make(root.path(), &id, fill).expect("made");
                assert!(directory.path("filled").exists());
                if made % 2 == 0 {
                    directory.remove(ownership).expect("removed");
                }
                made += 1;
            }
        });
    }
}
