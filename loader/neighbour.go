// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// neighbourKey is a host on a link.
type neighbourKey struct {
	ifindex int
	addr    netip.Addr
}

const (
	// neighbourMarks is the directory that says which neighbours are managed because of us.
	neighbourMarks = "neighbours"

	// States that the kernel does not leave by itself.
	neighbourFixed = netlink.NUD_PERMANENT | netlink.NUD_NOARP
)

// neighbourTable knows the link addresses of those whom XDP hands packets to. It has the
// kernel keep them resolved (NTF_EXT_MANAGED), as XDP resolves nobody.
type neighbourTable struct {
	ns  *namespace
	dir string // of the marks
	set func(key neighbourKey, address [6]byte, ok bool) error
	log *slog.Logger

	// mu is held from a question to the kernel until the answer is noted: what is noted last is the newest.
	mu      sync.Mutex
	watched map[neighbourKey]bool // true: managed because of us
	closed  bool
}

func newNeighbourTable(ns *namespace, dir string, set func(neighbourKey, [6]byte, bool) error, log *slog.Logger) *neighbourTable {
	return &neighbourTable{
		ns: ns, dir: filepath.Join(dir, neighbourMarks), set: set, log: log, watched: make(map[neighbourKey]bool),
	}
}

// watch begins to follow a neighbour.
func (t *neighbourTable) watch(key neighbourKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, known := t.watched[key]; known || t.closed {
		return
	}
	t.watched[key] = false
	t.look(key)
}

// look asks the kernel for a watched neighbour and notes what it says. Errors are logged:
// TC sends to whom XDP cannot. t.mu is held.
func (t *neighbourTable) look(key neighbourKey) {
	found, err := t.manage(key)
	if err != nil && !isGone(err) {
		t.log.Warn("a neighbour cannot be kept resolved: XDP leaves what goes there to TC", "neighbour", key.addr, "error", err)
	}
	// The kernel tells an address in the states in which it sends to it, and in no others.
	var address [6]byte
	usable := found != nil && len(found.HardwareAddr) == len(address)
	if usable {
		address = [6]byte(found.HardwareAddr)
	}
	if err := t.set(key, address, usable); err != nil {
		t.log.Error("follow neighbours", "error", err)
	}
}

// manage makes a neighbour one that the kernel keeps resolved, unless it is, or somebody
// has fixed its link address. Returns nil for one that the kernel does not have.
func (t *neighbourTable) manage(key neighbourKey) (*netlink.Neigh, error) {
	found, err := lookupNeighbour(t.ns, key)
	if err != nil || found != nil && (found.State&neighbourFixed != 0 || found.FlagsExt&netlink.NTF_EXT_MANAGED != 0) {
		return found, err
	}
	// The mark comes first: one too many after a crash does no harm.
	if err := os.Mkdir(filepath.Join(t.dir, neighbourMark(key)), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return found, fmt.Errorf("mark neighbour: %w", err)
	}
	t.watched[key] = true
	// Somebody may add it at the same time, and fix it: that is his message's turn.
	if err := setManaged(t.ns, key, found, netlink.NTF_EXT_MANAGED); err != nil && !errors.Is(err, unix.EEXIST) {
		return found, err
	}
	return lookupNeighbour(t.ns, key)
}

// follow notes changes until ctx ends. As elsewhere what a message says is not looked at,
// but of whom it is.
func (t *neighbourTable) follow(ctx context.Context) error {
	socket, err := subscribeTo(t.ns, unix.RTNLGRP_NEIGH)
	if err != nil {
		return err
	}
	defer socket.Close()
	defer context.AfterFunc(ctx, socket.Close)()
	t.lookAgain(nil) // what changed before the subscription
	for {
		messages, _, err := socket.Receive()
		switch {
		case errors.Is(err, unix.ENOBUFS):
			t.lookAgain(nil)
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		}
		changed := make(map[neighbourKey]bool)
		for _, m := range messages {
			if n, err := netlink.NeighDeserialize(m.Data); err == nil {
				changed[neighbourKey{n.LinkIndex, addrOf(n.IP)}] = true
			}
		}
		if len(changed) > 0 {
			t.lookAgain(changed)
		}
	}
}

