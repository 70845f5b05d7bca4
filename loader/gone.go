// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"slices"

	"github.com/cilium/ebpf"
)

// goneProgram is one whose interface has gone. It stays loaded, because to load one takes
// a tenth of a second, and an interface that comes back may have packets sooner.
type goneProgram struct {
	iface string
	role  Role
	at    place
	prog  *ebpf.Program
}

// maxGone bounds them; those that went first are given up.
const maxGone = 32

// keepLoaded keeps the program of an attachment that is about to be detached. i.mu is
// held.
func (i *Instance) keepLoaded(a *attachment) error {
	prog, err := a.prog.Clone()
	if err != nil {
		return err
	}
	i.gone = append(i.gone, goneProgram{a.iface, a.role, a.at, prog})
	return i.dropGone(len(i.gone) - maxGone)
}

// dropGone gives up the first n. i.mu is held.
func (i *Instance) dropGone(n int) error {
	var errs []error
	for range n {
		errs = append(errs, i.gone[0].prog.Close())
		i.gone = i.gone[1:]
	}
	return errors.Join(errs...)
}

// programFor is loadProgram, but for one that is loaded still. i.mu is held.
func (i *Instance) programFor(p place) (*ebpf.Program, error) {
	n := slices.IndexFunc(i.gone, func(g goneProgram) bool { return g.at == p })
	if n < 0 {
		return i.loadProgram(p)
	}
	prog := i.gone[n].prog
	i.gone = slices.Delete(i.gone, n, n+1)
	return prog, nil
}

// reattachTowards brings the programs back to interfaces that backends answered by: their
// routes come later than they themselves. i.mu is held.
func (i *Instance) reattachTowards() error {
	var errs []error
	for _, g := range slices.Clone(i.gone) {
		if _, facesClients := i.opts.mode(g.iface); facesClients || g.role != RoleBackend {
			continue
		}
		device, err := i.ns.LinkByName(g.iface)
		if err != nil || !isEthernet(device) {
			continue // still away: its coming back is a change too
		}
		if i.attached[attachKey{device.Attrs().Index, RoleBackend}] != nil {
			continue // a worker that sends there was first
		}
		err = i.attachTowards(device)
		if err == nil {
			i.log.Info("attached again", "interface", g.iface, "role", g.role)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
