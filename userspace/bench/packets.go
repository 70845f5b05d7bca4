// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"sync/atomic"
	"time"
)

// PacketOptions says how packets leave and come back.
type PacketOptions struct {
	// Interface is where the packets leave and the answers come: an Ethernet interface, at whose far end is the balancer or
	// the way to it.
	Interface string
	// Sources are the client addresses. Whoever answers must have a route for them by this host; they should not be its own.
	// At most 65536 of them are used, each with 64512 ports, and a pair is used again when all the others were.
	Sources netip.Prefix
	// MSS is announced. 0: the interface's MTU less headers.
	MSS int
	// XDP makes it several times faster where it goes: the interface's driver must know XDP natively, and of a veth pair the
	// far end must have GRO on or an XDP program too, otherwise every frame is lost.
	XDP bool
}

// capturedHeaders is enough of a frame for all headers.
const capturedHeaders = ethernetHeader + header6 + 60

// drainLimit is for connections that still close, or wait, when a run is over.
const drainLimit = time.Second

// Packets runs the load by TCP of its own, on the calling thread: no kernel has a part in it, so it needs a fraction of the time that
// sockets take. It needs root, and Linux 6.6.
func Packets(ctx context.Context, l Load, o PacketOptions) (*Result, error) {
	l.Target = netip.AddrPortFrom(l.Target.Addr().Unmap(), l.Target.Port())
	if err := l.check(); err != nil {
		return nil, err
	}
	way, err := openWay(ctx, l.Target, o)
	if err != nil {
		return nil, err
	}
	defer way.close()
	rec, clock := newRecorder(), newClock()
	c, err := newClient(&l, way.sources, way.mss, way.hop, way.line, rec.part(0), clock.now())
	if err != nil {
		return nil, err
	}
	return measure(ctx, rec, l.Warmup, l.Duration, l.Progress,
		func(stop *atomic.Bool) error { return c.run(clock, stop) },
		func() *Result {
			r := rec.result("connections", "packets", l.Target)
			r.Offered = l.Rate
			return r
		})
}

// way is all that is open for packets to a target.
type way struct {
	line
	close   func()
	sources pairs
	mss     int
	hop     hop
}

// openWay opens it in the namespace of the calling thread. Of what comes it holds the headers.
func openWay(ctx context.Context, target netip.AddrPort, o PacketOptions) (*way, error) {
	device, err := ethernet(o.Interface)
	if err != nil {
		return nil, err
	}
	w := &way{}
	if w.sources, err = newPairs(o.Sources); err != nil {
		return nil, err
	}
	if err := w.sources.check(target, 1); err != nil {
		return nil, err
	}
	if w.mss, err = mssOf(device, target.Addr().Is6(), o.MSS); err != nil {
		return nil, err
	}
	if w.hop, err = resolve(ctx, device, target.Addr()); err != nil {
		return nil, err
	}
	answers := match{src: netip.PrefixFrom(target.Addr(), target.Addr().BitLen()), srcPort: target.Port(), dst: o.Sources}
	w.line, w.close, err = openLine(device, []match{answers}, capturedHeaders, o.XDP)
	return w, err
}

// openLine opens a line for what matches, of which it takes at most capture bytes each. What close could fail with, nobody
// could mend.
func openLine(device *net.Interface, matches []match, capture int, xdp bool) (line, func(), error) {
	if xdp {
		x, err := openXDPLine(device, matches, capture, xdpRecords)
		if err != nil {
			return nil, nil, err
		}
		return x, func() { _ = x.close() }, nil
	}
	tap, err := openTap(device.Index, matches)
	if err != nil {
		return nil, nil, err
	}
	ring, err := openRing(device, tap.filter, capture, ringFrames)
	if err != nil {
		_ = tap.close()
		return nil, nil, err
	}
	return ring, func() { _, _ = ring.close(), tap.close() }, nil
}

// What may wait to be taken.
const (
	ringFrames = 1 << 13
	xdpRecords = 1 << 24 // bytes
)

// clock tells nanoseconds that grow from run to run, and never jump within one: sequence numbers and timestamps are made of
// them.
type clock struct{ start time.Time }

func newClock() clock { return clock{time.Now()} }

func (c clock) now() int64 { return c.start.UnixNano() + int64(time.Since(c.start)) }

