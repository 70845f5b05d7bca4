// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// socketWatch knows whether sockets of this node may have connections on listeners'
// ports. Once it saw one it says so until the daemon ends: connections outlive the
// socket that accepted them.
type socketWatch struct {
	mu     sync.Mutex
	ports  map[uint16]bool // of the listeners
	looked bool            // at all sockets since the ports were set
	found  bool
}

func (w *socketWatch) watch(listeners []ListenerSpec) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ports, w.looked = make(map[uint16]bool), false
	for _, l := range listeners {
		w.ports[l.Addr.Port()] = true
	}
}

// HasSockets reports whether a socket of this node may own a connection to a listener's
// port. All sockets are looked at once; after that only new ones that listen could bring
// connections, so it costs little to ask every second. When unsure it is true.
func (i *Instance) HasSockets() bool {
	w := &i.sockets
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.found || len(w.ports) == 0 {
		return true
	}
	states := uint32(1 << unix.BPF_TCP_LISTEN)
	if !w.looked {
		states = ^uint32(0)
	}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		found, err := socketOn(i.ns, family, states, w.ports)
		if err != nil {
			i.log.Warn("cannot list this node's sockets: every SYN is looked for among them", "error", err)
			found = true
		}
		w.found = w.found || found
	}
	w.looked = true
	return w.found
}

// socketOn reports whether a TCP socket in one of states (bits, by the kernel's numbers)
// has one of these local ports.
func socketOn(ns *namespace, family uint8, states uint32, ports map[uint16]bool) (found bool, err error) {
	// struct inet_diag_req_v2 of <linux/inet_diag.h>: family, protocol, two bytes, states, and
	// a socket's identity, which a dump does not look at.
	const requestSize, sportAt = 56, 4
	request := make([]byte, requestSize)
	request[0], request[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(request[4:], states)

	var answers [][]byte
	err = ns.do(func() (err error) {
		req := nl.NewNetlinkRequest(unix.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		req.AddRawData(request)
		answers, err = req.Execute(unix.NETLINK_INET_DIAG, 0)
		return err
	})
	if err != nil {
		return false, fmt.Errorf("list sockets: %w", err)
	}
	for _, a := range answers {
		if len(a) >= sportAt+2 && ports[binary.BigEndian.Uint16(a[sportAt:])] {
			return true, nil
		}
	}
	return false, nil
}
