// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// legs are the wires that a test may spoil.
func legs(bed *testbed.Bed) map[string][]*testbed.Wire {
	return map[string][]*testbed.Wire{
		"client":  {bed.ClientWire},
		"backend": {bed.BackendWire},
		"both":    {bed.ClientWire, bed.BackendWire},
	}
}

// impair spoils wires until the test ends.
func impair(t *testing.T, wires []*testbed.Wire, i testbed.Impairment) {
	t.Helper()
	for _, w := range wires {
		w.Impair(i)
		t.Cleanup(func() { w.Impair(testbed.Impairment{}) })
	}
}

// requestLimit is what one request may take: far more than the losses that are likely cost, and less than any timeout whose
// end one could mistake for success. Four lost SYNs cost 15 s, without tcp_syn_linear_timeouts (Linux 6.5).
const requestLimit = 20 * time.Second

// TestLossRequests makes many small requests, each with a connection of its own, over legs that lose, repeat, reorder and delay
// packets. None may fail, and none may hang.
func TestLossRequests(t *testing.T) {
	bed := wired(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	for name, i := range map[string]testbed.Impairment{
		"drop-1":    {Drop: 0.01},
		"drop-5":    {Drop: 0.05},
		"duplicate": {Duplicate: 0.3},
		"copies":    {Drop: 0.05, Duplicate: 0.5}, // a hello whose first segment is lost and whose second comes thrice
		"reorder":   {Reorder: 0.3},
		"disorder":  {Delay: 5 * time.Millisecond, Jitter: 20 * time.Millisecond, Disorder: true},
		"all":       {Drop: 0.02, Duplicate: 0.02, Reorder: 0.05, Delay: time.Millisecond, Jitter: 5 * time.Millisecond, Disorder: true},
	} {
		for leg, wires := range legs(bed) {
			t.Run(name+"/"+leg, func(t *testing.T) {
				impair(t, wires, i)
				t.Logf("slowest of all: %s", requests(t, bed, 100))
			})
		}
	}
	d.noFlows(70 * time.Second) // a lost FIN or ACK lets a flow wait for timeouts.closing
}

// requests makes n requests, some of them at a time and half of them over IPv6, and returns what the slowest took.
func requests(t *testing.T, bed *testbed.Bed, n int) (slowest time.Duration) {
	t.Helper()
	took, errs := make([]time.Duration, n), make([]error, n)
	var wg sync.WaitGroup
	for w := range 20 {
		wg.Go(func() {
			for i := w; i < n; i += 20 {
				began := time.Now()
				errs[i] = request(t, bed, i%2 == 1)
				took[i] = time.Since(began)
			}
		})
	}
	wg.Wait()
	for i := range n {
		slowest = max(slowest, took[i])
		if errs[i] != nil {
			t.Errorf("request %d failed after %s: %v", i, took[i].Round(time.Millisecond), errs[i])
		}
	}
	if slowest > requestLimit {
		t.Errorf("the slowest request took %s", slowest)
	}
	return slowest
}

func request(t *testing.T, bed *testbed.Bed, v6 bool) error {
	got, err := goClient(t, bed, vip(bed, v6), "a.example.com")
	if err == nil && (len(got) < 2 || got[:2] != "b1") {
		err = fmt.Errorf("answer %q", got)
	}
	return err
}

// TestLossBulk moves 100 MB each way over legs that do everything wrong to one packet in a hundred, and less over worse ones.
func TestLossBulk(t *testing.T) {
	bed := wired(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, siteRoutes(bed))
	for _, c := range []struct {
		name string
		leg  string
		i    testbed.Impairment
		size int64
	}{
		{"all-1", "both", testbed.Impairment{Drop: 0.01, Duplicate: 0.01, Reorder: 0.01}, bulkSize},
		{"drop-5-client", "client", testbed.Impairment{Drop: 0.05}, 10 << 20},
		{"drop-5-backend", "backend", testbed.Impairment{Drop: 0.05}, 10 << 20},
		{"drop-5", "both", testbed.Impairment{Drop: 0.05}, 10 << 20},
		{"delay", "both", testbed.Impairment{Delay: 2 * time.Millisecond, Jitter: time.Millisecond, Disorder: true}, 10 << 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			impair(t, legs(bed)[c.leg], c.i)
			families(t, func(t *testing.T, v6 bool) {
				t.Run("download", func(t *testing.T) {
					began := time.Now()
					downloadSize(t, bed, vip(bed, v6), "a.example.com", c.size)
					wantFast(t, began)
				})
				t.Run("upload", func(t *testing.T) {
					began := time.Now()
					uploadSize(t, bed, vip(bed, v6), "a.example.com", c.size)
					wantFast(t, began)
				})
			})
		})
	}
}

