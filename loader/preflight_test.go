// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestPreflightRelease(t *testing.T) {
	for release, tooOld := range map[string]bool{
		"4.19.0-27-amd64": true, "5.15.0-91-generic": true, "6.0.19": true,
		"6.1.0-56-cloud-amd64": false, "6.1": false, "6.12.117+deb12-amd64": false, "7.0.0": false, "10.0.1": false,
		"of my own": false, // nothing is known of it
	} {
		problems := checkRelease(release)
		if (problems != nil) != tooOld {
			t.Errorf("%s: %v", release, problems)
		}
		if tooOld {
			wantAmong(t, problems, "kernel "+release+" is too old", "run Linux 6.1 or newer")
		}
	}
}

func TestPreflightJIT(t *testing.T) {
	for value, off := range map[string]bool{"0": true, "1": false, "2": false, "": false} {
		problems := judgeJIT(value)
		if off != (len(problems) == 1 && problems[0].Warning && problems[0].Remedy == "sysctl -w net.core.bpf_jit_enable=1") || !off && problems != nil {
			t.Errorf("%q: %v", value, problems)
		}
	}
}

func wantAmong(t *testing.T, problems []Problem, what, remedy string) {
	t.Helper()
	for _, p := range problems {
		if strings.Contains(p.What, what) && strings.Contains(p.Remedy, remedy) && !p.Warning {
			return
		}
	}
	t.Errorf("no problem like %q with a remedy like %q in %v", what, remedy, problems)
}

// hidden runs a test on a thread that sees empty directories in place of these.
func hidden(t *testing.T, test func(), directories ...string) {
	t.Helper()
	needRoot(t)
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends, and with it what it sees
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		for _, dir := range directories {
			if err == nil {
				err = unix.Mount("tmpfs", dir, "tmpfs", 0, "")
			}
		}
		if err == nil {
			test()
		}
		done <- err
	}()
	must(t, <-done)
}

func TestPreflightHidden(t *testing.T) {
	for _, c := range []struct{ directory, what, remedy string }{
		{"/sys/kernel/btf", "no type information", "CONFIG_DEBUG_INFO_BTF=y"},
		{"/sys", "no place for bpffs", "mount -t sysfs sysfs /sys"},
		{"/dev/net", "no TAP device can be made", "modprobe tun"},
	} {
		hidden(t, func() { wantAmong(t, Preflight(Options{}), c.what, c.remedy) }, c.directory)
	}
}

// Whoever may mount it gets the missing bpffs; who may not is told, by preflight already.
func TestPreflightBPFFS(t *testing.T) {
	hidden(t, func() {
		o := testOptions(t)
		capable(t, []int{unix.CAP_NET_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON}, func() {
			wantAmong(t, Preflight(Options{}), "lacks CAP_SYS_ADMIN (to mount bpffs)", "run as root")
			if err := mountBPFFS(o.Logger); err == nil || !strings.Contains(err.Error(), "mount -t bpf bpffs /sys/fs/bpf") {
				t.Errorf("mount bpffs: %v", err)
			}
		})
		if problems := Preflight(Options{}); fatal(problems) != nil {
			t.Errorf("root has problems: %v", problems)
		}
		if err := mountBPFFS(o.Logger); err != nil || !hasBPFFS() {
			t.Errorf("mount bpffs: %v, there: %t", err, hasBPFFS())
		}
	}, bpffs)
}

// capable runs a test with these capabilities only. They are a thread's own.
func capable(t *testing.T, capabilities []int, test func()) {
	t.Helper()
	needRoot(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var all, few [2]unix.CapUserData
	if err := unix.Capget(&header, &all[0]); err != nil {
		t.Error(err)
		return
	}
	few = all
	few[0].Effective, few[1].Effective = 0, 0
	for _, c := range capabilities {
		few[c/32].Effective |= 1 << (c % 32)
	}
	if err := unix.Capset(&header, &few[0]); err != nil {
		t.Error(err)
		return
	}
	defer func() {
		if err := unix.Capset(&header, &all[0]); err != nil {
			t.Error(err)
		}
	}()
	test()
}

func TestPreflightCapabilities(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	for _, c := range []struct {
		has  []int
		lack string
	}{
		{nil, "lacks CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON"},
		{[]int{unix.CAP_NET_ADMIN}, "lacks CAP_BPF, CAP_PERFMON"},
		{[]int{unix.CAP_NET_ADMIN, unix.CAP_BPF}, "lacks CAP_PERFMON"},
		{[]int{unix.CAP_BPF, unix.CAP_PERFMON}, "lacks CAP_NET_ADMIN"},
		{[]int{unix.CAP_SYS_ADMIN}, "lacks CAP_NET_ADMIN"},
	} {
		capable(t, c.has, func() {
			problems := checkCapabilities()
			wantAmong(t, problems, c.lack, "run as root, or give the service these capabilities")
			if len(problems) != 1 || !strings.HasSuffix(problems[0].What, c.lack) {
				t.Errorf("with %v: %v", c.has, problems)
			}
			if _, err := Load(testOptions(t, "eth0")); err == nil || !strings.Contains(err.Error(), c.lack) {
				t.Errorf("load with %v: %v", c.has, err)
			}
		})
	}
	for _, enough := range [][]int{
		{unix.CAP_NET_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON},
		{unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN},
	} {
		capable(t, enough, func() {
			if problems := checkCapabilities(); problems != nil {
				t.Errorf("with %v: %v", enough, problems)
			}
		})
	}
}

// What preflight takes for enough is enough: to attach, in every mode, and to leave nothing.
func TestFewCapabilities(t *testing.T) {
	for _, mode := range []Mode{ModeTC, ModeXDP, ModeXDPGeneric} {
		ns := newNetns(t)
		addXDPVeth(t, "eth0", "10.9.0.1/24")
		before := snapshot(t, ns)
		o := testOptions(t, "eth0")
		o.Mode = mode
		capable(t, []int{unix.CAP_NET_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON}, func() {
			i, err := Load(o)
			if err != nil {
				t.Errorf("load in mode %s: %v", mode, err)
				return
			}
			if err := i.Attach(); err != nil {
				t.Errorf("attach in mode %s: %v", mode, err)
			}
			if err := i.Close(); err != nil {
				t.Errorf("close in mode %s: %v", mode, err)
			}
		})
		wantSame(t, snapshot(t, ns), before)
	}
}
