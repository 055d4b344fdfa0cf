//! The cases: what follows `run`, and what comes of it.

use rustix::process::Signal;

/// One `run`.
pub struct Case {
    /// For the report.
    pub name: &'static str,
    /// Where docker says so: a page of its documentation, or the file of moby, runc or
    /// Linux that it goes by.
    pub docs: &'static str,
    /// What follows `run --rm`.
    pub args: &'static [&'static str],
    /// Its standard input.
    pub stdin: &'static str,
    /// Done to it when it has said that it is ready.
    pub act: Act,
    /// What it says.
    pub stdout: Text,
    /// And complains of.
    pub stderr: Text,
    /// How it ends.
    pub status: i32,
}

/// Something to do to a container.
#[derive(Clone, Copy)]
pub enum Act {
    Nothing,
    /// A signal for `vm-run run`.
    Signal(Signal),
    /// `vm-run stop`.
    Stop,
}

/// What a stream is to hold.
#[derive(Debug, Clone, Copy)]
pub enum Text {
    Is(&'static str),
    Has(&'static str),
}

use Text::{Has, Is};

const RUN: &str = "docker container run";
const DEFAULTS: &str = "moby oci/defaults.go";
const CAPS: &str = "moby oci/caps";
const USERS: &str = "moby/sys user";
const STATUS: &str = "docker container run, Exit status";
const IMAGE: &str = "image-spec layer.md";
const BUILD: &str = "Dockerfile reference";

/// A shell script that ends well and says nothing on stderr.
const fn script(
    name: &'static str,
    docs: &'static str,
    args: &'static [&'static str],
    stdout: &'static str,
) -> Case {
    Case {
        name,
        docs,
        args,
        stdin: "",
        act: Act::Nothing,
        stdout: Is(stdout),
        stderr: Is(""),
        status: 0,
    }
}

/// One that is refused before anything runs, or does not end well.
const fn fails(
    name: &'static str,
    docs: &'static str,
    args: &'static [&'static str],
    stderr: &'static str,
    status: i32,
) -> Case {
    Case {
        name,
        docs,
        args,
        stdin: "",
        act: Act::Nothing,
        stdout: Is(""),
        stderr: Has(stderr),
        status,
    }
}

impl Case {
    const fn reads(mut self, stdin: &'static str) -> Self {
        self.stdin = stdin;
        self
    }

    const fn act(mut self, act: Act) -> Self {
        self.act = act;
        self
    }

    const fn complains(mut self, text: &'static str) -> Self {
        self.stderr = Has(text);
        self
    }

    const fn ends(mut self, status: i32) -> Self {
        self.status = status;
        self
    }
}

