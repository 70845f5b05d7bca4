// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// linkHook is a program attached by a link of its own: by tcx (Linux 6.6) or XDP.
type linkHook struct {
	link   link.Link
	name   string
	pinned string
}

// attachTCX returns an error that is ebpf.ErrNotSupported if the kernel has no tcx.
func (i *Instance) attachTCX(a *attachment) (hook, error) {
	l, err := link.AttachTCX(link.TCXOptions{
		Interface: a.ifindex,
		Program:   a.prog,
		Attach:    ebpf.AttachTCXIngress,
		Anchor:    i.anchor(a),
	})
	if err != nil {
		return nil, err
	}
	return &linkHook{link: l, name: "tcx"}, nil
}

// anchor keeps our programs of one interface together, the client's first: a bound
// client packet then never passes the backend program.
func (i *Instance) anchor(a *attachment) link.Anchor {
	if other := i.neighbour(a); other != nil {
		if l, ok := other.hook.(*linkHook); ok {
			if a.role == RoleClient {
				return link.BeforeLink(l.link)
			}
			return link.AfterLink(l.link)
		}
	}
	if i.opts.Order == OrderLast {
		return link.Tail()
	}
	return link.Head()
}

func (h *linkHook) kind() string { return h.name }

func (h *linkHook) pin(path string) error {
	if err := h.link.Pin(path); err != nil {
		return err
	}
	h.pinned = path
	return nil
}

// detach says so to the kernel: to drop the last reference would take the program
// off only some time later.
func (h *linkHook) detach() error {
	err := h.link.Detach()
	if errors.Is(err, unix.ENOLINK) {
		err = nil
	}
	if h.isPinned() {
		err = errors.Join(err, removeFile(h.pinned))
	}
	return errors.Join(err, h.link.Close())
}

// isPinned reports whether the pin is of this link, and not of a later one on an interface of the same name.
func (h *linkHook) isPinned() bool {
	if h.pinned == "" {
		return false
	}
	there, err := link.LoadPinnedLink(h.pinned, nil)
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	defer there.Close() //nolint:errcheck // only read
	ours, err := h.link.Info()
	theirs, theirErr := there.Info()
	return err != nil || theirErr != nil || ours.ID == theirs.ID
}

func (h *linkHook) release() error { return h.link.Close() }

// alive: a program that cannot be asked about is not taken for dead, as it would be taken off.
func (h *linkHook) alive() bool {
	ifindex, err := h.ifindex()
	return err != nil || ifindex != 0
}

// ifindex is of the interface that the link is on, 0 if that is gone.
func (h *linkHook) ifindex() (int, error) {
	info, err := h.link.Info()
	switch {
	case err != nil:
		return 0, fmt.Errorf("ask for a link: %w", err)
	case info.TCX() != nil:
		return int(info.TCX().Ifindex), nil
	case info.XDP() != nil:
		return int(info.XDP().Ifindex), nil
	}
	return 0, fmt.Errorf("a link of type %d, not of tcx or XDP", info.Type)
}

// openPinnedLink returns an error that is fs.ErrNotExist if there is none.
func openPinnedLink(path string, role Role) (*linkHook, error) {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return nil, fmt.Errorf("open pinned link %s: %w", path, err)
	}
	name := "tcx"
	if role == RoleXDP {
		name = "xdp"
	}
	return &linkHook{link: l, name: name, pinned: path}, nil
}

// removePinnedLink takes off what a dead daemon pinned.
func removePinnedLink(path string) error {
	h, err := openPinnedLink(path, "")
	if err != nil {
		return err
	}
	return h.detach()
}
