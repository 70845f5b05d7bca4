// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// bothHooks runs a test with tcx, if this kernel has it, and as on a kernel without it.
func bothHooks(t *testing.T, test func(t *testing.T, kind string, clsact bool)) {
	_, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress})
	if !errors.Is(err, unix.EINVAL) {
		t.Run("tcx", func(t *testing.T) { test(t, "tcx", false) })
	}
	t.Run("clsact", func(t *testing.T) { test(t, "clsact", true) })
}

func TestCloseLeavesNothing(t *testing.T) {
	bothHooks(t, func(t *testing.T, kind string, clsact bool) {
		ns := newNetns(t)
		addVeth(t, "eth0", "10.9.0.1/24", "fd00:9::1/64")
		addVeth(t, "eth1.20", "10.8.0.1/24") // a dot, as VLANs have it
		before := snapshot(t, ns)

		o := testOptions(t, "eth0", "eth1.20")
		o.forceClsact = clsact
		i, err := Load(o)
		must(t, err)
		if status := i.Interfaces(); len(status) != 0 {
			t.Errorf("attached by Load: %v", status)
		}
		must(t, i.Attach())
		checkStatus(t, i, kind)
		checkPins(t, i, clsact)

		must(t, i.Close())
		must(t, i.Close())
		wantSame(t, snapshot(t, ns), before)
		if _, err := i.AddBackend(netip.MustParseAddrPort("10.9.0.2:443")); err == nil {
			t.Error("a closed instance took a backend")
		}
	})
}

func checkStatus(t *testing.T, i *Instance, kind string) {
	t.Helper()
	var got []string
	slots := make(map[uint32]bool)
	for _, s := range i.Interfaces() {
		got = append(got, s.Name+" "+string(s.Role)+" "+string(s.Mode)+" "+s.Hook)
		if slots[s.Slot] {
			t.Errorf("slot %d is used twice", s.Slot)
		}
		slots[s.Slot] = true
		if (s.Slot == 0) != (s.Role == RoleTap) {
			t.Errorf("%s %s counts in slot %d", s.Name, s.Role, s.Slot)
		}
	}
	slices.Sort(got)
	want := []string{
		"eth0 backend tc " + kind, "eth0 client tc " + kind,
		"eth1.20 backend tc " + kind, "eth1.20 client tc " + kind,
		i.TapName() + " tap tc " + kind,
	}
	wantSame(t, got, want)
}

func checkPins(t *testing.T, i *Instance, clsact bool) {
	t.Helper()
	dir, err := Dir("test")
	must(t, err)
	if dir != i.Directory() {
		t.Errorf("Dir says %s, the instance %s", dir, i.Directory())
	}
	for _, m := range i.Tables().All() {
		pinned, err := ebpf.LoadPinnedMap(filepath.Join(dir, m.Name), nil)
		must(t, err)
		must(t, pinned.Close())
	}
	info, err := os.Stat(dir)
	must(t, err)
	if info.Mode().Perm() != 0o700 {
		t.Errorf("state directory has mode %v", info.Mode())
	}
	if !clsact {
		for _, path := range []string{linkPin(dir, "eth0", RoleClient), linkPin(dir, "eth1.20", RoleBackend)} {
			l, err := link.LoadPinnedLink(path, nil)
			must(t, err)
			must(t, l.Close())
		}
	}
}

// A bystander's qdisc and filter survive us.
func TestClsactOfOthersStays(t *testing.T) {
	ns := newNetns(t)
	d := addVeth(t, "eth0", "10.9.0.1/24")
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.SchedCLS,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
		License:      "GPL",
	})
	must(t, err)
	defer prog.Close() //nolint:errcheck // gone with the test
	must(t, netlink.QdiscAdd(clsactQdisc(d.Attrs().Index)))
	must(t, netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: d.Attrs().Index, Parent: ingress, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 10,
		},
		Fd: prog.FD(), Name: "bystander", DirectAction: true,
	}))
	before := snapshot(t, ns)
	for _, order := range []Order{OrderFirst, OrderLast} {
		o := testOptions(t, "eth0")
		o.forceClsact = true
		o.Order = order
		i, err := Load(o)
		must(t, err)
		must(t, i.Attach())
		ours := []string{"filter snilb_client test on eth0", "filter snilb_backend test on eth0"}
		bystander := []string{"filter bystander on eth0"}
		if order == OrderFirst {
			wantSame(t, programsOn(t, d), append(ours, bystander...))
		} else {
			wantSame(t, programsOn(t, d), append(bystander, ours...))
		}
		must(t, i.Close())
		wantSame(t, snapshot(t, ns), before)
	}
}

