// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"snilb/maps"
	"snilb/userspace/config"
	"snilb/userspace/packet"
	"snilb/userspace/ringbuf/ringbuftest"
)

// kernel has the maps and the jobs program of an instance, which outlive its daemons. No packet comes by itself.
type kernel struct {
	t       testing.TB
	tables  *maps.Tables
	coll    *ebpf.Collection
	workers int
}

func newKernel(t testing.TB, workers, flows int) *kernel {
	t.Helper()
	ringbuftest.NeedRoot(t)
	spec, err := maps.Spec()
	must(t, err)
	for name := range spec.Programs {
		if name != maps.ProgramJobs {
			delete(spec.Programs, name)
		}
	}
	for _, name := range []string{"flows4", "flows6"} {
		spec.Maps[name].MaxEntries = uint32(2 * flows)
	}
	spec.Maps[maps.MapJobs].MaxEntries = uint32(workers)
	k := &kernel{t: t, tables: &maps.Tables{}, workers: workers}
	k.coll, err = ebpf.NewCollection(spec)
	must(t, err)
	t.Cleanup(func() {
		k.coll.Close()
		for _, m := range k.tables.All() {
			_ = m.Map.Close()
		}
	})
	must(t, k.coll.Assign(k.tables))
	return k
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// daemon is an engine on the kernel, and what it sent and logged.
type daemon struct {
	*Engine
	t   testing.TB
	out []*frames // by worker
	log *strings.Builder
}

const kernelRoutes = `
listen: ":443"
pools:
  own: {backends: ["192.0.2.11:443", "[2001:db8::11]:443"], timeouts: {closing: 7s, unconfirmed: 20s}}
  clients: {backends: ["192.0.2.12:443", "[2001:db8::12]:443"], source: client}
routes:
  - {sni: a.example.com, pool: own}
  - {sni: b.example.com, pool: clients}
`

func firstPlan(t testing.TB, routes string, known Known) *Plan {
	t.Helper()
	c, err := config.Parse("test", []byte("version: 1\n"+routes))
	must(t, err)
	p, err := FirstPlan(c, known)
	must(t, err)
	return p
}

// try makes a daemon of that configuration.
func (k *kernel) try(p *Plan, change func(*Options)) (*daemon, error) {
	k.t.Helper()
	d := &daemon{t: k.t, log: &strings.Builder{}}
	o := Options{
		Tables: k.tables,
		NextHop: func(addr netip.Addr) (Hop, error) {
			source := netip.MustParseAddr("198.51.100.1")
			if addr.Is6() {
				source = netip.MustParseAddr("2001:db8:1::1")
			}
			return Hop{Index: 1, MTU: 1500, Source: source}, nil
		},
		NextHopWithin:   func(_ netip.Addr, mtu int) (Hop, error) { return Hop{Index: 2, MTU: mtu}, nil },
		MSS:             func() (uint16, uint16) { return 1460, 1440 },
		HasSockets:      func() bool { return false },
		SourcePortFirst: 20000, SourcePortLast: 20099, SourcePortsOwn: [2]uint16{20000, 20099},
		Secret: [32]byte{1},
		Log:    slog.New(slog.NewTextHandler(d.log, nil)),
	}
	for n := range k.workers {
		for _, rings := range []*[]*ebpf.Map{&o.Rings, &o.QuietRings} {
			ring, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: uint32(os.Getpagesize())})
			must(k.t, err)
			k.t.Cleanup(func() { _ = ring.Close() })
			*rings = append(*rings, ring)
		}
		jobs, err := maps.NewJobs(k.coll.Programs[maps.ProgramJobs], k.coll.Maps[maps.MapJobs], n)
		must(k.t, err)
		k.t.Cleanup(func() { must(k.t, jobs.Close()) })
		o.Jobs = append(o.Jobs, jobs)
		d.out = append(d.out, &frames{})
		o.Queues = append(o.Queues, d.out[n])
	}
	if change != nil {
		change(&o)
	}
	var err error
	d.Engine, err = New(o, p)
	return d, err
}

// start is try where that works, for a daemon that does not run: the test does its work.
func (k *kernel) start(p *Plan, change func(*Options)) *daemon {
	k.t.Helper()
	d, err := k.try(p, change)
	must(k.t, err)
	k.t.Cleanup(func() { must(k.t, d.free()) })
	d.started = d.clock.now()
	for _, w := range d.workers {
		w.now = d.started
	}
	return d
}

