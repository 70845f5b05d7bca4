// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	bpf "snilb/maps"
)

// Role is what an interface, and so the program on it, is for.
type Role string

// The roles. The last one is on no interface: the engine calls its program.
const (
	RoleClient  Role = "client"
	RoleBackend Role = "backend"
	RoleTap     Role = "tap"
	RoleXDP     Role = "xdp"
	roleJobs    Role = "jobs"
)

var programOf = map[Role]string{
	RoleClient:  bpf.ProgramClient,
	RoleBackend: bpf.ProgramBackend,
	RoleTap:     bpf.ProgramTap,
	RoleXDP:     bpf.ProgramXDP,
	roleJobs:    bpf.ProgramJobs,
}

var onDeadPolicies = map[OnDead]uint8{
	OnDeadPass:  bpf.OnDeadPass,
	OnDeadReset: bpf.OnDeadReset,
	OnDeadHold:  bpf.OnDeadHold,
}

// place is what a copy of a program is told of where it runs.
type place struct {
	role         Role
	mode         Mode
	slot         uint32 // of the counters
	facesClients bool
	redirectBack bool // XDP_TX reaches nobody there
}

// spec returns the object cut down to one role's program, with the constants of a
// counter slot. All specs of an instance have the same maps.
func (i *Instance) spec(p place) (*ebpf.CollectionSpec, error) {
	read := bpf.Spec
	if p.role == RoleXDP {
		read = bpf.SpecXDP
	}
	spec, err := read()
	if err != nil {
		return nil, fmt.Errorf("read the compiled programs: %w", err)
	}
	name := programOf[p.role]
	maps.DeleteFunc(spec.Programs, func(other string, _ *ebpf.ProgramSpec) bool { return other != name })

	entries := uint32(i.opts.FlowEntries) * 2 // one a direction
	spec.Maps[mapFlows4].MaxEntries = entries
	spec.Maps[mapFlows6].MaxEntries = entries
	spec.Maps[bpf.MapJobs].MaxEntries = uint32(i.opts.Workers)
	spec.Maps[mapRings].InnerMap.MaxEntries = uint32(i.opts.RingSize)

	err = errors.Join(
		set(spec, bpf.VarCounterSlot, p.slot),
		set(spec, bpf.VarWorkers, uint32(i.opts.Workers)),
		set(spec, bpf.VarWorkerKey, i.record.WorkerKey),
		set(spec, bpf.VarSourcePortFirst, i.opts.SourcePortFirst),
		set(spec, bpf.VarSourcePortLast, i.opts.SourcePortLast),
		set(spec, bpf.VarDeadAfter, uint64(i.opts.DeadAfter)),
		set(spec, bpf.VarOnDead, onDeadPolicies[i.opts.OnDead]),
		set(spec, bpf.VarRingBusy, uint64(i.opts.RingSize)/8*7),
		set(spec, bpf.VarHasCsumIPv6, i.hasCsumIPv6),
		set(spec, bpf.VarFacesClients, p.facesClients),
		set(spec, bpf.VarRedirectBack, p.redirectBack),
	)
	return spec, err
}

// The maps whose size the options set. Their names are the tags of maps.Tables.
const (
	mapFlows4 = "flows4"
	mapFlows6 = "flows6"
	mapRings  = "rings"
)

func set(spec *ebpf.CollectionSpec, name string, value any) error {
	v, ok := spec.Variables[name]
	if !ok {
		return fmt.Errorf("the compiled programs have no constant %s", name)
	}
	if err := v.Set(value); err != nil {
		return fmt.Errorf("set %s: %w", name, err)
	}
	return nil
}

// createMaps makes the maps all programs of the instance share. What begins with a
// dot are the constants of one load.
func (i *Instance) createMaps() error {
	spec, err := i.spec(place{role: RoleTap})
	if err != nil {
		return err
	}
	clear(spec.Programs)
	maps.DeleteFunc(spec.Maps, func(name string, _ *ebpf.MapSpec) bool { return strings.HasPrefix(name, ".") })
	spec.Variables = nil
	var o ebpf.CollectionOptions
	if i.state != nil {
		o.MapReplacements = i.state.maps
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, o)
	if err != nil {
		return fmt.Errorf("create maps: %w", err)
	}
	defer coll.Close()
	if i.state != nil {
		err = i.state.close()
	}
	if err := errors.Join(err, coll.Assign(i.tables)); err != nil {
		return fmt.Errorf("create maps: %w", err)
	}
	for name := range coll.Maps {
		i.shared[name] = coll.DetachMap(name)
	}
	for _, m := range i.tables.All() {
		i.shared[m.Name] = m.Map
	}
	return nil
}

