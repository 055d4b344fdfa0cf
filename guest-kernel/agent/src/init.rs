//! A PID 1 that is not the container's program (`--init`): it hands signals on to the
//! program, reaps whatever becomes an orphan, and ends as the program does.
//!
//! It is the agent's own file, run anew: nothing of the agent's memory is in a process
//! that the container may look into.

use crate::exec::Failure;
use crate::sys;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus};
use std::ffi::{CStr, CString};
use std::process::ExitCode;

/// How it is called; the agent is never called so.
const NAME: &CStr = c"vm-run-init";

/// The file, open from before the root changes.
#[derive(Debug)]
pub struct Init(OwnedFd);

impl Init {
    /// Opens it.
    pub fn open() -> Result<Self, Failure> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        open("/proc/self/exe", flags, Mode::empty())
            .map(Self)
            .map_err(|e| Failure::other(format!("cannot open the agent's own file: {e}")))
    }

    /// Splits this process: it becomes the init, and a child returns that is to become
    /// the program with `args`, in the foreground of the terminal if there is one.
    pub fn split(&self, args: &[String], has_terminal: bool) -> Result<(), Failure> {
        let failed = |what: &str, e: &dyn std::fmt::Display| {
            Failure::other(format!("cannot {what} the program of an init: {e}"))
        };
        // What comes before the init listens waits for it.
        sys::block_signals().map_err(|e| failed("block the signals of", &e))?;
        let forked = sys::fork_into(0, None).map_err(|e| failed("fork", &e))?;
        let Some((program, _)) = forked else {
            rustix::process::setpgid(None, None).map_err(|e| failed("make a group of", &e))?;
            if has_terminal {
                let group = rustix::process::getpid();
                rustix::termios::tcsetpgrp(rustix::stdio::stdin(), group)
                    .map_err(|e| failed("give the terminal to", &e))?;
            }
            return sys::reset_signals().map_err(|e| failed("reset the signals of", &e));
        };
        let program = program.as_raw_nonzero().to_string();
        let own = [NAME.to_bytes(), program.as_bytes(), b"--"];
        let words = own.into_iter().chain(args.iter().map(String::as_bytes));
        let words: Result<Vec<CString>, _> = words.map(CString::new).collect();
        let words = words.map_err(|e| failed("name", &e))?;
        Err(failed("watch", &sys::exec_file(&self.0, &words)))
    }
}

/// Whether this process was started to be one, and of which program.
pub fn asked(mut args: impl Iterator<Item = String>) -> Option<Pid> {
    if args.next()?.as_bytes() != NAME.to_bytes() {
        return None;
    }
    Pid::from_raw(args.next()?.parse().ok()?)
}

/// Lives as long as the program. All signals are blocked, and waited for.
pub fn live(program: Pid) -> ExitCode {
    // For `ps`; run from a descriptor, it has the number of that.
    rustix::thread::set_name(NAME).ok();
    loop {
        if let Some(status) = reap(program) {
            return ExitCode::from(status);
        }
        match sys::await_signal() {
            Ok(libc::SIGCHLD) => {}
            // The terminal's own, for whoever uses it in the background.
            Ok(libc::SIGTTIN | libc::SIGTTOU) => {}
            // One that has ended, and is about to be reaped, needs none.
            Ok(signal) => drop(sys::kill(program, signal)),
            // It is asked again.
            Err(_) => {}
        }
    }
}

/// Reaps whoever has ended; the status, if the program has.
fn reap(program: Pid) -> Option<u8> {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid == program => return Some(code(status)),
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) => return None,
            // It has no child any more, which cannot be: the program is one.
            Err(_) => return Some(1),
        }
    }
}

fn code(status: WaitStatus) -> u8 {
    const SIGNALLED: i32 = 128;
    let code = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => SIGNALLED + signal,
        (None, None) => 1,
    };
    u8::try_from(code).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_its_own_name_asks_for_it() {
        let asked = |words: &[&str]| asked(words.iter().map(|word| (*word).to_owned()));
        assert_eq!(asked(&["vm-run-init", "7", "--", "sh"]), Pid::from_raw(7));
        for other in [
            &["/init", "7"][..],
            &["vm-run-init"],
            &["vm-run-init", "x"],
            &["vm-run-init", "0"],
            &[],
        ] {
            assert_eq!(asked(other), None, "{other:?}");
        }
    }
}
