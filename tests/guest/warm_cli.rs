//! Warm templates on the command line.

use crate::support::{Call, Ran, field, listing, own_root, programs};
use rustix::process::Signal;
use std::path::Path;

/// Says something, is warm, says which child it is, reads a line, ends.
const ANSWERS: &str = "echo warming; echo slowly >&2; g=$(/run/vm-run/warm) || exit 1
    echo child=$g; read line && echo line=$line; echo host=$(hostname); exit 7";

/// Is warm, and runs until it is told to end.
const SERVES: &str = "trap 'echo term; exit 43' TERM; g=$(/run/vm-run/warm)
    echo ready; while :; do sleep 1 & wait; done";

fn build(root: &Path, name: &str, line: &str) -> Ran {
    let args = ["--name", name, "--image", "busybox", "--warm", line];
    Call::template_build_in(root, &args).end()
}

fn template<const N: usize>(root: &Path, args: [&str; N]) -> Ran {
    let ran = Call::vm_run_in(root, &[&["template"], &args[..]].concat()).end();
    assert_eq!((ran.status, ran.err()), (0, String::new()), "{ran}");
    ran
}

#[test]
fn a_container_goes_on_in_each_child() {
    let own = own_root();
    let root = own.path();
    let built = build(root, "w", ANSWERS);
    assert_eq!((built.status, built.out()), (0, "w\n".into()), "{built}");
    assert_eq!(built.err(), "warming\nslowly\n", "what it said meanwhile");

    let with_input = Call::run_in(root, &["-i", "--template", "w", "--hostname", "hal"]);
    let first = with_input.end_with(b"hi\n");
    assert_eq!((first.status, first.err()), (7, String::new()), "{first}");
    let out = first.out();
    assert_eq!((field(&out, "line"), field(&out, "host")), ("hi", "hal"));
    // Without -i its input is at its end.
    let second = Call::run_in(root, &["--template", "w"]).end_with(b"hi\n");
    assert_eq!((second.status, second.err()), (7, String::new()));
    assert!(!second.out().contains("line="), "{second}");
    let other = second.out();
    assert_ne!(field(&out, "child"), field(&other, "child"));

    let table = template(root, ["ls"]).out();
    let row = table.lines().find(|row| row.starts_with("w "));
    let row: Vec<&str> = row.expect("is listed").split_whitespace().collect();
    assert_eq!(row, ["w", "warm", "256", "MiB", "1", "busybox"]);
    let listed = template(root, ["ls", "--json"]);
    let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let listed = listed.as_array().into_iter().flatten();
    let found = listed.clone().find(|t| t["name"] == "w").expect("listed");
    assert_eq!(
        (&found["kind"], &found["image"]),
        (&"warm".into(), &"busybox".into())
    );
    assert_eq!(found["command"][2], ANSWERS);
    let manifest = template(root, ["inspect", "--verify", "w"]);
    let manifest: serde_json::Value = serde_json::from_slice(&manifest.stdout).expect("JSON");
    assert_eq!(manifest["warm"]["image"], "busybox");

    template(root, ["rm", "w"]);
    let line = Call::run_in(root, &["--template", "w"]).refused(125);
    assert!(line.contains("no template w"), "{line}");
}

#[test]
fn signals_and_commands_reach_the_container_inside() {
    let own = own_root();
    let root = own.path();
    let built = build(root, "serves", SERVES);
    assert_eq!(built.status, 0, "{built}");

    let mut running = Call::run_in(root, &["--template", "serves"]).start();
    running.expect("ready");
    running.signal(Signal::TERM);
    let ran = running.end();
    assert_eq!(
        (ran.status, ran.out()),
        (43, "ready\nterm\n".into()),
        "{ran}"
    );

    let script = "grep -c ready /proc/1/cmdline; cat; echo err >&2; exit 5";
    let args = ["-i", "--template", "serves", "--", "sh", "-c", script];
    let ran = Call::run_in(root, &args).end_with(b"typed\n");
    let told = (ran.status, ran.out(), ran.err());
    assert_eq!(told, (5, "1\ntyped\n".into(), "err\n".into()));
    let args = ["--template", "serves", "--", "no-such-command"];
    Call::run_in(root, &args).refused(127);

    let refused: [&[&str]; 5] = [
        &["busybox"],
        &["-e", "A=1"],
        &["-u", "root", "--", "id"],
        &["-w", "/", "--", "pwd"],
        &["--entrypoint", "sh"],
    ];
    for words in refused {
        let line = Call::run_in(root, &[&["--template", "serves"], words].concat()).refused(125);
        assert!(line.contains("cannot be chosen"), "{words:?}: {line}");
    }
}

