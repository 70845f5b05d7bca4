// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"snilb/maps"
	"snilb/userspace/packet"
	"snilb/userspace/ringbuf/ringbuftest"
)

// TestAdopt has a daemon come to flows that an earlier one bound: it finds each by both legs, knows its backend and pool, and the
// kernel's entries stay as they are.
func TestAdopt(t *testing.T) {
	k := newKernel(t, 3, 100)
	var own, theirs []*maps.Pair
	for n := range 12 {
		own = append(own, pairOf(n, n%3, n%2 == 0, true))
		theirs = append(theirs, pairOf(100+n, n%3, n%2 == 0, false))
	}
	k.bind(own...)
	k.bind(theirs...)
	// Where the port is ours by its number says nothing.
	number := pairOf(15, 0, false, false)
	number.Client.Src = netip.AddrPortFrom(number.Client.Src.Addr(), 20030)
	number.Down.To.Dst, number.Backend.Dst, number.Up.To.Src = number.Client.Src, number.Client.Src, number.Client.Src
	k.bind(number)
	theirs = append(theirs, number)

	d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
	if got := d.Status(); got.Adopted != 25 || got.Flows != 25 || d.Bound() != 25 || d.Live() != 25 || got.Events["half_flows"] != 0 {
		t.Errorf("%+v, and %d bound, %d live, want 25 adopted", got, d.Bound(), d.Live())
	}
	if n := k.entries(); n != 50 {
		t.Errorf("%d entries are left of 50", n)
	}
	for i, p := range append(own, theirs...) {
		f, w := d.flow(p), d.workers[p.Up.Worker()]
		v := w.flows.wayOf(f)
		pool := "own"
		if i >= len(own) {
			pool = "clients"
		}
		if v.backend.Pool != pool || v.backend.Addr != p.Backend.Src || v.backend.ID == 0 || (v.ports != nil) != (pool == "own") {
			t.Errorf("flow %d: way %+v, backend %+v, want one of %s", i, v, v.backend, pool)
		}
		if want := map[string]time.Duration{"own": 7 * time.Second, "clients": time.Minute}[pool]; v.timeouts.Closing != want {
			t.Errorf("flow %d: timeouts %+v of another pool", i, v.timeouts)
		}
		if f.generation != p.Up.Flow.Generation || f.timer != 0 || f.closing.ended() || !f.hasEntry(w) {
			t.Errorf("flow %d: %+v, has its entry: %v", i, f, f.hasEntry(w))
		}
	}
	if !d.sourceClient.Load() {
		t.Error("at first the kernel is told that no flow has its client's port")
	}
	if n := len(slices.Collect(d.Flows())); n != 25 {
		t.Errorf("%d flows are shown", n)
	}
	for _, w := range d.workers {
		for w.flows.len() > 0 {
			w.flows.at(w.flows.order[0]).remove(w, "idle")
		}
	}
	if n := k.entries(); n != 0 || d.Bound() != 0 {
		t.Errorf("%d entries are left of removed flows, %d bound", n, d.Bound())
	}
}

// TestAdoptUnknownBackend has flows of a backend that the file has no more: they go on, with the file's own timeouts.
func TestAdoptUnknownBackend(t *testing.T) {
	k := newKernel(t, 1, 10)
	p := pairOf(1, 0, false, true)
	k.bind(p)
	d := k.start(firstPlan(t, "listen: \":443\"\ntimeouts: {closing: 9s}\npools: {q: {backends: [\"192.0.2.99:443\"]}}\nroutes: [{sni: a.example.com, pool: q}]\n", Known{}), nil)
	f, w := d.flow(p), d.workers[0]
	if v := w.flows.wayOf(f); v.backend.Pool != "" || v.backend.Addr != p.Backend.Src || v.timeouts.Closing != 9*time.Second || v.ports != nil {
		t.Errorf("way %+v, backend %+v", v, v.backend)
	}
	f.remove(w, "idle")
	if n := k.entries(); n != 0 {
		t.Errorf("%d entries are left", n)
	}
}