// wantFast fails a transfer whose losses cost a retransmission timeout each, which is what remains of TCP without SACK: that
// takes about a hundred times as long.
func wantFast(t *testing.T, began time.Time) {
	t.Helper()
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("took %s", took)
	}
}

// loss says which frames of a connection meet their fate: those that match, from the skip-th on, as many as times.
type loss struct {
	name       string
	backendLeg bool
	to         testbed.Direction
	match      func(testbed.Frame) bool
	skip       int
	times      int32
	limit      time.Duration // what the connection may take
}

func isSYN(f testbed.Frame) bool    { return f.Has(testbed.SYN) && !f.Has(testbed.ACK) }
func isSYNACK(f testbed.Frame) bool { return f.Has(testbed.SYN | testbed.ACK) }
func isFIN(f testbed.Frame) bool    { return f.Has(testbed.FIN) }
func isData(f testbed.Frame) bool   { return f.Bytes > 0 }
func isACK(f testbed.Frame) bool    { return f.Flags == testbed.ACK && f.Bytes == 0 }

// isHello knows the first segment by its record header, whose version no later one has.
func isHello(f testbed.Frame) bool { return bytes.HasPrefix(f.Payload, []byte{0x16, 3, 1}) }

const toLB, fromLB = testbed.ToLB, testbed.FromLB

// One loss costs TCP a retransmission timeout, a second for a SYN and less for everything else.
var losses = []loss{
	{"client-syn", false, toLB, isSYN, 0, 1, 4 * time.Second},
	{"our-syn-ack", false, fromLB, isSYNACK, 0, 1, 4 * time.Second},
	{"client-ack", false, toLB, isACK, 0, 1, 2 * time.Second},
	{"hello-first", false, toLB, isData, 0, 1, 2 * time.Second},
	{"hello-second", false, toLB, isData, 1, 1, 2 * time.Second},
	{"hello-both", false, toLB, isData, 0, 2, 2 * time.Second},
	{"to-client-first", false, fromLB, isData, 0, 1, 2 * time.Second},
	{"client-fin", false, toLB, isFIN, 0, 1, 2 * time.Second},
	{"fin-to-client", false, fromLB, isFIN, 0, 1, 2 * time.Second},
	{"our-syn", true, fromLB, isSYN, 0, 1, 2 * time.Second},
	{"backend-syn-ack", true, toLB, isSYNACK, 0, 1, 3 * time.Second},
	{"replay-first", true, fromLB, isData, 0, 1, 3 * time.Second},
	{"replay-second", true, fromLB, isData, 1, 1, 3 * time.Second},
	{"replay-both", true, fromLB, isData, 0, 2, 3 * time.Second},
	{"backend-ack", true, toLB, isACK, 0, 1, 2 * time.Second},
	{"backend-first", true, toLB, isData, 0, 1, 2 * time.Second},
	{"backend-fin", true, toLB, isFIN, 0, 1, 2 * time.Second},
	{"fin-to-backend", true, fromLB, isFIN, 0, 1, 2 * time.Second},
}

// ackLost is the acknowledgment of a hello's first piece. Only its repetition makes a client go on that waits for it.
var ackLost = loss{"hello-ack", false, fromLB, isACK, 0, 1, 2 * time.Second}

// More than one packet in a row: longer than one attempt lasts, but well within what TCP bears.
var badLosses = []loss{
	{"our-syn-5-times", true, fromLB, isSYN, 0, 5, 5 * time.Second},
	{"backend-syn-ack-5-times", true, toLB, isSYNACK, 0, 5, 5 * time.Second},
	{"hello-first-3-times", false, toLB, isHello, 0, 3, 5 * time.Second},
	{"replay-5-times", true, fromLB, isData, 0, 5, 8 * time.Second}, // while the backend repeats its SYN-ACK
}

