//! What a container gets that asks for more than the rest, or for less.

use crate::cases::{Case, cases};
use crate::host::{Agent, Images, outcome, process, shell, start, until};
use std::fs;
use std::net::Shutdown;
use vm_run_abi::options::{ContainerOptions, Limit, ProcessOptions, Tmpfs};
use vm_run_abi::protocol::{
    CONTAINER, Event, ExitStatus, Request, StartFailure, Stream, WindowSize,
};

pub const ALL: &[Case] = cases![
    capabilities_are_those_that_were_asked_for,
    limits_and_scores_are_set,
    groups_are_added,
    a_privileged_container_is_shown_everything,
    file_systems_in_memory_are_as_described,
    names_are_written,
    kernel_parameters_are_its_own,
    an_init_reaps_forwards_and_ends_as_its_program,
    an_init_on_a_terminal_gives_it_to_the_program,
    an_init_reports_a_program_that_cannot_run,
];

const CAP_CHOWN: u64 = 1;
const CAP_SYS_CHROOT: u64 = 1 << 18;

/// What a script says that ends well, with these options.
fn said(
    images: &Images,
    script: &str,
    container: ContainerOptions,
    process: ProcessOptions,
) -> String {
    let mut spec = shell(script);
    spec.0.options = container;
    spec.1.options = process;
    let outcome = outcome(&mut Agent::start(images), spec);
    let status = ExitStatus::Code(0);
    let process = CONTAINER;
    let ended = Event::Exited { process, status };
    assert_eq!(outcome.events.last(), Some(&ended), "{outcome:?}");
    outcome.stdout
}

fn with_process(images: &Images, script: &str, options: ProcessOptions) -> String {
    said(images, script, ContainerOptions::default(), options)
}

fn with_container(images: &Images, script: &str, options: ContainerOptions) -> String {
    said(images, script, options, ProcessOptions::default())
}

fn capabilities_are_those_that_were_asked_for(images: &Images) {
    let script = "grep -E '^Cap(Inh|Prm|Eff|Bnd|Amb)|^NoNew' /proc/self/status | tr -d '\\t'";
    let options = ProcessOptions {
        capabilities: Some(CAP_SYS_CHROOT | CAP_CHOWN),
        no_new_privileges: true,
        ..ProcessOptions::default()
    };
    assert_eq!(
        with_process(images, script, options),
        "CapInh:0000000000000000\nCapPrm:0000000000040001\nCapEff:0000000000040001\n\
         CapBnd:0000000000040001\nCapAmb:0000000000000000\nNoNewPrivs:1\n"
    );
    // All are those that there are.
    let options = ProcessOptions {
        capabilities: Some(u64::MAX),
        ..ProcessOptions::default()
    };
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find(|line| line.starts_with("CapPrm")).unwrap();
    let found = with_process(images, "grep CapPrm /proc/self/status", options);
    assert_eq!(found.trim_end(), own);
}

fn limits_and_scores_are_set(images: &Images) {
    let limit = |resource, soft, hard| Limit {
        resource,
        soft,
        hard,
    };
    let options = ProcessOptions {
        limits: vec![limit(7, 64, 128), limit(4, 0, u64::MAX)],
        oom_score_adj: Some(321),
        ..ProcessOptions::default()
    };
    let script = "ulimit -Sn; ulimit -Hn; ulimit -Sc; ulimit -Hc; cat /proc/self/oom_score_adj";
    assert_eq!(
        with_process(images, script, options),
        "64\n128\n0\nunlimited\n321\n"
    );
}

