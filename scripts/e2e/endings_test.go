// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"snilb/scripts/testbed"
)

// endPorts is how many source ports a backend is given here: a test looks at its end that none is lost.
const endPorts = 40

// endBed is a bed whose backend b1 hands every connection to the test, with an attached snilb that has few source ports.
type endBed struct {
	*testbed.Bed
	*daemon
	first    []byte // the hello
	accepted map[bool]chan *net.TCPConn
}

func newEndBed(t *testing.T, timeouts string) *endBed {
	t.Helper()
	b := &endBed{
		Bed: newBed(t, testbed.Options{}), first: hello(t, classic("a.example.com")),
		accepted: map[bool]chan *net.TCPConn{},
	}
	for _, v6 := range []bool{false, true} {
		b.accepted[v6] = make(chan *net.TCPConn, endPorts)
		serve(t, b.Backend, at(b.Bed, 1, v6, 443), func(c net.Conn) {
			if _, err := io.ReadFull(c, make([]byte, len(b.first))); err != nil {
				_ = c.Close() // nobody of ours: a health check
				return
			}
			b.accepted[v6] <- c.(*net.TCPConn)
		})
	}
	b.daemon = attach(t, b.Bed, siteRoutes(b.Bed, "timeouts: {"+timeouts+"}"),
		"--drain-timeout", "0s", "--workers", "1", "--source-ports", fmt.Sprintf("23000-%d", 23000+endPorts-1))
	return b
}

// pair is both ends of a connection through snilb, as their kernels see it.
type pair struct{ client, backend *net.TCPConn }

func (b *endBed) pair(t *testing.T, v6 bool) pair {
	t.Helper()
	c, err := dialTCP(t, b.Bed, vip(b.Bed, v6))
	must(t, err)
	return b.accept(t, v6, c)
}

// accept sends the hello and waits for the connection that it becomes at the backend.
func (b *endBed) accept(t *testing.T, v6 bool, c *net.TCPConn) pair {
	t.Helper()
	_, err := c.Write(b.first)
	must(t, err)
	p := pair{c, b.arrived(t, v6)}
	must(t, errors.Join(p.client.SetDeadline(time.Now().Add(clientTimeout)), p.backend.SetDeadline(time.Now().Add(clientTimeout))))
	return p
}

func (b *endBed) arrived(t *testing.T, v6 bool) *net.TCPConn {
	t.Helper()
	select {
	case c := <-b.accepted[v6]:
		t.Cleanup(func() { _ = c.Close() })
		return c
	case <-time.After(clientTimeout):
		t.Fatal("no connection reached the backend")
		return nil
	}
}

// rawPair is a connection of a raw client, open on both sides, with clientTimeout to go.
func (b *endBed) rawPair(t *testing.T, v6 bool) (*testbed.Raw, *net.TCPConn) {
	t.Helper()
	r, err := b.Raw(vip(b.Bed, v6))
	must(t, err)
	t.Cleanup(func() { _ = r.Close() })
	_, err = r.Open(testbed.LinuxSYN(r.TSVal), 3*time.Second)
	must(t, err)
	_, err = r.Write(b.first)
	must(t, err)
	backend := b.arrived(t, v6)
	deadline := time.Now().Add(clientTimeout)
	must(t, errors.Join(backend.SetDeadline(deadline), r.SetDeadline(deadline)))
	return r, backend
}

// sides are the pair seen from the client, and from the backend.
func (p pair) sides() map[string][2]*net.TCPConn {
	return map[string][2]*net.TCPConn{"client": {p.client, p.backend}, "backend": {p.backend, p.client}}
}

// nothingLeft waits until the flow table is empty, and looks that every source port can be had again.
func (b *endBed) nothingLeft(t *testing.T, wait time.Duration) {
	t.Helper()
	b.noFlows(wait)
	families(t, func(t *testing.T, v6 bool) {
		for len(b.accepted[v6]) > 0 { // reset before anybody asked for it
			_ = (<-b.accepted[v6]).Close()
		}
		for range endPorts {
			p := b.pair(t, v6)
			must(t, echo(p.client, p.backend, "a port"))
		}
	})
}

// wantClosed looks how many flows ended for each reason, and that none did for another.
func (b *endBed) wantClosed(t *testing.T, want map[string]uint64) {
	t.Helper()
	got := b.counters().Engine.Closed
	for reason, n := range want {
		if got[reason] != n {
			t.Errorf("%d flows were closed for %s, want %d", got[reason], reason, n)
		}
	}
	for reason, n := range got {
		if _, ok := want[reason]; !ok {
			t.Errorf("%d flows were closed for %s, want none", n, reason)
		}
	}
}

