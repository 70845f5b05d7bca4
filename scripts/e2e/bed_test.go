// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"snilb/scripts/testbed"
)

// The tests in this file have no snilb in them: they show that beds, backends and clients do what the others rely on, by
// the plainly routed path. When one of these fails, look here first.

func TestBedClients(t *testing.T) {
	bed := newBed(t, testbed.Options{Forward: true})
	for _, server := range []struct {
		name  string
		start func(*testing.T)
	}{
		{"nginx", func(t *testing.T) { nginxBackends(t, bed) }},
		{"go", func(t *testing.T) { startBackends(t, bed) }},
	} {
		t.Run(server.name, func(t *testing.T) {
			server.start(t)
			families(t, func(t *testing.T, v6 bool) { askAll(t, bed, at(bed, 2, v6, 443), "b2") })
		})
	}
}

// askAll asks one target by all clients.
func askAll(t *testing.T, bed *testbed.Bed, target netip.AddrPort, backend string) {
	for _, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			if c.tool != "" {
				needTool(t, c.tool)
			}
			got, err := c.get(t, bed, target, "b.example.com")
			wantBody(t, got, err, backend, "b.example.com")
			if c.name == "curl" {
				return
			}
			got, err = c.get(t, bed, target, "")
			wantBody(t, got, err, backend, "")
		})
	}
}

func TestBedTopologies(t *testing.T) {
	for name, opts := range map[string]testbed.Options{
		"one-armed":   {Topology: testbed.OneArmed, Backends: 5, Clients: 4},
		"two-uplinks": {Topology: testbed.TwoUplinks, Forward: true},
		"small-mtu":   {ClientMTU: 1280, BackendMTU: 9000, Forward: true},
		"no-offload":  {NoOffload: true, Forward: true},
	} {
		t.Run(name, func(t *testing.T) {
			bed := newBed(t, opts)
			startBackends(t, bed)
			families(t, func(t *testing.T, v6 bool) {
				got, err := goClient(t, bed, at(bed, 1, v6, 443), "a.example.com")
				wantBody(t, got, err, "b1", "a.example.com")
			})
		})
	}
}

// TestBedUplinks moves the client's way to the extra VIPs in the middle of a connection.
func TestBedUplinks(t *testing.T) {
	bed := newBed(t, testbed.Options{Topology: testbed.TwoUplinks, Forward: true})
	for _, extra := range []netip.Addr{bed.ExtraVIP4, bed.ExtraVIP6} {
		target := netip.AddrPortFrom(extra, 443)
		b, err := testbed.StartBackend(bed.LB, "b1", target, cert)
		must(t, err)
		t.Cleanup(func() { _ = b.Close() })
		c := dialTLS(t, bed, target, "a.example.com")
		for i := range 4 {
			must(t, bed.UseUplink(i%2))
			got, err := whoami(c)
			wantBody(t, got, err, "b1", "a.example.com")
		}
	}
}

// TestBedRaw speaks TLS over the raw client, in order, swapped and with every segment sent twice.
func TestBedRaw(t *testing.T) {
	bed := newBed(t, testbed.Options{Forward: true})
	startBackends(t, bed)
	families(t, func(t *testing.T, v6 bool) {
		for name, shape := range shapes {
			t.Run(name, func(t *testing.T) {
				got, err := rawClient(t, bed, at(bed, 3, v6, 443), "a.example.com", shape)
				wantBody(t, got, err, "b3", "a.example.com")
			})
		}
	})
}

// TestBedRawReset is the raw client against a closed port: the RST must come through, with a right checksum.
func TestBedRawReset(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	families(t, func(t *testing.T, v6 bool) {
		r, err := bed.Raw(vip(bed, v6))
		must(t, err)
		defer func() { _ = r.Close() }()
		s, err := r.Open(testbed.LinuxSYN(r.TSVal), 2*time.Second)
		if !errors.Is(err, testbed.ErrReset) || s.BadChecksum {
			t.Errorf("open: %v, segment %s, bad checksum %t", err, s, s.BadChecksum)
		}
		must(t, r.Quiet(300*time.Millisecond))
	})
}

func TestBedBulk(t *testing.T) {
	bed := newBed(t, testbed.Options{Forward: true})
	startBackends(t, bed)
	download(t, bed, at(bed, 1, false, 443), "a.example.com")
	upload(t, bed, at(bed, 1, true, 443), "a.example.com")
}

// TestBedHello says that Go's default hello does not fit into one segment: what the tests of split hellos rest on.
func TestBedHello(t *testing.T) {
	if n := len(hello(t, &tls.Config{ServerName: "a.example.com"})); n <= 1460 {
		t.Errorf("a post-quantum hello has %d bytes, one segment holds it", n)
	}
	if n := len(hello(t, classic("a.example.com"))); n > 1220 {
		t.Errorf("a classic hello has %d bytes", n)
	}
}