// TestAdoptSourceClient has the kernel go on looking for flows with their clients' own ports when no pool has that any more.
func TestAdoptSourceClient(t *testing.T) {
	for _, own := range []bool{true, false} {
		k := newKernel(t, 1, 10)
		k.bind(pairOf(1, 0, false, own))
		k.start(firstPlan(t, "listen: \":443\"\npools: {q: {backends: [\"192.0.2.11:443\"]}}\nroutes: [{sni: a.example.com, pool: q}]\n", Known{}), nil)
		var live maps.Live
		must(t, k.tables.Control.Lookup(uint32(0), &live))
		if got := live.Flags&maps.LiveSourceClient != 0; got == own {
			t.Errorf("a flow with a port of ours: %v; the kernel looks for others: %v", own, got)
		}
	}
}

// TestAdoptHalves removes what is no whole flow, and nothing else.
func TestAdoptHalves(t *testing.T) {
	eachFamily(t, func(t *testing.T, v6 bool) {
		k := newKernel(t, 2, 100)
		whole, both := pairOf(1, 1, v6, true), 2
		k.bind(whole)
		for what, c := range map[string]struct {
			change func(*maps.Pair)
			legs   int
		}{
			"client alone":       {func(p *maps.Pair) { p.Down = nil }, 1},
			"backend alone":      {func(p *maps.Pair) { p.Up = nil }, 1},
			"other generation":   {func(p *maps.Pair) { p.Down.Flow.Generation++ }, both},
			"other worker":       {func(p *maps.Pair) { p.Down.Flow.Control = maps.FlowControl(1, 0, 0) }, both},
			"back to another":    {func(p *maps.Pair) { p.Down.To.Dst = netip.AddrPortFrom(p.Down.To.Dst.Addr(), 9) }, both},
			"to another backend": {func(p *maps.Pair) { p.Up.To.Dst = netip.AddrPortFrom(p.Up.To.Dst.Addr(), 444) }, both},
			"pending": {func(p *maps.Pair) {
				p.Up, p.Down.Flow.Control, p.Down.To = nil, p.Down.Flow.Control|maps.FlowPending, p.Backend
			}, 1},
			"pending with a flow":  {func(p *maps.Pair) { p.Down.Flow.Control |= maps.FlowPending }, both},
			"back to a whole flow": {func(p *maps.Pair) { p.Up, p.Down.To, p.Down.Flow.Generation = nil, whole.Down.To, 1 }, 1},
			"to the whole's":       {func(p *maps.Pair) { p.Down, p.Up.To, p.Up.Flow.Generation = nil, whole.Up.To, 1 }, 1},
		} {
			t.Run(what, func(t *testing.T) {
				k.t = t
				p := pairOf(2, 1, v6, true)
				c.change(p)
				if p.Up != nil {
					must(t, k.tables.InsertFlow(maps.LegClient, p.Client, p.Up))
				}
				if p.Down != nil {
					must(t, k.tables.InsertFlow(maps.LegBackend, p.Backend, p.Down))
				}
				d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
				d.flow(whole)
				if got := d.Status(); got.Flows != 1 || got.Adopted != 1 || int(got.Events["half_flows"]) != c.legs {
					t.Errorf("%d flows, %d adopted, %d halves, want 1, 1, %d", got.Flows, got.Adopted, got.Events["half_flows"], c.legs)
				}
				if n := k.entries(); n != 2 {
					t.Errorf("%d entries are left, want the whole flow's 2", n)
				}
				for w, n := range []int{0, 1} {
					if got := d.workers[w].flows.len(); got != n {
						t.Errorf("worker %d has %d flows, want %d", w, got, n)
					}
				}
			})
		}
	})
}

