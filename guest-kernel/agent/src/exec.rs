//! From the prepared process to its program: who it is, where it stands, what
//! it may do, and which file it becomes.

use crate::sys;
use crate::user::{self, User};
use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags};
use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read};
use vm_run_abi::protocol::{ProcessSpec, StartFailure};

/// Why the process could not be started, for [`vm_run_abi::protocol::Event`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Of what sort.
    pub reason: StartFailure,
    /// One line.
    pub message: String,
}

impl Failure {
    /// A failure of neither the command's absence nor its mode.
    pub fn other(message: impl Into<String>) -> Self {
        Self {
            reason: StartFailure::Other,
            message: message.into(),
        }
    }
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self::other(message)
    }
}

/// The longest passwd or group file that is looked at, in bytes.
const ACCOUNTS_LIMIT: u64 = 16 << 20;

/// The user that `spec` means in the image that is now the root, in `groups` too.
pub fn find_user(spec: &str, groups: &[String]) -> Result<User, Failure> {
    let passwd = read_accounts("/etc/passwd")?;
    let group = read_accounts("/etc/group")?;
    user::resolve(spec, &passwd, &group)
        .and_then(|user| user.and_in(groups, &group))
        .map_err(|e| Failure::other(e.to_string()))
}

/// A file of the image, which may be anything: only a regular one is read, and
/// only so far. One that is not there is empty.
fn read_accounts(path: &str) -> Result<String, Failure> {
    let failed = |e: io::Error| Failure::other(format!("cannot read {path}: {e}"));
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(rustix::io::Errno::NOENT) => return Ok(String::new()),
        Err(e) => return Err(failed(e.into())),
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(Failure::other(format!("{path} is not a regular file")));
    }
    let mut bytes = Vec::new();
    file.take(ACCOUNTS_LIMIT)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Makes the working directory if it is missing, and stands in it.
pub fn enter_directory(cwd: &str) -> Result<(), Failure> {
    let cwd = if cwd.is_empty() { "/" } else { cwd };
    if !cwd.starts_with('/') {
        let message = format!("the working directory {cwd:?} is not an absolute path");
        return Err(Failure::other(message));
    }
    match rustix::process::chdir(cwd) {
        Ok(()) => return Ok(()),
        Err(rustix::io::Errno::NOENT) => {}
        Err(e) => return Err(Failure::other(format!("cannot change to {cwd:?}: {e}"))),
    }
    fs::create_dir_all(cwd)
        .and_then(|()| Ok(rustix::process::chdir(cwd)?))
        .map_err(|e| Failure::other(format!("cannot make the working directory {cwd:?}: {e}")))
}

/// The capabilities of a docker container (moby oci/caps/defaults.go).
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::AUDIT_WRITE);

/// Becomes `user`, with docker's capabilities or those of these that there are if that
/// is root, and none if not.
pub fn become_user(user: &User, wanted: Option<u64>) -> Result<(), Failure> {
    let step = |what: &str, result: rustix::io::Result<()>| {
        result.map_err(|e| Failure::other(format!("cannot {what}: {e}")))
    };
    let mut capabilities = CAPABILITIES;
    if let Some(wanted) = wanted {
        let held = rustix::thread::capabilities(None)
            .map_err(|e| Failure::other(format!("cannot tell its capabilities: {e}")))?;
        capabilities = CapabilitySet::from_bits_retain(wanted) & held.permitted;
    }
    step("drop capabilities", bound(capabilities))?;
    let groups: Vec<Gid> = user.groups.iter().map(|id| Gid::from_raw(*id)).collect();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    step("set groups", rustix::thread::set_thread_groups(&groups))?;
    step(
        "set the group",
        rustix::thread::set_thread_res_gid(gid, gid, gid),
    )?;
    // Another user than root loses its capabilities here.
    step(
        "set the user",
        rustix::thread::set_thread_res_uid(uid, uid, uid),
    )?;
    if !uid.is_root() {
        return Ok(());
    }
    let sets = CapabilitySets {
        effective: capabilities,
        permitted: capabilities,
        inheritable: CapabilitySet::empty(),
    };
    step(
        "set capabilities",
        rustix::thread::set_capabilities(None, sets),
    )
}

/// Leaves only these in the bounding set.
fn bound(capabilities: CapabilitySet) -> rustix::io::Result<()> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if capabilities.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Above the last capability that this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Docker's, where the environment has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program, ready to become.
#[derive(Debug)]
pub struct Program {
    command: String,
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// Finds the command and completes the environment with `PATH`, `HOME` and
    /// `HOSTNAME`, and with `added`, which replaces what the host has said.
    /// To be called as the user that is to run it.
    pub fn find(
        process: &ProcessSpec,
        user: &User,
        hostname: &str,
        added: &[&str],
    ) -> Result<Self, Failure> {
        let command = process
            .args
            .first()
            .filter(|command| !command.is_empty())
            .ok_or_else(|| Failure {
                reason: StartFailure::NotFound,
                message: "exec: no command".to_owned(),
            })?;
        let value_of = |name: &str| {
            let values = process.env.iter().rev().filter_map(|v| v.split_once('='));
            let mut named = values.filter(|(n, _)| *n == name);
            named.next().map(|(_, value)| value)
        };
        let mut env = process.env.clone();
        let path = value_of("PATH").unwrap_or(DEFAULT_PATH);
        if value_of("PATH").is_none() {
            env.push(format!("PATH={DEFAULT_PATH}"));
        }
        if value_of("HOSTNAME").is_none() {
            env.push(format!("HOSTNAME={hostname}"));
        }
        if value_of("HOME").is_none_or(str::is_empty) {
            env.retain(|v| !v.starts_with("HOME="));
            env.push(format!("HOME={}", user.home));
        }
        let name_of = |value: &str| value.split('=').next().map(str::to_owned);
        for value in added {
            env.retain(|other| name_of(other) != name_of(value));
            env.push((*value).to_owned());
        }
        Ok(Self {
            command: command.clone(),
            path: c_string(&look_up(command, path)?)?,
            args: c_strings(&process.args)?,
            env: c_strings(&env)?,
        })
    }