// hears is a client's segment at the first worker, by the first listener.
func (d *daemon) hears(s *packet.Segment) { d.workers[0].clientSegment(1, s) }

// segments are those that a worker sent, with what each frame asks for.
func (d *daemon) segments(worker int) (all []packet.Segment, requests []byte) {
	d.t.Helper()
	for _, frame := range *d.out[worker] {
		s, err := packet.Parse(frame[14:])
		must(d.t, err)
		all, requests = append(all, s), append(requests, frame[3])
	}
	*d.out[worker] = nil
	return all, requests
}

// pairOf is flow number n of a family, at a worker, with the generation n, as an earlier daemon bound it: to the first pool if own.
func pairOf(n, worker int, v6, own bool) *maps.Pair {
	client, vip := netip.MustParseAddr("203.0.113.7"), netip.MustParseAddrPort("192.0.2.1:443")
	source, backend := netip.MustParseAddr("198.51.100.1"), netip.MustParseAddrPort("192.0.2.11:443")
	if v6 {
		client, vip = netip.MustParseAddr("2001:db8:7::7"), netip.MustParseAddrPort("[2001:db8::1]:443")
		source, backend = netip.MustParseAddr("2001:db8:1::1"), netip.MustParseAddrPort("[2001:db8::11]:443")
	}
	from := netip.AddrPortFrom(client, uint16(1000+n))
	local := netip.AddrPortFrom(source, uint16(20000+6*n+worker))
	if !own {
		local, backend = from, netip.AddrPortFrom(backend.Addr().Next(), 443)
	}
	control := maps.FlowControl(1, 0, worker)
	now := uint32(newClock().now() >> 20)
	return &maps.Pair{
		Client: maps.Tuple{Src: from, Dst: vip}, Backend: maps.Tuple{Src: backend, Dst: local},
		Up: &maps.Entry{
			To:   maps.Tuple{Src: local, Dst: backend},
			Flow: maps.Flow{Control: control | maps.FlowConfirmed, Generation: uint16(n), LastSeen: now, LastAck: 5001},
		},
		Down: &maps.Entry{
			To:   maps.Tuple{Src: vip, Dst: from},
			Flow: maps.Flow{Control: control, Generation: uint16(n), LastSeen: now, LastAck: 7001},
		},
	}
}

func (k *kernel) bind(pairs ...*maps.Pair) {
	k.t.Helper()
	for _, p := range pairs {
		must(k.t, k.tables.InsertFlow(maps.LegClient, p.Client, p.Up))
		must(k.t, k.tables.InsertFlow(maps.LegBackend, p.Backend, p.Down))
	}
}

// entries counts those in the tables.
func (k *kernel) entries() (n int) {
	k.t.Helper()
	must(k.t, k.tables.Flows(func(maps.Leg, maps.Tuple, *maps.Entry) { n++ }))
	return n
}

// flow is a pair's as the daemon has it.
func (d *daemon) flow(p *maps.Pair) *flow {
	d.t.Helper()
	w := d.workers[p.Up.Worker()]
	f := w.flows.byClient(connection{p.Client.Src, p.Client.Dst})
	if f == nil {
		d.t.Fatalf("the flow of %v is not known", p.Client)
	}
	if back := w.flows.byBackend(p.Backend.Src, p.Backend.Dst); back != f {
		d.t.Fatalf("the flow of %v is %p by its backend, want %p", p.Client, back, f)
	}
	return f
}

func eachFamily(t *testing.T, test func(t *testing.T, v6 bool)) {
	for _, v6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("v6=%v", v6), func(t *testing.T) { test(t, v6) })
	}
}

// eventOf is a ring record.
func eventOf(t testing.TB, kind maps.EventKind, at int64, s *packet.Segment) []byte {
	t.Helper()
	frame := s.Append(nil)
	var b bytes.Buffer
	must(t, binary.Write(&b, binary.NativeEndian, maps.EventHeader{
		Time: uint64(at), Kind: uint8(kind), Listener: 1, Length: uint32(len(frame)), Captured: uint16(len(frame)),
	}))
	return append(b.Bytes(), frame...)
}
