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
			if d.wantLast("half a hello", packet.ACK, uint32(1001+half)); len(owned) != 1 || owned[want] != 5000 {
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

// TestOrphans resets who gave an earlier daemon bytes and has no flow, and forgets all.
func TestOrphans(t *testing.T) {
	eachFamily(t, func(t *testing.T, v6 bool) {
		k := newKernel(t, 2, 100)
		bound, lost, half := pairOf(1, 1, v6, true), pairOf(2, 0, v6, true), pairOf(3, 1, v6, true)
		k.bind(bound)
		must(t, k.tables.InsertFlow(maps.LegClient, half.Client, half.Up))
		for i, p := range []*maps.Pair{bound, lost, half} {
			must(t, k.tables.OwnHello(p.Client, uint32(0xfffffffe+i))) // over the wrap
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
		must(t, k.tables.OwnedHellos(func(c maps.Tuple, _ uint32) { t.Errorf("%v is still noted", c) }))
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
		must(t, k.tables.OwnHello(pairOf(n, 0, false, true).Client, 1))
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
