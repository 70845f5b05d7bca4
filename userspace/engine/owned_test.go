// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"snilb/maps"
	"snilb/userspace/packet"
)

// TestOwned has a connection be noted from the first byte that is acknowledged on, and no longer than it is the engine's.
func TestOwned(t *testing.T) {
	for name, tc := range map[string]struct {
		site string
		end  func(d *desk, c client, half int, rest []byte)
	}{
		"refused":  {"nobody.example.com", func(d *desk, c client, half int, rest []byte) { d.sends(c, 1+half, rest, packet.PSH) }},
		"reset":    {"a.example.com", func(d *desk, c client, half int, _ []byte) { d.sends(c, 1+half, nil, packet.RST) }},
		"closed":   {"a.example.com", func(d *desk, c client, half int, _ []byte) { d.sends(c, 1+half, nil, packet.FIN) }},
		"too slow": {"a.example.com", func(d *desk, _ client, _ int, _ []byte) { d.passes(time.Minute) }},
		"bound": {"a.example.com", func(d *desk, c client, half int, rest []byte) {
			d.sends(c, 1+half, rest, packet.PSH)
			if len(d.e.owned.(noted)) != 1 {
				d.t.Error("forgotten before the bind")
			}
			d.handshake(c).settle(d.worker)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			d, c := newDesk(t, ""), newClient(1)
			owned, hello := d.e.owned.(noted), helloOf(tc.site)
			half := len(hello) / 2
			d.sends(c, 1, hello[:half], packet.PSH)
			if len(owned) != 0 {
				t.Error("noted before anything is acknowledged")
			}
			d.passes(2 * ackAfter)
			want := maps.Tuple{Src: c.addr, Dst: netip.MustParseAddrPort("203.0.113.1:443")}
			if d.wantLast("half a hello", packet.ACK, uint32(1001+half)); len(owned) != 1 || owned[want] != (maps.OwnedHello{Cookie: 5000, Acknowledged: true}) {
				t.Errorf("noted %v, want %v with 5000", owned, want)
			}
			tc.end(d, c, half, hello[half:])
			if len(owned) != 0 {
				t.Errorf("still noted: %v", owned)
			}
		})
	}
}

// TestOwnedByte has a lone byte, which may be a probe, be acknowledged: from then on it is the engine's too.
func TestOwnedByte(t *testing.T) {
	d, c := newDesk(t, ""), newClient(1)
	d.sends(c, 1, []byte{0}, 0)
	d.passes(loneByteAfter + time.Millisecond*10)
	if d.wantLast("a byte", packet.ACK, 1002); len(d.e.owned.(noted)) != 1 {
		t.Error("not noted")
	}
}

// TestOwnedNothing: a hello in one piece is never acknowledged by the engine, and costs no system call.
func TestOwnedNothing(t *testing.T) {
	d, c := newDesk(t, ""), newClient(1)
	d.e.owned = nil
	d.sends(c, 1, clientHello(t), packet.PSH)
	d.handshake(c).settle(d.worker)
}

const proxiedRoutes = `
listen: ":443"
pools:
  p: {backends: ["192.0.2.11:443"], proxy_protocol: v2}
routes: [{sni: a.example.com, pool: p}]
`

// pushes is as if the backend of a client's connection had answered the SYN: it gets bytes.
func (d *desk) pushes(c client) *handshake {
	d.t.Helper()
	h := d.handshake(c)
	a := &h.attempt
	a.peer, a.ack = packet.Segment{Seq: 9000, Options: packet.Options{MSS: 1460}}, a.isn+1
	h.phase = pushing
	if !h.mustPush() {
		d.t.Fatal("there is nothing to push")
	}
	h.push(d.worker)
	return h
}

// TestOwnedPush has a backend be noted before it gets bytes that the client does not send, with the number behind what it got.
func TestOwnedPush(t *testing.T) {
	for _, pieces := range []bool{false, true} {
		d, c, hello := newDeskOf(t, proxiedRoutes), newClient(1), clientHello(t)
		owned := d.e.owned.(noted)
		end := func() uint32 {
			s := d.last()
			return s.End()
		}
		if pieces {
			d.sends(c, 1, hello[:100], packet.PSH)
			d.passes(2 * ackAfter)
			d.sends(c, 101, hello[100:], packet.PSH)
		} else {
			d.sends(c, 1, hello, packet.PSH)
		}
		h := d.pushes(c)
		want := maps.OwnedHello{Cookie: 5000, Acknowledged: pieces, Backend: h.attempt.tuple(), PushedTo: end()}
		if got := owned[h.clientTuple()]; got != want {
			t.Errorf("in pieces %v: noted %+v, want %+v", pieces, got, want)
		}
		d.sends(c, 1+len(hello), []byte("more"), packet.PSH)
		h.push(d.worker)
		want.PushedTo = end()
		if got := owned[h.clientTuple()]; got != want {
			t.Errorf("in pieces %v, then more: noted %+v, want %+v", pieces, got, want)
		}
		if h.settle(d.worker); len(owned) != 0 {
			t.Errorf("still noted: %v", owned)
		}
	}
}