// TestBedClose looks that nothing outlives a bed: no name, no process.
func TestBedClose(t *testing.T) {
	needRoot(t)
	bed, err := testbed.New(testbed.Options{Topology: testbed.OneArmed})
	must(t, err)
	names := []string{bed.Client.Path(), bed.LB.Path(), bed.Backend.Path(), bed.LAN.Path()}
	cmd := bed.LB.Command(context.Background(), "sleep", "600")
	must(t, cmd.Start())
	must(t, bed.Close())
	if err := cmd.Wait(); err == nil {
		t.Error("a process outlived its bed")
	}
	for _, path := range names {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", filepath.Base(path), err)
		}
	}
}

// TestBedXDP sends frames through an XDP_REDIRECT from one leg to the other: a veth loses them in silence when its far
// end was not prepared.
func TestBedXDP(t *testing.T) {
	needRoot(t)
	bed, err := testbed.New(testbed.Options{XDP: true})
	need(t, "network namespaces", err)
	t.Cleanup(func() { must(t, bed.Close()) })
	in, err := bed.LB.Index("eth0")
	must(t, err)
	out, err := bed.LB.Index("eth1")
	must(t, err)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R1, int32(out)),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirect.Call(),
		asm.Return(),
	}})
	need(t, "BPF programs", err)
	defer func() { _ = prog.Close() }()
	must(t, bed.LB.Do(func() error {
		l, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: in, Flags: link.XDPDriverMode})
		if err == nil {
			t.Cleanup(func() { _ = l.Close() })
		}
		return err
	}))
	r, err := bed.Raw(vip(bed, false))
	must(t, err)
	defer func() { _ = r.Close() }()
	const frames = 100
	before := received(t, bed.Backend, "eth0")
	for range frames {
		must(t, r.Send(r.Bare(0)))
	}
	for range 100 {
		if received(t, bed.Backend, "eth0")-before >= frames {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("of %d redirected frames %d arrived", frames, received(t, bed.Backend, "eth0")-before)
}

// received is how many packets a device has counted.
func received(t *testing.T, ns *testbed.NS, dev string) uint64 {
	t.Helper()
	h, err := ns.Netlink()
	must(t, err)
	defer h.Close()
	l, err := h.LinkByName(dev)
	must(t, err)
	return l.Attrs().Statistics.RxPackets
}

// TestBedLeftovers leaves one of everything, to show that assertClean would see it.
func TestBedLeftovers(t *testing.T) {
	needBPFFS(t)
	bed := newBed(t, testbed.Options{})
	name := instanceName()
	if left := leftovers(t, bed, name); len(left) > 0 {
		t.Fatalf("a new bed has leftovers: %v", left)
	}
	newNeighbour(t, bed, "eth0", link.Head())
	eth1, err := bed.LB.Index("eth1")
	must(t, err)
	must(t, bed.LB.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "snilb0"
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return err
		}
		return netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: eth1, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}})
	}))
	for _, dir := range []string{filepath.Join(pinRoot, name), filepath.Join(socketDir, name+"@1.sock")} {
		must(t, os.MkdirAll(dir, 0o755))
		t.Cleanup(func() { _ = os.Remove(dir) })
	}
	left := strings.Join(leftovers(t, bed, name), "\n")
	for _, want := range []string{"tcx ingress program", "device snilb0", "qdisc clsact on eth1", "pin " + pinRoot, filepath.Join(socketDir, name+"@1.sock")} {
		if !strings.Contains(left, want) {
			t.Errorf("%s is not seen in:\n%s", want, left)
		}
	}
}

// TestBedCommand looks that commands see the real bpffs, and the network of their namespace.
func TestBedCommand(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	out, err := bed.LB.Command(t.Context(), "readlink", "/proc/self/ns/mnt").Output()
	must(t, err)
	mnt, err := os.Readlink("/proc/self/ns/mnt")
	must(t, err)
	if got := strings.TrimSpace(string(out)); got != mnt {
		t.Errorf("mount namespace %s, want the caller's %s", got, mnt)
	}
	devs, err := bed.LB.Command(t.Context(), "cat", "/proc/net/dev").Output()
	must(t, err)
	if !bytes.Contains(devs, []byte("eth1:")) {
		t.Errorf("no eth1 in the namespace:\n%s", devs)
	}
	if err := bed.LB.Command(t.Context(), "no-such-program").Run(); !errors.Is(err, os.ErrNotExist) && err == nil {
		t.Error("a missing program gave no error")
	}
}