// echo sends text both ways.
func echo(a, z *net.TCPConn, text string) error {
	for _, way := range [][2]*net.TCPConn{{a, z}, {z, a}} {
		if _, err := io.WriteString(way[0], text); err != nil {
			return err
		}
		got := make([]byte, len(text))
		if _, err := io.ReadFull(way[1], got); err != nil || string(got) != text {
			return fmt.Errorf("sent %q, got %q, %w", text, got, err)
		}
	}
	return nil
}

// wantRead looks at how a connection ends: io.EOF for a FIN, ECONNRESET for a RST.
func wantRead(c *net.TCPConn, want error) error {
	n, err := c.Read(make([]byte, 1))
	if n != 0 || !errors.Is(err, want) {
		return fmt.Errorf("%s - %s: read %d bytes, %w, want %w", c.LocalAddr(), c.RemoteAddr(), n, err, want)
	}
	return nil
}

// abort closes by RST.
func abort(c *net.TCPConn) error { return errors.Join(c.SetLinger(0), c.Close()) }

// each runs a job for every element at once and reports what went wrong.
func each[T any](t *testing.T, all []T, job func(T) error) {
	t.Helper()
	errs := make(chan error, len(all))
	for _, one := range all {
		go func() { errs <- job(one) }()
	}
	for range all {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

// TestHalfCloseEither closes one direction, whoever is first, and sends the other way for longer than the closing timeout: that
// one counts silence only.
func TestHalfCloseEither(t *testing.T) {
	b := newEndBed(t, "closing: 2s") // less than halfClose goes on, and far more than its pauses
	var all [][2]*net.TCPConn
	for _, v6 := range []bool{false, true} {
		for name := range (pair{}).sides() {
			all = append(all, b.pair(t, v6).sides()[name])
		}
	}
	each(t, all, func(s [2]*net.TCPConn) error { return halfClose(s[0], s[1]) })
	b.nothingLeft(t, 10*time.Second)
	b.wantClosed(t, map[string]uint64{"closed": 4})
}

// halfClose has first close its direction, and second send for a while after it.
func halfClose(first, second *net.TCPConn) error {
	if err := errors.Join(echo(first, second, "both ways"), first.CloseWrite(), wantRead(second, io.EOF)); err != nil {
		return err
	}
	sent := make(chan error, 1)
	var want bytes.Buffer
	go func() {
		noise := io.TeeReader(testbed.Noise(5), &want)
		for range 12 {
			if _, err := io.CopyN(second, noise, 100<<10); err != nil {
				sent <- err
				return
			}
			time.Sleep(200 * time.Millisecond)
		}
		sent <- second.CloseWrite()
	}()
	got, err := io.ReadAll(first)
	if err := errors.Join(err, <-sent); err != nil {
		return err
	}
	if !bytes.Equal(got, want.Bytes()) {
		return fmt.Errorf("after the FIN came %d bytes, want the %d that were sent", len(got), want.Len())
	}
	return nil
}

// resets are ways in which a kernel comes to send a RST; the other side is to hear it.
var resets = map[string]func(who, other *net.TCPConn) error{
	"linger": func(who, _ *net.TCPConn) error { return abort(who) },
	"unread": func(who, other *net.TCPConn) error {
		_, err := io.WriteString(other, "never read")
		for pending := 0; pending == 0 && err == nil; time.Sleep(time.Millisecond) {
			err = control(who, func(fd int) (err error) {
				pending, err = unix.IoctlGetInt(fd, unix.SIOCINQ)
				return err
			})
		}
		return errors.Join(err, who.Close())
	},
	"half-closed": func(who, other *net.TCPConn) error {
		return errors.Join(other.CloseWrite(), wantRead(who, io.EOF), abort(who))
	},
}

func control(c *net.TCPConn, do func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var doErr error
	err = raw.Control(func(fd uintptr) { doErr = do(int(fd)) })
	return errors.Join(err, doErr)
}

// TestResetEither has each side reset, for each reason a kernel has; the other side hears it.
func TestResetEither(t *testing.T) {
	b := newEndBed(t, "closing: 2s")
	var n uint64
	for reason, reset := range resets {
		for who := range (pair{}).sides() {
			t.Run(reason+"-by-"+who, func(t *testing.T) {
				families(t, func(t *testing.T, v6 bool) {
					s := b.pair(t, v6).sides()[who]
					n++
					must(t, echo(s[0], s[1], "alive"))
					must(t, reset(s[0], s[1]))
					must(t, wantRead(s[1], syscall.ECONNRESET))
				})
			})
		}
	}
	b.nothingLeft(t, 10*time.Second)
	b.wantClosed(t, map[string]uint64{"reset": n})
}

// TestResetWithData sends a RST that carries data, as no kernel does and RFC 9293 allows.
func TestResetWithData(t *testing.T) {
	b := newEndBed(t, "closing: 2s")
	families(t, func(t *testing.T, v6 bool) {
		r, backend := b.rawPair(t, v6)
		rst := r.Bare(testbed.RST)
		rst.Payload = []byte("because of this")
		must(t, r.Send(rst))
		must(t, wantRead(backend, syscall.ECONNRESET))
	})
	b.nothingLeft(t, 10*time.Second)
	b.wantClosed(t, map[string]uint64{"reset": 2})
}

// TestForgedReset sends RSTs and FINs at numbers that are not the client's, and a SYN behind them, as somebody would who knows
// no more than who speaks to whom: the connection goes on, also after it was silent for longer than a closed one is kept.
func TestForgedReset(t *testing.T) {
	const closing = time.Second
	b := newEndBed(t, "closing: "+closing.String())
	families(t, func(t *testing.T, v6 bool) {
		r, backend := b.rawPair(t, v6)
		must(t, r.Send(r.Bare(0))) // the client has bound its flow
		for _, number := range []uint32{0, r.SndNxt - 1000, r.SndNxt + 100_000, r.SndNxt + 1<<31} {
			must(t, forge(r, number))
		}
		for until := time.Now().Add(2 * closing); time.Now().Before(until); {
			if s, err := r.Recv(time.Until(until)); err == nil && s.Flags&(testbed.SYN|testbed.RST|testbed.FIN) != 0 {
				t.Errorf("a forged packet was answered by %s", s)
			}
		}
		_, err := r.Write([]byte("alive"))
		must(t, err)
		got := make([]byte, 5)
		_, err = io.ReadFull(backend, got)
		must(t, err)
		_, err = backend.Write(got)
		must(t, err)
		_, err = io.ReadFull(r, got)
		must(t, err)
		must(t, abort(backend))
		if _, err := r.Read(got); !errors.Is(err, testbed.ErrReset) {
			t.Errorf("the backend's reset: %v", err)
		}
	})
	b.nothingLeft(t, 10*time.Second)
	b.wantClosed(t, map[string]uint64{"reset": 2})
}

// forge sends what ends a connection and what starts one, all at a number of one's choice.
func forge(r *testbed.Raw, number uint32) error {
	rst, fin := r.Bare(testbed.RST), r.Bare(testbed.FIN)
	rst.Seq, fin.Seq = number, number
	syn := testbed.Segment{Seq: number, Flags: testbed.SYN, Window: r.Window, Options: testbed.LinuxSYN(r.TSVal)}
	return r.Send(rst, fin, syn)
}

// closeBoth has both sides close at the same instant; each sees the other's FIN.
func closeBoth(p pair) error {
	other := make(chan error, 1)
	go func() { other <- errors.Join(p.backend.CloseWrite(), wantRead(p.backend, io.EOF)) }()
	err := errors.Join(p.client.CloseWrite(), wantRead(p.client, io.EOF))
	return errors.Join(err, <-other, p.client.Close(), p.backend.Close())
}

func (b *endBed) pairs(t *testing.T, n int) []pair {
	t.Helper()
	var all []pair
	for range n {
		all = append(all, b.pair(t, false), b.pair(t, true))
	}
	return all
}

// TestCloseTogether has both sides close at the same instant, many times.
func TestCloseTogether(t *testing.T) {
	b := newEndBed(t, "")
	each(t, b.pairs(t, endPorts), closeBoth)
	b.nothingLeft(t, 10*time.Second)
	b.wantClosed(t, map[string]uint64{"closed": 2 * endPorts})
}

// TestLostFIN loses the first FIN of one side or of both, which makes theirs cross: it comes again, and the connection ends as
// if nothing had been lost.
func TestLostFIN(t *testing.T) {
	const fin = "tcp flags & fin == fin "
	b := newEndBed(t, "")
	toBackend := func(t *testing.T) { filter(t, b.Backend, "input", dropFirstOfEach(fin+"tcp dport 443", "tcp sport")) }
	toClient := func(t *testing.T) { filter(t, b.Client, "input", dropFirstOfEach(fin+"tcp sport 443", "tcp dport")) }
	for name, lose := range map[string][]func(*testing.T){
		"client's": {toBackend}, "backend's": {toClient}, "both": {toBackend, toClient},
	} {
		t.Run(name, func(t *testing.T) {
			for _, f := range lose {
				f(t)
			}
			each(t, b.pairs(t, 5), closeBoth)
		})
	}
	b.nothingLeft(t, 10*time.Second)
	b.wantClosed(t, map[string]uint64{"closed": 30})
}

// TestUnacknowledgedFIN loses a FIN whose sender takes longer to repeat it than a closed flow is kept: the flow waits for the last ACK.
func TestUnacknowledgedFIN(t *testing.T) {
	const rto = 3 * time.Second
	b := newEndBed(t, "")
	slowRetransmission(t, b.Bed, rto)
	filter(t, b.Backend, "input", dropFirstOfEach("tcp flags & fin == fin tcp dport 443", "tcp sport"))
	each(t, b.pairs(t, 1), func(p pair) error {
		err := errors.Join(echo(p.client, p.backend, "alive"), p.backend.CloseWrite(), wantRead(p.client, io.EOF))
		began := time.Now()
		err = errors.Join(err, p.client.CloseWrite(), wantRead(p.backend, io.EOF))
		if took := time.Since(began); err == nil && took < rto {
			return fmt.Errorf("the FIN came after %s: it was not lost for long enough", took)
		}
		return err
	})
	b.nothingLeft(t, 10*time.Second)
	b.wantClosed(t, map[string]uint64{"closed": 2})
}

// slowRetransmission makes the client repeat nothing before rto.
func slowRetransmission(t *testing.T, bed *testbed.Bed, rto time.Duration) {
	t.Helper()
	must(t, bed.Client.Sysctl("ipv4/tcp_early_retrans", "0"))
	h, err := bed.Client.Netlink()
	must(t, err)
	defer h.Close()
	link, err := h.LinkByName("eth0")
	must(t, err)
	for _, addr := range []netip.Addr{bed.VIP4, bed.VIP6} {
		must(t, h.RouteAdd(&netlink.Route{
			LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK, RtoMin: int(rto.Milliseconds()), RtoMinLock: true,
			Dst: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())},
		}))
	}
}