fn groups_are_added(images: &Images) {
    let mut spec = shell("id -G");
    spec.1.user = "web".to_owned();
    spec.1.options.groups = vec!["4242".to_owned(), "root".to_owned()];
    let outcome = outcome(&mut Agent::start(images), spec);
    assert_eq!(outcome.stdout, "1000 0 4 4242\n", "{outcome:?}");
    let mut spec = shell("id -G");
    spec.1.options.groups = vec!["nowhere".to_owned()];
    let outcome = crate::host::outcome(&mut Agent::start(images), spec);
    let Event::StartFailed { message, .. } = &outcome.events[0] else {
        panic!("{outcome:?}");
    };
    assert!(
        message.contains("unable to find group nowhere"),
        "{message}"
    );
}

fn a_privileged_container_is_shown_everything(images: &Images) {
    let options = ContainerOptions {
        privileged: true,
        ..ContainerOptions::default()
    };
    let all = ProcessOptions {
        capabilities: Some(u64::MAX),
        ..ProcessOptions::default()
    };
    let script = "mkdir /sys/fs/cgroup/x && rmdir /sys/fs/cgroup/x && echo cgroups
        cut -d' ' -f5 /proc/self/mountinfo | grep -c ^/proc/; ls /sys/firmware | wc -l | grep -vx 0 | wc -l
        head -c1 /dev/loop-control 2>&1 | grep -c 'not permitted'; ls /dev/kmsg
        mount -t tmpfs t /tmp && echo mounted";
    assert_eq!(
        said(images, script, options, all),
        "cgroups\n0\n1\n0\n/dev/kmsg\nmounted\n"
    );
}

fn file_systems_in_memory_are_as_described(images: &Images) {
    let tmpfs = |path: &str, flags, data: &str| Tmpfs {
        path: path.to_owned(),
        flags,
        data: data.to_owned(),
    };
    const NOSUID_NODEV_NOEXEC: u32 = 2 | 4 | 8;
    let options = ContainerOptions {
        tmpfs: vec![
            tmpfs("/home/web", NOSUID_NODEV_NOEXEC, "size=1m,mode=700"),
            tmpfs("/new/place", 0, ""),
            tmpfs("/tmp", 0, ""),
            tmpfs("/etc", 1, "size=64k"),
        ],
        shm_size: Some(8 << 20),
        ..ContainerOptions::default()
    };
    let script = "for at in /home/web /new/place /tmp /etc; do
          grep \" $at \" /proc/self/mounts | cut -d' ' -f3-4 | tr -d '\\n'; stat -c ' %a' $at; done
        df -k /dev/shm | tail -1 | awk '{print $2}'; stat -c %a /dev/shm
        cp /bin/busybox /new/place && /new/place/busybox echo runs
        cp /bin/busybox /home/web/ 2>&1 | grep -c 'No space'";
    let text = with_container(images, script, options);
    let inode = if text.contains("inode64") {
        ",inode64"
    } else {
        ""
    };
    assert_eq!(
        text,
        format!(
            "tmpfs rw,nosuid,nodev,noexec,relatime,size=1024k,mode=700{inode} 700\n\
             tmpfs rw,relatime{inode} 1777\ntmpfs rw,relatime{inode} 1777\n\
             tmpfs ro,relatime,size=64k,mode=755{inode} 755\n8192\n1777\nruns\n1\n"
        )
    );
}

fn names_are_written(images: &Images) {
    let options = ContainerOptions {
        domainname: "example.org".to_owned(),
        hosts: "192.0.2.1\tdb\n2001:db8::1\tdb6\n".to_owned(),
        resolv_conf: "nameserver 192.0.2.53\n".to_owned(),
        ..ContainerOptions::default()
    };
    let script = "cat /proc/sys/kernel/domainname /etc/resolv.conf; tail -n 3 /etc/hosts |
        sed s/$(hostname)/NAME/g";
    assert_eq!(
        with_container(images, script, options),
        "example.org\nnameserver 192.0.2.53\n127.0.1.1\tNAME.example.org NAME\n192.0.2.1\tdb\n\
         2001:db8::1\tdb6\n"
    );
}