// TestAdoptWorkers refuses to start when a flow's packets would come to nobody.
func TestAdoptWorkers(t *testing.T) {
	for _, own := range []int{maps.MaxWorkers - 1, 2} {
		k := newKernel(t, 2, 10)
		p := pairOf(1, own, false, true)
		p.Down.Flow.Control = maps.FlowControl(1, 0, own&1) // which would be half a flow
		k.bind(p)
		_, err := k.try(firstPlan(t, kernelRoutes, Known{}), nil)
		if err == nil || !strings.Contains(err.Error(), "number of workers differs") {
			t.Errorf("a flow of worker %d of 2: %v", own, err)
		}
		if n := k.entries(); n != 2 {
			t.Errorf("%d entries are left of 2", n)
		}
	}
}

// TestAdoptEnds has an earlier daemon hear the ends of flows: they time out all the same.
func TestAdoptEnds(t *testing.T) {
	k := newKernel(t, 1, 100)
	const fin, rst = maps.FlowFIN, maps.FlowRST
	for name, c := range map[string]struct {
		up, down uint32
		silent   time.Duration // both sides, at the review
		reason   string
		rests    bool
	}{
		"client's FIN":         {fin, 0, 8 * time.Second, "closing_timeout", false},
		"backend's FIN":        {0, fin, 8 * time.Second, "closing_timeout", true},
		"both":                 {fin, fin, 8 * time.Second, "closing_timeout", true},
		"both, not yet silent": {fin, fin, 6 * time.Second, "", false},
		"client's RST":         {rst, 0, 8 * time.Second, "reset", false},
		"backend's RST":        {0, rst, 8 * time.Second, "reset", true},
		"RST, alive":           {rst, 0, 0, "", false},
		"none":                 {0, 0, 8 * time.Second, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			k.t = t
			p := pairOf(1, 0, false, true)
			p.Up.Flow.Control |= c.up
			p.Down.Flow.Control |= c.down
			k.bind(p)
			d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
			f, w := d.flow(p), d.workers[0]
			if ended := c.up|c.down != 0; f.closing.ended() != ended || (f.timer != 0) != ended {
				t.Errorf("it has ended: %v, timer %d", f.closing.ended(), f.timer)
			}
			ports := w.flows.wayOf(f).ports
			// From when the flow was last seen, which was just before.
			w.now = d.clock.now() + int64(c.silent)
			w.review([]*flow{f})
			left := 2
			if c.reason != "" {
				left = 0
			}
			if n := k.entries(); n != left || int(w.stats.closed[c.reason]) != 1-left/2 {
				t.Errorf("%d entries, closed %v, want %q", n, w.stats.closed, c.reason)
			}
			if rests := ports.resting.len() == 1; rests != c.rests {
				t.Errorf("the port rests: %v, want %v", rests, c.rests)
			}
			must(t, k.tables.DeleteFlow(maps.LegClient, p.Client))
			must(t, k.tables.DeleteFlow(maps.LegBackend, p.Backend))
		})
	}
}