// dialFrom connects from a port of one's choice, for as long as the client's own kernel still holds it.
func (b *endBed) dialFrom(t *testing.T, v6 bool, port uint16) *net.TCPConn {
	t.Helper()
	local := netip.AddrPortFrom(b.Clients4[0], port)
	if v6 {
		local = netip.AddrPortFrom(b.Clients6[0], port)
	}
	d := reusing(net.TCPAddrFromAddrPort(local))
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c, err := b.Client.DialWith(t.Context(), d, "tcp", vip(b.Bed, v6).String())
		if err == nil {
			t.Cleanup(func() { _ = c.Close() })
			return c.(*net.TCPConn)
		}
		if busy := errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EADDRINUSE); !busy || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// TestSamePortClosing connects again and again from one client port, as soon as the kernel lets it: the SYN finds a flow that is
// closing. With the backend first to close, TIME_WAIT is there, else here, where tcp_tw_reuse ends it after a second.
func TestSamePortClosing(t *testing.T) {
	b := newEndBed(t, "")
	must(t, b.Client.Sysctl("ipv4/tcp_tw_reuse", "1"))
	for who, rounds := range map[string]int{"backend": 8, "client": 2} {
		t.Run(who+"-first", func(t *testing.T) {
			families(t, func(t *testing.T, v6 bool) {
				for range rounds {
					began := time.Now()
					p := b.accept(t, v6, b.dialFrom(t, v6, 7000))
					must(t, echo(p.client, p.backend, "again"))
					if took := time.Since(began); took > 2500*time.Millisecond { // a second SYN is out after 1 s, a third after 3
						t.Errorf("took %s", took)
					}
					s := p.sides()[who]
					must(t, errors.Join(s[0].CloseWrite(), wantRead(s[1], io.EOF), s[1].Close(), wantRead(s[0], io.EOF), s[0].Close()))
				}
			})
		})
	}
	b.nothingLeft(t, 10*time.Second)
}