// TestOrphanBackends resets backends that an earlier daemon pushed bytes to, and their clients only if these wait too.
func TestOrphanBackends(t *testing.T) {
	eachFamily(t, func(t *testing.T, v6 bool) {
		k := newKernel(t, 1, 100)
		bound, both, backend, reused := pairOf(1, 0, v6, true), pairOf(2, 0, v6, true), pairOf(3, 0, v6, true), pairOf(4, 0, v6, true)
		k.bind(bound)
		for _, p := range []*maps.Pair{bound, both} {
			must(t, k.tables.OwnHello(p.Client, &maps.OwnedHello{Cookie: 7, Acknowledged: true, Backend: p.Backend, PushedTo: 100}))
		}
		must(t, k.tables.OwnHello(backend.Client, &maps.OwnedHello{Cookie: 7, Backend: backend.Backend, PushedTo: 101}))
		must(t, k.tables.OwnHello(reused.Client, &maps.OwnedHello{Cookie: 7, Backend: bound.Backend, PushedTo: 102}))
		d, err := k.try(firstPlan(t, kernelRoutes, Known{}), nil)
		must(t, err)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		must(t, d.Run(ctx))
		want := map[maps.Tuple]uint32{both.Client: 8, both.Backend: 100, backend.Backend: 101}
		sent, _ := d.segments(0)
		for _, s := range sent {
			to := maps.Tuple{Src: s.Dst, Dst: s.Src}
			if seq, ok := want[to]; !ok || s.Seq != seq || s.Flags != packet.RST {
				t.Errorf("sent %+v", s)
			}
			delete(want, to)
		}
		if got := d.Status().Hellos["orphaned"]; len(want) != 0 || got != 1 {
			t.Errorf("%v are not reset, %d counted, want 1", want, got)
		}
		must(t, k.tables.OwnedHellos(func(c maps.Tuple, _ maps.OwnedHello) { t.Errorf("%v is still noted", c) }))
	})
}

// TestOrphans resets who gave an earlier daemon bytes and has no flow, and forgets all.
func TestOrphans(t *testing.T) {
	eachFamily(t, func(t *testing.T, v6 bool) {
		k := newKernel(t, 2, 100)
		bound, lost, half := pairOf(1, 1, v6, true), pairOf(2, 0, v6, true), pairOf(3, 1, v6, true)
		k.bind(bound)
		must(t, k.tables.InsertFlow(maps.LegClient, half.Client, half.Up))
		for i, p := range []*maps.Pair{bound, lost, half} {
			must(t, k.tables.OwnHello(p.Client, &maps.OwnedHello{Cookie: uint32(0xfffffffe + i), Acknowledged: true})) // over the wrap
		}
		d, err := k.try(firstPlan(t, kernelRoutes, Known{}), nil)
		must(t, err)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		must(t, d.Run(ctx))
		sent, requests := d.segments(0)
		want := map[netip.AddrPort]uint32{lost.Client.Src: 0, half.Client.Src: 1}
		for i, s := range sent {
			seq, ok := want[s.Dst]
			if !ok || s.Seq != seq || s.Flags != packet.RST || s.Src != lost.Client.Dst || requests[i] != maps.TapOutput {
				t.Errorf("sent %+v", s)
			}
		}
		if got := d.Status().Hellos["orphaned"]; len(sent) != 2 || got != 2 {
			t.Errorf("%d resets, %d counted, want 2", len(sent), got)
		}
		must(t, k.tables.OwnedHellos(func(c maps.Tuple, _ maps.OwnedHello) { t.Errorf("%v is still noted", c) }))
		d.flow(bound)
	})
}

// stubborn keeps its notes.
type stubborn struct{ noted }

func (stubborn) DisownHello(maps.Tuple) error { return errors.New("no way") }

// TestOrphansStay goes on when a note cannot be removed: all the flows hang on this daemon.
func TestOrphansStay(t *testing.T) {
	k := newKernel(t, 2, 100)
	const lost = burst + 5
	for n := range lost {
		must(t, k.tables.OwnHello(pairOf(n, 0, false, true).Client, &maps.OwnedHello{Acknowledged: true}))
	}
	d, err := k.try(firstPlan(t, kernelRoutes, Known{}), nil)
	must(t, err)
	d.owned = stubborn{}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	var api sync.WaitGroup
	ran := make(chan struct{})
	api.Go(func() { // asks at any time: the race detector looks
		for {
			select {
			case <-ran:
				return
			default:
				d.Status()
			}
		}
	})
	err = d.Run(ctx)
	close(ran)
	api.Wait()
	must(t, err)
	if sent, _ := d.segments(0); len(sent) != lost {
		t.Errorf("%d resets, want %d", len(sent), lost)
	}
	if !strings.Contains(d.log.String(), "is still noted") {
		t.Errorf("the log does not say it: %s", d.log)
	}
}

// TestOwnedFails goes on when there is no room for the note.
func TestOwnedFails(t *testing.T) {
	d, c := newDesk(t, ""), newClient(1)
	d.e.owned = full{}
	hello := clientHello(t)
	d.sends(c, 1, hello[:100], packet.PSH)
	d.passes(2 * ackAfter)
	d.wantLast("half a hello", packet.ACK, 1101)
	d.sends(c, 101, hello[100:], packet.PSH)
	if h := d.handshake(c); h == nil || h.phase != connecting {
		t.Error("the hello is not decided")
	}
	d.wantLog("is not noted")
}
