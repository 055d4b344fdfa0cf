//! What a container can rely on.

use crate::host::{Agent, Images, Outcome, collect, outcome, process, shell, start};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::Path;
use std::time::{Duration, Instant};
use vm_run_abi::protocol::{
    CONTAINER, ContainerSpec, Event, ExitStatus, ProcessSpec, Request, StartFailure, Stream,
    WindowSize, Writable,
};

/// A case and its name.
pub type Case = (&'static str, fn(&Images));

macro_rules! cases {
    ($($name:ident),* $(,)?) => { &[$((stringify!($name), $name)),*] };
}
pub(crate) use cases;

pub const ALL: &[Case] = cases![
    streams_and_status_are_the_programs_own,
    eight_mebibytes_come_back_the_same,
    a_late_reader_gets_everything,
    commands_that_cannot_run_are_told_apart,
    signals_reach_the_process,
    a_terminal_is_one,
    a_terminal_delivers_what_was_written_last,
    users_are_those_of_the_image,
    privileges_are_dockers,
    surroundings_are_dockers,
    mounts_are_these_and_no_others,
    a_container_has_the_guests_network_or_its_own,
    a_first_process_that_is_gone_is_a_failed_start,
    a_long_command_arrives_whole,
    writable_layers_keep_their_promises,
    an_empty_layer_is_mounted_before_it_is_wanted,
    each_container_is_another_machine,
    an_ext4_image_works_too,
    the_end_of_the_first_process_is_the_end_of_all,
    input_that_nobody_reads_is_dropped,
    a_host_that_goes_ends_everything,
    nonsense_from_the_host_ends_the_agent,
];

fn run(images: &Images, spec: (ContainerSpec, ProcessSpec)) -> Outcome {
    outcome(&mut Agent::start(images), spec)
}

fn sh(images: &Images, script: &str) -> String {
    let outcome = run(images, shell(script));
    assert_eq!(outcome.events, ended(0), "{outcome:?}");
    outcome.stdout
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(pid as i32).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

fn ended(code: u8) -> Vec<Event> {
    let status = ExitStatus::Code(code);
    let process = CONTAINER;
    vec![
        Event::Started { process },
        Event::Exited { process, status },
    ]
}

fn streams_and_status_are_the_programs_own(images: &Images) {
    let outcome = run(images, shell("echo out; echo err >&2; exit 7"));
    assert_eq!(outcome.stdout, "out\n");
    assert_eq!(outcome.stderr, "err\n");
    assert_eq!(outcome.events, ended(7));

    let (container, mut process) = shell("cat; echo $FOO; pwd; echo $PATH; echo $HOME");
    process.env = vec!["FOO=a b".to_owned()];
    process.cwd = "/made/for/me".to_owned();
    let outcome = run(images, (container, process));
    assert_eq!(
        outcome.stdout,
        "a b\n/made/for/me\n\
         /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n/root\n"
    );

    // Streams that the host has not opened are /dev/null.
    let mut agent = Agent::start(images);
    let (container, mut process) = shell("cat; echo lost; exit 5");
    process.streams = Vec::new();
    agent.send(&Request::StartContainer { container, process });
    assert_eq!([agent.event(), agent.event()], ended(5)[..]);
}

fn eight_mebibytes_come_back_the_same(images: &Images) {
    let mut sent = Vec::with_capacity(8 << 20);
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    while sent.len() < 8 << 20 {
        word = word.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
        sent.extend_from_slice(&word.to_be_bytes());
    }
    let mut agent = Agent::start(images);
    let mut streams = start(&mut agent, process(&["cat"]));
    let stdout = collect(streams.stdout);
    streams.stdin.write_all(&sent).unwrap();
    streams.stdin.shutdown(Shutdown::Write).unwrap();
    assert!(stdout.join().unwrap() == sent);
    assert_eq!([agent.event(), agent.event()], ended(0)[..]);
}

fn a_late_reader_gets_everything(images: &Images) {
    let mut agent = Agent::start(images);
    let script = "head -c 3000000 /dev/zero; echo done >&2";
    let mut streams = start(&mut agent, shell(script));
    // The first process cannot end before it has been read from; its last pipe
    // full is delivered after its end.
    let mut first = vec![0; 2_800_000];
    streams.stdout.read_exact(&mut first).unwrap();
    assert_eq!([agent.event(), agent.event()], ended(0)[..]);
    let mut rest = Vec::new();
    streams.stdout.read_to_end(&mut rest).unwrap();
    assert_eq!(first.len() + rest.len(), 3_000_000);
}

fn commands_that_cannot_run_are_told_apart(images: &Images) {
    let refused = |args: &[&str]| match run(images, process(args)).events.remove(0) {
        Event::StartFailed {
            reason, message, ..
        } => (reason, message),
        other => panic!("{args:?}: {other:?}"),
    };
    use StartFailure::{NotExecutable, NotFound, Other};
    let expect = |args: &[&str], reason, message: &str| {
        assert_eq!(refused(args), (reason, message.to_owned()));
    };
    let unknown = "exec: \"foo\": executable file not found in $PATH";
    expect(&["foo"], NotFound, unknown);
    let gone = "exec: \"/bin/foo\": stat /bin/foo: no such file or directory";
    expect(&["/bin/foo"], NotFound, gone);
    let denied = "exec: \"/etc/passwd\": permission denied";
    expect(&["/etc/passwd"], NotExecutable, denied);
    expect(&["/etc"], NotExecutable, "exec: \"/etc\": is a directory");
    let garbage = "exec: \"garbage\": exec format error";
    expect(&["garbage"], NotExecutable, garbage);
    assert_eq!(refused(&["/bin/orphan-script"]).0, NotFound);
    expect(&["sh", "a\0b"], Other, "\"a\\0b\" contains a zero byte");

    let (container, mut process) = shell("true");
    process.cwd = "/etc/passwd".to_owned();
    let events = run(images, (container, process)).events;
    let [Event::StartFailed { reason: Other, .. }] = &events[..] else {
        panic!("{events:?}");
    };
}

fn signals_reach_the_process(images: &Images) {
    let mut agent = Agent::start(images);
    let script = "trap 'echo trapped; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
    let mut streams = start(&mut agent, shell(script));
    let mut ready = [0; 6];
    streams.stdout.read_exact(&mut ready).unwrap();
    agent.signal(libc::SIGTERM);
    let mut rest = String::new();
    streams.stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "trapped\n");
    assert_eq!([agent.event(), agent.event()], ended(3)[..]);

    // As in docker: the first process of a PID namespace is spared the signals
    // that it does not handle, but for SIGKILL.
    let mut agent = Agent::start(images);
    let mut streams = start(
        &mut agent,
        shell("echo ready; while :; do sleep 0.05; done"),
    );
    streams.stdout.read_exact(&mut ready).unwrap();
    for signal in [libc::SIGTERM, libc::SIGUSR1, 0, -1, 99999] {
        agent.signal(signal);
    }
    agent.signal(libc::SIGKILL);
    let process = CONTAINER;
    let status = ExitStatus::Signal(9);
    assert_eq!(agent.event(), Event::Started { process });
    assert_eq!(agent.event(), Event::Exited { process, status });
}

fn a_terminal_is_one(images: &Images) {
    let mut agent = Agent::start(images);
    let script = "tty; stty size; ls -l /dev/console /dev/tty >/dev/null && echo both; \
                  trap 'stty size' WINCH; trap 'echo int; exit 9' INT; read line; echo \"<$line>\"; \
                  while :; do sleep 0.05; done";
    let (container, mut process) = shell(script);
    process.streams = vec![Stream::Terminal];
    process.window = Some(WindowSize { rows: 33, cols: 77 });
    let mut terminal = agent.stream(Stream::Terminal);
    agent.send(&Request::StartContainer { container, process });
    let mut seen = String::new();
    let mut until = |seen: &mut String, text: &str| {
        let mut byte = [0];
        while !seen.contains(text) {
            terminal.read_exact(&mut byte).unwrap();
            seen.push(char::from(byte[0]));
        }
        terminal.try_clone().unwrap()
    };
    let mut typed = until(&mut seen, "both");
    assert!(seen.contains("/dev/pts/0\r\n33 77\r\n"), "{seen:?}");
    typed.write_all(b"word\n").unwrap();
    until(&mut seen, "<word>");
    let size = WindowSize { rows: 10, cols: 20 };
    let process = CONTAINER;
    agent.send(&Request::Resize { process, size });
    until(&mut seen, "10 20");
    typed.write_all(&[3]).unwrap();
    until(&mut seen, "int\r\n");
    let mut rest = Vec::new();
    terminal.read_to_end(&mut rest).unwrap();
    assert_eq!([agent.event(), agent.event()], ended(9)[..]);
}

fn a_terminal_delivers_what_was_written_last(images: &Images) {
    let mut agent = Agent::start(images);
    let (container, mut process) = process(&["seq", "1", "200000"]);
    process.streams = vec![Stream::Terminal];
    let mut terminal = agent.stream(Stream::Terminal);
    agent.send(&Request::StartContainer { container, process });
    std::thread::sleep(Duration::from_millis(200));
    let mut all = String::new();
    terminal.read_to_string(&mut all).unwrap();
    assert_eq!(all.lines().count(), 200_000);
    assert_eq!(all.lines().last(), Some("200000"));
}

fn users_are_those_of_the_image(images: &Images) {
    let as_user = |user: &str| {
        let script = "id; echo $HOME; echo again >/dev/stdout; touch /tmp/x && ls /etc/shadow";
        let (container, mut process) = shell(script);
        process.user = user.to_owned();
        run(images, (container, process))
    };
    let web = "uid=1000(web) gid=1000(web) groups=4(adm),1000(web)\n/home/web\nagain\n";
    assert_eq!(as_user("web").stdout, web);
    assert_eq!(as_user("1000").stdout, web);
    let groups = "uid=1000(web) gid=4(adm) groups=4(adm)\n/home/web\nagain\n";
    assert_eq!(as_user("web:adm").stdout, groups);
    let number = "uid=77 gid=78 groups=78\n/\nagain\n";
    assert_eq!(as_user("77:78").stdout, number);
    let Event::StartFailed {
        reason, message, ..
    } = &as_user("ghost").events[0]
    else {
        panic!("a ghost ran");
    };
    assert_eq!(*reason, StartFailure::Other);
    assert_eq!(
        message,
        "unable to find user ghost: no matching entries in passwd file"
    );
}

fn privileges_are_dockers(images: &Images) {
    let script = "grep -E '^(Cap|NoNewPrivs|SigIgn|SigBlk)' /proc/self/status; umask; \
                  ulimit -n; ls -1 /proc/self/fd | wc -l; cat /proc/self/stat | cut -d' ' -f6";
    let root = "CapInh:\t0000000000000000\nCapPrm:\t00000000a80425fb\n\
                CapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\n\
                CapAmb:\t0000000000000000\n";
    let rest = "NoNewPrivs:\t0\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n\
                0022\n4096\n4\n1\n";
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(
        sorted(&sh(images, script)),
        sorted(&format!("{root}{rest}"))
    );
    let (container, mut process) = shell(script);
    process.user = "web".to_owned();
    let web = run(images, (container, process)).stdout;
    let none = root
        .replace("Prm:\t00000000a80425fb", "Prm:\t0000000000000000")
        .replace("Eff:\t00000000a80425fb", "Eff:\t0000000000000000");
    assert_eq!(sorted(&web), sorted(&format!("{none}{rest}")));
}

fn surroundings_are_dockers(images: &Images) {
    let has = |script: &str, expected: &str| {
        assert_eq!(sh(images, script), expected, "{script}");
    };
    has(
        "echo $$; readlink /proc/1/exe; grep ^0 /proc/self/cgroup",
        "1\n/bin/busybox\n0::/\n",
    );
    has(
        "cat /etc/hostname | tr -d '\\n' | cmp - /proc/sys/kernel/hostname; true",
        "",
    );
    has(
        "[ $(cat /etc/hostname) = $(hostname) ] && [ $HOSTNAME = $(hostname) ] && echo same",
        "same\n",
    );
    has("grep -c localhost /etc/hosts; ls /tmp", "2\n");
    has("[ -c /dev/null ] && echo x >/dev/null && echo ok", "ok\n");
    has(
        "stat -c '%a %t:%T' /dev/tty /dev/full",
        "666 5:0\n666 1:7\n",
    );
    has(
        "for x in fd ptmx core; do readlink /dev/$x; done",
        "/proc/self/fd\npts/ptmx\n/proc/kcore\n",
    );
    has(
        "df -m /dev/shm | tail -1 | awk '{print $2}'; stat -c %a /dev/shm",
        "64\n1777\n",
    );
    has("touch /dev/mqueue/q /dev/shm/s && echo ok", "ok\n");
    has(
        "head -c 1 /proc/kcore | wc -c; ls /sys/firmware | wc -l",
        "0\n0\n",
    );
    has(
        "(echo 1 >/proc/sys/vm/swappiness) 2>&1 | grep -c 'Read-only'",
        "1\n",
    );
    has("mkdir /sys/fs/cgroup/x 2>&1 | grep -c 'Read-only'", "1\n");
    has("mount -t tmpfs t /tmp 2>&1 | grep -c 'ermi'", "1\n");
    let nodes =
        "mknod /tmp/d b 7 0 && mknod /tmp/n c 1 3 && echo x >/tmp/n && head -c1 /tmp/d 2>&1";
    let denied = format!("{nodes} | grep -c 'not permitted'");
    has(&denied, "1\n");
    // Nothing of the agent's own tree is left.
    has(
        "ls /mnt 2>/dev/null | wc -l; cut -d' ' -f5 /proc/self/mountinfo | grep -c ^/mnt; true",
        "0\n0\n",
    );
    has("stat -c '%a %u:%g' /", "755 0:0\n");
}

fn mounts_are_these_and_no_others(images: &Images) {
    // What lies where, its root there, its kind, and the mount's own options
    // (proc_pid_mountinfo(5)).
    let script = "sed 's/ - / /' /proc/self/mountinfo | \
                  while read _ _ _ root at options kind _; do \
                  echo $at $root $kind $options; done | sort";
    let plain = "nosuid,nodev,noexec,relatime";
    let mut expected = vec![
        "/ / overlay rw,noatime".to_owned(),
        "/dev / tmpfs rw,nosuid".to_owned(),
        format!("/dev/mqueue / mqueue rw,{plain}"),
        "/dev/pts / devpts rw,nosuid,noexec,relatime".to_owned(),
        format!("/dev/shm / tmpfs rw,{plain}"),
        "/etc/hostname /hostname tmpfs rw,noatime".to_owned(),
        "/etc/hosts /hosts tmpfs rw,noatime".to_owned(),
        "/etc/machine-id /machine-id tmpfs rw,noatime".to_owned(),
        "/etc/resolv.conf /resolv.conf tmpfs rw,noatime".to_owned(),
        format!("/proc / proc rw,{plain}"),
        format!("/sys / sysfs ro,{plain}"),
        format!("/sys/fs/cgroup / cgroup2 ro,{plain}"),
    ];
    // As far as this kernel has them.
    for name in ["bus", "fs", "irq", "sys", "sysrq-trigger"] {
        if Path::new("/proc").join(name).exists() {
            expected.push(format!("/proc/{name} /{name} proc ro,{plain}"));
        }
    }
    for path in [
        "/proc/acpi",
        "/proc/asound",
        "/proc/interrupts",
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/sched_debug",
        "/proc/scsi",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/sys/devices/virtual/powercap",
        "/sys/firmware",
    ] {
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => expected.push(format!("{path} / tmpfs ro,relatime")),
            Ok(_) => expected.push(format!("{path} /null tmpfs rw,nosuid")),
            Err(_) => {}
        }
    }
    expected.sort();
    let mounts = sh(images, script);
    assert_eq!(mounts.lines().collect::<Vec<_>>(), expected);
}