// TestSamePortLive connects from the port of a client that vanished, over a flow that is open or half closed. The backend's
// challenge ACK makes the client reset the old connection, and its next SYN starts the new one.
func TestSamePortLive(t *testing.T) {
	b := newEndBed(t, "")
	for name, before := range map[string]func(pair) error{
		"open":        func(p pair) error { return echo(p.client, p.backend, "old") },
		"half-closed": func(p pair) error { return errors.Join(p.backend.CloseWrite(), wantRead(p.client, io.EOF)) },
	} {
		t.Run(name, func(t *testing.T) {
			families(t, func(t *testing.T, v6 bool) {
				old := b.accept(t, v6, b.dialFrom(t, v6, 7001))
				must(t, before(old))
				gag := filter(t, b.Client, "output", "tcp flags & rst == rst drop")
				must(t, abort(old.client))
				gag()
				began := time.Now()
				p := b.accept(t, v6, b.dialFrom(t, v6, 7001))
				must(t, echo(p.client, p.backend, "new"))
				took := time.Since(began)
				t.Logf("took %s", took)
				if took > 2900*time.Millisecond { // the second SYN goes out after a second, the third after three
					t.Errorf("took %s", took)
				}
				must(t, wantRead(old.backend, syscall.ECONNRESET))
				must(t, errors.Join(p.client.Close(), p.backend.Close()))
			})
		})
	}
	b.nothingLeft(t, 15*time.Second)
}