func (i *Instance) createRings() error {
	// Events of the quiet ring are headers, and few: two a flow.
	quietSize := max(i.opts.RingSize/8, os.Getpagesize())
	for worker := range uint32(i.opts.Workers) {
		err := i.openOrCreateRing(worker, fmt.Sprintf("snilb_ring%d", worker), i.opts.RingSize)
		if err == nil {
			err = i.openOrCreateRing(bpf.MaxWorkers+worker, fmt.Sprintf("snilb_quiet%d", worker), quietSize)
		}
		if err != nil {
			return fmt.Errorf("create the rings of worker %d: %w", worker, err)
		}
	}
	return nil
}

// ringPins is the directory of the rings: the map that holds them has their name already.
const ringPins = "workers"

// ringPin is the name of a ring's pin, by its place in Instance.rings.
func ringPin(n int) string {
	if n%2 == 1 {
		return fmt.Sprintf("quiet%d", n/2)
	}
	return fmt.Sprintf("ring%d", n/2)
}

// openOrCreateRing goes on with an earlier daemon's ring: what is in it was sent to us as well.
func (i *Instance) openOrCreateRing(index uint32, name string, size int) error {
	if i.state == nil {
		return i.createRing(index, name, size)
	}
	ring, err := ebpf.LoadPinnedMap(filepath.Join(i.dir, ringPins, ringPin(len(i.rings))), nil)
	if err != nil {
		return i.layoutError(fmt.Errorf("open a ring: %w", err))
	}
	i.rings = append(i.rings, ring)
	return nil
}

func (i *Instance) createRing(index uint32, name string, size int) error {
	ring, err := ebpf.NewMap(&ebpf.MapSpec{Name: name, Type: ebpf.RingBuf, MaxEntries: uint32(size)})
	if err != nil {
		return err
	}
	i.rings = append(i.rings, ring)
	return i.tables.Rings.Put(&index, ring)
}

// createJobs loads the program that works on flows, and maps what each worker shares with it.
func (i *Instance) createJobs() error {
	prog, err := i.loadProgram(place{role: roleJobs, mode: ModeTC})
	if err != nil {
		return err
	}
	i.jobsProgram = prog
	for worker := range i.opts.Workers {
		jobs, err := bpf.NewJobs(prog, i.shared[bpf.MapJobs], worker)
		if err != nil {
			return err
		}
		i.jobs = append(i.jobs, jobs)
	}
	return nil
}

// loadProgram loads a copy of a role's program that counts in a slot of its own.
func (i *Instance) loadProgram(p place) (*ebpf.Program, error) {
	spec, err := i.spec(p)
	if err != nil {
		return nil, err
	}
	if p.mode == ModeXDPGeneric {
		// For a program that takes several buffers the kernel (6.18) copies a packet without the length of its
		// Ethernet header, and TC sees it from its IP header on. Other programs see all packets in one buffer.
		spec.Programs[programOf[p.role]].Flags &^= unix.BPF_F_XDP_HAS_FRAGS
	}
	var coll *ebpf.Collection
	err = withPerfmon(func() (err error) {
		coll, err = ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: i.shared})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("load program %s: %w", programOf[p.role], err)
	}
	defer coll.Close()
	return coll.DetachProgram(programOf[p.role]), nil
}

// probeCsumIPv6 asks the kernel whether bpf_l4_csum_replace knows BPF_F_IPV6, by
// running it: the flag came with 6.16 and was given to older stable kernels too, so
// the version says nothing. A kernel without it corrupts the sum of a packet whose
// sum is the device's to finish; only IPv6 is concerned.
func probeCsumIPv6() (bool, error) {
	const pseudoHeader, ipv6 = 1 << 4, 1 << 7
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "snilb_probe",
		Type: ebpf.SchedCLS,
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R2, 50), // somewhere in the packet
			asm.Mov.Imm(asm.R3, 0),
			asm.Mov.Imm(asm.R4, 1),
			asm.Mov.Imm(asm.R5, pseudoHeader|ipv6),
			asm.FnL4CsumReplace.Call(),
			asm.Return(),
		},
		License: "GPL",
	})
	if err != nil {
		return false, fmt.Errorf("probe the checksum helper: %w", err)
	}
	defer prog.Close() //nolint:errcheck // gone with the process at the latest
	result, err := prog.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
	if err != nil {
		return false, fmt.Errorf("probe the checksum helper: %w", err)
	}
	return result == 0, nil
}