fn a_container_has_the_guests_network_or_its_own(images: &Images) {
    let script = "readlink /proc/self/ns/net; ls /sys/class/net; \
                  cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
                  ping -c 1 -q 127.0.0.1 >/dev/null && echo alive";
    let guests = fs::read_link("/proc/self/ns/net").unwrap();
    let guests = guests.to_str().unwrap();
    let alone = sh(images, script);
    let (namespace, rest) = alone.split_once('\n').unwrap();
    assert_ne!(namespace, guests);
    assert_eq!(rest, "lo\n0\nalive\n");

    let (mut container, process) = shell("readlink /proc/self/ns/net; ls /sys/class/net");
    container.network = true;
    let connected = run(images, (container, process));
    let mut interfaces: Vec<String> = fs::read_dir("/sys/class/net")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    interfaces.sort();
    let expected = format!("{guests}\n{}\n", interfaces.join("\n"));
    assert_eq!(connected.stdout, expected, "{connected:?}");
}

fn a_first_process_that_is_gone_is_a_failed_start(images: &Images) {
    let mut agent = Agent::start(images);
    // Once it answers, the process is there.
    let (_, mut exec) = process(&["true"]);
    exec.streams = Vec::new();
    agent.send(&Request::Exec {
        id: 1,
        process: exec,
    });
    assert!(matches!(agent.event(), Event::StartFailed { .. }));
    kill(agent.first_pid());
    agent.await_no_process();
    let events = outcome(&mut agent, process(&["true"])).events;
    let [
        Event::StartFailed {
            reason, message, ..
        },
    ] = &events[..]
    else {
        panic!("{events:?}");
    };
    assert_eq!(*reason, StartFailure::Other);
    assert!(message.contains("has gone"), "{message}");
}