// TestUnheardQuiet has flows close while nobody hears it: who repeats nothing for long has closed, and nobody is reset. Where one
// FIN is missing, or the pool gives less time, it is a timeout.
func TestUnheardQuiet(t *testing.T) {
	k := newKernel(t, 1, 100)
	const fin = maps.FlowFIN
	for name, c := range map[string]struct {
		up, down uint32
		own      bool // with a closing timeout of 7 s, not a minute
		silent   time.Duration
		reason   string
	}{
		"not yet":              {fin, fin, false, unheardQuiet - 100*time.Millisecond, ""},
		"both":                 {fin, fin, false, unheardQuiet + 100*time.Millisecond, "closed"},
		"both, less time":      {fin, fin, true, 8 * time.Second, "closing_timeout"},
		"one":                  {fin, 0, false, unheardQuiet + 100*time.Millisecond, ""},
		"one, for a long time": {0, fin, false, 61 * time.Second, "closing_timeout"},
	} {
		for _, when := range []string{"before the start", "after it"} {
			t.Run(name+", "+when, func(t *testing.T) {
				k.t = t
				p := pairOf(1, 0, false, c.own)
				mark := func() {
					p.Up.Flow.Control |= c.up
					p.Down.Flow.Control |= c.down
				}
				if when == "before the start" {
					mark()
				}
				k.bind(p)
				d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
				mark()
				f, w := d.flow(p), d.workers[0]
				w.now = d.clock.now() + int64(c.silent)
				p.Up.Flow.LastSeen, p.Down.Flow.LastSeen = uint32((w.now-int64(c.silent))>>20), uint32((w.now-int64(c.silent))>>20)
				reason := f.judge(w, p.Up, p.Down)
				sent, _ := d.segments(0)
				if resets := map[string]int{"closing_timeout": 2}[c.reason]; reason != c.reason || len(sent) != resets {
					t.Errorf("%q, and sent %+v, want %q with %d resets", reason, sent, c.reason, resets)
				}
				f.remove(w, "idle")
			})
		}
	}
}

// TestAdoptReset has a RST of an earlier daemon's time be in an entry: it may have been forged, and its sender be alive and silent for a
// while, so the flow has the pool's closing timeout, a minute here. With a FIN, or a RST of now, it is as ever.
func TestAdoptReset(t *testing.T) {
	k := newKernel(t, 1, 100)
	const rst, fin = maps.FlowRST, maps.FlowFIN
	for name, c := range map[string]struct {
		up, down uint32
		again    bool
		silent   time.Duration
		reason   string
	}{
		"silent":            {rst, 0, false, 50 * time.Second, ""},
		"silent for long":   {rst, 0, false, 61 * time.Second, "reset"},
		"backend's":         {0, rst, false, 50 * time.Second, ""},
		"with a FIN":        {rst | fin, 0, false, resetQuiet + time.Second, "reset"},
		"the other's FIN":   {rst, fin, false, resetQuiet + time.Second, "reset"},
		"another since":     {rst, 0, true, resetQuiet + time.Second, "reset"},
		"not long since it": {rst, 0, true, resetQuiet - time.Second, ""},
	} {
		t.Run(name, func(t *testing.T) {
			k.t = t
			p := pairOf(1, 0, false, false)
			p.Up.Flow.Control |= c.up
			p.Down.Flow.Control |= c.down
			k.bind(p)
			d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
			f, w := d.flow(p), d.workers[0]
			if c.again {
				w.closingSegment(maps.LegClient, &packet.Segment{Src: p.Client.Src, Dst: p.Client.Dst, Flags: packet.RST})
			}
			seen := uint32(w.now >> 20)
			p.Up.Flow.LastSeen, p.Down.Flow.LastSeen = seen, seen
			w.now += int64(c.silent)
			if reason := f.judge(w, p.Up, p.Down); reason != c.reason {
				t.Errorf("%q, want %q", reason, c.reason)
			}
			f.remove(w, "idle")
		})
	}
}

// TestAdoptManyEnds has many flows be over when a daemon comes: others get the worker's lock in between, and what is due is not all due at
// once.
func TestAdoptManyEnds(t *testing.T) {
	const flows = 3*maps.FlowJobs + 1
	k := newKernel(t, 1, flows)
	for n := range flows {
		p := pairOf(n, 0, false, true)
		local := netip.AddrPortFrom(p.Up.To.Src.Addr(), uint16(30000+n))
		p.Backend.Dst, p.Up.To.Src = local, local
		p.Up.Flow.Control |= maps.FlowRST
		k.bind(p)
	}
	d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
	w := d.workers[0]
	ticks := make(map[int64]int)
	for _, n := range w.flows.order {
		at := w.flowTimers.all[w.flows.at(n).timer].at
		if late := time.Duration(at - d.clock.now()); late > 7*time.Second+settleSpread {
			t.Errorf("flow %d waits %v", n, late)
		}
		ticks[at>>tickShift]++
	}
	for _, n := range ticks {
		if n > maps.FlowJobs/8 {
			t.Errorf("%d flows of %d are due in one tick", n, flows)
		}
	}
	w.now = d.clock.now() + int64(time.Minute)
	for lots, more := 1, true; more; lots++ {
		more = w.runTimers()
		if gone, want := flows-w.flows.len(), min(lots*maps.FlowJobs, flows); gone != want {
			t.Fatalf("%d flows were removed in %d lots, want %d", gone, lots, want)
		}
	}
	if w.flows.len() != 0 || k.entries() != 0 {
		t.Errorf("%d flows, %d entries are left", w.flows.len(), k.entries())
	}
}

