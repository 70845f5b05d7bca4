// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"net"
	"net/netip"
	"testing"
)

func loadOnTC(t *testing.T) *Instance {
	t.Helper()
	newNetns(t)
	addXDPVeth(t, "eth0", "10.9.0.1/24")
	o := testOptions(t)
	o.Interfaces = []Interface{{"eth0", ModeTC}}
	return load(t, o)
}

// Whether a socket has a listener's port: one that listens is found whenever it comes,
// and is not forgotten; a connection that is left is found when the ports are set.
func TestHasSockets(t *testing.T) {
	i := loadOnTC(t)
	want := func(what string, want bool) {
		t.Helper()
		if got := i.HasSockets(); got != want {
			t.Fatalf("%s: %v, want %v", what, got, want)
		}
	}
	listenOn := func(port uint16) []ListenerSpec {
		return []ListenerSpec{{ID: 1, Addr: netip.AddrPortFrom(netip.Addr{}, port)}}
	}
	want("before it knows the ports", true)
	must(t, i.SetListeners(listenOn(443)))
	want("no socket", false)
	other, err := net.Listen("tcp", "127.0.0.1:8443")
	must(t, err)
	want("another port", false)

	conn, err := net.Dial("tcp", "127.0.0.1:8443")
	must(t, err)
	defer conn.Close() //nolint:errcheck // gone with the namespace
	accepted, err := other.Accept()
	must(t, err)
	defer accepted.Close() //nolint:errcheck // gone with the namespace
	must(t, other.Close())
	want("another port's connection", false)
	must(t, i.SetListeners(listenOn(8443)))
	want("a connection alone", true)
}

func TestHasSocketsListening(t *testing.T) {
	i := loadOnTC(t)
	must(t, i.SetListeners([]ListenerSpec{{ID: 1, Addr: netip.MustParseAddrPort("0.0.0.0:443")}}))
	if i.HasSockets() {
		t.Fatal("a socket is found where there is none")
	}
	l, err := net.Listen("tcp", "[::1]:443")
	must(t, err)
	if !i.HasSockets() {
		t.Fatal("one that listens is not found")
	}
	must(t, l.Close())
	if !i.HasSockets() {
		t.Fatal("it is forgotten, while its connections may live on")
	}
}
