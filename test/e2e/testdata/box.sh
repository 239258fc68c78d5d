#!/bin/bash
# box.sh TREE CGROUP
#
# Becomes a systemd as PID 1 of namespaces of its own, in a cgroup2 of its own,
# with box.target as its only goal. The network namespace must be another one than the
# parent process's already. Nothing of it is left when this process is killed,
# but the empty CGROUP.
#
# It must not reach the machine's files: a systemd that boots empties /tmp, among
# others. So its root is a tmpfs, with the machine's /usr as the lower part of an
# overlay and TREE copied over that. The machine's root is unmounted.
set -euo pipefail
tree=$1 cgroup=$2
if [ "${3-}" != inside ]; then
	if [ "$(readlink /proc/self/ns/net)" = "$(readlink /proc/$PPID/ns/net)" ]; then
		echo "box.sh: it shares the caller's network namespace: start it in one of its own" >&2
		exit 1
	fi
	echo $$ >"$cgroup/cgroup.procs"
	exec unshare --fork --kill-child --pid --mount --ipc --uts --cgroup --propagation private \
		/bin/bash "$0" "$tree" "$cgroup" inside
fi

root=/mnt
mount -t tmpfs -o mode=755 box $root
cd $root
mkdir -p overlay dev etc/systemd/system old proc root run sys tmp usr var/lib var/log var/tmp
mount -t tmpfs box overlay
mkdir overlay/upper overlay/work
mount -t overlay -o lowerdir=/usr,upperdir=overlay/upper,workdir=overlay/work box usr
for dir in bin lib lib64 sbin; do
	if [ -e /usr/$dir ]; then ln -s usr/$dir $dir; fi
done

mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf -o mode=700 bpf sys/fs/bpf
mount -t tmpfs -o mode=755 box dev
mkdir dev/net dev/pts dev/shm
mknod -m 666 dev/null c 1 3
mknod -m 666 dev/zero c 1 5
mknod -m 666 dev/full c 1 7
mknod -m 666 dev/random c 1 8
mknod -m 666 dev/urandom c 1 9
mknod -m 666 dev/tty c 5 0
mknod -m 666 dev/ptmx c 5 2
mknod -m 666 dev/net/tun c 10 200
mount -t tmpfs -o mode=755 box run
chmod 1777 dev/shm tmp var/tmp

cat >etc/passwd <<-END
	root:x:0:0::/root:/bin/sh
	openvpn:x:990:990::/:/usr/sbin/nologin
	nobody:x:65534:65534::/:/usr/sbin/nologin
END
cat >etc/group <<-END
	root:x:0:
	openvpn:x:990:
	nogroup:x:65534:
END
echo 'passwd: files' >etc/nsswitch.conf
echo 'group: files' >>etc/nsswitch.conf
cp /etc/ld.so.cache etc/
tr -d - <proc/sys/kernel/random/uuid >etc/machine-id
# The journal is all that is wanted of what a machine starts by itself.
for unit in usr/lib/systemd/system/*.target.wants/*; do
	case $unit in
	*/systemd-journald*) ;;
	*) ln -sfn /dev/null "etc/systemd/system/${unit##*/}" ;;
	esac
done
cp -a "$tree"/. .

pivot_root . old
umount -l old
rmdir old
cd /
if [ "$(stat -f -c %T /)" != tmpfs ] || grep -E ' / /(usr|old)? ' /proc/self/mountinfo | grep -qvE ' - (tmpfs|overlay) '; then
	echo "box.sh: the machine's files are in reach" >&2
	exit 1
fi
exec env -i container=rpsel PATH=/usr/sbin:/usr/bin \
	setpriv --bounding-set=-sys_boot,-sys_module,-sys_time \
	/usr/lib/systemd/systemd --unit=box.target --log-target=journal --show-status=no