fn a_long_command_arrives_whole(images: &Images) {
    // More than a socket holds, and as much as a process can be given.
    let words: Vec<String> = (0..12_000).map(|n| format!("{n:0>150}")).collect();
    let mut args = vec!["sh", "-c", "echo $#; shift 11999; echo $1", "sh"];
    args.extend(words.iter().map(String::as_str));
    let outcome = run(images, process(&args));
    assert_eq!(outcome.events, ended(0), "{}", outcome.stderr);
    assert_eq!(outcome.stdout, format!("12000\n{:0>150}\n", 11_999));
}

fn writable_layers_keep_their_promises(images: &Images) {
    let with = |writable: Writable, script: &str, disk: &str| {
        let (mut container, process) = shell(script);
        container.writable = writable;
        let mut agent = Agent::start_with(images, &images.busybox, disk);
        outcome(&mut agent, (container, process))
    };
    let disk = images.writable();
    let first = with(Writable::Disk, "echo kept >/file; rm /bin/garbage", &disk.0);
    assert_eq!(first.events, ended(0), "{first:?}");
    let second = with(Writable::Disk, "cat /file; ls /bin/garbage", &disk.0);
    assert_eq!(second.stdout, "kept\n");
    assert_eq!(second.events, ended(1));

    let limit = 4 << 20;
    let full =
        "head -c 8000000 /dev/zero >/file || echo full; ls -l /file | awk '{print $5 < 4200000}'";
    let memory = with(Writable::Memory { limit }, full, "/dev/null");
    assert_eq!(memory.stdout, "full\n1\n");

    let script = "touch /file || echo refused; touch /dev/shm/file && pwd";
    let nothing = with(Writable::Nothing, script, "/dev/null");
    assert_eq!(nothing.stdout, "refused\n/\n", "{nothing:?}");

    let failed = with(Writable::Disk, "true", &images.busybox.0);
    let Event::StartFailed { message, .. } = &failed.events[0] else {
        panic!("{failed:?}");
    };
    assert!(
        message.starts_with("the writable disk holds no ext4: "),
        "{message}"
    );
}