// run works until it is stopped, then until all connections are closed or the time for that is up.
func (c *client) run(clock clock, stop *atomic.Bool) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var last int64
	for c.err == nil {
		now := clock.now()
		if !c.stopped && stop.Load() {
			c.stopped, last = true, now+int64(drainLimit)
		}
		if c.stopped && (c.used == 0 || now > last) {
			return errors.Join(c.resetAll(), c.err)
		}
		if c.step(now) {
			continue
		}
		if err := c.line.wait(c.idle()); err != nil {
			return err
		}
	}
	return c.err
}

// measure runs a generator, on the calling thread, through the warm-up and the duration, or until the context ends, and takes
// the result before it tells it to stop: what it does from then on is not measured.
func measure(ctx context.Context, rec *recorder, warmup, duration time.Duration, progress func(Second),
	run func(stop *atomic.Bool) error, result func() *Result) (*Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var stop atomic.Bool
	results := make(chan *Result, 1)
	go func() {
		sleepUntil(ctx, time.Now().Add(warmup))
		if warmup > 0 {
			rec.reset()
		}
		done, watched := make(chan struct{}), make(chan struct{})
		go func() {
			rec.watch(done, progress)
			close(watched)
		}()
		sleepUntil(ctx, time.Now().Add(duration))
		close(done)
		<-watched
		results <- result()
		stop.Store(true)
	}()
	err := run(&stop)
	cancel() // for a generator that failed
	return <-results, err
}

// PacketServer answers hellos by packets of its own.
type PacketServer struct {
	// Interface is where the packets come and the answers leave: an Ethernet interface. Answers go to whom the packet came
	// from.
	Interface string
	// Listen are the addresses it has. They may be this host's own, so that it answers for them to ARP and neighbour
	// discovery, or be routed to it. Nothing else on this host is then reached at them by the interface.
	Listen []netip.AddrPort
	// Reply is how many bytes answer a hello, at least 1. Then it closes.
	Reply int
	// XDP is that of PacketOptions.
	XDP bool
	// Ready is called once it serves. Optional.
	Ready func()
}

const (
	maxListen = 64
	maxReply  = 1 << 20
)

// ServePackets serves on the calling thread until the context ends, with TCP of its own. It needs root, and Linux 6.6.
func ServePackets(ctx context.Context, s PacketServer) error {
	if len(s.Listen) == 0 || len(s.Listen) > maxListen || s.Reply < 1 || s.Reply > maxReply {
		return fmt.Errorf("%d addresses and a reply of %d bytes: 1 to %d, and 1 to %d", len(s.Listen), s.Reply, maxListen, maxReply)
	}
	device, err := ethernet(s.Interface)
	if err != nil {
		return err
	}
	var listen []netip.AddrPort
	var matches []match
	mss := 65535
	for _, a := range s.Listen {
		a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
		if !a.IsValid() || a.Port() == 0 {
			return fmt.Errorf("%v is no address and port", a)
		}
		m, err := mssOf(device, a.Addr().Is6(), 0)
		if err != nil {
			return err
		}
		mss = min(mss, m)
		listen = append(listen, a)
		matches = append(matches, match{dst: netip.PrefixFrom(a.Addr(), a.Addr().BitLen()), dstPort: a.Port()})
	}
	line, closeLine, err := openLine(device, matches, device.MTU+ethernetHeader, s.XDP)
	if err != nil {
		return err
	}
	defer closeLine()
	if s.Ready != nil {
		s.Ready()
	}
	clock := newClock()
	v := newServer(listen, answer(s.Reply), mss, line, [2]uint64{rand.Uint64(), rand.Uint64() | 1}, clock.now())
	return v.run(ctx, clock)
}

// answer has the form of a TLS record, as far as it goes: a ServerHello's, of which no client of this tool reads more.
func answer(n int) []byte {
	b := make([]byte, n)
	copy(b, []byte{22, 3, 3, byte(max(n-5, 0) >> 8), byte(max(n-5, 0)), 2})
	return b
}

func (v *server) run(ctx context.Context, clock clock) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for ctx.Err() == nil {
		busy, err := v.step(clock.now())
		if err == nil && !busy {
			err = v.line.wait(time.Duration(wheelTick))
		}
		if err != nil {
			return err
		}
	}
	return nil
}