    /// Becomes the program; returns only the reason why not.
    pub fn exec(&self) -> Failure {
        let error = sys::exec(&self.path, &self.args, &self.env);
        let path = self.path.to_string_lossy();
        // The file is there (it has been looked up): what it asks to be run by
        // is not.
        if error.kind() == io::ErrorKind::NotFound {
            return Failure {
                reason: StartFailure::NotFound,
                message: format!("exec: {path:?}: no such file or directory (its interpreter)"),
            };
        }
        cannot_run(&self.command, &error)
    }
}

fn c_string(text: &str) -> Result<CString, Failure> {
    CString::new(text).map_err(|_| Failure::other(format!("{text:?} contains a zero byte")))
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>, Failure> {
    texts.iter().map(|text| c_string(text)).collect()
}

/// The file that `command` means, by the rules of docker (Go's exec.LookPath):
/// with a slash it is a path; without one it is looked for in the absolute
/// directories of `path`, and what cannot be executed there is passed over.
fn look_up(command: &str, path: &str) -> Result<String, Failure> {
    if command.contains('/') {
        return match executable(command) {
            Ok(()) => Ok(command.to_owned()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Failure {
                reason: StartFailure::NotFound,
                message: format!("exec: {command:?}: stat {command}: no such file or directory"),
            }),
            Err(e) => Err(cannot_run(command, &e)),
        };
    }
    path.split(':')
        .filter(|directory| directory.starts_with('/'))
        .map(|directory| format!("{}/{command}", directory.trim_end_matches('/')))
        .find(|file| executable(file).is_ok())
        .ok_or_else(|| Failure {
            reason: StartFailure::NotFound,
            message: format!("exec: {command:?}: executable file not found in $PATH"),
        })
}

/// Whether this user may execute the file.
fn executable(path: &str) -> io::Result<()> {
    if fs::metadata(path)?.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    Ok(rustix::fs::accessat(
        CWD,
        path,
        Access::EXEC_OK,
        AtFlags::EACCESS,
    )?)
}

fn cannot_run(command: &str, error: &io::Error) -> Failure {
    use io::ErrorKind::{IsADirectory, NotFound, PermissionDenied};
    let reason = match (error.kind(), error.raw_os_error()) {
        (NotFound, _) => StartFailure::NotFound,
        (IsADirectory | PermissionDenied, _) => StartFailure::NotExecutable,
        (_, Some(libc::ENOEXEC | libc::ETXTBSY | libc::ENOTDIR | libc::ELIBBAD | libc::EPERM)) => {
            StartFailure::NotExecutable
        }
        _ => StartFailure::Other,
    };
    let why = match (error.kind(), error.raw_os_error()) {
        (IsADirectory, _) => "is a directory".to_owned(),
        (PermissionDenied, _) => "permission denied".to_owned(),
        (_, Some(libc::ENOEXEC)) => "exec format error".to_owned(),
        (_, Some(libc::E2BIG)) => "argument list too long".to_owned(),
        _ => error.to_string(),
    };
    Failure {
        reason,
        message: format!("exec: {command:?}: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn look_up_goes_by_path_and_by_dockers_words() {
        assert_eq!(
            look_up("sh", "/nonexistent:/bin/").as_deref(),
            Ok("/bin/sh")
        );
        assert_eq!(look_up("/bin/sh", "").as_deref(), Ok("/bin/sh"));
        let failed = |command, path| look_up(command, path).unwrap_err();
        let gone = failed("no-such-command", "/bin:/usr/bin");
        assert_eq!(gone.reason, StartFailure::NotFound);
        assert_eq!(
            gone.message,
            "exec: \"no-such-command\": executable file not found in $PATH"
        );
        assert_eq!(failed("/no/such", "").reason, StartFailure::NotFound);
        let passwd = failed("/etc/passwd", "");
        assert_eq!(passwd.reason, StartFailure::NotExecutable);
        assert_eq!(passwd.message, "exec: \"/etc/passwd\": permission denied");
        assert_eq!(failed("/etc/", "").reason, StartFailure::NotExecutable);
        // Relative directories in PATH are not searched.
        assert_eq!(failed("sh", "bin:.:").reason, StartFailure::NotFound);
    }
}
