# PID 1 of the emulated host, in its root file system: finishes the set-up, runs
# the one command, reports its status on the control port (descriptor 3).
# Ports are named $ports and a number: 2 stdout, 3 stderr, 4 stdin.
# The request is a shell fragment that sets modules, stdin and hostname, and defines
# the function session.

b=/run/vmhost/busybox

fail() {
    echo "fail $*" >&3
    $b poweroff -f
}

$b mkdir -p /dev/pts /dev/shm /dev/mqueue /dev/net /run/lock /run/user
$b mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
$b mount -t tmpfs -o mode=1777 shm /dev/shm
$b mount -t mqueue mqueue /dev/mqueue
$b mount -t cgroup2 cgroup2 /sys/fs/cgroup
$b ln -s /proc/self/fd /dev/fd
$b ln -s /proc/self/fd/0 /dev/stdin
$b ln -s /proc/self/fd/1 /dev/stdout
$b ln -s /proc/self/fd/2 /dev/stderr
# The nodes of modules that load at first use, where they are not built in.
node() {
    [ -c "$1" ] || $b mknod -m 666 "$1" c "$2" "$3"
}
node /dev/net/tun 10 200
node /dev/loop-control 10 237
node /dev/fuse 10 229
node /dev/vhost-net 10 238
node /dev/vhost-vsock 10 241
$b chmod 666 /dev/kvm
$b ip link set lo up
ulimit -H -n 1048576

request=/sys/firmware/qemu_fw_cfg/by_name/opt/vm-run/request/raw
[ -r $request ] || fail "no request"
. $request
$b hostname "$hostname"
release=$($b uname -r)
$b mkdir -p "/lib/modules/$release"
$b mount -o bind "$modules/$release" "/lib/modules/$release" || fail "no modules in $modules"

# Pipes between the command and the ports: a port can be opened only once, and a
# command may open /dev/stdout anew.
$b mkfifo -m 666 /run/vmhost/in /run/vmhost/out /run/vmhost/err
$b cat </run/vmhost/out >"${ports}2" 3>&- & out=$!
$b cat </run/vmhost/err >"${ports}3" 3>&- & err=$!
input=/dev/null
if [ "$stdin" = port ]; then
    input=/run/vmhost/in
    {
        # A port that the outer side has not opened yet reads as ended. The outer
        # side sends one byte before the input: once that is here, an end is an end.
        until [ "$($b dd bs=1 count=1 2>/dev/null)" = + ]; do $b usleep 10000; done
        exec $b cat
    } <"${ports}4" >$input 3>&- &
fi

# On the last CPU: whichever takes the interrupt has to wake that one.
$b taskset -c "$(($($b nproc) - 1))" "$b" cat <&3 >/dev/null & wake=$!
echo ready >&3
(session) <$input >/run/vmhost/out 2>/run/vmhost/err 3>&-
status=$?

# What the command left running may still write: half a second, then it ends.
{
    read -r self _ </proc/self/stat
    $b usleep 500000
    for process in /proc/[0-9]*; do
        process=${process#/proc/}
        case $process in 1 | "$self" | "$out" | "$err" | "$wake") ;; *) kill -9 "$process" ;; esac
    done
} 3>&- &
wait "$out" "$err"
echo "exit $status" >&3
$b poweroff -f
