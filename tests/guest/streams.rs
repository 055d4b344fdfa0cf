//! Standard streams, signals, the exit status.

use crate::support::{Call, own_root, python};
use rustix::process::Signal;
use sha2::{Digest, Sha256};

#[test]
fn output_errors_and_status_arrive_where_they_belong() {
    let ran = Call::run(&["busybox", "sh", "-c", "echo out; echo err >&2; exit 7"]).end();
    assert_eq!(
        (ran.status, ran.out(), ran.err()),
        (7, "out\n".into(), "err\n".into())
    );
}

#[test]
fn standard_input_is_given_with_i_and_only_then() {
    let ran = Call::run(&["-i", "busybox", "cat"]).end_with(b"hi\n");
    assert_eq!(
        (ran.status, ran.out(), ran.err()),
        (0, "hi\n".into(), String::new())
    );
    let ran = Call::run(&["busybox", "cat"]).end_with(b"hi\n");
    assert_eq!(
        (ran.status, ran.out(), ran.err()),
        (0, String::new(), String::new())
    );
}

#[test]
fn eight_mebibytes_of_random_bytes_come_back_the_same() {
    let mut bytes = vec![0; 8 << 20];
    for part in bytes.chunks_mut(256) {
        rustix::rand::getrandom(part, rustix::rand::GetRandomFlags::empty()).expect("random");
    }
    let ran = Call::run(&["-i", "busybox", "cat"]).end_with(&bytes);
    assert_eq!((ran.status, ran.err()), (0, String::new()));
    assert_eq!(ran.stdout.len(), bytes.len());
    assert_eq!(Sha256::digest(&ran.stdout), Sha256::digest(&bytes));
}

/// Longer than the end of a process waits for outputs that somebody else holds open.
#[test]
fn who_reads_slowly_misses_nothing_of_a_run_and_of_an_exec() {
    const SLOWLY: &str = r#""$0" "$@" | { sleep 8; wc -c; }"#;
    // More than all that lies between holds.
    const LONG: &str = "head -c 6000000 /dev/zero";
    let ran = Call::run(&["busybox", "sh", "-c", LONG])
        .under("sh", &["-c", SLOWLY])
        .end();
    assert_eq!(ran.out().trim(), "6000000", "{ran}");
    let own = own_root();
    let kept = ["-d", "--name", "it", "busybox", "sleep", "1000"];
    let started = Call::run_to_keep(own.path(), &kept).end();
    assert_eq!(started.status, 0, "{started}");
    let ran = Call::vm_run_in(own.path(), &["exec", "it", "sh", "-c", LONG])
        .under("sh", &["-c", SLOWLY])
        .end();
    assert_eq!(ran.out().trim(), "6000000", "{ran}");
    // Something in the background that holds an output open is not waited for, though it
    // writes now and then.
    let held = "while :; do echo; sleep 1; done & echo over";
    let ran = Call::vm_run_in(own.path(), &["exec", "it", "sh", "-c", held]).end();
    assert!(ran.status == 0 && ran.out().contains("over"), "{ran}");
    let removed = Call::vm_run_in(own.path(), &["rm", "-f", "it"]).end();
    assert_eq!(removed.status, 0, "{removed}");
}

#[test]
fn signals_reach_the_container_which_decides_what_they_do() {
    let script = "trap 'echo int' INT
        trap 'n=$((n + 1)); echo term $n; [ $n -lt 2 ] || exit 41' TERM
        sleep 1000 & echo ready; while :; do wait; done";
    let mut running = Call::run(&["busybox", "sh", "-c", script]).start();
    running.expect("ready");
    running.signal(Signal::INT);
    running.expect("int");
    running.signal(Signal::TERM);
    running.expect("term 1");
    running.signal(Signal::TERM);
    let ran = running.end();
    assert_eq!((ran.status, ran.err()), (41, String::new()), "{ran}");
    assert_eq!(ran.out(), "ready\nint\nterm 1\nterm 2\n");
}

/// PID 1 of a container has no default actions, in docker's too: only the kernel
/// ends it, here for the CPU time that it uses up.
#[test]
fn an_end_by_a_signal_gives_128_and_the_signal() {
    let script = "kill -9 $$; ulimit -t 1; echo alive; while :; do :; done";
    let ran = Call::run(&["busybox", "sh", "-c", script]).end();
    assert_eq!((ran.status, ran.out()), (137, "alive\n".into()), "{ran}");
    let script = "import ctypes; ctypes.string_at(0)";
    let ran = Call::run(&[python(), "python3", "-c", script]).end();
    assert_eq!((ran.status, ran.out()), (139, String::new()), "{ran}");
}
