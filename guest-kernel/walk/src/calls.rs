//! Every system call once, with arguments that do no harm.

use crate::kernel::{Answer, call, out, probe, ptr};
use crate::table::TABLE;

/// Calls that are not made, and why.
const LEFT_OUT: &[(&str, &str)] = &[
    ("rt_sigreturn", "reads a frame that only a signal makes"),
    (
        "vfork",
        "the child would return over its parent's stack frame",
    ),
];

/// One line for each call of the table, and for numbers just past it.
pub fn walk(line: &mut dyn FnMut(String, String)) {
    for &(number, name) in TABLE {
        if LEFT_OUT.iter().any(|(left_out, _)| *left_out == name) {
            continue;
        }
        line(format!("call {name}"), probe(|| one(number)));
    }
    line("call past the table".to_owned(), probe(|| call(1000, &[])));
}

/// Most calls get nothing but bits set: no descriptor, no address, no flag of
/// that sort exists. Those for which that says too little, or does too much, get
/// arguments of their own.
fn one(number: i64) -> Answer {
    let own = u64::from(std::process::id());
    match number {
        // Answers ENOSYS itself to an operation that it does not know.
        libc::SYS_futex => call(number, &[ptr(&0u32), libc::FUTEX_WAKE as u64, 1]),
        // Every process of the machine, or none.
        libc::SYS_kill => call(number, &[own, 0]),
        libc::SYS_alarm => call(number, &[0]),
        libc::SYS_fork => match call(number, &[])? {
            0 => crate::kernel::end(0),
            child => Ok(child),
        },
        // A new process of its own in which nothing must be told.
        libc::SYS_clone => match call(number, &[libc::SIGCHLD as u64])? {
            0 => crate::kernel::end(0),
            child => Ok(child),
        },
        libc::SYS_mlockall => call(number, &[0]),
        libc::SYS_getcpu => call(number, &[out(&mut 0u32), out(&mut 0u32)]),
        libc::SYS_get_mempolicy => call(number, &[out(&mut 0u32)]),
        libc::SYS_set_mempolicy => call(number, &[0]),
        libc::SYS_personality => call(number, &[0xffff_ffff]),
        libc::SYS_brk => call(number, &[0]),
        _ => call(number, &[u64::MAX; 6]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_what_is_left_out_is_in_it() {
        assert!(TABLE.is_sorted());
        assert_eq!(TABLE.last(), Some(&(462, "mseal")));
        for (name, reason) in LEFT_OUT {
            assert!(TABLE.iter().any(|(_, known)| known == name), "{name}");
            assert!(!reason.is_empty());
        }
    }
}
