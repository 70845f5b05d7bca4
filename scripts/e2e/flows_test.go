// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// echoBed is a bed with an echo backend at b1, in both families.
func echoBed(t *testing.T, opts testbed.Options, ends chan<- error) *testbed.Bed {
	t.Helper()
	bed := newBed(t, opts)
	for _, v6 := range []bool{false, true} {
		serveEcho(t, bed, at(bed, 1, v6, 443), ends)
	}
	return bed
}

// TestFlows reads status and flows while a connection is open.
func TestFlows(t *testing.T) {
	bed := echoBed(t, testbed.Options{}, nil)
	d := attach(t, bed, siteRoutes(bed))
	families(t, func(t *testing.T, v6 bool) {
		c := dialTLS(t, bed, vip(bed, v6), "A.Example.Com")
		must(t, ping(c, "hello"))
		out, err := d.snilb("flows", "--name", d.name, "-o", "json")
		must(t, err)
		var flows []flow
		if err := json.Unmarshal([]byte(out), &flows); err != nil {
			t.Fatalf("flows -o json is no list of flows: %v\n%s", err, out)
		}
		if len(flows) != 1 {
			t.Fatalf("%d flows, want 1:\n%s", len(flows), out)
		}
		checkFlow(t, flows[0], flow{
			Client: c.LocalAddr().String(), SNI: "a.example.com", Pool: "one", Backend: at(bed, 1, v6, 443).String(), State: "open",
		})
		checkStatus(t, d)
		must(t, c.Close())
		d.noFlows(15 * time.Second)
	})
}

// checkFlow compares the fields that want sets, and asks for all the others to be there.
func checkFlow(t *testing.T, got, want flow) {
	t.Helper()
	for _, f := range []struct{ name, got, want string }{
		{"client", got.Client, want.Client}, {"sni", got.SNI, want.SNI}, {"pool", got.Pool, want.Pool},
		{"backend", got.Backend, want.Backend}, {"state", got.State, want.State},
	} {
		if f.got != f.want {
			t.Errorf("flow: %s is %q, want %q", f.name, f.got, f.want)
		}
	}
	if got.Listener == "" {
		t.Error("flow: no listener")
	}
	if got.AgeSeconds == nil || got.IdleSeconds == nil || got.BytesIn == nil || got.BytesOut == nil {
		t.Fatal("flow: one of age_seconds, idle_seconds, bytes_in, bytes_out is missing")
	}
	if age, idle := *got.AgeSeconds, *got.IdleSeconds; age < 0 || age > 30 || idle < 0 || idle > age+1 {
		t.Errorf("flow: age_seconds %g, idle_seconds %g", age, idle)
	}
}

// checkStatus asks for a JSON object and exit code 0; its fields are not fixed yet.
func checkStatus(t *testing.T, d *daemon) {
	t.Helper()
	out, err := d.snilb("status", "--name", d.name, "-o", "json")
	must(t, err)
	var status map[string]any
	if err := json.Unmarshal([]byte(out), &status); err != nil || len(status) == 0 {
		t.Errorf("status -o json: %v\n%s", err, out)
	}
}

// TestBytes compares bytes_in and bytes_out with what the client's socket has seen, to the byte.
func TestBytes(t *testing.T) {
	bed := echoBed(t, testbed.Options{}, nil)
	d := attach(t, bed, siteRoutes(bed))
	families(t, func(t *testing.T, v6 bool) {
		raw, err := dialTCP(t, bed, vip(bed, v6))
		must(t, err)
		count := &counter{Conn: raw}
		c := handshake(t, count, &tls.Config{ServerName: "a.example.com"})
		for i := range 50 {
			must(t, ping(c, fmt.Sprintf("%*d", 1+i*997, i)))
		}
		flows := d.waitFlows("one", time.Second, func(f []flow) bool { return len(f) == 1 })
		wantBytes(t, bed, flows[0], count, raw)
		must(t, c.Close())
		d.noFlows(15 * time.Second)
	})
}

// wantBytes compares a flow with what its client has written and read. What either side sends again, on a busy machine, is
// counted again once the flow is bound.
func wantBytes(t *testing.T, bed *testbed.Bed, f flow, count *counter, raw *net.TCPConn) {
	t.Helper()
	if f.BytesIn == nil || f.BytesOut == nil {
		t.Fatal("no bytes_in or bytes_out")
	}
	const segment = 1460 // at the most
	in, out, sent, received := *f.BytesIn, *f.BytesOut, count.out.Load(), count.in.Load()
	again, backends := tcpInfo(t, raw).Bytes_retrans, uint64(segment*snmp(t, bed.Backend, "Tcp: RetransSegs"))
	if in < sent || in > sent+again || out < received || out > received+backends {
		t.Errorf("bytes_in %d, bytes_out %d, but the client sent %d and %d again and received %d, backends sent up to %d again",
			in, out, sent, again, received, backends)
	}
}