#[rustfmt::skip] // A line for each.
pub const CASES: &[Case] = &[
    // Users.
    script("root by default", USERS, &["odd", "sh", "-c", "id -u; id -g; id -G; echo $HOME"], "0\n0\n0\n/root\n"),
    script("a user by name", USERS, &["-u", "web", "odd", "sh", "-c", "id -u; id -g; id -G; echo $HOME"], "1000\n1000\n1000 4 44\n/home/web\n"),
    script("a user by a known number", USERS, &["-u", "1000", "odd", "sh", "-c", "id -u; id -G; echo $HOME"], "1000\n1000 4 44\n/home/web\n"),
    script("a user by an unknown number", USERS, &["-u", "4242", "odd", "sh", "-c", "id -u; id -G; echo $HOME"], "4242\n0\n/\n"),
    script("a user and a group by name", USERS, &["-u", "web:video", "odd", "id", "-G"], "44\n"),
    script("a user and a group by number", USERS, &["-u", "1000:77", "odd", "sh", "-c", "id -u; id -G"], "1000\n77\n"),
    fails("no such user", USERS, &["-u", "nosuch", "odd", "true"], "unable to find user nosuch: no matching entries in passwd file", 125),
    fails("no such group", USERS, &["-u", "web:nosuch", "odd", "true"], "unable to find group nosuch", 125),
    script("more groups", RUN, &["-u", "web", "--group-add", "77", "--group-add", "root", "odd", "id", "-G"], "1000 0 4 44 77\n"),
    fails("more groups, one unknown", RUN, &["--group-add", "nosuch", "odd", "true"], "unable to find group nosuch", 125),
    // Environment.
    script("variables", RUN, &["-e", "A=1 2", "-e", "EMPTY=", "odd", "sh", "-c", "echo \"$A|${EMPTY-unset}|${B-unset}\""], "1 2||unset\n"),
    script("variables of a file", RUN, &["--env-file", "/dev/stdin", "-e", "B=3", "odd", "sh", "-c", "echo $A $B"], "1 3\n").reads("A=1\n# no\n\nB=2\n"),
    script("variables of the image", BUILD, &["--entrypoint", "sh", "odd:full", "-c", "echo $FROM $PATH"], "image /bin\n"),
    script("variables over the image's", RUN, &["--entrypoint", "sh", "-e", "FROM=here", "odd:full", "-c", "echo $FROM"], "here\n"),
    script("a path by default", DEFAULTS, &["odd", "sh", "-c", "echo $PATH"], "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"),
    // Directories.
    script("a directory that is there", RUN, &["-w", "/tmp", "odd", "pwd"], "/tmp\n"),
    script("a directory that is made", RUN, &["-w", "/a/b/c", "odd", "sh", "-c", "pwd; stat -c '%a %u:%g' ."], "/a/b/c\n755 0:0\n"),
    script("a directory of the image", BUILD, &["--entrypoint", "pwd", "odd:full"], "/work/dir\n"),
    fails("a relative directory", RUN, &["-w", "tmp", "odd", "true"], "absolute path", 125),
    // Statuses.
    script("success", STATUS, &["odd", "true"], ""),
    script("a status of its own", STATUS, &["odd", "sh", "-c", "exit 7"], "").ends(7),
    script("the highest status", STATUS, &["odd", "sh", "-c", "exit 255"], "").ends(255),
    fails("a file that is no program", STATUS, &["odd", "/etc/passwd"], "permission denied", 126),
    fails("a directory as a program", STATUS, &["odd", "/tmp"], "is a directory", 126),
    fails("no such command", STATUS, &["odd", "no-such-command"], "executable file not found in $PATH", 127),
    fails("no such path", STATUS, &["odd", "/no/such"], "no such file or directory", 127),
    fails("no such option", STATUS, &["--no-such-option", "odd"], "--no-such-option", 125),
    script("a child that is killed", STATUS, &["odd", "sh", "-c", "sh -c 'kill -9 $$'; echo $?"], "137\n").complains("Killed"),
    // Signals.
    script("a signal with a handler", "docker container run, --sig-proxy", &["odd", "sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done"], "ready\n").act(Act::Signal(Signal::TERM)).ends(3),
    script("an interrupt", "docker container run, --sig-proxy", &["odd", "sh", "-c", "trap 'exit 4' INT; echo ready; while :; do sleep 0.1; done"], "ready\n").act(Act::Signal(Signal::INT)).ends(4),
    script("a signal for a PID 1 without a handler", "pid_namespaces(7)", &["odd", "sh", "-c", "kill -TERM 1; kill -KILL 1; echo alive"], "alive\n"),
    script("the image's stop signal", BUILD, &["--entrypoint", "sh", "odd:full", "-c", "trap 'exit 5' USR1; echo ready; while :; do sleep 0.1; done"], "ready\n").act(Act::Stop).ends(5),
    script("another stop signal", RUN, &["--stop-signal", "INT", "odd", "sh", "-c", "trap 'exit 6' INT; echo ready; while :; do sleep 0.1; done"], "ready\n").act(Act::Stop).ends(6),
    script("a stop that is not heard", "docker container stop", &["--stop-timeout", "1", "odd", "sh", "-c", "echo ready; exec sleep 1000"], "ready\n").act(Act::Stop).ends(137),
    // Streams and terminals.
    script("two streams", RUN, &["odd", "sh", "-c", "echo out; echo err >&2"], "out\n").complains("err\n"),
    script("an input", RUN, &["-i", "odd", "cat"], "said\n").reads("said\n"),
    script("no input", RUN, &["odd", "cat"], "").reads("unheard\n"),
    script("no terminal", RUN, &["-i", "odd", "sh", "-c", "test -t 0 || test -t 1 || echo none; echo ${TERM-unset}"], "none\nunset\n"),
    script("a terminal", RUN, &["-t", "odd", "sh", "-c", "test -t 0 && test -t 1 && test -t 2 && tty; echo $TERM; test -c /dev/console && echo console"], "/dev/pts/0\r\nxterm\r\nconsole\r\n"),
    // Read-only.
    fails("a read-only root", RUN, &["--read-only", "odd", "touch", "/x"], "Read-only file system", 1),
    script("what a read-only root leaves writable", RUN, &["--read-only", "--tmpfs", "/run", "odd", "sh", "-c", "touch /run/x /dev/shm/x /dev/x && echo ok"], "ok\n"),
    // File systems in memory.
    script("a tmpfs", RUN, &["--tmpfs", "/run:rw,size=1m,mode=700", "odd", "sh", "-c", "grep ' /run ' /proc/mounts | cut -d' ' -f3,4 | sed s/,inode64//"], "tmpfs rw,nosuid,nodev,noexec,relatime,size=1024k,mode=700\n"),
    script("the modes of a tmpfs", "runc libcontainer/rootfs_linux.go", &["--tmpfs", "/home/web", "--tmpfs", "/new/place", "odd", "stat", "-c", "%a", "/home/web", "/new/place"], "755\n1777\n"),
    script("a tmpfs without programs", RUN, &["--tmpfs", "/run", "odd", "sh", "-c", "cp /bin/busybox /run/; /run/busybox true"], "").complains("Permission denied").ends(126),
    script("a tmpfs with programs", RUN, &["--tmpfs", "/run:exec", "odd", "sh", "-c", "cp /bin/busybox /run/; /run/busybox echo runs"], "runs\n"),
    script("a tmpfs that is full", RUN, &["--tmpfs", "/run:size=64k", "odd", "sh", "-c", "dd if=/dev/zero of=/run/x bs=1024 count=100; wc -c < /run/x"], "65536\n").complains("No space left on device"),
    fails("no such tmpfs option", RUN, &["--tmpfs", "/run:fast", "odd", "true"], "invalid tmpfs option \"fast\"", 125),
    fails("a relative tmpfs", RUN, &["--tmpfs", "run", "odd", "true"], "must be absolute", 125),
    fails("a tmpfs as the root", RUN, &["--tmpfs", "/", "odd", "true"], "destination can't be '/'", 125),
    // Limits.
    script("limits", RUN, &["--ulimit", "nofile=64:128", "--ulimit", "core=0", "odd", "sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -Hc"], "64\n128\n0\n"),
    script("limits by default", "docker.service", &["odd", "sh", "-c", "ulimit -n; grep 'Max processes' /proc/self/limits | awk '{print $3, $4}'"], "1048576\nunlimited unlimited\n"),
    script("a limit that is reached", RUN, &["--ulimit", "fsize=1024", "odd", "sh", "-c", "dd if=/dev/zero of=/f bs=4096 count=1 2>/dev/null; echo $?"], "153\n"),
    fails("no such limit", RUN, &["--ulimit", "files=1", "odd", "true"], "invalid ulimit type: files", 125),
    fails("a soft limit above the hard one", RUN, &["--ulimit", "nofile=5:3", "odd", "true"], "ulimit soft limit must be less than or equal to hard limit: 5 > 3", 125),
    script("a limit of memory", RUN, &["-m", "32m", "odd", "sh", "-c", "cat /sys/fs/cgroup/memory.max; exec tail /dev/zero"], "33554432\n").ends(137),
    script("a limit of processor time", RUN, &["--cpus", "0.5", "odd", "cat", "/sys/fs/cgroup/cpu.max"], "50000 100000\n"),
    fails("too little memory", RUN, &["-m", "1m", "odd", "true"], "minimum memory limit allowed is 6MB", 125),
    script("a limit of processes", RUN, &["--pids-limit", "3", "odd", "sh", "-c", "sleep 1 & sleep 1 & sleep 1 & wait"], "").complains("fork").ends(2),
    script("a score for when memory is out", RUN, &["--oom-score-adj", "321", "odd", "cat", "/proc/self/oom_score_adj"], "321\n"),
    fails("a score that is none", RUN, &["--oom-score-adj", "1001", "odd", "true"], "[-1000, 1000]", 125),
    script("file modes", "moby oci/defaults.go, umask", &["odd", "sh", "-c", "umask; touch /x; stat -c %a /x"], "0022\n644\n"),
    // Capabilities.
    script("capabilities by default", CAPS, &["odd", "sh", "-c", "grep -E 'Cap(Inh|Eff|Bnd|Amb)' /proc/self/status | cut -f2"], "0000000000000000\n00000000a80425fb\n00000000a80425fb\n0000000000000000\n"),
    script("capabilities of a user", CAPS, &["-u", "web", "--cap-add", "SYS_TIME", "odd", "sh", "-c", "grep -E 'Cap(Eff|Bnd)' /proc/self/status | cut -f2"], "0000000000000000\n00000000aa0425fb\n"),
    script("no capabilities", CAPS, &["--cap-drop", "ALL", "odd", "sh", "-c", "grep -E 'Cap(Eff|Bnd)' /proc/self/status | cut -f2; touch /x; chown 5 /x"], "0000000000000000\n0000000000000000\n").complains("Operation not permitted").ends(1),
    script("one capability", CAPS, &["--cap-drop", "all", "--cap-add", "cap_chown", "odd", "sh", "-c", "touch /x; chown 5 /x; stat -c %u /x"], "5\n"),
    script("all capabilities but one", CAPS, &["--cap-add", "ALL", "--cap-drop", "MKNOD", "odd", "sh", "-c", "grep CapEff /proc/self/status | cut -f2; mknod /n c 1 3"], "000001fff7ffffff\n").complains("Operation not permitted").ends(1),
    script("nodes by default", CAPS, &["odd", "sh", "-c", "mknod /n c 1 3 && echo x > /n && echo ok"], "ok\n"),
    fails("no mounts by default", CAPS, &["odd", "mount", "-t", "tmpfs", "t", "/tmp"], "permission denied", 1),
    script("mounts with a capability", CAPS, &["--cap-add", "SYS_ADMIN", "odd", "sh", "-c", "mount -t tmpfs t /tmp && echo mounted"], "mounted\n"),
    script("raw sockets by default", CAPS, &["odd", "sh", "-c", "ping -c 1 127.0.0.1 | grep -c '1 packets received'"], "1\n"),
    script("ports and pings for everybody", "moby daemon/oci_linux.go, net.ipv4", &["-u", "web", "odd", "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start", "/proc/sys/net/ipv4/ping_group_range"], "0\n0\t2147483647\n"),
    fails("no such capability", CAPS, &["--cap-add", "FLY", "odd", "true"], "invalid capability: \"CAP_FLY\"", 125),
    // Privileges.
    script("a privileged container", RUN, &["--privileged", "odd", "sh", "-c", "grep CapEff /proc/self/status | cut -f2; mount -t tmpfs t /tmp && echo mounted; head -c 4 /dev/vda | wc -c; echo 0 > /proc/sys/vm/overcommit_memory && echo tuned; mkdir /sys/fs/cgroup/x && echo made; cut -d' ' -f5 /proc/self/mountinfo | grep -c /proc/"], "000001ffffffffff\nmounted\n4\ntuned\nmade\n0\n").ends(1),
    script("disks of others by default", DEFAULTS, &["odd", "sh", "-c", "mknod /d b 254 0; head -c 1 /d"], "").complains("Operation not permitted").ends(1),
    script("no new privileges", RUN, &["-u", "web", "--security-opt", "no-new-privileges", "odd", "sh", "-c", "grep NoNewPrivs /proc/self/status | cut -f2; /usr/capable/busybox grep CapEff /proc/self/status | cut -f2"], "1\n0000000000000000\n"),
    fails("a profile that cannot be had", RUN, &["--security-opt", "seccomp=x.json", "odd", "true"], "no seccomp profile", 125),
    // An init.
    script("no init by default", RUN, &["odd", "sh", "-c", "echo $$; tr '\\0' '\\n' < /proc/1/cmdline | head -n 1"], "1\nsh\n"),
    script("an init", RUN, &["--init", "odd", "sh", "-c", "ps -o pid,comm | grep -w 1 | grep -c init; (sleep 0.1 &); sleep 1; grep -l '^State:.Z' /proc/[0-9]*/status; echo done"], "1\ndone\n"),
    script("a signal through an init", RUN, &["--init", "odd", "sh", "-c", "echo ready; exec sleep 1000"], "ready\n").act(Act::Signal(Signal::TERM)).ends(143),
    script("a status through an init", RUN, &["--init", "odd", "sh", "-c", "exit 9"], "").ends(9),
    fails("no such command for an init", RUN, &["--init", "odd", "no-such-command"], "executable file not found in $PATH", 127),
    // Layers.
    script("whiteouts", IMAGE, &["odd", "sh", "-c", "ls /whole; ls -d /tree"], "kept\n").complains("No such file").ends(1),
    script("opaque directories", IMAGE, &["odd", "ls", "/opaque"], "new\n"),
    script("a directory that became a file", IMAGE, &["odd", "cat", "/replaced"], "a file now\n"),
    script("hard links", IMAGE, &["odd", "sh", "-c", "test /first -ef /second && stat -c %h /first; cat /second"], "2\nlinked\n"),
    script("owners, modes and kinds", IMAGE, &["odd", "stat", "-c", "%a %u:%g %F", "/owned", "/fifo", "/null", "/tmp"], "2640 1000:44 regular empty file\n644 0:0 fifo\n644 0:0 character special file\n1777 0:0 directory\n"),
    script("capabilities of files", IMAGE, &["-u", "web", "odd", "sh", "-c", "/usr/capable/busybox grep CapEff /proc/self/status | cut -f2"], "0000000000002000\n"),
    script("programs of another user", IMAGE, &["-u", "web", "odd", "/usr/suid/busybox", "su", "-c", "id -u"], "0\n"),
    // Names.
    script("the hostname", RUN, &["--hostname", "hal", "odd", "sh", "-c", "hostname; cat /etc/hostname; echo $HOSTNAME; grep -c hal /etc/hosts"], "hal\nhal\nhal\n1\n"),
    script("the domain name", RUN, &["--hostname", "hal", "--domainname", "example.org", "odd", "sh", "-c", "cat /proc/sys/kernel/domainname; grep -c 'hal.example.org hal' /etc/hosts"], "example.org\n1\n"),
    script("more hosts", RUN, &["--add-host", "db:192.0.2.1", "--add-host", "six=[2001:db8::1]", "odd", "tail", "-n", "2", "/etc/hosts"], "192.0.2.1\tdb\n2001:db8::1\tsix\n"),
    fails("a host without an address", RUN, &["--add-host", "db", "odd", "true"], "bad format for add-host: \"db\"", 125),
    script("a name server of its own", RUN, &["odd", "grep", "nameserver", "/etc/resolv.conf"], "nameserver 192.0.0.1\n"),
    script("no name servers", RUN, &["--network", "none", "odd", "sh", "-c", "test -f /etc/resolv.conf && cat /etc/resolv.conf"], ""),
    script("name servers", RUN, &["--dns", "192.0.2.53", "--dns-search", "example.org", "--dns-option", "ndots:2", "odd", "cat", "/etc/resolv.conf"], "nameserver 192.0.2.53\nsearch example.org\noptions ndots:2\n"),
    fails("a name server that is none", RUN, &["--dns", "here", "odd", "true"], "not correctly formatted", 125),
    // The kernel's file systems.
    script("shared memory by default", RUN, &["odd", "sh", "-c", "df -k /dev/shm | tail -n 1 | awk '{print $2}'; stat -c %a /dev/shm"], "65536\n1777\n"),
    script("shared memory", RUN, &["--shm-size", "8m", "odd", "sh", "-c", "df -k /dev/shm | tail -n 1 | awk '{print $2}'; stat -c %a /dev/shm"], "8192\n1777\n"),
    script("kernel parameters", RUN, &["--sysctl", "net.ipv4.ip_forward=1", "--sysctl", "kernel.msgmax=12345", "odd", "cat", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/kernel/msgmax"], "1\n12345\n"),
    fails("a kernel parameter of the machine", RUN, &["--sysctl", "kernel.panic=1", "odd", "true"], "sysctl 'kernel.panic=1' is not allowed", 125),
    script("masked paths", DEFAULTS, &["odd", "sh", "-c", "cat /proc/kcore /proc/keys /proc/timer_list 2>/dev/null | wc -c; ls /sys/firmware | wc -l"], "0\n0\n"),
    script("read-only paths", DEFAULTS, &["odd", "sh", "-c", "for f in /proc/sys/vm/overcommit_memory /proc/sysrq-trigger /sys/kernel/mm/transparent_hugepage/enabled; do (echo 0 > $f) 2>/dev/null && echo $f; done; mkdir /sys/fs/cgroup/x"], "").complains("Read-only file system").ends(1),
    script("devices", DEFAULTS, &["odd", "sh", "-c", "ls /dev; readlink /dev/stdout; readlink /dev/ptmx; touch /dev/mqueue/q && echo queue"], "core\nfd\nfull\nmqueue\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n/proc/self/fd/1\npts/ptmx\nqueue\n"),
    script("namespaces", DEFAULTS, &["odd", "sh", "-c", "echo $$; cat /proc/self/cgroup; set -- /proc/[0-9]*; echo $#"], "1\n0::/\n1\n"),
    // Commands.
    script("the image's command", BUILD, &["odd"], "by default\n"),
    script("the image's entrypoint and command", BUILD, &["odd:full"], "entry cmd\n"),
    script("another command", BUILD, &["odd:full", "a", "b"], "entry a b\n"),
    script("another entrypoint", RUN, &["--entrypoint", "/bin/echo", "odd:full"], "\n"),
    script("another entrypoint and command", RUN, &["--entrypoint", "/bin/echo", "odd:full", "a"], "a\n"),
    script("no entrypoint", RUN, &["--entrypoint", "", "odd:full", "id", "-un"], "web\n"),
    script("the image's user", BUILD, &["--entrypoint", "id", "odd:full", "-G"], "4\n"),
    fails("no command", RUN, &["odd:bare"], "no command", 125),
    fails("no such image", RUN, &["--pull", "never", "odd:nosuch"], "odd:nosuch", 125),
];
