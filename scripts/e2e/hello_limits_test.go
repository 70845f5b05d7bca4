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
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// TestHelloInTime has clients that let snilb wait for their hello, within the timeout and beyond it.
func TestHelloInTime(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed, "timeouts: {hello: 2s}"), "--workers", "1")
	began := time.Now()
	size := len(hello(t, classic("a.example.com")))
	families(t, func(t *testing.T, v6 bool) {
		t.Run("nagle", func(t *testing.T) {
			c, err := dialTCP(t, bed, vip(bed, v6))
			must(t, err)
			must(t, c.SetNoDelay(false))
			start := time.Now()
			got, err := whoami(handshake(t, &splitter{Conn: c, size: size/2 + 1}, classic("a.example.com")))
			wantBody(t, got, err, "b1", "a.example.com")
			if took := time.Since(start); took > 1500*time.Millisecond {
				t.Errorf("took %s: the second half waited for an acknowledgment", took)
			}
		})
		t.Run("pauses", func(t *testing.T) {
			c, err := dialTCP(t, bed, vip(bed, v6))
			must(t, err)
			split := &splitter{Conn: c, size: size/4 + 1, pause: 300 * time.Millisecond}
			got, err := whoami(handshake(t, split, classic("a.example.com")))
			wantBody(t, got, err, "b1", "a.example.com")
		})
		t.Run("too-slow", func(t *testing.T) {
			before := d.counters()
			start := time.Now()
			wantEnding(t, bed, vip(bed, v6), hello(t, classic("a.example.com"))[:size/2], endings["reset"])
			if took := time.Since(start); took < 1900*time.Millisecond || took > 10*time.Second {
				t.Errorf("reset after %s, want the timeout of 2s", took)
			}
			after := d.counters()
			if n := after.Engine.Hellos["timeout"] - before.Engine.Hellos["timeout"]; n != 1 || after.Engine.HelloBytes != 0 {
				t.Errorf("%d timeouts counted, %d bytes still held", n, after.Engine.HelloBytes)
			}
			d.wantLogged("hello took too long", began)
		})
	})
}

// TestFirstFlight sends hellos that are larger than what the client may send before the first acknowledgment.
func TestFirstFlight(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, siteRoutes(bed))
	for _, addr := range []netip.Addr{bed.VIP4, bed.VIP6} {
		out, err := bed.Client.Command(t.Context(), "ip", "route", "replace", netip.PrefixFrom(addr, addr.BitLen()).String(), "dev", "eth0", "initcwnd", "1").CombinedOutput()
		if err != nil {
			t.Fatalf("ip route: %v\n%s", err, out)
		}
	}
	huge := &tls.Config{ServerName: "a.example.com", CurvePreferences: []tls.CurveID{tls.X25519}}
	for i := range 55 {
		huge.NextProtos = append(huge.NextProtos, fmt.Sprintf("%0250d", i))
	}
	huge.NextProtos = append(huge.NextProtos, "http/1.1")
	if n := len(hello(t, huge)); n < 14000 || n > 16000 {
		t.Fatalf("the hello has %d bytes", n)
	}
	families(t, func(t *testing.T, v6 bool) {
		for name, config := range map[string]*tls.Config{"post-quantum": {ServerName: "a.example.com"}, "15KB": huge} {
			t.Run(name, func(t *testing.T) {
				start := time.Now()
				got, err := get(t, bed, vip(bed, v6), "/", config)
				wantBody(t, got, err, "b1", "a.example.com")
				if took := time.Since(start); took > 3*time.Second {
					t.Errorf("took %s", took)
				}
			})
		}
	})
}

// recordings serves b1 by a TCP server that keeps all of each connection until its end, and then says "got".
func recordings(t *testing.T, bed *testbed.Bed) <-chan []byte {
	t.Helper()
	got := make(chan []byte, 100)
	for _, v6 := range []bool{false, true} {
		serve(t, bed.Backend, at(bed, 1, v6, 443), func(c net.Conn) {
			defer func() { _ = c.Close() }()
			all, err := io.ReadAll(c)
			if err != nil {
				all = []byte(err.Error())
			}
			got <- all
			_, _ = io.WriteString(c, "got")
		})
	}
	return got
}

