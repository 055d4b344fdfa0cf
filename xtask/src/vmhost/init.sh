#!/bin/busybox sh
# PID 1 of the emulated host, from its initramfs: puts this host's root file
# system together out of the outer machine's (9p, read-only) and a tmpfs over it,
# then hands over to session.sh inside it.
# Protocol on the control port, one line each: "fail REASON", "ready", "exit STATUS".
# The other way it brings bytes that mean nothing: see WAKE in machine.rs.

b=/bin/busybox

$b mkdir -p /dev /proc /sys /lower /layer /root
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
for module in $($b cat /modules/order); do
    $b insmod "/modules/$module" || echo "init: cannot load $module"
done

# virtio-console adds its ports one by one after probing; the first number in their
# names is the device's place on the virtio bus.
for port in 1 2 3 4; do
    while set -- /dev/vport*p$port; [ ! -c "$1" ]; do $b usleep 5000; done
done
export ports="${1%4}"
exec 3<>"${ports}1"

must() {
    "$b" "$@" && return
    echo "fail $*" >&3
    $b poweroff -f
}

must mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000,access=any outer /lower
must mount -t tmpfs -o size=80%,mode=755 layer /layer
must mkdir /layer/upper /layer/work
must mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work root /root

must mount -o move /dev /root/dev
must mount -o move /proc /root/proc
must mount -o move /sys /root/sys
must mount -t tmpfs -o mode=755 run /root/run
must mkdir /root/run/vmhost
must cp /bin/busybox /session.sh /root/run/vmhost/

exec $b switch_root /root /run/vmhost/busybox sh /run/vmhost/session.sh
echo "fail switch_root" >&3
$b poweroff -f
