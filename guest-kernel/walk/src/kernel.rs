//! Calls into the kernel, and probes: each runs in a process of its own.

use std::io;
use std::time::{Duration, Instant};

/// What the kernel answered: the errno on failure.
pub type Answer = Result<i64, i32>;

/// How long a call may sleep before a signal interrupts it.
const PATIENCE: libc::time_t = 2;
/// How long a probe may take before it counts as hung. Emulated machines are slow.
const LIMIT: Duration = Duration::from_secs(30);

/// Makes a system call with up to six arguments.
///
/// Only to be called in a probe's own process (see [`probe`]), which does
/// nothing afterwards but tell the answer.
pub fn call(number: i64, args: &[u64]) -> Answer {
    let mut all = [0u64; 6];
    all[..args.len()].copy_from_slice(args);
    let [a, b, c, d, e, f] = all;
    // SAFETY: the kernel checks every pointer it is given. What a call may write
    // to is an address that the caller took from a live buffer by `ptr` or
    // `out`, and a call that changes this process (its memory map, its signals)
    // changes a process that is about to end.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result == -1 {
        Err(errno())
    } else {
        Ok(result)
    }
}

/// The error of the last call.
pub fn errno() -> i32 {
    io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or_default()
}

/// The address of something that the kernel reads.
pub fn ptr<T: ?Sized>(value: &T) -> u64 {
    std::ptr::from_ref(value).cast::<u8>() as u64
}

/// The address of something that the kernel writes.
pub fn out<T: ?Sized>(value: &mut T) -> u64 {
    std::ptr::from_mut(value).cast::<u8>() as u64
}

/// Runs a probe in a process of its own and puts its answer into one word:
/// `ok`, the name of an errno, `exits`, `killed by N` or `hangs`.
pub fn probe(run: impl FnOnce() -> Answer) -> String {
    let mut pipe = [0i32; 2];
    if call(libc::SYS_pipe2, &[out(&mut pipe), libc::O_CLOEXEC as u64]).is_err() {
        return format!("no pipe: {}", name(errno()));
    }
    // SAFETY: this program has one thread, so the child may do whatever the
    // parent may.
    let child = unsafe { libc::fork() };
    if child == 0 {
        interrupt_sleep();
        let report = match run() {
            Ok(_) => 0,
            Err(errno) => errno,
        };
        // With the call itself, for the probe may have closed or changed much.
        let told = call(libc::SYS_write, &[pipe[1] as u64, ptr(&report), 4]);
        end(i32::from(told.is_err()));
    }
    if child < 0 {
        return format!("no process: {}", name(errno()));
    }
    let answer = wait(child, pipe[0]);
    for end in pipe {
        // SAFETY: both are this function's own descriptors, closed once.
        unsafe { libc::close(end) };
    }
    answer
}

/// Runs `task` in a process of its own, which gives up powers that this one keeps.
pub fn in_child(task: fn() -> Result<(), String>) -> Result<(), String> {
    // SAFETY: this program has one thread.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let done = task();
        if let Err(message) = &done {
            eprintln!("walk: {message}");
        }
        end(i32::from(done.is_err()));
    }
    let mut status = 0;
    // SAFETY: status outlives the call.
    let ended = unsafe { libc::waitpid(child, &mut status, 0) };
    if ended == child && status == 0 {
        Ok(())
    } else {
        Err(format!("the walk failed (wait status {status:#x})"))
    }
}

/// Ends this process at once, with no destructor and no buffer written.
pub fn end(status: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(status) }
}