// What is not ours goes on to the stack, and is counted once by each program.
func TestPacketPasses(t *testing.T) {
	bothHooks(t, func(t *testing.T, _ string, clsact bool) {
		newNetns(t)
		addVeth(t, "eth0", "10.9.0.1/24")
		socket, err := net.ListenPacket("udp4", "10.9.0.1:9999")
		must(t, err)
		defer socket.Close() //nolint:errcheck // gone with the test
		o := testOptions(t, "eth0")
		o.forceClsact = clsact
		i := loadAttached(t, o)

		before := packets(t, i)
		sendFrame(t, "eth0-far", udpFrame(device(t, "eth0").Attrs().HardwareAddr))
		must(t, socket.SetReadDeadline(time.Now().Add(2*time.Second)))
		if _, _, err := socket.ReadFrom(make([]byte, 100)); err != nil {
			t.Fatal("the packet did not pass:", err)
		}
		after := packets(t, i)
		for _, role := range []Role{RoleClient, RoleBackend} {
			if after[role] == before[role] {
				t.Errorf("the %s program did not count the packet", role)
			}
		}
		for n, queue := range i.TapQueues() {
			if _, err := queue.Write(make([]byte, 60+9000*n)); err != nil {
				t.Fatal(err)
			}
		}
		if got := packets(t, i)[RoleTap] - before[RoleTap]; got != 2 {
			t.Errorf("the TAP program saw %d frames of 2", got)
		}
	})
}

func packets(t *testing.T, i *Instance) map[Role]uint64 {
	t.Helper()
	sums := make(map[Role]uint64)
	for _, s := range i.Interfaces() {
		set, err := i.Tables().Packets(s.Slot)
		must(t, err)
		for _, n := range set.Packets {
			sums[s.Role] += n
		}
	}
	return sums
}

func udpFrame(to net.HardwareAddr) []byte {
	f := make([]byte, 14+20+8+18)
	copy(f, to)
	copy(f[6:], []byte{2, 0, 0, 0, 0, 1})
	binary.BigEndian.PutUint16(f[12:], unix.ETH_P_IP)
	ip := f[14:]
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], []byte{10, 9, 0, 2})
	copy(ip[16:], []byte{10, 9, 0, 1})
	binary.BigEndian.PutUint16(ip[10:], ^onesSum(ip[:20], 0))
	udp := ip[20:]
	binary.BigEndian.PutUint16(udp, 5555)
	binary.BigEndian.PutUint16(udp[2:], 9999)
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	return f
}

func sendFrame(t *testing.T, iface string, frame []byte) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd) //nolint:errcheck // only sent
	must(t, unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: device(t, iface).Attrs().Index}))
}

// Every step that Load and Attach take is made to fail in turn.
func TestFailureRollsBack(t *testing.T) {
	bothHooks(t, func(t *testing.T, _ string, clsact bool) {
		o := testOptions(t, "eth0", "eth1")
		o.forceClsact = clsact
		failEachStep(t, o, 8+3*5)
	})
}

// failEachStep wants that many steps at least of an instance on eth0 and eth1.
func failEachStep(t *testing.T, o Options, least int) {
	t.Helper()
	ns := newNetns(t)
	addXDPVeth(t, "eth0", "10.9.0.1/24")
	addXDPVeth(t, "eth1", "10.8.0.1/24")
	before := snapshot(t, ns)

	var steps []string
	o.before = func(step string) error { steps = append(steps, step); return nil }
	i, err := Load(o)
	must(t, err)
	must(t, i.Attach())
	must(t, i.Close())
	if len(steps) < least {
		t.Fatalf("only %d steps: %q", len(steps), steps)
	}
	injected := errors.New("injected")
	for _, failing := range steps {
		o.before = func(step string) error {
			if step == failing {
				return injected
			}
			return nil
		}
		i, err := Load(o)
		if err == nil {
			loaded := snapshot(t, ns)
			err = i.Attach()
			wantSame(t, snapshot(t, ns), loaded)
			must(t, i.Close())
		}
		if !errors.Is(err, injected) {
			t.Errorf("step %q: got error %v", failing, err)
		}
		wantSame(t, snapshot(t, ns), before)
		if t.Failed() {
			t.Fatalf("after a failure of %q", failing)
		}
	}
}

