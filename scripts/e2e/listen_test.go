// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"snilb/scripts/testbed"
)

// TestListeners has one listener on every address and one on an address and port of its own; a third port stays the stack's.
func TestListeners(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, fmt.Sprintf(`version: 1
listen:
  - ":443"
  - {name: partners, address: "%s:8443"}
  - {name: partners6, address: "[%s]:8443"}
pools:
%s%sroutes:
  - {sni: a.example.com, listen: [partners, partners6], pool: two}
  - {sni: a.example.com, pool: one}
`, bed.ExtraVIP4, bed.ExtraVIP6, pool(bed, "one", "", 1), pool(bed, "two", "", 2)))
	for _, c := range []struct {
		target  netip.AddrPort
		backend string
	}{
		{vip(bed, false), "b1"}, {vip(bed, true), "b1"},
		{netip.AddrPortFrom(bed.ExtraVIP4, 443), "b1"}, {netip.AddrPortFrom(bed.ExtraVIP6, 443), "b1"},
		{netip.AddrPortFrom(bed.ExtraVIP4, 8443), "b2"}, {netip.AddrPortFrom(bed.ExtraVIP6, 8443), "b2"},
	} {
		got, err := goClient(t, bed, c.target, "a.example.com")
		wantBody(t, got, err, c.backend, "a.example.com")
	}
	// Nobody listens there: the stack refuses, and at once.
	for _, target := range []netip.AddrPort{netip.AddrPortFrom(bed.VIP4, 8443), netip.AddrPortFrom(bed.VIP6, 444)} {
		if _, err := dialTCP(t, bed, target); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial %s: %v, want it refused", target, err)
		}
	}
}

// TestUplinks moves open connections from one uplink to the other: there is one flow table for both.
func TestUplinks(t *testing.T) {
	bed := newBed(t, testbed.Options{Topology: testbed.TwoUplinks})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	var conns []net.Conn
	for i, extra := range []netip.Addr{bed.ExtraVIP4, bed.ExtraVIP6} {
		must(t, bed.UseUplink(i)) // the second connection begins on the second uplink
		conns = append(conns, dialTLS(t, bed, netip.AddrPortFrom(extra, 443), "a.example.com"))
	}
	for i := range 6 {
		must(t, bed.UseUplink(i%2))
		for _, c := range conns {
			got, err := whoami(c)
			wantBody(t, got, err, "b1", "a.example.com")
		}
	}
	if n := len(d.flows()); n != len(conns) {
		t.Errorf("%d flows for %d connections", n, len(conns))
	}
	for _, c := range conns {
		must(t, c.Close())
	}
	d.noFlows(15 * time.Second)
}

// TestLiveProxy attaches in front of an nginx that serves the same port, and lets go again. A connection that nginx has
// must notice neither.
func TestLiveProxy(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	startNginx(t, bed.LB, `	keepalive_timeout 600s;
	server { listen 443 ssl; listen [::]:443 ssl ipv6only=on;
		location = / { return 200 'b9 "$ssl_server_name" "" $remote_addr:$remote_port\n'; }
	}
`, vip(bed, false))
	families(t, func(t *testing.T, v6 bool) {
		old := dialTLS(t, bed, vip(bed, v6), "local.example.com")
		stillThere := func(when string) {
			t.Helper()
			got, err := whoami(old)
			if err != nil {
				t.Fatalf("nginx's connection %s: %v", when, err)
			}
			wantBody(t, got, nil, "b9", "local.example.com")
		}
		stillThere("before")
		d := attach(t, bed, siteRoutes(bed))
		stillThere("behind snilb")
		got, err := goClient(t, bed, vip(bed, v6), "a.example.com")
		wantBody(t, got, err, "b1", "a.example.com")
		stillThere("after a balanced one")
		d.stop(syscall.SIGTERM)
		stillThere("afterwards")
		got, err = goClient(t, bed, vip(bed, v6), "local.example.com")
		wantBody(t, got, err, "b9", "local.example.com")
	})
}

// neighbour is somebody else's program on the hook: it counts and passes on.
type neighbour struct {
	prog  *ebpf.Program
	count *ebpf.Map
	link  link.Link
}

