// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"snilb/maps"
)

// leaveState makes what a killed daemon leaves on eth0 and eth1: three connections, one of them half-open, twenty packets
// that eth0's programs have counted, and five seconds of silence.
func leaveState(t *testing.T, o Options) *Instance {
	t.Helper()
	i := loadAttached(t, o)
	record := maps.InstanceRecord{Layout: maps.LayoutVersion, Workers: 2, SourcePortFirst: 10000, SourcePortLast: 29999}
	for _, s := range i.Interfaces() {
		name := s.Name
		if s.Role == RoleTap {
			name = ""
		}
		record.Slots[s.Slot] = maps.UserOf(name, string(s.Role))
	}
	zero := uint32(0)
	must(t, i.tables.Instance.Put(&zero, &record))
	client, backend := maps.Tuple{Src: addrPort("10.9.0.7:5"), Dst: addrPort("10.9.0.1:443")}, maps.Tuple{Src: addrPort("10.8.0.2:443"), Dst: addrPort("10.8.0.1:10000")}
	must(t, i.tables.InsertFlow(maps.LegClient, client, &maps.Entry{To: backend.Reverse()}))
	must(t, i.tables.InsertFlow(maps.LegBackend, backend, &maps.Entry{To: client.Reverse()}))
	client.Src, backend.Src = addrPort("10.9.0.7:6"), addrPort("10.8.0.3:443")
	must(t, i.tables.InsertFlow(maps.LegBackend, backend, &maps.Entry{Flow: maps.Flow{Control: maps.FlowPending}, To: client.Reverse()}))
	client6, backend6 := maps.Tuple{Src: addrPort("[fd00::7]:5"), Dst: addrPort("[fd00::1]:443")}, maps.Tuple{Src: addrPort("[fd01::2]:443"), Dst: addrPort("[fd01::1]:10000")}
	must(t, i.tables.InsertFlow(maps.LegClient, client6, &maps.Entry{To: backend6.Reverse()}))
	var now unix.Timespec
	must(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &now))
	must(t, i.tables.SetLive(&maps.Live{Beat: uint64(now.Nano()) - 5e9}))
	for range 20 {
		sendFrame(t, "eth0-far", udpFrame(device(t, "eth0").Attrs().HardwareAddr))
	}
	return i
}

func leftRoles(s *State) []string {
	var all []string
	for _, i := range s.Interfaces {
		text := i.Name + " " + string(i.Role) + " " + string(i.Mode) + " " + i.Hook
		if i.Gone {
			text += " gone"
		}
		all = append(all, text)
	}
	return all
}

func TestInspect(t *testing.T) {
	bothHooks(t, func(t *testing.T, kind string, clsact bool) {
		ns := newNetns(t)
		addVeth(t, "eth0", "10.9.0.1/24")
		addVeth(t, "eth1.20", "10.8.0.1/24")
		o := testOptions(t, "eth0", "eth1.20")
		o.forceClsact = clsact
		i := leaveState(t, o)
		if s, err := Inspect("test"); err != nil || s.PID != os.Getpid() {
			t.Errorf("of a living daemon: %+v, %v", s, err)
		}
		tap := i.TapName()
		die(t, i)
		t.Cleanup(func() { must(t, Detach("test", o.Logger)) })
		before := snapshot(t, ns)
		s, err := Inspect("test")
		must(t, err)
		wantSame(t, snapshot(t, ns), before)
		wantSame(t, leftRoles(&s), []string{
			"eth0 client tc " + kind, "eth0 backend tc " + kind, "eth1.20 client tc " + kind, "eth1.20 backend tc " + kind, tap + " tap tc " + kind,
		})
		if s.PID != 0 || s.Directory != i.dir || !s.Known() || s.Workers != 2 || s.SourcePortFirst != 10000 || s.SourcePortLast != 29999 || s.Flows != 2 {
			t.Errorf("%+v", s)
		}
		if s.Silent < 5*time.Second || s.Silent > time.Hour {
			t.Errorf("silent for %v", s.Silent)
		}
		counted := make(map[string]uint64)
		for _, left := range s.Interfaces {
			for _, n := range left.Packets.Packets {
				counted[left.Name+" "+string(left.Role)] += n
			}
		}
		// The kernel sends some of its own.
		if counted["eth0 client"] < 20 || counted["eth0 backend"] < 20 || counted["eth1.20 client"] >= 20 || counted["eth1.20 backend"] >= 20 {
			t.Errorf("counted %v", counted)
		}
	})
}

// Of tables that this version cannot read it says where they are at work, and no more.
func TestInspectOtherLayout(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	addVeth(t, "eth1", "10.8.0.1/24")
	if _, err := Inspect("test"); !errors.Is(err, ErrNothing) {
		t.Errorf("nothing is left: %v", err)
	}
	i := leaveState(t, testOptions(t, "eth0", "eth1"))
	zero := uint32(0)
	must(t, i.tables.Instance.Put(&zero, &maps.InstanceRecord{Layout: maps.LayoutVersion + 1}))
	die(t, i)
	t.Cleanup(func() { must(t, Detach("test", i.log)) })
	must(t, netlink.LinkDel(device(t, "eth1")))
	s, err := Inspect("test")
	must(t, err)
	if s.Known() || s.Layout != maps.LayoutVersion+1 || s.Flows != 0 || s.Workers != 0 {
		t.Errorf("%+v", s)
	}
	got := leftRoles(&s)
	if !slices.Contains(got, "eth0 client tc tcx") || !slices.Contains(got, "eth1 client tc tcx gone") {
		t.Errorf("interfaces %q", got)
	}
	for _, left := range s.Interfaces {
		if left.Packets != nil {
			t.Errorf("counters of %s are read", left.Name)
		}
	}
}

func TestInspectXDP(t *testing.T) {
	eachXDP(t, func(t *testing.T, mode Mode) {
		newNetns(t)
		addXDPVeth(t, "eth0", "10.9.0.1/24")
		addXDPVeth(t, "eth1", "10.8.0.1/24")
		o := testOptions(t, "eth0", "eth1")
		o.Mode = mode
		die(t, leaveState(t, o))
		t.Cleanup(func() { must(t, Detach("test", o.Logger)) })
		s, err := Inspect("test")
		must(t, err)
		if got := leftRoles(&s)[0]; got != "eth0 xdp "+string(mode)+" xdp" {
			t.Errorf("first is %q", got)
		}
	})
}
