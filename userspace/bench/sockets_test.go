// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// startServer runs Serve on a loopback address until the test ends.
func startServer(t *testing.T, reply int) netip.AddrPort {
	t.Helper()
	l := listen(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- Serve(ctx, reply, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return addrOf(l)
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func addrOf(l net.Listener) netip.AddrPort { return l.Addr().(*net.TCPAddr).AddrPort() }

// startBehaviour accepts connections and lets behave have them. What it leaves open stays so until the test ends, and is not
// closed as garbage.
func startBehaviour(t *testing.T, behave func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l := listen(t)
	var mu sync.Mutex
	var accepted []net.Conn
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		defer mu.Unlock()
		for _, c := range accepted {
			_ = c.Close()
		}
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			accepted = append(accepted, c)
			mu.Unlock()
			go behave(c.(*net.TCPConn))
		}
	}()
	return addrOf(l)
}

func testLoad(t *testing.T, target netip.AddrPort) Load {
	t.Helper()
	return Load{
		Target: target, Concurrency: 4, Duration: 300 * time.Millisecond, Timeout: 5 * time.Second, Reply: 1,
		Hellos: testHellos(t, HelloOptions{Layout: "go", Names: Names{List: []string{"a.example.com"}}}),
	}
}

func testHellos(t *testing.T, o HelloOptions) *Hellos {
	t.Helper()
	h, err := NewHellos(o)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func allSucceed(t *testing.T, res *Result, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	if res.Successes == 0 || res.Failed() != 0 {
		t.Fatalf("%d successes, failures %v", res.Successes, res.Failures)
	}
}

func TestConnections(t *testing.T) {
	for name, change := range map[string]func(*Load){
		"one byte":          func(*Load) {},
		"split in records":  func(l *Load) { l.Hellos.opts.RecordBytes = 3 },
		"split in segments": func(l *Load) { l.Hellos.opts.SegmentBytes = 100 },
		"chrome":            func(l *Load) { l.Hellos.opts.Layout = "chrome" },
		"with a warm-up":    func(l *Load) { l.Warmup = 100 * time.Millisecond },
	} {
		t.Run(name, func(t *testing.T) {
			l := testLoad(t, startServer(t, 1))
			change(&l)
			l.Hellos = testHellos(t, l.Hellos.opts)
			res, err := Connections(t.Context(), l, SocketOptions{})
			allSucceed(t, res, err)
			if res.Bytes != res.Successes || res.Latency == nil || res.Latency.P50 <= 0 || len(res.Curve) == 0 {
				t.Errorf("%d bytes for %d successes, latency %+v", res.Bytes, res.Successes, res.Latency)
			}
		})
	}
}

// TestConnectionsFrom connects from given addresses, and the answer is larger than the reader's buffer.
func TestConnectionsFrom(t *testing.T) {
	l := testLoad(t, startServer(t, 100_000))
	l.Reply = 100_000
	from := []netip.Addr{netip.MustParseAddr("127.1.2.3"), netip.MustParseAddr("127.1.2.4")}
	res, err := Connections(t.Context(), l, SocketOptions{From: from, ResetClose: true})
	allSucceed(t, res, err)
	if res.Bytes != res.Successes*100_000 {
		t.Errorf("%d bytes for %d successes", res.Bytes, res.Successes)
	}
	if _, err := Connections(t.Context(), l, SocketOptions{From: []netip.Addr{netip.IPv6Loopback()}}); err == nil {
		t.Error("an IPv6 source for an IPv4 target was taken")
	}
}

// TestRate offers what a rate says, from the first moment.
func TestRate(t *testing.T) {
	l := testLoad(t, startServer(t, 1))
	l.Rate, l.Duration = 100, 500*time.Millisecond
	res, err := Connections(t.Context(), l, SocketOptions{})
	allSucceed(t, res, err)
	if res.Attempts > 51 || res.Attempts < 25 {
		t.Errorf("%d attempts in half a second at 100 a second", res.Attempts)
	}
}

// TestNoOmission stalls the server once: every attempt that was due meanwhile must show it, though none of them could begin.
func TestNoOmission(t *testing.T) {
	const stall = 300 * time.Millisecond
	begin := time.Now()
	target := startBehaviour(t, func(c *net.TCPConn) {
		defer func() { _ = c.Close() }()
		time.Sleep(time.Until(begin.Add(stall)))
		_, _ = c.Write([]byte{1})
		_, _ = c.Read(make([]byte, 4096))
	})
	l := testLoad(t, target)
	l.Concurrency, l.Rate, l.Duration = 1, 200, 600*time.Millisecond
	res, err := Connections(t.Context(), l, SocketOptions{})
	allSucceed(t, res, err)
	// 60 of the 120 were due in the stall, so the median is at least near its end, whatever the machine is doing.
	if slow := res.Latency.P90; slow < float64(stall.Microseconds())/2 {
		t.Errorf("the 90th percentile is %v us: the stall of %v is hidden", slow, stall)
	}
}

func TestFailures(t *testing.T) {
	closed := listen(t)
	refusing := addrOf(closed)
	_ = closed.Close()
	for _, tt := range []struct {
		want   Failure
		target netip.AddrPort
	}{
		{Refused, refusing},
		{Reset, startBehaviour(t, func(c *net.TCPConn) {
			_, _ = c.Read(make([]byte, 1))
			_ = c.SetLinger(0)
			_ = c.Close()
		})},
		{Closed, startBehaviour(t, func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 4096)); _ = c.Close() })},
		{Timeout, startBehaviour(t, func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 4096)) })},
	} {
		t.Run(tt.want.String(), func(t *testing.T) {
			l := testLoad(t, tt.target)
			l.Rate = 100
			if tt.want == Timeout { // the others must not meet it on a busy machine
				l.Timeout = 50 * time.Millisecond
			}
			res, err := Connections(t.Context(), l, SocketOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if res.Successes != 0 || res.Failures[tt.want.String()] == 0 || len(res.Failures) != 1 {
				t.Errorf("%d successes, failures %v, want %s only", res.Successes, res.Failures, tt.want)
			}
		})
	}
}