/// What each child is told it was asked for, by the hooks and by nobody else.
#[test]
fn hooks_run_before_the_freeze_and_in_each_child() {
    let own = own_root();
    let root = own.path();
    let hooked = |name: &str, hooks: &[&str]| {
        let warm = "/run/vm-run/warm >/dev/null; read line; cat /told; echo line=$line";
        let args = ["--name", name, "--image", "busybox", "--warm", warm];
        Call::template_build_in(root, &[&args[..], hooks].concat())
    };
    let pre = "echo before=$(hostname) > /told; echo unheard";
    let post = "echo after=$(hostname) >> /told";
    let built = hooked("h", &["--pre-freeze", pre, "--post-fork", post]).end();
    assert_eq!((built.status, built.err()), (0, String::new()), "{built}");
    for name in ["one", "two"] {
        let args = ["-i", "--template", "h", "--hostname", name];
        let ran = Call::run_in(root, &args).end_with(b"hi\n");
        let told = format!("before=warm\nafter={name}\nline=hi\n");
        assert_eq!((ran.status, ran.out(), ran.err()), (0, told, String::new()));
    }
    let manifest = template(root, ["inspect", "h"]);
    let manifest: serde_json::Value = serde_json::from_slice(&manifest.stdout).expect("JSON");
    assert_eq!(
        manifest["warm"]["hooks"]["post_fork"]["Command"][2], post,
        "{manifest}"
    );

    // What fails before the freeze forbids it, and what fails in a child ends it.
    let failing = "echo not ready >&2; exit 3";
    let line = hooked("p", &["--pre-freeze", failing]).refused(125);
    assert!(line.contains("pre-freeze hook ended with status 3: not ready"));
    let slow = ["--pre-freeze", "sleep 1000", "--hook-timeout", "1"];
    let line = hooked("p", &slow).refused(125);
    assert!(
        line.contains("pre-freeze hook did not end in 1 s"),
        "{line}"
    );
    assert_eq!(hooked("f", &["--post-fork", failing]).end().status, 0);
    for words in [&[][..], &["--", "echo", "not", "this"]] {
        let args = [&["--template", "f"], words].concat();
        let line = Call::run_in(root, &args).refused(125);
        assert!(
            line.contains("post-fork hook ended with status 3: not ready"),
            "{line}"
        );
    }
}

/// Keys are files: a child has those of its template, the image's or not, unless a hook
/// makes others, as docs/identity.md says.
#[test]
fn ssh_host_keys_are_kept_or_made_anew() {
    let image = programs();
    let own = own_root();
    let root = own.path();
    let renew = "cd /etc/ssh; rm -f ssh_host_ed25519_key*; \
                 ssh-keygen -q -t ed25519 -N '' -f ssh_host_ed25519_key";
    let line = format!(
        "{renew}; /run/vm-run/warm > /dev/null; read line; \
         echo key=$(cat ssh_host_ed25519_key.pub); echo image=$(cat ssh_host_rsa_key)"
    );
    let keys = |name: &str, hooks: &[&str]| {
        let args = ["--name", name, "--image", image, "--warm", &line];
        let built = Call::template_build_in(root, &[&args[..], hooks].concat()).end();
        assert_eq!(built.status, 0, "{built}");
        [0, 1].map(|_| {
            let ran = Call::run_in(root, &["-i", "--template", name]).end_with(b"go\n");
            assert_eq!((ran.status, ran.err()), (0, String::new()), "{ran}");
            assert_eq!(field(&ran.out(), "image"), "the image's");
            field(&ran.out(), "key")
                .split(' ')
                .nth(1)
                .map(str::to_owned)
        })
    };
    let kept = keys("kept", &[]);
    assert!(kept[0].is_some() && kept[0] == kept[1], "{kept:?}");
    let made = keys("made", &["--post-fork", renew]);
    assert!(made[0].is_some() && made[0] != made[1], "{made:?}");
}

#[test]
fn a_container_that_is_not_warm_leaves_nothing() {
    let own = own_root();
    let root = own.path();
    let before = listing(root);
    let ended = build(root, "t", "echo last words; exit 3");
    assert_eq!((ended.status, ended.out()), (125, String::new()), "{ended}");
    let lines: Vec<String> = ended.err().lines().map(String::from).collect();
    assert!(
        lines.len() == 2 && lines[0] == "last words" && lines[1].contains("ended with status 3"),
        "{ended}"
    );
    let args = ["--image", "busybox", "--warm-timeout", "2", "--warm"];
    let line = Call::template_build_in(root, &args)
        .args(&["sleep 1000"])
        .refused(125);
    assert!(line.contains("in 2 s"), "{line}");
    let line = Call::template_build_in(root, &args)
        .args(&[r#"["/no/such"]"#])
        .refused(127);
    assert!(line.contains("/no/such"), "{line}");
    assert_eq!(listing(root), before);
}

/// Default templates and warm ones belong to a domain, and a child of another is
/// refused.
#[test]
fn a_trust_domain_has_templates_of_its_own() {
    let own = own_root();
    let root = own.path();
    let ran = Call::run_in(root, &["--domain", "tenant", "busybox", "echo", "mine"]).end();
    assert_eq!((ran.status, ran.out()), (0, "mine\n".into()), "{ran}");
    let name = "tenant.default-256m-1c";
    assert!(template(root, ["ls"]).out().contains(name));
    let line = Call::run_in(root, &["--template", name, "busybox", "true"]).refused(125);
    assert!(line.contains("trust domain"), "{line}");
    let line = Call::run_in(root, &["--domain", "../x", "busybox", "true"]).refused(125);
    assert!(line.contains("trust domain"), "{line}");

    let args = [
        "--domain", "tenant", "--image", "busybox", "--warm", ANSWERS,
    ];
    let built = Call::template_build_in(root, &args).end();
    assert_eq!(
        (built.status, built.out()),
        (0, "busybox\n".into()),
        "{built}"
    );
    let ran = Call::run_in(root, &["--domain", "tenant", "--template", "busybox"]).end();
    assert_eq!(ran.status, 7, "{ran}");
    let line = Call::run_in(root, &["--template", "busybox"]).refused(125);
    assert!(line.contains("trust domain"), "{line}");
}