// die gives up what the kernel takes from a killed daemon: its files, and nothing else.
func die(t *testing.T, i *Instance) {
	t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, a := range i.attached {
		if h, ok := a.hook.(*linkHook); ok {
			must(t, h.link.Close())
		}
		must(t, a.prog.Close())
	}
	for _, queue := range i.tap.queues {
		must(t, queue.Close())
	}
	for _, m := range append(i.rings, mapsOf(i)...) {
		must(t, m.Close())
	}
	must(t, i.lock.file.Close())
	must(t, i.ns.close())
	i.closed = true
}

func mapsOf(i *Instance) []*ebpf.Map {
	var all []*ebpf.Map
	for _, m := range i.shared {
		all = append(all, m)
	}
	return all
}

// attachAndDie leaves what a daemon leaves that is killed: so many programs on the device.
func attachAndDie(t *testing.T, o Options, d netlink.Link, programs int) {
	t.Helper()
	i, err := Load(o)
	must(t, err)
	must(t, i.Attach())
	die(t, i)
	if got := programsOn(t, d); len(got) != programs {
		t.Fatalf("a dead daemon's programs are %q", got)
	}
}

func TestLeftoversAreRemoved(t *testing.T) {
	bothHooks(t, func(t *testing.T, _ string, clsact bool) {
		ns := newNetns(t)
		d := addVeth(t, "eth0", "10.9.0.1/24")
		before := snapshot(t, ns)
		o := testOptions(t, "eth0")
		o.forceClsact = clsact
		t.Log("what is left without the state that says whose it is")
		attachAndDie(t, o, d, 2)
		dir := filepath.Join(stateDir, "test"+ns.suffix)
		must(t, os.Mkdir(dir+unfinished, 0o700))
		if !clsact {
			must(t, removeLinks(dir, o.Logger))
		}
		must(t, os.RemoveAll(dir))
		i, err := Load(o)
		must(t, err)
		if got := programsOn(t, d); len(got) != 0 {
			t.Errorf("left after Load: %q", got)
		}
		must(t, i.Close())
		if !clsact { // whose mark, that the qdisc is ours, is gone
			wantSame(t, snapshot(t, ns), before)
		}
		before = snapshot(t, ns)

		t.Log("detach")
		attachAndDie(t, o, d, 2)
		socket, err := SocketPath("test")
		must(t, err)
		must(t, os.WriteFile(socket, nil, 0o600))
		other := o
		other.Name = "other"
		if _, err := Load(other); err == nil || !strings.Contains(err.Error(), "--name test") {
			t.Errorf("another instance on a dead one's interface: %v", err)
		}
		if name, err := Holder("eth0"); name != "test" || err != nil {
			t.Errorf("holder %q, %v", name, err)
		}
		must(t, Detach("test", o.Logger))
		wantSame(t, snapshot(t, ns), before)
		if err := Detach("test", o.Logger); !errors.Is(err, ErrNothing) {
			t.Errorf("detach of nothing: %v", err)
		}
		wantSame(t, snapshot(t, ns), before)
	})
}

