//! The system calls that a worker may make, thread by thread (seccomp(2)).
//!
//! What is not in [`calls`] kills the process, with SIGSYS: nothing in a VM's life
//! needs it, so it is a guest that has broken out, or a mistake of ours, which the
//! spawner then reports. A thread's list is a part of the main thread's, which every
//! thread inherits.

mod broker;
mod calls;

use calls::{Call, Check};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};
use std::collections::BTreeMap;

/// What a thread of a worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[doc(hidden)]
pub enum Thread {
    /// It makes and ends the VM, and answers the owner. What it may do, all threads
    /// that it starts may do until they are confined further.
    Main,
    /// It runs one vCPU: the thread with the most of the guest's influence.
    Vcpu,
    /// It runs the devices' event loop.
    Io,
}

/// A list that cannot be put in force.
#[derive(Debug, thiserror::Error)]
#[doc(hidden)]
pub enum Error {
    /// The list makes no filter.
    #[error("a list of system calls makes no filter: {0}")]
    Filter(#[from] BackendError),
    /// The kernel does not take it.
    #[error("seccomp: {0}")]
    Install(#[from] seccompiler::Error),
}

/// Confines the calling thread, and those that it starts, to what it is for. Once for
/// each thread; there is no way back.
///
/// # Errors
/// A kernel without seccomp filters. The thread must then not go on.
#[doc(hidden)]
pub fn confine(thread: Thread) -> Result<(), Error> {
    let list = calls::of(thread, std::process::id());
    if thread == Thread::Main {
        // First: it is of no use where the list below is in force already.
        apply_filter(&absent()?)?;
    }
    install(&list)
}

/// Confines a broker, which has one thread, to what serves files.
///
/// # Errors
/// As [`confine`].
pub(crate) fn confine_broker() -> Result<(), Error> {
    install(&broker::list(std::process::id()))
}

fn install(list: &[Call]) -> Result<(), Error> {
    let mut rules = BTreeMap::new();
    for call in list {
        rules.insert(call.number, call.rules()?);
    }
    // What is listed twice would lose its first conditions.
    debug_assert_eq!(rules.len(), list.len());
    let program = program(rules, SeccompAction::KillProcess, SeccompAction::Allow)?;
    Ok(apply_filter(&program)?)
}

/// What the C library tries, and does without where the kernel has no such call.
fn absent() -> Result<BpfProgram, Error> {
    let enosys = SeccompAction::Errno(libc::ENOSYS as u32);
    let rules = BTreeMap::from([
        // It takes its flags in memory, which a filter cannot see: clone(2)'s are looked at.
        (libc::SYS_clone3, Vec::new()),
        (libc::SYS_openat, calls::open_to_read().rules()?),
    ]);
    program(rules, SeccompAction::Allow, enosys)
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, Error> {
    let filter = SeccompFilter::new(rules, others, listed, TargetArch::x86_64)?;
    Ok(BpfProgram::try_from(filter)?)
}

impl Call {
    /// One rule for each alternative; none is needed where every argument will do.
    fn rules(&self) -> Result<Vec<SeccompRule>, Error> {
        self.alternatives
            .iter()
            .map(|checks| {
                let conditions = checks
                    .iter()
                    .map(|check| {
                        let (argument, operator, value) = match *check {
                            Check::Is(argument, value) => (argument, SeccompCmpOp::Eq, value),
                            Check::With(argument, bits) => {
                                let all = SeccompCmpOp::MaskedEq(u64::from(bits));
                                (argument, all, bits)
                            }
                            Check::Without(argument, bits) => {
                                (argument, SeccompCmpOp::MaskedEq(u64::from(bits)), 0)
                            }
                        };
                        // All of them are 32 bits wide for the kernel.
                        let width = SeccompCmpArgLen::Dword;
                        SeccompCondition::new(argument, width, operator, u64::from(value))
                    })
                    .collect::<Result<_, _>>()?;
                Ok(SeccompRule::new(conditions)?)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn numbers(thread: Thread) -> BTreeSet<i64> {
        let list = calls::of(thread, 1);
        list.iter().map(|call| call.number).collect()
    }

    #[test]
    fn each_list_names_a_call_once_and_makes_a_filter() {
        for thread in [Thread::Main, Thread::Vcpu, Thread::Io] {
            let list = calls::of(thread, 1);
            assert_eq!(numbers(thread).len(), list.len(), "{thread:?}");
            let mut rules = BTreeMap::new();
            for call in &list {
                rules.insert(call.number, call.rules().expect("rules"));
            }
            let made = program(rules, SeccompAction::KillProcess, SeccompAction::Allow);
            assert!(made.expect("a filter").len() < 1000, "{thread:?}");
        }
    }

    #[test]
    fn a_thread_may_do_no_more_than_the_one_that_started_it() {
        let main = numbers(Thread::Main);
        for thread in [Thread::Vcpu, Thread::Io] {
            assert!(numbers(thread).is_subset(&main), "{thread:?}");
        }
    }

    #[test]
    fn a_broker_makes_files_and_nothing_else() {
        let list = broker::list(1);
        let numbers: BTreeSet<i64> = list.iter().map(|call| call.number).collect();
        assert_eq!(numbers.len(), list.len());
        let mut rules = BTreeMap::new();
        for call in &list {
            rules.insert(call.number, call.rules().expect("rules"));
        }
        program(rules, SeccompAction::KillProcess, SeccompAction::Allow).expect("a filter");
        for number in [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_fork,
            libc::SYS_socket,
            libc::SYS_socketpair,
            libc::SYS_connect,
            libc::SYS_mount,
            libc::SYS_open_tree,
            libc::SYS_move_mount,
            libc::SYS_pivot_root,
            libc::SYS_chroot,
            libc::SYS_chdir,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_ptrace,
            libc::SYS_kill,
            libc::SYS_ioctl,
            libc::SYS_bpf,
            libc::SYS_capset,
            libc::SYS_open_by_handle_at,
            libc::SYS_io_uring_setup,
            libc::SYS_prlimit64,
        ] {
            assert!(!numbers.contains(&number), "{number}");
        }
    }

    #[test]
    fn no_list_names_a_call_that_opens_or_reaches_anything() {
        // openat is listed as far as [`absent`] answers it; tests/jail tries both.
        let never = [
            libc::SYS_open,
            libc::SYS_openat2,
            libc::SYS_open_by_handle_at,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_accept4,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_kill,
            libc::SYS_tkill,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_open,
            libc::SYS_pidfd_getfd,
            libc::SYS_mount,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_userfaultfd,
            libc::SYS_io_uring_setup,
            libc::SYS_keyctl,
            libc::SYS_shmat,
            libc::SYS_pkey_mprotect,
            libc::SYS_prlimit64,
        ];
        let main = numbers(Thread::Main);
        for number in never {
            assert!(!main.contains(&number), "{number}");
        }
    }
}