func TestRequests(t *testing.T) {
	for _, answer := range []int{1, 1000, 200_000} {
		res, err := Requests(t.Context(), testLoad(t, startServer(t, 1)), SocketOptions{}, 100, answer)
		allSucceed(t, res, err)
		if res.Bytes != res.Successes*uint64(answer) {
			t.Errorf("%d bytes for %d answers of %d", res.Bytes, res.Successes, answer)
		}
	}
}

// TestRequestsReconnect goes on when connections end between two requests.
func TestRequestsReconnect(t *testing.T) {
	target := startBehaviour(t, func(c *net.TCPConn) {
		defer func() { _ = c.Close() }()
		for range 2 { // the hello and one request
			if _, err := c.Read(make([]byte, 4096)); err != nil {
				return
			}
			_, _ = c.Write([]byte{1})
		}
	})
	l := testLoad(t, target)
	l.Concurrency = 1
	res, err := Requests(t.Context(), l, SocketOptions{}, 100, 1)
	if err != nil || res.Successes < 2 || res.Failed() < 1 {
		t.Errorf("%+v, %v", res, err)
	}
}

func TestBulk(t *testing.T) {
	for _, upload := range []bool{false, true} {
		const size = 5<<20 + 77
		l := testLoad(t, startServer(t, 1))
		l.Duration = 20 * time.Second
		res, err := Bulk(t.Context(), l, SocketOptions{}, size, upload)
		allSucceed(t, res, err)
		if res.Successes != 4 || res.Bytes < 4*size || res.Bytes > 4*size+4*requestHeader || res.Seconds > 15 {
			t.Errorf("upload %v: %d bytes in %v s by %d", upload, res.Bytes, res.Seconds, res.Successes)
		}
	}
}