func TestSecondDaemonIsRefused(t *testing.T) {
	ns := newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	addVeth(t, "eth1", "10.8.0.1/24")
	loadAttached(t, testOptions(t, "eth0"))
	running := snapshot(t, ns)

	_, err := Load(testOptions(t, "eth1"))
	if !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), "pid ") {
		t.Errorf("second load: %v", err)
	}
	if err := Detach("test", nil); !errors.Is(err, ErrRunning) {
		t.Errorf("detach of a living instance: %v", err)
	}
	other := testOptions(t, "eth1", "eth0")
	other.Name = "other"
	if _, err = Load(other); err == nil || !strings.Contains(err.Error(), "instance test") {
		t.Errorf("second instance on one interface: %v", err)
	}
	pid, err := Running("test")
	must(t, err)
	if pid != os.Getpid() {
		t.Errorf("running as pid %d", pid)
	}
	wantSame(t, snapshot(t, ns), running)

	other.Interfaces = named("eth1")
	if _, err = Load(other); err == nil || !strings.Contains(err.Error(), "source ports 10000-29999 overlap with those of instance test") {
		t.Errorf("second instance with the same source ports: %v", err)
	}
	other.SourcePortFirst, other.SourcePortLast = 30000, 30999
	i, err := Load(other)
	must(t, err)
	must(t, i.Attach())
	names, err := Instances()
	must(t, err)
	wantSame(t, names, []string{"other", "test"})
	must(t, i.Close())
	wantSame(t, snapshot(t, ns), running)
}

func TestTapDevice(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	addVeth(t, "snilb0") // taken: by another instance, say
	i := load(t, testOptions(t, "eth0"))
	tap := device(t, i.TapName())
	a := tap.Attrs()
	if a.Name != "snilb1" || a.Alias != "snilb test" || a.MTU != tapMTU || a.Flags&net.FlagUp == 0 || a.RawFlags&unix.IFF_NOARP == 0 {
		t.Errorf("TAP device %s: %+v", a.Name, a)
	}
	addrs, err := netlink.AddrList(tap, unix.AF_UNSPEC)
	must(t, err)
	if len(addrs) != 0 {
		t.Errorf("TAP device has addresses: %v", addrs)
	}
	if got := len(i.TapQueues()); got != 2 {
		t.Errorf("%d queues", got)
	}
}

func TestPreflight(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "tun0"
	must(t, netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TUN}))

	find := func(o Options, what string, warning bool) {
		t.Helper()
		for _, p := range Preflight(o) {
			if strings.Contains(p.What, what) && p.Warning == warning && p.Remedy != "" {
				return
			}
		}
		t.Errorf("no problem like %q in %v", what, Preflight(o))
	}
	if problems := Preflight(testOptions(t, "eth0")); problems != nil {
		t.Errorf("problems: %v", problems)
	}
	find(testOptions(t, "lo"), "loopback", false)
	find(testOptions(t, "eth7"), "eth7", false)
	find(testOptions(t, "tun0"), "no Ethernet", false)
	o := testOptions(t, "eth0")
	o.SourcePortFirst, o.SourcePortLast = 20000, 40000
	find(o, "overlap the ports", false)
	find(o, "NodePorts", true)
	if _, err := Load(o); err == nil || !strings.Contains(err.Error(), "ip_local_reserved_ports=32768-40000") {
		t.Errorf("load with a port overlap: %v", err)
	}
	must(t, os.WriteFile(sysctlReserved, []byte("32768-40000"), 0))
	must(t, fatal(Preflight(o)))
}