// TestAdoptEndsHeard has the events of both FINs still be in the ring when the daemon that should have read them dies: the flow ends
// as if nothing had happened.
func TestAdoptEndsHeard(t *testing.T) {
	k := newKernel(t, 1, 100)
	p := pairOf(1, 0, false, true)
	p.Up.Flow.Control |= maps.FlowFIN
	p.Down.Flow.Control |= maps.FlowFIN
	p.Up.Flow.LastAck, p.Down.Flow.LastAck = 900, 800
	k.bind(p)
	d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
	w := d.workers[0]
	w.closingSegment(maps.LegClient, &packet.Segment{Src: p.Client.Src, Dst: p.Client.Dst, Seq: 799, Flags: packet.FIN})
	w.closingSegment(maps.LegBackend, &packet.Segment{Src: p.Backend.Src, Dst: p.Backend.Dst, Seq: 899, Flags: packet.FIN})
	w.now += int64(closedQuiet) + int64(50*time.Millisecond)
	w.review([]*flow{d.flow(p)})
	if w.stats.closed["closed"] != 1 {
		t.Errorf("closed: %v", w.stats.closed)
	}
}

// TestAdoptUnconfirmed gives clients that have not acknowledged anything as long as others.
func TestAdoptUnconfirmed(t *testing.T) {
	k := newKernel(t, 1, 100)
	p := pairOf(1, 0, false, true)
	p.Up.Flow.Control &^= maps.FlowConfirmed
	k.bind(p)
	d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
	f, w := d.flow(p), d.workers[0]
	started := w.now
	for _, c := range []struct {
		after time.Duration
		gone  uint64
	}{{19 * time.Second, 0}, {21 * time.Second, 1}} {
		w.now = started + int64(c.after)
		if f.timer == 0 {
			t.Fatal("no timer runs")
		}
		w.runTimers()
		if n := w.stats.closed["unconfirmed"]; n != c.gone {
			t.Errorf("after %v %d are gone, want %d", c.after, n, c.gone)
		}
	}
}

// TestAdoptGeneration has new flows never be taken for those that are there.
func TestAdoptGeneration(t *testing.T) {
	for name, c := range map[string]struct {
		used []uint16
		next uint16
	}{
		"none":      {nil, 1},
		"a few":     {[]uint16{3, 9, 4}, 10},
		"wrapped":   {[]uint16{65534, 65535, 0, 1, 2}, 3},
		"to an end": {[]uint16{60000, 65535}, 0},
	} {
		k := newKernel(t, 2, 100)
		for n, g := range c.used {
			p := pairOf(n, 1, false, true)
			p.Up.Flow.Generation, p.Down.Flow.Generation = g, g
			k.bind(p)
		}
		d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
		if got := d.workers[1].generation + 1; got != c.next {
			t.Errorf("%s: the next flow's generation is %d, want %d", name, got, c.next)
		}
		if got := d.workers[0].generation; got != 0 {
			t.Errorf("%s: another worker's is %d", name, got)
		}
	}
	var all bitset
	for g := range 1 << 16 {
		if g != 777 {
			all.set(g)
		}
	}
	if got := lastGeneration(all); got != 776 {
		t.Errorf("of one that is free the one before is %d", got)
	}
}

