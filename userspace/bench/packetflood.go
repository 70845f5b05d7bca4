// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"sync/atomic"
	"time"

	"snilb/userspace/packet"
)

// FloodOptions describes packets that belong to no connection.
type FloodOptions struct {
	Target    netip.AddrPort
	Interface string
	Sources   netip.Prefix // as in PacketOptions; addresses and ports are drawn from it at random
	// Kind is what they are: "syn", "ack" (an acknowledgment of a SYN-ACK that never was, as one who guesses cookies sends) or
	// "data" (the same with a payload that looks like the begin of a hello), or "mixed": these in turn.
	Kind     string
	Rate     float64 // packets a second; 0: as fast as it goes
	Duration time.Duration
	Progress func(Second)
	XDP      bool // as in PacketOptions
}

// FloodKinds are the kinds.
var FloodKinds = []string{"syn", "ack", "data", "mixed"}

// Flood sends packets and looks at no answer, nor does this host's kernel. Attempts in the result are packets sent.
func Flood(ctx context.Context, o FloodOptions) (*Result, error) {
	o.Target = netip.AddrPortFrom(o.Target.Addr().Unmap(), o.Target.Port())
	if !o.Target.IsValid() || o.Target.Port() == 0 || o.Duration <= 0 || o.Rate < 0 {
		return nil, errors.New("a flood needs a target, a duration and no rate below 0")
	}
	shapes, ok := floodShapes[o.Kind]
	if !ok {
		return nil, fmt.Errorf("no flood of kind %q: one of %v", o.Kind, FloodKinds)
	}
	way, err := openWay(ctx, o.Target, PacketOptions{Interface: o.Interface, Sources: o.Sources, XDP: o.XDP})
	if err != nil {
		return nil, err
	}
	defer way.close()
	rec, clock := newRecorder(), newClock()
	f := &flood{way: way, target: o.Target, rate: o.Rate, shapes: shapes, tally: rec.part(0)}
	return measure(ctx, rec, 0, o.Duration, o.Progress,
		func(stop *atomic.Bool) error { return f.run(clock, stop) },
		func() *Result {
			r := rec.result("flood", "packets", o.Target)
			r.Offered = o.Rate
			return r
		})
}

// The packets, before numbers and addresses are drawn.
var (
	floodSYN = packet.Segment{Flags: packet.SYN, Window: fullWindow, Options: packet.Options{
		MSS: 1460, SACKPermitted: true, HasTimestamps: true, HasWScale: true, WScale: windowScale,
	}}
	floodACK  = packet.Segment{Flags: packet.ACK, Window: fullWindow >> windowScale, Options: packet.Options{HasTimestamps: true}}
	floodData = packet.Segment{Flags: packet.ACK | packet.PSH, Window: fullWindow >> windowScale,
		Options: packet.Options{HasTimestamps: true}, Payload: []byte{22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}}
)

// floodShapes are those of a kind, sent in turn.
var floodShapes = map[string][]packet.Segment{
	"syn": {floodSYN}, "ack": {floodACK}, "data": {floodData}, "mixed": {floodSYN, floodACK, floodData},
}

// floodTurn is how many packets are sent at once.
const floodTurn = xdpBatch

type flood struct {
	way    *way
	target netip.AddrPort
	rate   float64
	shapes []packet.Segment
	next   int // of the shapes
	tally  *tally
}

func (f *flood) run(clock clock, stop *atomic.Bool) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	random := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	begun := clock.now()
	for sent := float64(0); !stop.Load(); {
		now, batch := clock.now(), float64(floodTurn)
		if f.rate > 0 {
			batch = min(batch, float64(now-begun)/1e9*f.rate-sent)
			if batch < 1 {
				time.Sleep(100 * time.Microsecond)
				continue
			}
		}
		for range int(batch) {
			f.one(random, now)
		}
		if err := f.way.flush(); err != nil {
			return err
		}
		f.way.receive(floodTurn, func([]byte) {})
		sent += float64(int(batch))
		f.tally.mu.Lock()
		f.tally.attempts += uint64(batch)
		f.tally.mu.Unlock()
	}
	return nil
}

func (f *flood) one(random *rand.Rand, now int64) {
	s := f.shapes[f.next%len(f.shapes)]
	f.next++
	s.Src, s.Dst = f.way.sources.pair(uint32(random.Uint64N(f.way.sources.total()))), f.target
	s.Seq, s.Options.TSVal = random.Uint32(), clockMillis(now)
	if s.Has(packet.ACK) {
		s.Ack, s.Options.TSEcr = random.Uint32(), clockMillis(now)
	}
	put(f.way.line, &f.way.hop, &s, nil, 0)
}