// lookAgain looks at those of the neighbours that are watched; nil is all.
func (t *neighbourTable) lookAgain(changed map[neighbourKey]bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if changed == nil {
		changed = make(map[neighbourKey]bool)
		for key := range t.watched {
			changed[key] = true
		}
	}
	for key := range changed {
		if _, known := t.watched[key]; known && !t.closed {
			t.look(key)
		}
	}
}

// close lets the kernel forget again whom it kept because of us.
func (t *neighbourTable) close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	var errs []error
	for key, ours := range t.watched {
		if ours {
			errs = append(errs, releaseNeighbour(t.ns, key))
		}
	}
	return errors.Join(errs...)
}

// releaseMarked does the same for a daemon that died.
func releaseMarked(ns *namespace, dir string) error {
	entries, err := os.ReadDir(filepath.Join(dir, neighbourMarks))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list neighbours: %w", err)
	}
	var errs []error
	for _, e := range entries {
		key, err := parseNeighbourMark(e.Name())
		if err == nil {
			err = releaseNeighbour(ns, key)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func releaseNeighbour(ns *namespace, key neighbourKey) error {
	found, err := lookupNeighbour(ns, key)
	if err == nil && found != nil && found.State&neighbourFixed == 0 && found.FlagsExt&netlink.NTF_EXT_MANAGED != 0 {
		err = setManaged(ns, key, found, 0)
	}
	if isGone(err) {
		return nil
	}
	return err
}

// setManaged sets or clears the flag and nothing else: with NTF_USE the kernel leaves
// the state but NUD_PERMANENT and the link address alone. One that was not found is
// added; an error is EEXIST if it is there by now.
func setManaged(ns *namespace, key neighbourKey, found *netlink.Neigh, managed int) error {
	n := &netlink.Neigh{LinkIndex: key.ifindex, IP: key.addr.AsSlice(), Flags: netlink.NTF_USE, FlagsExt: managed}
	set := ns.NeighAdd
	if found != nil {
		set = ns.NeighSet
		n.Flags |= found.Flags & netlink.NTF_EXT_LEARNED // which would be cleared
	}
	if err := set(n); err != nil {
		return fmt.Errorf("set whether neighbour %v is managed: %w", key.addr, err)
	}
	return nil
}

// lookupNeighbour returns nil for one that the kernel does not have.
func lookupNeighbour(ns *namespace, key neighbourKey) (*netlink.Neigh, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, 0)
	family := unix.AF_INET6
	if key.addr.Is4() {
		family = unix.AF_INET
	}
	req.AddData(&netlink.Ndmsg{Family: uint8(family), Index: uint32(key.ifindex)})
	req.AddData(nl.NewRtAttr(netlink.NDA_DST, key.addr.AsSlice()))
	var messages [][]byte
	err := ns.do(func() (err error) {
		messages, err = req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
		return err
	})
	if errors.Is(err, unix.ENOENT) || err == nil && len(messages) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look neighbour %v up: %w", key.addr, err)
	}
	return netlink.NeighDeserialize(messages[0])
}

// neighbourMark is the name of a neighbour's mark.
func neighbourMark(key neighbourKey) string {
	return strconv.Itoa(key.ifindex) + "-" + escape(key.addr.String())
}

func parseNeighbourMark(mark string) (key neighbourKey, err error) {
	index, rest, _ := strings.Cut(mark, "-")
	text, err := unescape(rest)
	if err == nil {
		key.ifindex, err = strconv.Atoi(index)
	}
	if err == nil {
		key.addr, err = netip.ParseAddr(text)
	}
	if err != nil {
		return key, fmt.Errorf("mark of a neighbour %q: %w", mark, err)
	}
	return key, nil
}