func TestOptions(t *testing.T) {
	good := Options{Interfaces: named("eth0"), Workers: 1}.withDefaults()
	must(t, good.validate())
	for what, spoil := range map[string]func(*Options){
		"instance name":   func(o *Options) { o.Name = "a.b" },
		"no interface":    func(o *Options) { o.Interfaces = nil },
		"twice":           func(o *Options) { o.Interfaces = named("a", "a") },
		"workers":         func(o *Options) { o.Workers = 65 },
		"ring size":       func(o *Options) { o.RingSize = 12345 },
		"flow entries":    func(o *Options) { o.FlowEntries = -1 },
		"source ports 30": func(o *Options) { o.SourcePortFirst = 30000 },
		"needs one":       func(o *Options) { o.Workers = 3; o.SourcePortFirst = 29998 },
		"dead-after":      func(o *Options) { o.DeadAfter = -1 },
		"on-dead":         func(o *Options) { o.OnDead = "die" },
		"mode":            func(o *Options) { o.Mode = "fast" },
		"order":           func(o *Options) { o.Order = "middle" },
	} {
		o := good
		spoil(&o)
		if err := o.validate(); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestEscape(t *testing.T) {
	for name, want := range map[string]string{
		"eth0":        "eth0",
		"eth0.100":    "eth0%2e100",
		"a-b_c":       "a-b_c",
		"%2e":         "%252e",
		"wl:x@y":      "wl%3ax%40y",
		"\xc3\xa9th":  "%c3%a9th",
		"eth0-client": "eth0-client",
	} {
		if got := escape(name); got != want {
			t.Errorf("escape(%q) = %q, want %q", name, got, want)
		}
		for _, role := range []Role{RoleClient, RoleBackend, RoleTap, RoleXDP} {
			iface, gotRole, err := parseLinkPin(filepath.Base(linkPin("/d", name, role)))
			if err != nil || iface != name || gotRole != role {
				t.Errorf("%q %s came back as %q %s, %v", name, role, iface, gotRole, err)
			}
		}
	}
	for _, bad := range []string{"a%", "a%2", "a%zz"} {
		if _, err := unescape(bad); err == nil {
			t.Errorf("unescape(%q) went well", bad)
		}
	}
}

func TestChoosePriority(t *testing.T) {
	for _, c := range []struct {
		taken    []int
		order    Order
		base     int
		honoured bool
	}{
		{nil, OrderFirst, clsactPriority, true},
		{[]int{10, 20}, OrderFirst, 8, true},
		{[]int{10, 20}, OrderLast, 21, true},
		{[]int{1, 4}, OrderFirst, 2, false},
		{[]int{2}, OrderFirst, 3, false},
		{[]int{maxPriority}, OrderLast, 1, false},
	} {
		base, honoured := choosePriority(c.taken, c.order)
		if base != c.base || honoured != c.honoured {
			t.Errorf("%v %s: %d %v, want %d %v", c.taken, c.order, base, honoured, c.base, c.honoured)
		}
	}
}

// Kill believes the lock, and not its text: in a container processes have other numbers.
func TestKillHitsNobodyElse(t *testing.T) {
	ns := newNetns(t)
	bystander := exec.Command("sleep", "600")
	must(t, bystander.Start())
	defer func() { _ = bystander.Wait() }()
	defer func() { _ = bystander.Process.Kill() }()
	lock, err := acquire(ns, "test")
	must(t, err)
	must(t, lock.write(owner{pid: bystander.Process.Pid}))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := Kill(ctx, "test"); err == nil || !strings.Contains(err.Error(), "is not the one") {
		t.Errorf("held by somebody else: %v", err)
	}
	must(t, lock.release())
	if err := Kill(t.Context(), "test"); err == nil {
		t.Error("killed somebody for a lock that is not there")
	}
	if err := bystander.Process.Signal(syscall.Signal(0)); err != nil || hasState(t, bystander.Process.Pid, 'Z') {
		t.Errorf("the bystander is dead: %v", err)
	}
}

// hasState compares a process's state in /proc.
func hasState(t *testing.T, pid int, state byte) bool {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(t, err)
	_, rest, _ := strings.Cut(string(text), ") ")
	return rest != "" && rest[0] == state
}

// Whoever could open the lock could hold it, and so keep a daemon from starting.
func TestLockFileIsPrivate(t *testing.T) {
	ns := newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	load(t, testOptions(t, "eth0"))
	info, err := os.Stat(lockPath(ns, "test"))
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the lock has mode %v", info.Mode())
	}
}

func TestLockFileIsNotStolen(t *testing.T) {
	ns := newNetns(t)
	first, err := acquire(ns, "test")
	must(t, err)
	must(t, first.write(owner{pid: 42, interfaces: []string{"eth0", "eth1"}, ports: [2]uint16{7, 9}}))
	if got := readOwner(first.path); got.pid != 42 || got.ports != [2]uint16{7, 9} || !slices.Equal(got.interfaces, []string{"eth0", "eth1"}) {
		t.Errorf("owner came back as %+v", got)
	}
	if _, err := acquire(ns, "test"); !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), "pid 42") {
		t.Errorf("second lock: %v", err)
	}
	must(t, first.release())
	if _, err := os.Stat(first.path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("lock file is left: %v", err)
	}
	second, err := acquire(ns, "test")
	must(t, err)
	must(t, second.release())
}