fn an_empty_layer_is_mounted_before_it_is_wanted(images: &Images) {
    let disk = images.writable();
    let with = |agent: &mut Agent, mounted_disk, writable, script| {
        let (mut container, process) = shell(script);
        container.writable = writable;
        container.mounted_disk = mounted_disk;
        container.kept = true;
        outcome(agent, (container, process))
    };
    // Another layer hides it, and does not touch it.
    for writable in [Writable::Memory { limit: 1 << 20 }, Writable::Nothing] {
        let mut agent = Agent::start_with_mounted(images, &disk.0);
        let script = "touch /file; test -e /file && echo there";
        let hidden = with(&mut agent, false, writable.clone(), script);
        let expected = if writable == Writable::Nothing {
            ""
        } else {
            "there\n"
        };
        assert_eq!(hidden.stdout, expected, "{hidden:?}");
    }
    let mut agent = Agent::start_with_mounted(images, &disk.0);
    let script = "ls /file; stat -c '%u:%g %a' /; echo kept >/file; chmod 700 /";
    let first = with(&mut agent, true, Writable::Disk, script);
    assert_eq!(first.stdout, "0:0 755\n", "{first:?}");
    drop(agent);
    // Used, it is a disk like any other.
    let mut agent = Agent::start_with(images, &images.busybox, &disk.0);
    let script = "cat /file; stat -c %a /";
    let second = with(&mut agent, false, Writable::Disk, script);
    assert_eq!(second.stdout, "kept\n700\n", "{second:?}");

    let mut agent = Agent::start(images);
    let failed = with(&mut agent, true, Writable::Disk, "true");
    let Event::StartFailed { message, .. } = &failed.events[0] else {
        panic!("{failed:?}");
    };
    assert_eq!(message, "the host takes a disk for mounted that is not");
}

