// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// wantFinding wants exactly one of a subject.
func wantFinding(t *testing.T, found []Finding, level Level, subject, what, remedy string) {
	t.Helper()
	n := 0
	for _, f := range found {
		if f.Subject != subject {
			continue
		}
		n++
		if f.Level != level || !strings.Contains(f.What, what) || !strings.Contains(f.Remedy, remedy) {
			t.Errorf("%s: got %+v, want %s, %q and %q", subject, f, level, what, remedy)
		}
		if (f.Level == LevelOK) != (f.Remedy == "") {
			t.Errorf("%s: level %s with remedy %q", subject, f.Level, f.Remedy)
		}
	}
	if n != 1 {
		t.Errorf("%d findings of %s, want one, in %+v", n, subject, found)
	}
}

func passProgram(t *testing.T) *ebpf.Program {
	t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "bystander", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	must(t, err)
	t.Cleanup(func() { must(t, prog.Close()) })
	return prog
}

func TestDoctor(t *testing.T) {
	ns := newNetns(t)
	addXDPVeth(t, "eth0", "10.9.0.1/24")
	addVeth(t, "eth1", "10.8.0.1/24") // whose peer has no GRO
	must(t, netlink.LinkSetDown(device(t, "eth1")))
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "tun0"
	must(t, netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TUN}))
	before := snapshot(t, ns)

	found := Doctor([]string{"eth0", "eth1", "eth7", "tun0", "lo"})
	wantFinding(t, found, LevelOK, "kernel", "Linux ", "")
	wantFinding(t, found, LevelOK, "type information", "vmlinux", "")
	wantFinding(t, found, LevelOK, "capabilities", "CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON", "")
	wantFinding(t, found, LevelOK, "bpffs", "mounted on /sys/fs/bpf", "")
	wantFinding(t, found, LevelOK, "TAP device", "/dev/net/tun", "")
	wantFinding(t, found, LevelOK, "source ports", "10000-29999", "")
	wantFinding(t, found, LevelOK, "instances", "none", "")
	wantFinding(t, found, LevelOK, "eth0", "Ethernet (veth), up, MTU 1500", "")
	wantFinding(t, found, LevelOK, "eth0 instance", "none has it", "")
	for _, mode := range Modes {
		wantFinding(t, found, LevelOK, "eth0 "+string(mode), "", "")
	}
	wantFinding(t, found, LevelOK, "eth0 other programs", "none", "")
	wantFinding(t, found, LevelWarn, "eth1", "is down", "ip link set dev eth1 up")
	wantFinding(t, found, LevelOK, "eth1 tc", "works", "")
	wantFinding(t, found, LevelWarn, "eth1 xdp", "cannot receive what XDP sends", "ethtool -K eth1-far gro on")
	wantFinding(t, found, LevelOK, "eth1 xdp-generic", "", "")
	wantFinding(t, found, LevelFail, "eth7", "eth7", "ip link")
	wantFinding(t, found, LevelFail, "tun0", "carries no Ethernet frames", "NIC")
	wantFinding(t, found, LevelFail, "lo", "loopback", "faces the clients")

	// What nobody named is looked at if it is of use, and is never a failure.
	for _, f := range Doctor(nil) {
		if f.Level == LevelFail || strings.HasPrefix(f.Subject, "tun0") || strings.HasPrefix(f.Subject, "lo") || f.Subject == "eth1" {
			t.Errorf("without names: %+v", f)
		}
	}
	wantFinding(t, Doctor(nil), LevelOK, "eth0", "up", "")
	wantSame(t, snapshot(t, ns), before)
}

func TestDoctorNeighbours(t *testing.T) {
	bothHooks(t, func(t *testing.T, kind string, clsact bool) {
		newNetns(t)
		d := addXDPVeth(t, "eth0", "10.9.0.1/24")
		o := testOptions(t, "eth0")
		o.forceClsact = clsact
		loadAttached(t, o)
		wantFinding(t, Doctor(nil), LevelOK, "eth0 other programs", "none", "") // ours are none
		prog := passProgram(t)
		if clsact {
			must(t, netlink.FilterAdd(&netlink.BpfFilter{
				FilterAttrs: netlink.FilterAttrs{LinkIndex: d.Attrs().Index, Parent: ingress, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 10},
				Fd:          prog.FD(), Name: "bystander", DirectAction: true,
			}))
		} else {
			l, err := link.AttachTCX(link.TCXOptions{Interface: d.Attrs().Index, Program: prog, Attach: ebpf.AttachTCXIngress})
			must(t, err)
			t.Cleanup(func() { must(t, l.Close()) })
		}
		wantFinding(t, Doctor(nil), LevelWarn, "eth0 other programs", "bystander", "--order last")
		l, err := link.AttachXDP(link.XDPOptions{Program: passXDP(t), Interface: d.Attrs().Index, Flags: link.XDPGenericMode})
		must(t, err)
		t.Cleanup(func() { must(t, l.Close()) })
		for _, mode := range []Mode{ModeXDP, ModeXDPGeneric} {
			wantFinding(t, Doctor([]string{"eth0"}), LevelWarn, "eth0 "+string(mode), "XDP on interface eth0 is taken by program", "ip link set dev eth0 xdp off")
		}
	})
}

