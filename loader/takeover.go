// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
)

// takeOver puts a program in the place of the one that an earlier daemon attached for the same role: no packet meets
// none of them. Returns nil if there is none, or one that cannot go on and was taken off.
func (i *Instance) takeOver(a *attachment, device netlink.Link) (hook, error) {
	h, err := i.openLeftLink(a)
	if errors.Is(err, fs.ErrNotExist) {
		return i.takeOverFilter(a)
	}
	if err != nil {
		return nil, err
	}
	if a.role == RoleXDP && !hasXDPMode(device, a.mode) {
		return nil, h.detach()
	}
	if err := h.link.Update(a.prog); err != nil {
		return nil, errors.Join(fmt.Errorf("replace the program: %w", err), h.release())
	}
	return h, nil
}

// openLeftLink opens the link that an earlier daemon attached, and has the interface's name of today name its pin. Returns
// an error that is fs.ErrNotExist if there is none.
func (i *Instance) openLeftLink(a *attachment) (*linkHook, error) {
	path := linkPin(i.dir, a.iface, a.role)
	h, err := openPinnedLink(path, a.role)
	if err == nil {
		ifindex, err := h.ifindex()
		switch {
		case err != nil:
			return nil, errors.Join(err, h.release())
		case ifindex == a.ifindex:
			return h, nil
		}
		if err := h.detach(); err != nil { // of an interface that had the name before
			return nil, err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	before, err := pinOn(i.dir, a.ifindex, a.role)
	if err != nil {
		return nil, err
	}
	if before == "" {
		return nil, fs.ErrNotExist
	}
	if err := os.Rename(before, path); err != nil {
		return nil, fmt.Errorf("rename the pin of a link: %w", err)
	}
	return openPinnedLink(path, a.role)
}

// hasXDPMode reports whether the XDP program of an interface runs in that mode.
func hasXDPMode(device netlink.Link, mode Mode) bool {
	want := uint32(nl.XDP_ATTACHED_DRV)
	if mode == ModeXDPGeneric {
		want = nl.XDP_ATTACHED_SKB
	}
	x := device.Attrs().Xdp
	return x != nil && x.AttachMode == want
}

// takeOverFilter is takeOver for clsact.
func (i *Instance) takeOverFilter(a *attachment) (hook, error) {
	filters, err := instanceFilters(i.ns, a.ifindex, i.opts.Name)
	if err != nil {
		return nil, err
	}
	for _, f := range filters {
		if f.Name != filterName(i.opts.Name, a.role) {
			continue
		}
		f.Fd = a.prog.FD()
		if err := i.ns.FilterReplace(f); err != nil {
			return nil, fmt.Errorf("replace the program of a filter: %w", err)
		}
		return &clsactHook{ns: i.ns, filter: f, mark: clsactMark(i.dir, a.iface)}, nil
	}
	return nil, nil
}

// id is the link's own, whatever its pin is named; 0 if the kernel does not tell.
func (h *linkHook) id() link.ID {
	info, err := h.link.Info()
	if err != nil {
		return 0
	}
	return info.ID
}

// leftAttachment is a program that an earlier daemon attached.
type leftAttachment struct {
	iface   string
	ifindex int // 0: the interface is gone
	role    Role
	device  netlink.Link // nil then
	id      link.ID      // 0 of a filter
	remove  func() error
}

// isTakenOver reports whether it is one of ours by now: the same link, and not only one like it in the same place.
func (i *Instance) isTakenOver(l *leftAttachment) bool {
	a := i.attached[attachKey{l.ifindex, l.role}]
	if a == nil {
		return false
	}
	h, ok := a.hook.(*linkHook)
	return !ok || h.id() == l.id
}

// leftAttachments lists what the instance has on interfaces.
func (i *Instance) leftAttachments() ([]leftAttachment, error) {
	all, err := i.leftLinks()
	if err != nil {
		return nil, err
	}
	devices, err := i.ns.links()
	if err != nil {
		return nil, err
	}
	for _, device := range devices {
		filters, err := i.leftFilters(device)
		if err != nil {
			return nil, err
		}
		all = append(all, filters...)
	}
	return all, nil
}

func (i *Instance) leftLinks() ([]leftAttachment, error) {
	dir := filepath.Join(i.dir, "links")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var all []leftAttachment
	for _, e := range entries {
		iface, role, err := parseLinkPin(e.Name())
		if err != nil {
			return nil, err
		}
		path := filepath.Join(dir, e.Name())
		left := leftAttachment{iface: iface, role: role, remove: func() error { return removePinnedLink(path) }}
		h, err := openPinnedLink(path, role)
		if err != nil {
			return nil, err
		}
		left.ifindex, err = h.ifindex()
		left.id = h.id()
		if err := errors.Join(err, h.release()); err != nil {
			return nil, err
		}
		if left.device, err = i.ns.LinkByIndex(left.ifindex); err != nil {
			left.ifindex, left.device = 0, nil
		}
		all = append(all, left)
	}
	return all, nil
}

func (i *Instance) leftFilters(device netlink.Link) ([]leftAttachment, error) {
	iface, index := device.Attrs().Name, device.Attrs().Index
	filters, err := instanceFilters(i.ns, index, i.opts.Name)
	if isGone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []leftAttachment
	for _, f := range filters {
		for role := range programOf {
			if f.Name != filterName(i.opts.Name, role) {
				continue
			}
			h := &clsactHook{ns: i.ns, filter: f, mark: clsactMark(i.dir, iface)}
			all = append(all, leftAttachment{iface: iface, ifindex: index, role: role, device: device, remove: h.detach})
		}
	}
	return all, nil
}