// fates is what happens to the chosen frames of one connection.
type fates struct {
	loss
	fate   testbed.Fate
	client int    // the client's port
	port   uint16 // our port on the backend leg, from its SYN on
	seen   int
	hits   atomic.Int32
}

// judge is the filter of both wires.
func (l *fates) judge(f testbed.Frame) testbed.Fate {
	if isSYN(f) && f.Direction == fromLB {
		l.port = f.Src.Port()
	}
	if f.Direction != l.to || !l.concerns(f) || !l.match(f) {
		return testbed.Chance
	}
	l.seen++
	if l.seen <= l.skip || l.hits.Load() == l.times {
		return testbed.Chance
	}
	l.hits.Add(1)
	return l.fate
}

// concerns looks at the port that tells the connection: the client's on its leg, ours on the other.
func (l *fates) concerns(f testbed.Frame) bool {
	port := f.Dst.Port()
	if (f.Direction == toLB) != l.backendLeg {
		port = f.Src.Port()
	}
	if l.backendLeg {
		return port == l.port
	}
	return int(port) == l.client
}

// TestLossSingle takes one packet of a connection away, or repeats it at once or when the connection is over, at every step from
// the first SYN to the last FIN.
func TestLossSingle(t *testing.T) {
	bed := wired(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	bed.ClientWire.Record()
	bed.BackendWire.Record()
	families(t, func(t *testing.T, v6 bool) {
		for _, l := range losses {
			t.Run("drop/"+l.name, func(t *testing.T) { meet(t, bed, v6, l, testbed.Dropped, nil) })
			t.Run("double/"+l.name, func(t *testing.T) { meet(t, bed, v6, l, testbed.Doubled, nil) })
			if !strings.HasSuffix(l.name, "-syn") { // which would open a new connection
				t.Run("echo/"+l.name, func(t *testing.T) { meet(t, bed, v6, l, testbed.Echoed, nil) })
			}
		}
	})
	d.noFlows(15 * time.Second)
	noneHealed(t, d, 2*(3*len(losses)-2))
	client, backend := bed.ClientWire.Recorded(), bed.BackendWire.Recorded()
	ownSYNACKs(t, client)
	noResetOfOurs(t, "client", toward(slices.Clone(client), fromLB), toward(slices.Clone(backend), toLB))
	noResetOfOurs(t, "backend", toward(slices.Clone(backend), fromLB), toward(slices.Clone(client), toLB))
}

// noneHealed asks the balancer whether it took a packet of one of n connections for a stranger's, or ended one before its time:
// TCP often lives with either.
func noneHealed(t *testing.T, d *daemon, n int) {
	t.Helper()
	c := d.counters()
	if c.Engine.Events["unknown"] != 0 || c.connects("", "ok") != uint64(n) || c.Engine.Closed["closed"]+c.Engine.Closed["reset"] != uint64(n) {
		t.Errorf("of %d connections: bound %d, ended %v, packets of none %d", n, c.connects("", "ok"), c.Engine.Closed, c.Engine.Events["unknown"])
	}
}

// ownSYNACKs looks that a client got no other SYN-ACK than ours, and the same for a SYN's copy: a later one may have another
// cookie.
func ownSYNACKs(t *testing.T, frames []testbed.Frame) {
	t.Helper()
	asked, last := map[netip.AddrPort]int{}, map[netip.AddrPort]testbed.Frame{}
	for _, f := range frames {
		switch {
		case isSYN(f):
			asked[f.Src] += copies(f)
		case isSYNACK(f):
			asked[f.Dst]--
			before := last[f.Dst]
			if asked[f.Dst] < 0 || f.At.Sub(before.At) < 100*time.Millisecond && before.Seq != f.Seq {
				t.Errorf("not our SYN-ACK, or another: %s", f.Segment)
			}
			last[f.Dst] = f
		}
	}
}

// copies is how many of a frame the wire sent on.
func copies(f testbed.Frame) int {
	return map[testbed.Fate]int{testbed.Carried: 1, testbed.Doubled: 2, testbed.Echoed: 2}[f.Fate]
}

// noResetOfOurs looks that every RST that left on a leg had come from the other one: a TCP resets what it hears of a connection
// that is over, such as a second copy of the last ACK.
func noResetOfOurs(t *testing.T, leg string, left, came []testbed.Frame) {
	t.Helper()
	n := 0
	for _, f := range came {
		if f.Has(testbed.RST) {
			n += copies(f)
		}
	}
	for _, f := range left {
		if f.Has(testbed.RST) {
			n--
		}
	}
	if n != 0 {
		t.Errorf("%s leg: %d RST more than came from the other side", leg, -n)
	}
}

// TestLossInARow takes more away than one attempt at a backend bears.
func TestLossInARow(t *testing.T) {
	bed := wired(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	families(t, func(t *testing.T, v6 bool) {
		for _, l := range badLosses {
			t.Run(l.name, func(t *testing.T) { meet(t, bed, v6, l, testbed.Dropped, nil) })
		}
	})
	d.noFlows(15 * time.Second)
}

// TestLossPushed does the same to a hello that comes in pieces: the client was told that they arrived, so that the engine and
// not the client must repeat them to the backend.
func TestLossPushed(t *testing.T) {
	bed := wired(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, siteRoutes(bed))
	pieces := func(c net.Conn) net.Conn { return &splitter{Conn: c, size: 700, pause: 50 * time.Millisecond} }
	families(t, func(t *testing.T, v6 bool) {
		for _, l := range append(losses, ackLost) {
			if !l.backendLeg && !strings.HasPrefix(l.name, "hello-") || strings.Contains(l.name, "fin") {
				continue
			}
			t.Run(l.name, func(t *testing.T) { meet(t, bed, v6, l, testbed.Dropped, pieces) })
		}
	})
}

var lossPort atomic.Int32

// meet makes a connection whose chosen frames meet their fate, from SYN to FIN in both directions.
func meet(t *testing.T, bed *testbed.Bed, v6 bool, l loss, fate testbed.Fate, wrap func(net.Conn) net.Conn) {
	t.Helper()
	local := net.TCPAddrFromAddrPort(netip.AddrPortFrom(bed.Clients4[0], uint16(31000+lossPort.Add(1))))
	if v6 {
		local.IP = bed.Clients6[0].AsSlice()
	}
	f := &fates{loss: l, fate: fate, client: local.Port}
	wire := bed.ClientWire
	if l.backendLeg {
		wire = bed.BackendWire
	}
	wire.Impair(testbed.Impairment{Filter: f.judge})
	defer wire.Impair(testbed.Impairment{})
	began := time.Now()
	if err := fromSYNToFIN(bed, local, vip(bed, v6), wrap); err != nil {
		t.Errorf("after %s: %v", time.Since(began).Round(time.Millisecond), err)
	}
	took := time.Since(began)
	if wrap != nil {
		took -= time.Second // its pauses
	}
	if took > l.limit {
		t.Errorf("took %s, more than %s", took, l.limit)
	}
	for range 100 { // the last FIN may still be on its way
		if f.hits.Load() == l.times {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d frames met their fate, want %d", f.hits.Load(), l.times)
}

// fromSYNToFIN asks the backend for its name and closes properly, in both directions.
func fromSYNToFIN(bed *testbed.Bed, local *net.TCPAddr, target netip.AddrPort, wrap func(net.Conn) net.Conn) error {
	ctx, cancel := context.WithTimeout(context.Background(), clientTimeout)
	defer cancel()
	raw, err := bed.Client.DialWith(ctx, &net.Dialer{LocalAddr: local}, "tcp", target.String())
	if err != nil {
		return err
	}
	defer func() { _ = raw.Close() }()
	under := raw
	if wrap != nil {
		under = wrap(raw)
	}
	c := tls.Client(under, trusting(&tls.Config{ServerName: "a.example.com"}))
	if err := errors.Join(c.SetDeadline(time.Now().Add(clientTimeout)), c.HandshakeContext(ctx)); err != nil {
		return err
	}
	body, err := whoami(c)
	if err == nil && !strings.HasPrefix(body, "b1 ") {
		err = fmt.Errorf("answer %q", body)
	}
	if err := errors.Join(err, c.CloseWrite(), raw.(*net.TCPConn).CloseWrite()); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, raw)
	return err
}