// TestBulkCut counts a transfer that ends early as a failure.
func TestBulkCut(t *testing.T) {
	target := startBehaviour(t, func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 4096))
		_, _ = c.Write([]byte{1})
		_, _ = c.Read(make([]byte, 4096))
		_, _ = c.Write(make([]byte, 1000))
		_ = c.Close()
	})
	l := testLoad(t, target)
	l.Duration = 5 * time.Second
	res, err := Bulk(t.Context(), l, SocketOptions{}, 1001, false)
	if err != nil || res.Successes != 0 || res.Failures["closed"] != 4 {
		t.Errorf("%+v, %v", res, err)
	}
}

func TestIdle(t *testing.T) {
	l := testLoad(t, startServer(t, 1))
	l.Concurrency = 300
	var stood int
	res, err := Idle(t.Context(), l, SocketOptions{}, 16, func(n int) { stood = n })
	allSucceed(t, res, err)
	if stood != 300 || res.Successes != 300 {
		t.Errorf("%d stood, %d still answered", stood, res.Successes)
	}
}

// TestIdleCut sees connections that ended while they idled.
func TestIdleCut(t *testing.T) {
	target := startBehaviour(t, func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 4096))
		_, _ = c.Write([]byte{1})
		_ = c.Close()
	})
	res, err := Idle(t.Context(), testLoad(t, target), SocketOptions{}, 4, func(int) {})
	if err != nil || res.Successes != 0 || res.Failed() != 4 {
		t.Errorf("%+v, %v", res, err)
	}
}

func TestBadLoads(t *testing.T) {
	good := testLoad(t, netip.MustParseAddrPort("127.0.0.1:1"))
	for name, change := range map[string]func(*Load){
		"no target":   func(l *Load) { l.Target = netip.AddrPort{} },
		"no port":     func(l *Load) { l.Target = netip.AddrPortFrom(l.Target.Addr(), 0) },
		"no hellos":   func(l *Load) { l.Hellos = nil },
		"rate":        func(l *Load) { l.Rate = -1 },
		"concurrency": func(l *Load) { l.Concurrency = 0 },
		"duration":    func(l *Load) { l.Duration = 0 },
		"timeout":     func(l *Load) { l.Timeout = 0 },
		"warm-up":     func(l *Load) { l.Warmup = -1 },
		"reply":       func(l *Load) { l.Reply = 0 },
	} {
		l := good
		change(&l)
		if _, err := Connections(t.Context(), l, SocketOptions{}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestServeRefuses closes a connection that sends no hello, or no request behind it.
func TestServeRefuses(t *testing.T) {
	target := startServer(t, 1)
	hello, err := testHellos(t, HelloOptions{Layout: "go", Names: Names{List: []string{"x"}}}).of(0)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		sent  []byte
		reply int
	}{
		"http":          {[]byte("GET / HTTP/1.0\r\n\r\n"), 0},
		"endless hello": {[]byte{22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff}, 0},
		"empty record":  {[]byte{22, 3, 1, 0, 0}, 0},
		"no request":    {append(append([]byte{}, hello...), "no record at all"...), 1},
	} {
		c, err := net.Dial("tcp", target.String())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Write(tt.sent); err != nil {
			t.Fatal(err)
		}
		n, err := c.Read(make([]byte, 16))
		if n == tt.reply && n > 0 {
			n, err = c.Read(make([]byte, 16))
			n += tt.reply
		}
		if n != tt.reply || err == nil || classify(err) == Timeout {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
		_ = c.Close()
	}
}

func TestClassify(t *testing.T) {
	for err, want := range map[error]Failure{
		unix.EHOSTUNREACH: Unreachable, unix.ENETUNREACH: Unreachable, unix.EADDRNOTAVAIL: Local, unix.EMFILE: Local,
		unix.ETIMEDOUT: Timeout, unix.EPIPE: Reset, io.ErrUnexpectedEOF: Closed,
	} {
		if got := classify(&net.OpError{Op: "dial", Err: err}); got != want {
			t.Errorf("%v is %v, want %v", err, got, want)
		}
	}
}