fn kernel_parameters_are_its_own(images: &Images) {
    let set = |name: &str| ContainerOptions {
        sysctls: vec![(name.to_owned(), "12345".to_owned())],
        ..ContainerOptions::default()
    };
    let script = "cat /proc/sys/kernel/msgmax";
    assert_eq!(
        with_container(images, script, set("kernel.msgmax")),
        "12345\n"
    );
    let mut spec = shell("true");
    spec.0.options = set("fs.mqueue.nothing");
    let outcome = outcome(&mut Agent::start(images), spec);
    let Event::StartFailed { message, .. } = &outcome.events[0] else {
        panic!("{outcome:?}");
    };
    assert!(message.contains("sysctl fs.mqueue.nothing"), "{message}");
}

fn init() -> ContainerOptions {
    ContainerOptions {
        init: true,
        ..ContainerOptions::default()
    }
}

fn an_init_reaps_forwards_and_ends_as_its_program(images: &Images) {
    // An orphan that ends while its new parent lives is no zombie for long.
    let script = "until grep -q vm-run-init /proc/1/cmdline; do sleep 0.01; done
        tr '\\0' '\\n' < /proc/1/cmdline | head -n1; [ $$ != 1 ] && echo other
        (sh -c 'sleep 0.1 &' ); sleep 0.5; grep -l '^State:.Z' /proc/[0-9]*/status; true";
    assert_eq!(
        with_container(images, script, init()),
        "vm-run-init\nother\n"
    );

    let script = "trap 'echo heard; exit 9' USR1; echo ready; while :; do sleep 0.05; done";
    for (signal, script, status) in [
        (libc::SIGUSR1, script, ExitStatus::Code(9)),
        // What a PID 1 without a handler never gets.
        (
            libc::SIGTERM,
            "echo ready; exec sleep 1000",
            ExitStatus::Code(143),
        ),
        (
            libc::SIGKILL,
            "echo ready; exec sleep 1000",
            ExitStatus::Signal(9),
        ),
    ] {
        let mut agent = Agent::start(images);
        let mut spec = shell(script);
        spec.0.options = init();
        let mut streams = start(&mut agent, spec);
        let process = CONTAINER;
        assert_eq!(agent.event(), Event::Started { process });
        until(&mut streams.stdout, "ready\n");
        agent.signal(signal);
        assert_eq!(agent.event(), Event::Exited { process, status }, "{signal}");
    }
}

fn an_init_on_a_terminal_gives_it_to_the_program(images: &Images) {
    let mut agent = Agent::start(images);
    let mut spec = process(&[
        "sh",
        "-c",
        "stty -echo; echo on $(tty); read x; echo got $x; cat",
    ]);
    spec.0.options = init();
    spec.1.streams = vec![Stream::Terminal];
    spec.1.window = Some(WindowSize { rows: 2, cols: 3 });
    let mut terminal = agent.stream(Stream::Terminal);
    let (container, process) = spec;
    agent.send(&Request::StartContainer { container, process });
    until(&mut terminal, "on /dev/pts/0\r\n");
    std::io::Write::write_all(&mut terminal, b"line\n").unwrap();
    until(&mut terminal, "got line\r\n");
    // To the foreground, which is not the init.
    std::io::Write::write_all(&mut terminal, b"\x03").unwrap();
    let process = CONTAINER;
    assert_eq!(agent.event(), Event::Started { process });
    let status = ExitStatus::Code(130);
    assert_eq!(agent.event(), Event::Exited { process, status });
    terminal.shutdown(Shutdown::Both).ok();
}

fn an_init_reports_a_program_that_cannot_run(images: &Images) {
    let mut spec = process(&["/bin/garbage"]);
    spec.0.options = init();
    let outcome = outcome(&mut Agent::start(images), spec);
    let Event::StartFailed { reason, .. } = &outcome.events[0] else {
        panic!("{outcome:?}");
    };
    assert_eq!(*reason, StartFailure::NotExecutable);
}