func wantRecorded(t *testing.T, got <-chan []byte, want []byte) {
	t.Helper()
	select {
	case all := <-got:
		if !bytes.Equal(all, want) {
			t.Errorf("the backend has %d bytes, want the %d that were sent; first difference at %d", len(all), len(want), difference(all, want))
		}
	case <-time.After(clientTimeout):
		t.Error("the backend never saw the end")
	}
}

func difference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// TestBehindHello sends data, and the end, right behind the hello: all of it arrives once and in order, and the answer too.
func TestBehindHello(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	got := recordings(t, bed)
	attach(t, bed, siteRoutes(bed))
	first := hello(t, &tls.Config{ServerName: "a.example.com"})
	for _, size := range []int{0, 1, 700, 20 << 10, 300 << 10} {
		more := make([]byte, size)
		_, err := io.ReadFull(testbed.Noise(uint64(size)), more)
		must(t, err)
		stream := slices.Concat(first, more)
		t.Run(fmt.Sprintf("%d-bytes", size), func(t *testing.T) {
			families(t, func(t *testing.T, v6 bool) {
				wantEnding(t, bed, vip(bed, v6), nil, func(t *testing.T, c net.Conn) {
					_, err := c.Write(stream)
					must(t, errors.Join(err, c.(*net.TCPConn).CloseWrite()))
					wantRecorded(t, got, stream)
					if answer, err := io.ReadAll(c); err != nil || string(answer) != "got" {
						t.Errorf("answer %q, %v", answer, err)
					}
				})
			})
		})
	}
	t.Run("fin-on-it", func(t *testing.T) {
		families(t, func(t *testing.T, v6 bool) {
			r, err := bed.Raw(vip(bed, v6))
			must(t, err)
			defer func() { _ = r.Close() }()
			_, err = r.Open(testbed.LinuxSYN(r.TSVal), 3*time.Second)
			must(t, err)
			small := hello(t, classic("a.example.com"))
			s := r.At(0, small)
			s.Flags |= testbed.FIN
			must(t, r.Send(s))
			r.SndNxt += uint32(len(small)) + 1
			wantRecorded(t, got, small)
			must(t, r.SetDeadline(time.Now().Add(clientTimeout)))
			if answer, err := io.ReadAll(r); err != nil || string(answer) != "got" {
				t.Errorf("answer %q, %v", answer, err)
			}
		})
	})
}

// TestEarlyData resumes a session of OpenSSL's and sends 0-RTT data behind the hello.
func TestEarlyData(t *testing.T) {
	needTool(t, "openssl")
	bed := newBed(t, testbed.Options{})
	attach(t, bed, siteRoutes(bed))
	families(t, func(t *testing.T, v6 bool) {
		dir := t.TempDir()
		cert := filepath.Join(dir, "cert.pem")
		must(t, os.WriteFile(cert, slices.Concat(certPEM()...), 0o600))
		said := newLines()
		server, stdin := background(t, bed.Backend, said, "openssl", "s_server", "-accept", at(bed, 1, v6, 443).String(), "-cert", cert, "-tls1_3", "-early_data", "-naccept", "2")
		_ = server
		defer func() { _ = stdin.Close() }()
		waitFor(t, "s_server", func() bool { return strings.Contains(said.String(), "ACCEPT") })

		session, early := filepath.Join(dir, "session"), filepath.Join(dir, "early")
		must(t, os.WriteFile(early, bytes.Repeat([]byte("0123456789abcde\n"), 500), 0o600))
		connect := []string{"s_client", "-connect", vip(bed, v6).String(), "-servername", "a.example.com", "-tls1_3"}
		clientSaid := newLines()
		_, in := background(t, bed.Client, clientSaid, "openssl", append(connect, "-sess_out", session)...)
		waitFor(t, "a session", func() bool { s, err := os.Stat(session); return err == nil && s.Size() > 0 })
		must(t, in.Close())

		clientSaid = newLines()
		_, in = background(t, bed.Client, clientSaid, "openssl", append(connect, "-sess_in", session, "-early_data", early)...)
		defer func() { _ = in.Close() }()
		waitFor(t, "early data", func() bool { return strings.Contains(said.String(), "End of early data") })
		if n := strings.Count(said.String(), "0123456789abcde\n"); n != 500 {
			t.Errorf("the server got %d of 500 lines of early data", n)
		}
		waitFor(t, "the client's verdict", func() bool { return strings.Contains(clientSaid.String(), "Early data was accepted") })
	})
}

