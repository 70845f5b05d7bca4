// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"snilb/maps"
	"snilb/userspace/packet"
	"snilb/userspace/ringbuf"
	"snilb/userspace/ringbuf/ringbuftest"
)

// TestQuiesce forgets whom nobody has answered, finishes the others, and begins nothing.
func TestQuiesce(t *testing.T) {
	d := newDesk(t, "")
	fresh, owned, going, late := newClient(1), newClient(2), newClient(3), newClient(4)
	hello := clientHello(t)
	d.sends(owned, 1, hello[:100], packet.PSH)
	d.passes(2 * ackAfter)
	d.sends(fresh, 1, hello[:100], packet.PSH)
	d.sends(going, 1, hello, packet.PSH)
	d.out = nil
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := d.e.Quiesce(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("with two connections being set up: %v", err)
	}
	if d.handshake(fresh) != nil || d.handshake(owned) == nil || d.handshake(going) == nil {
		t.Errorf("the fresh, the acknowledged and the connecting one are %v, %v, %v", d.handshake(fresh), d.handshake(owned), d.handshake(going))
	}
	if len(d.out) != 0 {
		t.Error("somebody was told something")
	}
	d.sends(late, 1, hello, packet.PSH)
	d.sends(fresh, 101, hello[100:], packet.PSH)
	if len(d.handshakes) != 2 || len(d.out) != 0 {
		t.Error("a connection is begun, or answered")
	}
	d.sends(owned, 101, hello[100:], packet.PSH)
	for _, c := range []client{owned, going} {
		if h := d.handshake(c); h == nil || h.phase != connecting {
			t.Fatal("a connection does not go on")
		}
		d.handshake(c).settle(d.worker)
	}
	must(t, d.e.Quiesce(ctx))
	if d.e.Bound() != 2 {
		t.Errorf("%d are bound, want 2", d.e.Bound())
	}
}

// TestQuiesceAbandons has time run out while a backend has bytes, and would wait for the client: it is told. A client whose
// bytes only the engine has is left to the next daemon.
func TestQuiesceAbandons(t *testing.T) {
	d := newDeskOf(t, proxiedRoutes)
	whole, pieces, hello := newClient(1), newClient(2), clientHello(t)
	d.sends(whole, 1, hello, packet.PSH)
	d.pushes(whole)
	d.sends(pieces, 1, hello[:100], packet.PSH)
	d.passes(2 * ackAfter)
	d.sends(pieces, 101, hello[100:], packet.PSH)
	d.pushes(pieces)
	d.out = nil
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := d.e.Quiesce(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("with two connections being set up: %v", err)
	}
	for _, frame := range d.out {
		s, err := packet.Parse(frame[14:])
		must(t, err)
		if s.Flags != packet.RST|packet.ACK || s.Dst.String() != "192.0.2.11:443" {
			t.Errorf("sent %+v", s)
		}
	}
	if len(d.out) != 2 || len(d.handshakes) != 0 || len(d.leases) != 0 {
		t.Errorf("%d resets, %d handshakes and %d ports are left", len(d.out), len(d.handshakes), len(d.leases))
	}
	for c, note := range d.e.owned.(noted) {
		if c.Src != pieces.addr || !note.Acknowledged {
			t.Errorf("noted %v %+v", c, note)
		}
	}
	if n := len(d.e.owned.(noted)); n != 1 {
		t.Errorf("%d are noted, want the one whose client must be told", n)
	}
	d.passes(time.Minute)
}

// TestQuiesceLeavesRings has what comes while there is nothing to finish wait for the next daemon.
func TestQuiesceLeavesRings(t *testing.T) {
	k := newKernel(t, 1, 10)
	hellos, ends := ringbuftest.New(t, 0), ringbuftest.New(t, 0)
	d, err := k.try(firstPlan(t, kernelRoutes, Known{}), func(o *Options) {
		o.Rings, o.QuietRings = []*ebpf.Map{hellos.Ring}, []*ebpf.Map{ends.Ring}
	})
	must(t, err)
	must(t, d.Quiesce(context.Background()))
	p := pairOf(1, 0, false, true)
	s := packet.Segment{Src: p.Client.Src, Dst: p.Client.Dst, Seq: 1, Ack: 2, Flags: packet.ACK, Payload: []byte{22, 3, 1}}
	record := eventOf(t, maps.EventHello, d.clock.now(), &s)
	if !hellos.Put(record) || !ends.Put(record) {
		t.Fatal("no event in the ring")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_ = d.Run(ctx)
	for what, ring := range map[string]*ebpf.Map{"hello": hellos.Ring, "end": ends.Ring} {
		r, err := ringbuf.NewReader(ring)
		must(t, err)
		if !r.HasData() {
			t.Errorf("the %s was taken, which the next daemon would have read", what)
		}
		must(t, r.Close())
	}
}

// TestQuiesceBeats has a worker that leaves its rings alone not be taken for one that is stuck.
func TestQuiesceBeats(t *testing.T) {
	d := newPulseDesk(t)
	must(t, d.e.Quiesce(context.Background()))
	for range 2 { // the first may have been under way
		d.turn()
	}
	if !d.beats(2) {
		t.Error("the heart stops")
	}
}