// TestIdle lets a connection idle out: both sides hear of it by RST, and the table is empty.
func TestIdle(t *testing.T) {
	ends := make(chan error, 2)
	bed := echoBed(t, testbed.Options{}, ends)
	d := attach(t, bed, siteRoutes(bed, "timeouts: {idle: 2s}"))
	families(t, func(t *testing.T, v6 bool) {
		for len(ends) > 0 {
			<-ends // health checks end here too
		}
		c := dialTLS(t, bed, vip(bed, v6), "a.example.com")
		for range 4 { // longer than the timeout in all, but never idle for as long
			must(t, ping(c, "busy"))
			time.Sleep(700 * time.Millisecond)
		}
		must(t, c.SetReadDeadline(time.Now().Add(15*time.Second)))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("client: %v, want a reset", err)
		}
		wantReset(t, ends)
		d.noFlows(5 * time.Second)
	})
}

// wantReset waits for a backend connection that ended by RST.
func wantReset(t *testing.T, ends <-chan error) {
	t.Helper()
	timeout := time.After(5 * time.Second)
	for {
		select {
		case err := <-ends:
			if errors.Is(err, syscall.ECONNRESET) {
				return
			}
		case <-timeout:
			t.Error("no backend connection was reset")
			return
		}
	}
}

// TestReset has either side reset a connection: the other side hears it, and the flow goes.
func TestReset(t *testing.T) {
	ends := make(chan error, 100)
	bed := echoBed(t, testbed.Options{}, ends)
	d := attach(t, bed, siteRoutes(bed))
	raw, err := dialTCP(t, bed, vip(bed, false))
	must(t, err)
	must(t, ping(handshake(t, raw, classic("a.example.com")), "hello"))
	must(t, raw.SetLinger(0))
	must(t, raw.Close())
	wantReset(t, ends)
	d.noFlows(20 * time.Second)
}

// connections is how many TestPorts makes. The whole number takes most of a minute, so a developer's run makes fewer.
var connections = flag.Int("connections", defaultConnections(), "how many connections TestPorts makes")

func defaultConnections() int {
	if os.Getenv("CI") != "" {
		return 100_000
	}
	return 20_000
}

// TestPorts makes a great many short connections from one client address, so that ports of the client and source ports of
// the balancer come around again. None may fail, and the table is empty afterwards.
func TestPorts(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	serve(t, bed.Backend, at(bed, 1, false, 443), oneByte)
	// The client closes first, so that it holds the TIME_WAITs; it may use those ports again after a second.
	must(t, bed.Client.Sysctl("ipv4/tcp_tw_reuse", "1"))
	must(t, bed.Client.Sysctl("ipv4/ip_local_port_range", "1024 65535"))
	d := attach(t, bed, siteRoutes(bed))
	first := hello(t, classic("a.example.com"))
	const workers = 4
	var left atomic.Int64
	left.Store(int64(*connections))
	errs := make([]error, workers)
	var wg sync.WaitGroup
	began := time.Now()
	for i := range workers {
		wg.Go(func() { errs[i] = hurry(bed, vip(bed, false), first, &left) })
	}
	wg.Wait()
	took := time.Since(began)
	must(t, errors.Join(errs...))
	t.Logf("%d connections in %s: %.0f us each", *connections, took.Round(time.Millisecond),
		float64(took.Microseconds())/float64(*connections))
	d.noFlows(30 * time.Second)
}

// hurry makes connections one after another until none are left to make. It stays on one thread in the client's
// namespace: to enter and leave it each time would cost more than the connection.
func hurry(bed *testbed.Bed, target netip.AddrPort, first []byte, left *atomic.Int64) error {
	return bed.Client.Do(func() error {
		d := net.Dialer{Timeout: clientTimeout}
		for left.Add(-1) >= 0 {
			c, err := d.Dial("tcp", target.String())
			if err != nil {
				return err
			}
			err = exchange(c, first)
			if err := errors.Join(err, c.Close()); err != nil {
				return fmt.Errorf("with %d connections left: %w", left.Load(), err)
			}
		}
		return nil
	})
}

func exchange(c net.Conn, first []byte) error {
	if err := c.SetDeadline(time.Now().Add(clientTimeout)); err != nil {
		return err
	}
	if _, err := c.Write(first); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// oneByte answers the first bytes by one byte and waits for the other side to close.
func oneByte(c net.Conn) {
	defer func() { _ = c.Close() }()
	buf := make([]byte, 4096)
	if _, err := c.Read(buf); err != nil {
		return
	}
	if _, err := c.Write(buf[:1]); err != nil {
		return
	}
	_, _ = io.Copy(io.Discard, c)
}