func certPEM() [][]byte { return [][]byte{cert.CertPEM, cert.KeyPEM} }

// background runs a program until the test ends. Its input stays open until the caller closes it.
func background(t *testing.T, ns *testbed.NS, out io.Writer, name string, args ...string) (*exec.Cmd, io.WriteCloser) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := ns.Command(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = out, out
	in, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s said:\n%s", name, out)
		}
	})
	return cmd, in
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(clientTimeout); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s in %s", what, clientTimeout)
		}
	}
}

// endless is the beginning of a hello of nearly 16 KiB.
func endless(n int) []byte {
	return append([]byte{22, 3, 1, 0x3f, 0xff, 1, 0, 0x3f, 0xfb, 3, 3}, make([]byte, n-11)...)
}

// TestHelloMemory has many clients send half a hello, and then more of it: what is held stays within the limit and one
// hello, established connections go on, and who came too late is served once the timeout has made room.
func TestHelloMemory(t *testing.T) {
	bed := echoBed(t, testbed.Options{Clients: 8}, nil)
	d := attach(t, bed, siteRoutes(bed, "limits: {hello_memory: 64KiB}", "timeouts: {hello: 2s}"), "--workers", "1")
	began := time.Now()
	const most = 64<<10 + 24<<10 + 2<<10
	families(t, func(t *testing.T, v6 bool) {
		old := dialTLS(t, bed, vip(bed, v6), "a.example.com")
		before := d.counters()
		var half []net.Conn
		for i := range 40 {
			addrs := clientsOf(bed, v6)
			c := dialFrom(t, bed, addrs[i%len(addrs)], vip(bed, addrs[i%len(addrs)].Is6()))
			_, err := c.Write(endless(400))
			must(t, err)
			half = append(half, c)
		}
		c := d.waitCounters("the memory limit", 5*time.Second, func(c *counters) bool {
			return c.Engine.Hellos["memory_limit"] > before.Engine.Hellos["memory_limit"]
		})
		if in := c.Engine.HalfOpen; in < 10 || in > 32 {
			t.Errorf("%d clients got in: each is 2448 bytes", in)
		}
		var late sync.WaitGroup
		late.Go(func() { // its hello is refused, and repeated until there is room
			addrs := clientsOf(bed, v6)
			raw := dialFrom(t, bed, addrs[0], vip(bed, addrs[0].Is6()))
			s := tls.Client(raw, trusting(classic("a.example.com"))) // one segment: once in, it is whole
			if err := ping(s, "late"); err != nil {
				t.Errorf("a client that came while memory was full: %v", err)
			}
		})
		for _, c := range half {
			_, _ = c.Write(make([]byte, 12000)) // those refused may be reset by now
		}
		for range 20 {
			if c := d.counters(); c.Engine.HelloBytes > most {
				t.Errorf("%d bytes are held, with a limit of 65536", c.Engine.HelloBytes)
			}
			must(t, ping(old, "still here"))
			time.Sleep(50 * time.Millisecond)
		}
		d.wantLogged("hello memory is full", began)
		late.Wait()
		for _, c := range half {
			must(t, c.Close())
		}
		d.waitCounters("all memory free", 15*time.Second, func(c *counters) bool { return c.Engine.HalfOpen == 0 && c.Engine.HelloBytes == 0 })
		must(t, ping(dialTLS(t, bed, vip(bed, v6), "a.example.com"), "new"))
		must(t, ping(old, "still here"))
	})
}