// TestFINWithData closes in the segment of the last bytes: behind the hello, of one segment or two, and later.
func TestFINWithData(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	for _, v6 := range []bool{false, true} {
		serve(t, bed.Backend, at(bed, 1, v6, 443), func(c net.Conn) {
			defer func() { _ = c.Close() }()
			got, err := io.ReadAll(c)
			if err == nil {
				_, _ = fmt.Fprintf(c, "%d bytes", len(got))
			}
		})
	}
	d := attach(t, bed, siteRoutes(bed), atOnce...)
	// A FIN on its own goes nowhere.
	filter(t, bed.Client, "output", "tcp flags & fin == fin meta length < 80 drop")
	short, long := hello(t, classic("a.example.com")), hello(t, &tls.Config{ServerName: "a.example.com"})
	families(t, func(t *testing.T, v6 bool) {
		for name, writes := range map[string][][]byte{
			"hello": {short}, "long-hello": {long}, "later": {short, bytes.Repeat([]byte("x"), 1000)},
		} {
			t.Run(name, func(t *testing.T) {
				c, err := dialTCP(t, bed, vip(bed, v6))
				must(t, err)
				must(t, c.SetDeadline(time.Now().Add(5*time.Second)))
				for _, w := range writes[:len(writes)-1] {
					_, err := c.Write(w)
					must(t, err)
					time.Sleep(50 * time.Millisecond)
				}
				must(t, control(c, func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_CORK, 1) }))
				_, err = c.Write(writes[len(writes)-1])
				must(t, errors.Join(err, c.CloseWrite()))
				got, err := io.ReadAll(c)
				if want := fmt.Sprintf("%d bytes", len(slices.Concat(writes...))); err != nil || string(got) != want {
					t.Errorf("got %q, %v, want %q", got, err, want)
				}
			})
		}
	})
	d.noFlows(10 * time.Second)
}

// TestResetBeforeBind has the client reset while a backend is asked: nothing of it is left, neither here nor there.
func TestResetBeforeBind(t *testing.T) {
	b := newEndBed(t, "attempt: 5s")
	t.Run("connecting", func(t *testing.T) {
		// Each time: one that comes again after 250 ms may be bound before a busy machine has looked.
		filter(t, b.Backend, "input", matchSYN+" tcp dport 443 drop")
		families(t, func(t *testing.T, v6 bool) {
			c, err := dialTCP(t, b.Bed, vip(b.Bed, v6))
			must(t, err)
			_, err = c.Write(b.first)
			must(t, err)
			b.waitFlows("one that connects", time.Second, func(f []flow) bool { return len(f) == 1 && f[0].State == "connecting" })
			must(t, abort(c))
			b.noFlows(time.Second)
		})
	})
	t.Run("pushing", func(t *testing.T) {
		families(t, func(t *testing.T, v6 bool) {
			// The engine owns the first bytes, and the backend's ACK of them never comes.
			remove := filter(t, b.Backend, "output", "tcp sport 443 tcp flags & syn == 0 drop")
			c, err := dialTCP(t, b.Bed, vip(b.Bed, v6))
			must(t, err)
			_, err = c.Write(b.first[:100])
			must(t, err)
			time.Sleep(200 * time.Millisecond)
			_, err = c.Write(b.first[100:])
			must(t, err)
			b.waitFlows("one that connects", time.Second, func(f []flow) bool { return len(f) == 1 && f[0].State == "connecting" })
			must(t, abort(c))
			b.noFlows(time.Second)
			remove()
			backend := at(b.Bed, 1, v6, 443)
			for range 50 {
				if countSockets(t, b.Backend, "established", backend) == 0 {
					return
				}
				time.Sleep(20 * time.Millisecond)
			}
			t.Error("the backend holds a connection that is over")
		})
	})
	b.nothingLeft(t, time.Second)
}
