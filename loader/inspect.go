// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	bpf "snilb/maps"
)

const mapControl = "control" // as the others in programs.go

// State is what an instance has in the kernel, as its pins tell it without its daemon.
type State struct {
	Name, Directory string
	// PID of the daemon, 0 if it is dead.
	PID int
	// Layout of the tables; 0 if they do not tell. Of another one than bpf.LayoutVersion only the interfaces are known.
	Layout     uint32
	Interfaces []LeftInterface

	Workers                         int
	SourcePortFirst, SourcePortLast uint16
	Flows                           int
	// Silent is since when there was no sign of a daemon; negative if there never was.
	Silent time.Duration
}

// LeftInterface is a program of an instance on an interface.
type LeftInterface struct {
	Name string
	Role Role
	Mode Mode
	Hook string
	// Gone says that the interface is no longer there, though it may have come back.
	Gone bool
	// Packets is nil where it is not known which the program's counters are.
	Packets *bpf.CounterSet
}

// Known reports whether this version can read the tables.
func (s *State) Known() bool { return s.Layout == bpf.LayoutVersion }

// Inspect reads the state of an instance of the calling thread's network namespace, and changes nothing. Returns an error
// that is ErrNothing if there is none.
func Inspect(name string) (s State, err error) {
	if s.Directory, err = Dir(name); err != nil {
		return s, err
	}
	s.Name = name
	if _, err := os.Stat(s.Directory); errors.Is(err, fs.ErrNotExist) {
		return s, fmt.Errorf("instance %s: %w", name, ErrNothing)
	} else if err != nil {
		return s, unreadable(name, err)
	}
	if s.PID, err = Running(name); err != nil {
		return s, err
	}
	ns, err := currentNamespace()
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, ns.close()) }()
	if err := s.readInterfaces(ns); err != nil {
		return s, unreadable(name, err)
	}
	return s, s.readTables()
}

func unreadable(name string, err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("read the state of instance %s: %w; run this as root", name, err)
	}
	return fmt.Errorf("read the state of instance %s: %w", name, err)
}

// readInterfaces looks at the pinned links, and at the filters, which have no pins.
func (s *State) readInterfaces(ns *namespace) error {
	entries, err := os.ReadDir(filepath.Join(s.Directory, "links"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		iface, role, err := parseLinkPin(e.Name())
		if err != nil {
			continue // not ours to name, but in our directory
		}
		left, err := inspectLink(ns, filepath.Join(s.Directory, "links", e.Name()), iface, role)
		if err != nil {
			return err
		}
		s.Interfaces = append(s.Interfaces, left)
	}
	devices, err := ns.links()
	if err != nil {
		return err
	}
	for _, device := range devices {
		filters, err := instanceFilters(ns, device.Attrs().Index, s.Name)
		if err != nil && !isGone(err) {
			return err
		}
		for _, f := range filters {
			s.Interfaces = append(s.Interfaces, LeftInterface{
				Name: device.Attrs().Name, Role: roleOfFilter(f.Name), Mode: ModeTC, Hook: clsactKind,
			})
		}
	}
	order := []Role{RoleXDP, RoleClient, RoleBackend, RoleTap}
	slices.SortFunc(s.Interfaces, func(a, b LeftInterface) int {
		if a.Name != b.Name {
			return strings.Compare(a.Name, b.Name)
		}
		return slices.Index(order, a.Role) - slices.Index(order, b.Role)
	})
	return nil
}

func roleOfFilter(filter string) Role {
	program, _, _ := strings.Cut(filter, " ")
	for role, name := range programOf {
		if name == program {
			return role
		}
	}
	return ""
}

// inspectLink asks a pinned link where it is. The kernel opens links for all or not at all.
func inspectLink(ns *namespace, path, iface string, role Role) (left LeftInterface, err error) {
	left = LeftInterface{Name: iface, Role: role, Mode: ModeTC, Hook: "tcx"}
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return left, fmt.Errorf("open pinned link %s: %w", path, err)
	}
	h := &linkHook{link: l}
	left.Gone = !h.alive()
	if role == RoleXDP {
		left.Mode, left.Hook = attachedXDP(ns, iface), "xdp"
	}
	return left, l.Close()
}

// attachedXDP is the mode in which an interface has XDP; "" if it has not.
func attachedXDP(ns *namespace, iface string) Mode {
	device, err := ns.LinkByName(iface)
	if err != nil || device.Attrs().Xdp == nil {
		return ""
	}
	switch device.Attrs().Xdp.AttachMode {
	case nl.XDP_ATTACHED_DRV:
		return ModeXDP
	case nl.XDP_ATTACHED_SKB:
		return ModeXDPGeneric
	}
	return ""
}

// readTables reads what this version understands.
func (s *State) readTables() (err error) {
	var opened []*ebpf.Map
	defer func() {
		for _, m := range opened {
			err = errors.Join(err, m.Close())
		}
	}()
	open := func(name string) (*ebpf.Map, error) {
		m, err := ebpf.LoadPinnedMap(filepath.Join(s.Directory, name), &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			return nil, unreadable(s.Name, fmt.Errorf("map %s: %w", name, err))
		}
		opened = append(opened, m)
		return m, nil
	}
	m, err := open(bpf.MapInstance)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // so old that it has none
	}
	if err != nil {
		return err
	}
	record, err := bpf.ReadRecord(m)
	if err != nil {
		return err
	}
	if s.Layout = record.Layout; !s.Known() {
		return nil
	}
	s.Workers, s.SourcePortFirst, s.SourcePortLast = int(record.Workers), record.SourcePortFirst, record.SourcePortLast
	var t bpf.Tables
	for _, table := range []struct {
		name string
		to   **ebpf.Map
	}{{mapFlows4, &t.Flows4}, {mapFlows6, &t.Flows6}, {mapControl, &t.Control}, {bpf.MapCounters, &t.Counters}} {
		if *table.to, err = open(table.name); err != nil {
			return err
		}
	}
	return s.readKnown(&t, record)
}

func (s *State) readKnown(t *bpf.Tables, record *bpf.InstanceRecord) error {
	for n := range s.Interfaces {
		i := &s.Interfaces[n]
		slot, ok := slotOf(record, i.Name, i.Role)
		if !ok {
			continue
		}
		packets, err := t.Packets(slot)
		if err != nil {
			return err
		}
		i.Packets = &packets
	}
	err := t.Flows(func(leg bpf.Leg, _ bpf.Tuple, _ *bpf.Entry) {
		if leg == bpf.LegClient {
			s.Flows++
		}
	})
	if err != nil {
		return err
	}
	live, err := t.Live()
	if err != nil {
		return err
	}
	s.Silent = silence(&live)
	return nil
}

// silence is how long there was no sign of a daemon; negative if there never was.
func silence(live *bpf.Live) time.Duration {
	if live.Beat == 0 {
		return -1
	}
	var now unix.Timespec
	// Cannot fail: the clock exists on every Linux, and the pointer is good.
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	return max(0, time.Duration(now.Nano())-time.Duration(live.Beat))
}

// slotOf finds the counters of a role on an interface. The last slot is shared by those that came too late.
func slotOf(record *bpf.InstanceRecord, iface string, role Role) (slot uint32, ok bool) {
	if role == RoleTap {
		iface = "" // whose number may change
	}
	n := slices.Index(record.Slots[:], bpf.UserOf(iface, string(role)))
	return uint32(max(n, 0)), n >= 0
}