// TestHellosPerSource has one client fill its share: others are served, and so is it after the timeout.
func TestHellosPerSource(t *testing.T) {
	bed := echoBed(t, testbed.Options{Clients: 2}, nil)
	d := attach(t, bed, siteRoutes(bed, "limits: {hellos_per_source: 4}", "timeouts: {hello: 5s}"), "--workers", "1")
	began := time.Now()
	families(t, func(t *testing.T, v6 bool) {
		greedy, other := clientsOf(bed, v6)[0], clientsOf(bed, v6)[1]
		old := handshake(t, dialFrom(t, bed, greedy, vip(bed, greedy.Is6())), &tls.Config{ServerName: "a.example.com"})
		before := d.counters()
		for range 6 {
			_, err := dialFrom(t, bed, greedy, vip(bed, greedy.Is6())).Write(endless(400))
			must(t, err)
		}
		d.waitCounters("the limit per source", 2*time.Second, func(c *counters) bool {
			return c.Engine.Hellos["source_limit"] >= before.Engine.Hellos["source_limit"]+2
		})
		must(t, ping(handshake(t, dialFrom(t, bed, other, vip(bed, other.Is6())), &tls.Config{ServerName: "a.example.com"}), "another"))
		if c := d.counters(); c.Engine.HalfOpen != 4 {
			t.Errorf("%d half-open connections, want the 4 of the limit still to be there", c.Engine.HalfOpen)
		}
		must(t, ping(old, "still here"))
		must(t, ping(handshake(t, dialFrom(t, bed, greedy, vip(bed, greedy.Is6())), &tls.Config{ServerName: "a.example.com"}), "its turn"))
		d.wantLogged("too many hellos of one client", began)
		must(t, ping(old, "still here"))
	})
}

// TestHelloTooLong announces more than a hello may have, and sends far beyond it.
func TestHelloTooLong(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed), "--workers", "1")
	began := time.Now()
	families(t, func(t *testing.T, v6 bool) {
		before := d.counters()
		wantEnding(t, bed, vip(bed, v6), []byte{22, 3, 1, 0x40, 0, 1, 0, 0x50, 0, 3, 3, 1, 2, 3, 4}, endings["reset"])
		far := func(s []testbed.Segment) []testbed.Segment {
			away := s[0]
			away.Seq += 1 << 17
			away.Payload = make([]byte, 100) // a hello there would be another connection's
			return slices.Concat(s[:1], []testbed.Segment{away}, s[1:])
		}
		got, err := rawClient(t, bed, vip(bed, v6), "a.example.com", far)
		wantBody(t, got, err, "b1", "a.example.com")
		after := d.counters()
		if n := after.Engine.Hellos["too_long"] - before.Engine.Hellos["too_long"]; n != 1 {
			t.Errorf("%d hellos counted as too_long", n)
		}
		if after.Engine.Events["out_of_window"] == before.Engine.Events["out_of_window"] {
			t.Error("no segment counted as out_of_window")
		}
		d.wantLogged("hello is too long", began)
		d.wantLogged("too far apart", began)
	})
}

// TestAckLost loses the acknowledgment that snilb sent for the first part of a hello: the client, whose Nagle waits for it,
// repeats that part and must get it again.
func TestAckLost(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, siteRoutes(bed))
	first := hello(t, classic("a.example.com"))
	families(t, func(t *testing.T, v6 bool) {
		r, err := bed.Raw(vip(bed, v6))
		must(t, err)
		defer func() { _ = r.Close() }()
		_, err = r.Open(testbed.LinuxSYN(r.TSVal), 3*time.Second)
		must(t, err)
		for range 3 {
			must(t, r.Send(r.At(0, first[:100])))
			wantACK(t, r, 101)
		}
		r.SndNxt += 100
		must(t, r.Send(r.Bare(testbed.RST)))
	})
}

// wantACK waits for a bare ACK of what stands below offset, counted from our initial sequence number.
func wantACK(t *testing.T, r *testbed.Raw, offset uint32) {
	t.Helper()
	got, err := r.Recv(3 * time.Second)
	if err != nil || got.Flags != testbed.ACK || got.Ack != r.ISS+offset || got.Seq != r.RcvNxt || got.BadChecksum {
		t.Errorf("answer %s, %v, want an ACK of %d", got, err, r.ISS+offset)
	}
}