// TestAdoptPorts hands out every port but those of flows that are there, each once, and these when the flows have ended.
func TestAdoptPorts(t *testing.T) {
	k := newKernel(t, 2, 100)
	var pairs []*maps.Pair
	for n := range 10 {
		pairs = append(pairs, pairOf(n, 1, false, true))
	}
	k.bind(pairs...)
	d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
	w := d.workers[1]
	p := w.flows.wayOf(d.flow(pairs[0])).ports
	if p.unused() != 40 || p.scarce() {
		t.Errorf("%d ports are unused of 50, 10 of which flows have; scarce: %v", p.unused(), p.scarce())
	}
	key := pathKey{pairs[0].Up.To.Src.Addr(), pairs[0].Up.To.Dst, 0, 0}
	if w.portsTo(key) != p {
		t.Error("a new connection takes its port elsewhere")
	}
	speaks := func(port uint16) bool {
		return w.speaks(key.backend, netip.AddrPortFrom(key.source, port))
	}
	seen := make(map[uint16]bool)
	take := func() uint16 {
		port, ok := p.take(w.now, func(port uint16) bool {
			if speaks(port) {
				t.Errorf("port %d came up, which a flow has", port)
			}
			return false
		})
		if ok && (seen[port] || port%2 != 1) {
			t.Errorf("port %d was handed out before, or is another worker's", port)
		}
		seen[port] = ok
		return port
	}
	for range 20 {
		take()
	}
	// Some end while their ports are still ahead, and some behind.
	for _, one := range pairs {
		d.flow(one).remove(w, "idle")
	}
	for range 30 {
		take()
	}
	if _, ok := p.take(w.now, unused); ok || len(seen) != 50 {
		t.Errorf("%d ports of 50 were handed out", len(seen))
	}
	if p.adopted != nil || p.unused() != 0 {
		t.Errorf("%d are unused, marks %v are left", p.unused(), p.adopted)
	}
}