fn wait(child: i32, report: i32) -> String {
    let start = Instant::now();
    let mut status = 0;
    loop {
        // SAFETY: status outlives the call.
        let done = unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) };
        if done == child {
            break;
        }
        if start.elapsed() > LIMIT {
            // SAFETY: the child is ours and has not been waited for.
            unsafe { libc::kill(child, libc::SIGKILL) };
            // SAFETY: as above.
            unsafe { libc::waitpid(child, &mut status, 0) };
            return "hangs".to_owned();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    if libc::WIFSIGNALED(status) {
        return format!("killed by {}", libc::WTERMSIG(status));
    }
    let mut told = [0u8; 4];
    // Never blocks: the probe has ended; what it left running holds no answer.
    let flags = call(
        libc::SYS_fcntl,
        &[report as u64, libc::F_SETFL as u64, libc::O_NONBLOCK as u64],
    );
    match flags.and_then(|_| call(libc::SYS_read, &[report as u64, out(&mut told), 4])) {
        Ok(4) => match i32::from_ne_bytes(told) {
            0 => "ok".to_owned(),
            errno => name(errno),
        },
        _ => "exits".to_owned(),
    }
}

/// Lets a signal interrupt a call that would sleep for ever.
fn interrupt_sleep() {
    extern "C" fn ignore(_signal: libc::c_int) {}
    let handler: extern "C" fn(libc::c_int) = ignore;
    // SAFETY: all zeroes is a valid sigaction: no flags (so calls are
    // interrupted, not restarted) and an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    let timer = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 1,
            tv_usec: 0,
        },
        it_value: libc::timeval {
            tv_sec: PATIENCE,
            tv_usec: 0,
        },
    };
    // SAFETY: the handler does nothing, so it may run at any moment.
    unsafe { libc::sigaction(libc::SIGALRM, &action, std::ptr::null_mut()) };
    // SAFETY: the timer outlives the call.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) };
}

/// The name of an errno.
pub fn name(errno: i32) -> String {
    match ERRNO.iter().find(|(number, _)| *number == errno) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("errno {errno}"),
    }
}

macro_rules! errnos {
    ($($name:ident)*) => { &[$((libc::$name, stringify!($name))),*] };
}

const ERRNO: &[(i32, &str)] = errnos!(
    EPERM ENOENT ESRCH EINTR EIO ENXIO E2BIG ENOEXEC EBADF ECHILD EAGAIN ENOMEM EACCES EFAULT ENOTBLK EBUSY
    EEXIST EXDEV ENODEV ENOTDIR EISDIR EINVAL ENFILE EMFILE ENOTTY ETXTBSY EFBIG ENOSPC ESPIPE EROFS EMLINK
    EPIPE EDOM ERANGE EDEADLK ENAMETOOLONG ENOLCK ENOSYS ENOTEMPTY ELOOP ENOMSG EIDRM ENODATA ETIME EPROTO
    EBADMSG EOVERFLOW EILSEQ EUSERS ENOTSOCK EDESTADDRREQ EMSGSIZE EPROTOTYPE ENOPROTOOPT EPROTONOSUPPORT
    ESOCKTNOSUPPORT EOPNOTSUPP EPFNOSUPPORT EAFNOSUPPORT EADDRINUSE EADDRNOTAVAIL ENETDOWN ENETUNREACH
    ENOBUFS EISCONN ENOTCONN ETIMEDOUT ECONNREFUSED EHOSTUNREACH EALREADY EINPROGRESS ESTALE EDQUOT
    ENOMEDIUM ECANCELED ENOKEY EKEYEXPIRED EKEYREVOKED EKEYREJECTED EOWNERDEAD ERFKILL
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_tells_success_errors_exits_signals() {
        assert_eq!(probe(|| call(libc::SYS_getpid, &[])), "ok");
        assert_eq!(probe(|| call(libc::SYS_close, &[u64::MAX])), "EBADF");
        assert_eq!(probe(|| end(3)), "exits");
        assert_eq!(
            probe(|| call(libc::SYS_kill, &[u64::from(std::process::id()), 0])),
            "ok"
        );
        let own = |signal: i32| {
            move || {
                call(
                    libc::SYS_kill,
                    &[call(libc::SYS_getpid, &[])? as u64, signal as u64],
                )
            }
        };
        assert_eq!(probe(own(libc::SIGKILL)), "killed by 9");
    }

    #[test]
    fn a_call_that_sleeps_for_ever_is_interrupted() {
        assert_eq!(probe(|| call(libc::SYS_pause, &[])), "EINTR");
    }
}