// The instances that there are, living and dead.
func TestDoctorInstances(t *testing.T) {
	bothHooks(t, func(t *testing.T, kind string, clsact bool) {
		ns := newNetns(t)
		addXDPVeth(t, "eth0", "10.9.0.1/24")
		o := testOptions(t, "eth0")
		o.forceClsact, o.Mode = clsact, ModeXDPGeneric
		i := loadAttached(t, o)
		found := Doctor([]string{"eth0"})
		wantFinding(t, found, LevelOK, "instance test", "its daemon runs (pid ", "")
		wantFinding(t, found, LevelFail, "eth0 instance", "test has it (pid ", "snilb detach eth0")
		wantFinding(t, found, LevelWarn, "eth0 xdp", "XDP on interface eth0 is taken by snilb instance test", "snilb detach --all --name test")
		wantFinding(t, Doctor(nil), LevelWarn, "eth0 instance", "test has it (pid ", "")
		for _, f := range Doctor(nil) {
			if strings.HasPrefix(f.Subject, i.TapName()) {
				t.Errorf("our own device: %+v", f)
			}
		}
		die(t, i)
		t.Cleanup(func() { must(t, Detach("test", o.Logger)) })
		before := snapshot(t, ns)
		found = Doctor([]string{"eth0"})
		wantFinding(t, found, LevelWarn, "instance test", "dead", "snilb detach --all --name test")
		wantFinding(t, found, LevelFail, "eth0 instance", "test has it, whose daemon is dead", "snilb detach --all --name test")
		wantSame(t, snapshot(t, ns), before)
	})
}

// What a process may not see it does not know, and says so.
func TestDoctorFewRights(t *testing.T) {
	newNetns(t)
	addXDPVeth(t, "eth0", "10.9.0.1/24")
	capable(t, nil, func() {
		found := Doctor([]string{"eth0"})
		wantFinding(t, found, LevelFail, "capabilities", "lacks CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON", "run as root")
		wantFinding(t, found, LevelWarn, "tcx", "not known: only root may look", "run as root")
		wantFinding(t, found, LevelWarn, "IPv6 checksums", "not known: only root may look", "run as root")
		wantFinding(t, found, LevelOK, "eth0", "up", "")
		wantFinding(t, found, LevelOK, "eth0 tc", "works", "")
	})
}

// A lock that is another user's does not tell whether its daemon runs.
func TestDoctorOfOtherUser(t *testing.T) {
	ns := newNetns(t)
	lock, err := acquire(ns, "test")
	must(t, err)
	path := lock.path
	t.Cleanup(func() { must(t, removeFile(path)) })
	must(t, lock.file.Chown(4001, -1))
	for _, dead := range []bool{false, true} {
		if dead {
			must(t, lock.file.Close())
		}
		capable(t, nil, func() {
			wantFinding(t, Doctor(nil), LevelWarn, "instance test", "not known: only root may look", "run as root")
			if pid, _, err := Held("test"); pid != 0 || !errors.Is(err, fs.ErrPermission) {
				t.Errorf("held by %d, %v", pid, err)
			}
		})
	}
}

func TestDoctorMachine(t *testing.T) {
	hidden(t, func() {
		newNetns(t)
		found := Doctor(nil)
		wantFinding(t, found, LevelOK, "bpffs", "not mounted: attach mounts it", "")
		wantFinding(t, found, LevelFail, "type information", "no type information", "CONFIG_DEBUG_INFO_BTF=y")
		wantFinding(t, found, LevelFail, "TAP device", "no TAP device can be made", "modprobe tun")
		wantFinding(t, found, LevelWarn, "interfaces", "no Ethernet interface is up", "ip link")
		must(t, os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("20000 40000"), 0))
		wantFinding(t, Doctor(nil), LevelFail, "source ports", "overlap the ports 20000-40000", "ip_local_reserved_ports=20000-29999")
		if hasBPFFS() {
			t.Error("the doctor has mounted bpffs")
		}
	}, bpffs, "/sys/kernel/btf", "/dev/net")
}