// TestPortsBegin has each daemon begin at another port than the last one.
func TestPortsBegin(t *testing.T) {
	d := newDesk(t, "")
	first := make(map[uint16]bool)
	for n := range 64 {
		key := pathKey{source: netip.MustParseAddr("192.0.2.1"), backend: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.11"), uint16(n))}
		port, ok := d.portsTo(key).take(0, unused)
		if first[port] = ok; !ok {
			t.Fatal("no port")
		}
	}
	if len(first) < 2 {
		t.Errorf("all begin at %v", first)
	}
}

// TestAdoptLate has a client's hello come, late or again, whose flow an earlier daemon bound and whose cookie is not known. What the
// kernel says is what counts.
func TestAdoptLate(t *testing.T) {
	eachFamily(t, func(t *testing.T, v6 bool) {
		k := newKernel(t, 1, 100)
		p := pairOf(1, 0, v6, true)
		k.bind(p)
		d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
		w := d.workers[0]
		hello := clientHello(t)
		s := packet.Segment{Src: p.Client.Src, Dst: p.Client.Dst, Seq: 1001, Ack: 5001, Flags: packet.ACK | packet.PSH, Payload: hello}
		again := s
		d.hears(&again)
		sent, requests := d.segments(0)
		if len(w.handshakes) != 0 || k.entries() != 2 || d.Bound() != 1 {
			t.Fatalf("the flow is cut: %d handshakes, %d entries", len(w.handshakes), k.entries())
		}
		var payload []byte
		for i, one := range sent {
			if requests[i] != maps.TapReplayClient || len(one.Payload) > int(smallestSegment(!v6)) {
				t.Errorf("frame %d asks for %d, has %d bytes", i, requests[i], len(one.Payload))
			}
			payload = append(payload, one.Payload...)
		}
		if string(payload) != string(hello) {
			t.Errorf("%d bytes of %d are handed to the kernel", len(payload), len(hello))
		}
		// The same from a new connection: a SYN has removed the client's entry.
		must(t, k.tables.DeleteFlow(maps.LegClient, p.Client))
		again = s
		d.hears(&again)
		if len(w.handshakes) != 1 || k.entries() != 0 || d.Bound() != 0 || w.stats.closed["replaced"] != 1 {
			t.Errorf("%d handshakes, %d entries, %d bound, closed %v", len(w.handshakes), k.entries(), d.Bound(), w.stats.closed)
		}
	})
}

// TestAdoptUnknownBackendSide has backends repeat a SYN-ACK to, or wait behind a PROXY header for, a daemon that is no more: they are reset,
// also when it was a while without one.
func TestAdoptUnknownBackendSide(t *testing.T) {
	eachFamily(t, func(t *testing.T, v6 bool) {
		k := newKernel(t, 1, 100)
		p, other := pairOf(1, 0, v6, true), pairOf(2, 0, v6, true)
		k.bind(p)
		d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
		w := d.workers[0]
		for what, s := range map[string]packet.Segment{
			"SYN-ACK":               {Seq: 9000, Ack: 1234, Flags: packet.SYN | packet.ACK},
			"ACK of a PROXY header": {Seq: 9001, Ack: 1334, Flags: packet.ACK},
		} {
			s.Src, s.Dst = other.Backend.Src, other.Backend.Dst
			for age, c := range map[string]struct {
				at   int64
				sent int
			}{
				"fresh":                {w.now, 1},
				"from before, stale":   {d.started - 1, 1},
				"stale by our own lag": {d.started + 1, 0},
			} {
				w.now = d.started + 2*int64(staleAfter)
				if age == "fresh" {
					w.now = c.at
				}
				w.event(eventOf(t, maps.EventBackend, c.at, &s))
				sent, _ := d.segments(0)
				if len(sent) != c.sent || c.sent == 1 && (sent[0].Flags != packet.RST || sent[0].Seq != s.Ack || sent[0].Dst != s.Src) {
					t.Errorf("%s, %s: answered by %+v", what, age, sent)
				}
			}
			s.Src, s.Dst = p.Backend.Src, p.Backend.Dst
			w.now = d.started + 2*int64(staleAfter)
			w.event(eventOf(t, maps.EventBackend, d.started-1, &s))
			if sent, _ := d.segments(0); len(sent) != 0 {
				t.Errorf("%s: a flow's backend is answered by %+v", what, sent)
			}
		}
	})
}

// TestLongAdoption has a backend wait behind a PROXY header while a daemon starts, which takes long: it is reset as one from before.
func TestLongAdoption(t *testing.T) {
	k := newKernel(t, 1, 10)
	main, quiet := ringbuftest.New(t, 0), ringbuftest.New(t, 0)
	d, err := k.try(firstPlan(t, kernelRoutes, Known{}), func(o *Options) {
		o.Rings, o.QuietRings = []*ebpf.Map{main.Ring}, []*ebpf.Map{quiet.Ring}
	})
	must(t, err)
	p := pairOf(1, 0, false, true)
	record := eventOf(t, maps.EventBackend, d.clock.now(), &packet.Segment{Src: p.Backend.Src, Dst: p.Backend.Dst, Seq: 9001, Ack: 1334, Flags: packet.ACK})
	if !main.Put(record) {
		t.Fatal("no event in the ring")
	}
	d.clock.base += int64(time.Minute) // that it takes
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- d.Run(ctx) }()
	for limit := time.Now().Add(time.Minute); d.Status().Events["stale"] == 0 && time.Now().Before(limit); {
		time.Sleep(time.Millisecond)
	}
	cancel()
	must(t, <-ended)
	if sent, _ := d.segments(0); len(sent) != 1 || sent[0].Flags != packet.RST || sent[0].Dst != p.Backend.Src {
		t.Errorf("answered by %+v", sent)
	}
}