fn each_container_is_another_machine(images: &Images) {
    let id = || run(images, shell("cat /etc/machine-id")).stdout;
    let (first, second) = (id(), id());
    assert_ne!(first, second);
    for id in [first, second] {
        let digits = id.strip_suffix('\n').unwrap();
        let is_digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        assert!(digits.len() == 32 && digits.bytes().all(is_digit), "{id}");
    }
}

fn an_ext4_image_works_too(images: &Images) {
    let mut agent = Agent::start_with(images, &images.busybox_ext4, "/dev/null");
    let outcome = outcome(&mut agent, shell("echo hello >/file; cat /file"));
    assert_eq!(outcome.stdout, "hello\n", "{outcome:?}");
}

fn the_end_of_the_first_process_is_the_end_of_all(images: &Images) {
    let start = Instant::now();
    // The child holds stdout and stderr open, and an orphan is reaped by nobody.
    let script = "sleep 1000 & (sleep 1000 & sleep 0.01) & sleep 0.1; echo started; exit 4";
    let outcome = run(images, shell(script));
    assert_eq!(outcome.stdout, "started\n");
    assert_eq!(outcome.events, ended(4));
    assert!(start.elapsed() < Duration::from_secs(20));
}

fn input_that_nobody_reads_is_dropped(images: &Images) {
    let mut agent = Agent::start(images);
    let mut streams = start(
        &mut agent,
        shell("exec <&-; echo closed; sleep 0.2; echo alive"),
    );
    let mut closed = [0; 7];
    streams.stdout.read_exact(&mut closed).unwrap();
    // The agent closes the connection; how soon the host sees it is open.
    streams.stdin.write_all(&vec![1; 1 << 20]).ok();
    let mut rest = String::new();
    streams.stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "alive\n");
    assert_eq!([agent.event(), agent.event()], ended(0)[..]);
}

fn a_host_that_goes_ends_everything(images: &Images) {
    let mut agent = Agent::start(images);
    let mut streams = start(
        &mut agent,
        shell("trap '' TERM; echo on; while :; do sleep 1; done"),
    );
    let mut on = [0; 3];
    streams.stdout.read_exact(&mut on).unwrap();
    agent.control.shutdown(Shutdown::Both).unwrap();
    agent.ends();
    let mut rest = Vec::new();
    streams.stdout.read_to_end(&mut rest).unwrap();

    // With nothing started, too.
    let mut agent = Agent::start(images);
    agent.control.shutdown(Shutdown::Both).unwrap();
    agent.ends();
}

fn nonsense_from_the_host_ends_the_agent(images: &Images) {
    for frame in [&b"\xff\xff\xff\xff"[..], b"\x01\0\0\0\xee", b"\0\0\0\0"] {
        let mut agent = Agent::start(images);
        agent.control.write_all(frame).unwrap();
        agent.ends();
    }
    // A second container is one too many.
    let mut agent = Agent::start(images);
    let streams = start(&mut agent, shell("sleep 1000"));
    let (container, process) = shell("true");
    agent.send(&Request::StartContainer { container, process });
    agent.ends();
    drop(streams);
}
