#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Starts systemd as process 1 of namespaces of its own: processes, mounts, cgroups, System V IPC and host name; the network is the
# caller's. It sees the machine's files with a package's above them, and knows no unit but those in a directory.
#
#   systemd.sh DIRECTORY CGROUP outer      DIRECTORY has: root/ (the package, unpacked), units/
set -eu -o pipefail
work=$1 group=$2 stage=$3

case $stage in
outer) # in a mount namespace; the machine may have its cgroups by another layout
	mkdir -p "$work/cgroup"
	mount -t cgroup2 cgroup2 "$work/cgroup"
	mkdir "$work/cgroup/$group"
	echo $$ >"$work/cgroup/$group/cgroup.procs"
	exec unshare --mount --pid --fork --kill-child --cgroup --ipc --uts bash "$0" "$work" "$group" inner
	;;
inner)
	mount -t tmpfs tmpfs "$work/layers"
	mkdir "$work"/layers/{upper,work,all}
	all=$work/layers/all
	mount -t overlay -o "lowerdir=/,upperdir=$work/layers/upper,workdir=$work/layers/work" overlay "$all"
	for dir in etc usr; do # /lib is a link where directories are merged; the unit is copied by name below
		cp -a "$work/root/$dir/." "$all/$dir/"
	done
	mkdir "$all/units"
	cp -a "$work/units/." "$work/root/lib/systemd/system/." "$all/units/"
	mount -t proc proc "$all/proc"
	mount -t sysfs sysfs "$all/sys"
	mount --bind /sys/fs/bpf "$all/sys/fs/bpf"
	mount -t cgroup2 cgroup2 "$all/sys/fs/cgroup"
	mount --rbind /dev "$all/dev"
	mount -t tmpfs tmpfs "$all/tmp"
	mount -t tmpfs tmpfs "$all/run"
	# It would raise limits of the machine.
	mount --bind "$all/proc/sys/fs" "$all/proc/sys/fs"
	mount -o remount,bind,ro "$all/proc/sys/fs"
	exec chroot "$all" env -i container=other SYSTEMD_UNIT_PATH=/units PATH=/usr/bin:/bin:/usr/sbin:/sbin \
		/lib/systemd/systemd --system --unit=test.target --log-target=null --show-status=0 --crash-reboot=no --default-standard-output=null
	;;
esac
