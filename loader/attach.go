// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"snilb/maps"
)

// attachment is one program on one interface's ingress.
type attachment struct {
	iface   string
	ifindex int
	role    Role
	mode    Mode
	slot    uint32
	at      place
	prog    *ebpf.Program
	hook    hook
	adopted bool // an earlier daemon attached it, and ours took its program's place
}

// hook is the kernel's side of an attachment.
type hook interface {
	kind() string
	// detach takes the program off. That the interface is gone is no error.
	detach() error
	// alive reports whether the program still sees packets.
	alive() bool
	// release lets go of it here, and leaves it to whoever comes.
	release() error
}

var errClosed = errors.New("the instance is closed: load it again")

type attachKey struct {
	ifindex int
	role    Role
}

// InterfaceStatus is one program on one interface. An interface that faces clients
// has two, and a third one in front of them in an XDP mode. Their counters are apart:
// what one program passes on, the next one sees too.
type InterfaceStatus struct {
	Name    string
	Ifindex int
	Role    Role
	Mode    Mode   // ModeTC but for RoleXDP
	Hook    string // "tcx", "clsact" or "xdp"
	Slot    uint32 // in maps.Tables.Packets
}

// Interfaces lists where programs are attached, those of an interface in the order in
// which a packet meets them.
func (i *Instance) Interfaces() []InterfaceStatus {
	i.mu.Lock()
	defer i.mu.Unlock()
	var all []InterfaceStatus
	for _, a := range i.sorted() {
		all = append(all, InterfaceStatus{
			Name: a.iface, Ifindex: a.ifindex, Role: a.role, Mode: a.mode, Hook: a.hook.kind(), Slot: a.slot,
		})
	}
	return all
}

// Attach puts the programs on the TAP device and the client-facing interfaces: a
// client program where clients come in, and a backend program behind it, as
// backends may be there too; in the XDP modes one more in front of both. Programs that
// an earlier daemon attached are replaced where they are, without a gap, and interfaces
// that are gone since are left to Run. If one step fails, all that Attach did is undone, but
// for what it took over: its connections go on.
func (i *Instance) Attach() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return errClosed
	}
	tapDevice, err := i.ns.LinkByIndex(i.tap.index)
	if err != nil {
		return fmt.Errorf("find TAP device %s: %w", i.tap.name, err)
	}
	type target struct {
		device netlink.Link
		role   Role
	}
	targets := []target{{tapDevice, RoleTap}}
	for _, name := range i.opts.names() {
		device, err := clientDevice(i.ns, name)
		if i.state != nil && isAbsent(err) {
			continue // preflight has warned, and Run attaches it once it is there
		}
		if err != nil {
			return err
		}
		for _, role := range i.roles(name) {
			targets = append(targets, target{device, role})
		}
	}
	// In this order: the first SYN that is answered finds all else in place, and what XDP passes on finds TC.
	order := []Role{RoleTap, RoleBackend, RoleClient, RoleXDP}
	slices.SortStableFunc(targets, func(a, b target) int {
		return slices.Index(order, a.role) - slices.Index(order, b.role)
	})
	i.warnOfOldKernel()
	var done []*attachment
	for _, t := range targets {
		a, err := i.attach(t.device, t.role)
		if err != nil {
			errs := []error{err}
			for n := len(done) - 1; n >= 0; n-- {
				errs = append(errs, i.undo(done[n]))
			}
			return errors.Join(errs...)
		}
		if a != nil {
			done = append(done, a)
		}
	}
	i.serving, i.mine = true, true
	return i.settleState()
}

// settleState ends what an earlier daemon left and this one has not taken over. What
// fails of it is no reason to let connections go.
func (i *Instance) settleState() error {
	if err := i.writeRecord(); err != nil {
		return err
	}
	if i.state == nil {
		return nil
	}
	for _, err := range []error{i.pinAnew(), i.adoptRest(), i.forgetPaths()} {
		if err != nil {
			i.log.Warn("tidy up after an earlier daemon", "error", err)
		}
	}
	return nil
}

// roles lists the programs of an interface that faces clients, in the order in which
// they are attached.
func (i *Instance) roles(iface string) []Role {
	roles := []Role{RoleBackend, RoleClient}
	if mode, _ := i.opts.mode(iface); mode != ModeTC {
		roles = append(roles, RoleXDP)
	}
	return roles
}

