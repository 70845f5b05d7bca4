// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// programOn is the id of a role's program on an interface, 0 if there is none.
func programOn(t *testing.T, i *Instance, iface string, role Role) ebpf.ProgramID {
	t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, a := range i.sorted() {
		if a.iface != iface || a.role != role || !a.hook.alive() {
			continue
		}
		info, err := a.prog.Info()
		must(t, err)
		id, _ := info.ID()
		return id
	}
	return 0
}

// An interface that is back has its programs, the very same, before it has an address or a route.
func TestProgramsStayLoaded(t *testing.T) {
	bothHooks(t, func(t *testing.T, kind string, clsact bool) {
		newNetns(t)
		addVeth(t, "eth0", "10.9.0.1/24")
		addVeth(t, "eth1", "10.8.0.1/24")
		o := testOptions(t, "eth0")
		o.forceClsact = clsact
		i := load(t, o)
		must(t, i.Attach())
		_, err := i.AddBackend(addrPort("10.8.0.2:443"))
		must(t, err)
		run(t, i)
		for iface, roles := range map[string][]Role{"eth0": {RoleClient, RoleBackend}, "eth1": {RoleBackend}} {
			before := make(map[Role]ebpf.ProgramID)
			for _, role := range roles {
				before[role] = programOn(t, i, iface, role)
			}
			for range 2 {
				must(t, netlink.LinkDel(device(t, iface)))
				eventually(t, "gone", func() bool { return programOn(t, i, iface, roles[0]) == 0 })
				addVeth(t, iface)
				for _, role := range roles {
					eventually(t, "back", func() bool { return programOn(t, i, iface, role) != 0 })
					if id := programOn(t, i, iface, role); id != before[role] {
						t.Errorf("%s program of %s is %d, and was %d", role, iface, id, before[role])
					}
				}
			}
		}
		if len(i.gone) != 0 {
			t.Errorf("%d programs wait for interfaces, and all are back", len(i.gone))
		}
	})
}

// Interfaces that never come back do not add up.
func TestGoneIsBounded(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	i := load(t, testOptions(t, "eth0"))
	must(t, i.Attach())
	i.mu.Lock()
	for range maxGone + 5 {
		must(t, i.keepLoaded(i.sorted()[0]))
	}
	if len(i.gone) != maxGone {
		t.Errorf("%d are kept, want %d", len(i.gone), maxGone)
	}
	i.mu.Unlock()
}

// One backend of several on a link gets a route of its own: its entry follows, and those of the others stay.
func TestBackendMovesAlone(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	eth1 := addVeth(t, "eth1", "10.8.0.1/24").Attrs().Index
	i := load(t, testOptions(t, "eth0"))
	run(t, i)
	for _, backend := range []string{"10.9.0.2:443", "10.9.0.3:443"} {
		_, err := i.AddBackend(addrPort(backend))
		must(t, err)
	}
	moves, stays := nextHop(t, i, "10.9.0.2").Index, nextHop(t, i, "10.9.0.3").Index
	routeVia(t, "10.9.0.2/32", "10.8.0.254")
	eventually(t, "entry moved", func() bool { return entry(t, i, moves).Ifindex == uint32(eth1) })
	if got := entry(t, i, stays); got.Ifindex == uint32(eth1) {
		t.Errorf("the other's entry moved along: %+v", got)
	}
}

// oneMessage is a subscription with one message, which then is broken.
type oneMessage struct{ kind uint16 }

func (o *oneMessage) Receive() ([]syscall.NetlinkMessage, *unix.SockaddrNetlink, error) {
	kind := o.kind
	if o.kind = 0; kind == 0 {
		return nil, nil, unix.EBADF
	}
	return []syscall.NetlinkMessage{{Header: syscall.NlMsghdr{Type: kind}}}, nil, nil
}

func (o *oneMessage) Close() {}

// The message of a link alone brings the programs back, without a wait for the end of the burst; that of an address does not.
func TestProgramsAreBackAtOnce(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	i := load(t, testOptions(t, "eth0"))
	must(t, i.Attach())
	must(t, netlink.LinkDel(device(t, "eth0")))
	addVeth(t, "eth0")
	for _, c := range []struct {
		kind uint16
		back bool
	}{{unix.RTM_NEWADDR, false}, {unix.RTM_NEWLINK, true}} {
		i.receive(&oneMessage{c.kind}, make(chan struct{}, 1), make(chan error, 1))
		if got := programOn(t, i, "eth0", RoleClient) != 0; got != c.back {
			t.Errorf("after message %d: program there %v, want %v", c.kind, got, c.back)
		}
	}
}