// newNeighbour attaches a counting program to the ingress of a device, at the head or the tail.
func newNeighbour(t *testing.T, bed *testbed.Bed, dev string, where link.Anchor) *neighbour {
	t.Helper()
	n := &neighbour{}
	var err error
	n.count, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	need(t, "BPF maps", err)
	t.Cleanup(n.close)
	n.prog, err = ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.RFP, -4, asm.R1, asm.Word),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, n.count.FD()),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Imm(asm.R1, 1),
		asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, 0),
		asm.Mov.Imm(asm.R0, -1).WithSymbol("out"), // TCX_NEXT
		asm.Return(),
	}})
	must(t, err)
	index, err := bed.LB.Index(dev)
	must(t, err)
	err = bed.LB.Do(func() error {
		n.link, err = link.AttachTCX(link.TCXOptions{Interface: index, Program: n.prog, Attach: ebpf.AttachTCXIngress, Anchor: where})
		return err
	})
	need(t, "tcx", err)
	return n
}

// saw is how many packets came by since it was asked last.
func (n *neighbour) saw(t *testing.T) uint64 {
	t.Helper()
	var packets uint64
	must(t, n.count.Lookup(uint32(0), &packets))
	must(t, n.count.Put(uint32(0), uint64(0)))
	return packets
}

func (n *neighbour) close() {
	if n.link != nil {
		_ = n.link.Close()
		n.link = nil
	}
	_ = n.prog.Close()
	_ = n.count.Close()
}

// TestNeighbours shares the hook with programs of others, before and behind ours: they go on seeing what is not ours.
func TestNeighbours(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	other := netip.AddrPortFrom(bed.VIP4, 9000)
	serve(t, bed.LB, other, func(c net.Conn) { _ = c.Close() })
	for _, order := range []string{"first", "last"} {
		t.Run("order-"+order, func(t *testing.T) {
			early := newNeighbour(t, bed, "eth0", link.Head())
			d := attach(t, bed, siteRoutes(bed), "--order", order)
			late := newNeighbour(t, bed, "eth0", link.Tail())
			shareHook(t, bed, other, early, late, order)
			must(t, d.cmd.Process.Signal(syscall.SIGTERM))
			<-d.exited
			early.saw(t)
			late.saw(t)
			_, err := dialTCP(t, bed, other)
			must(t, err)
			if early.saw(t) == 0 || late.saw(t) == 0 {
				t.Error("snilb took a program of somebody else with it")
			}
			early.close()
			late.close()
			assertClean(t, bed, d.name)
		})
	}
}

// shareHook sends packets that are ours and packets that are not, and looks who saw them.
func shareHook(t *testing.T, bed *testbed.Bed, other netip.AddrPort, early, late *neighbour, order string) {
	t.Helper()
	if _, err := dialTCP(t, bed, other); err != nil {
		t.Errorf("a port that is not ours: %v", err)
	}
	if e, l := early.saw(t), late.saw(t); e < 2 || l < 2 {
		t.Errorf("of a foreign connection the program before saw %d packets, the one behind %d", e, l)
	}
	got, err := goClient(t, bed, vip(bed, false), "a.example.com")
	wantBody(t, got, err, "b1", "a.example.com")
	e := early.saw(t)
	if *mode == "tc" && order == "last" && e < 5 {
		t.Errorf("attached last, but the program before saw only %d packets of a balanced connection", e)
	}
	if *mode == "tc" && order == "first" && e > 4 { // neighbour discovery is not ours
		t.Errorf("attached first, but another program saw %d packets of a balanced connection", e)
	}
}

// TestForeignPing passes what is no TCP at all.
func TestForeignPing(t *testing.T) {
	needTool(t, "ping")
	bed := newBed(t, testbed.Options{})
	attach(t, bed, siteRoutes(bed))
	for _, addr := range []netip.Addr{bed.VIP4, bed.VIP6} {
		if out, err := bed.Client.Command(context.Background(), "ping", "-n", "-c", "2", "-i", "0.2", "-W", "2", addr.String()).CombinedOutput(); err != nil {
			t.Errorf("ping %s: %v\n%s", addr, err, out)
		}
	}
}