// attach puts a role's program on a device. Returns nil if it is there already.
// i.mu is held.
func (i *Instance) attach(device netlink.Link, role Role) (_ *attachment, err error) {
	name, index := device.Attrs().Name, device.Attrs().Index
	key := attachKey{index, role}
	if i.attached[key] != nil {
		return nil, nil
	}
	if !isEthernet(device) {
		return nil, notEthernet(device)
	}
	step := func(what string) error { return i.opts.before(what + " " + string(role) + " " + name) }

	a := &attachment{iface: name, ifindex: index, role: role, mode: ModeTC, slot: i.slot(name, role)}
	mode, facesClients := i.opts.mode(name)
	if role == RoleXDP {
		a.mode = mode
		if err := i.opts.checkXDP(i.ns, device, mode); err != nil {
			return nil, err
		}
	}
	at := place{role: role, mode: a.mode, slot: a.slot, facesClients: facesClients}
	at.redirectBack = a.mode == ModeXDP && device.Type() == "veth"
	if err := step("load"); err != nil {
		return nil, err
	}
	a.at = at
	if a.prog, err = i.programFor(at); err != nil {
		return nil, err
	}
	if err = step("hook"); err == nil {
		err = i.ns.do(func() error { return i.takeOverOrHookUp(a, device) })
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("attach %s program to %s: %w", role, name, err), a.prog.Close())
	}
	i.attached[key] = a
	if err = step("pin"); err == nil {
		err = i.pinLink(a)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("pin link of %s: %w", name, err), i.undo(a))
	}
	i.log.Debug("attached", "interface", name, "role", role, "hook", a.hook.kind())
	return a, nil
}

func (i *Instance) takeOverOrHookUp(a *attachment, device netlink.Link) (err error) {
	if i.state != nil {
		if a.hook, err = i.takeOver(a, device); err != nil {
			return err
		}
	}
	if a.adopted = a.hook != nil; a.adopted {
		return nil
	}
	return i.hookUp(a, device)
}

// hookUp chooses tcx, and clsact where the kernel has no tcx.
func (i *Instance) hookUp(a *attachment, device netlink.Link) (err error) {
	if a.role == RoleXDP {
		a.hook, err = i.attachXDP(a, device)
		return err
	}
	if !i.noTCX {
		a.hook, err = i.attachTCX(a)
		if !errors.Is(err, ebpf.ErrNotSupported) {
			return err
		}
		i.noTCX = true
		i.log.Info("this kernel has no tcx (it came with Linux 6.6): attaching by clsact")
	}
	a.hook, err = i.attachClsact(a)
	return err
}

// pinLink makes a link outlive the daemon. A clsact filter does so by itself.
func (i *Instance) pinLink(a *attachment) error {
	l, ok := a.hook.(*linkHook)
	if !ok || a.adopted {
		return nil
	}
	path := linkPin(i.dir, a.iface, a.role)
	// An interface that went away and came back under its name left a dead link there.
	if err := removeFile(path); err != nil {
		return err
	}
	return l.pin(path)
}

// detach undoes attach. i.mu is held.
func (i *Instance) detach(a *attachment) error {
	delete(i.attached, attachKey{a.ifindex, a.role})
	err := a.hook.detach()
	if err != nil {
		err = fmt.Errorf("detach %s program from %s: %w", a.role, a.iface, err)
	}
	return errors.Join(err, a.prog.Close())
}

// undo is detach for an instance whose attaching failed: what it took over stays.
func (i *Instance) undo(a *attachment) error {
	if !a.adopted || i.mine {
		return i.detach(a)
	}
	return i.release(a)
}

// release forgets an attachment that stays in the kernel. i.mu is held.
func (i *Instance) release(a *attachment) error {
	delete(i.attached, attachKey{a.ifindex, a.role})
	return errors.Join(a.hook.release(), a.prog.Close())
}

// slot gives each program on an interface counters of its own while there are any,
// and the same ones when an interface or a daemon comes back. Slot 0 is the TAP's.
func (i *Instance) slot(iface string, role Role) uint32 {
	if role == RoleTap {
		iface = "" // whose number may change
	}
	user := maps.UserOf(iface, string(role))
	slots := &i.record.Slots
	if slots[0] == (maps.CounterUser{}) {
		slots[0] = maps.UserOf("", string(RoleTap))
	}
	last := len(slots) - 1
	for n := range slots {
		if slots[n] == user {
			return uint32(n)
		}
		if slots[n] == (maps.CounterUser{}) && n < last {
			slots[n] = user
			i.recordSlots()
			return uint32(n)
		}
	}
	return uint32(last)
}

// recordSlots keeps the record true once it is ours.
func (i *Instance) recordSlots() {
	if !i.mine {
		return
	}
	if err := i.writeRecord(); err != nil {
		i.log.Warn("which interface counts where is not noted for the next daemon", "error", err)
	}
}

// neighbour is our other program on the same interface, or nil.
func (i *Instance) neighbour(a *attachment) *attachment {
	switch a.role {
	case RoleClient:
		return i.attached[attachKey{a.ifindex, RoleBackend}]
	case RoleBackend:
		return i.attached[attachKey{a.ifindex, RoleClient}]
	default:
		return nil
	}
}

func removeFile(path string) error {
	err := os.Remove(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
