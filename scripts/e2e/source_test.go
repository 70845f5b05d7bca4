// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// sourceRoutes is siteRoutes with a setting for the pools one and two.
func sourceRoutes(bed *testbed.Bed, source string, lines ...string) string {
	return "version: 1\n" + strings.Join(append(lines, ""), "\n") + `listen: [":443"]
pools:
` + pool(bed, "one", "source: "+source, 1) + pool(bed, "two", "source: "+source, 2) + `routes:
  - {sni: a.example.com, pool: one}
  - {sni: b.example.com, pool: two}
`
}

// seenFrom asks over c who the backend thinks its client is.
func seenFrom(t *testing.T, c net.Conn, backend string) netip.AddrPort {
	t.Helper()
	got, err := whoami(c)
	wantBody(t, got, err, backend, "a.example.com")
	fields := strings.Fields(got)
	addr, err := netip.ParseAddrPort(fields[len(fields)-1])
	must(t, err)
	return addr
}

// TestSourceClient has backends see the client's own address and port: their default route leads through the balancer.
func TestSourceClient(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, sourceRoutes(bed, "client"))
	families(t, func(t *testing.T, v6 bool) {
		for range 20 {
			c := dialTLS(t, bed, vip(bed, v6), "a.example.com")
			if got := seenFrom(t, c, "b1"); got.String() != c.LocalAddr().String() {
				t.Errorf("the backend saw %s, the client is %s", got, c.LocalAddr())
			}
			must(t, c.Close())
		}
		download(t, bed, vip(bed, v6), "a.example.com")
		upload(t, bed, vip(bed, v6), "b.example.com")
		t.Run("same-port", func(t *testing.T) { samePort(t, bed, vip(bed, v6)) })
		t.Run("pieces", func(t *testing.T) {
			c, err := dialTCP(t, bed, vip(bed, v6))
			must(t, err)
			split := &splitter{Conn: c, size: 100, pause: 60 * time.Millisecond}
			got, err := whoami(handshake(t, split, classic("a.example.com")))
			wantBody(t, got, err, "b1", "a.example.com")
		})
	})
	d.noFlows(15 * time.Second)
}

// samePort connects from one port again and again, whichever side closes first: the tuple is the client's, and no other
// can be taken instead.
func samePort(t *testing.T, bed *testbed.Bed, target netip.AddrPort) {
	must(t, bed.Client.Sysctl("ipv4/tcp_tw_reuse", "1"))
	for round := range 6 {
		c, err := dialFromPort(bed, target, 7777)
		must(t, err)
		began := time.Now()
		s := handshake(t, c, classic("a.example.com"))
		if got := seenFrom(t, s, "b1"); got.Port() != 7777 {
			t.Errorf("round %d: the backend saw %s", round, got)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("round %d took %s", round, took)
		}
		if round%2 == 0 {
			must(t, c.(*net.TCPConn).SetLinger(0)) // RST, which leaves no TIME_WAIT here
			must(t, c.Close())
			continue
		}
		// The backend closes first and holds the TIME_WAIT.
		_, err = fmt.Fprint(s, "GET / HTTP/1.1\r\nHost: backend\r\nConnection: close\r\n\r\n")
		must(t, err)
		for buf := make([]byte, 4096); err == nil; {
			_, err = c.Read(buf)
		}
		must(t, c.Close())
	}
}

// dialFromPort connects from a port of one's own choice.
func dialFromPort(bed *testbed.Bed, target netip.AddrPort, port int) (net.Conn, error) {
	d := reusing(&net.TCPAddr{Port: port})
	d.Timeout = clientTimeout
	return bed.Client.DialWith(context.Background(), d, "tcp", target.String())
}

// reusing dials from local, also when the kernel still knows an ended connection from there.
func reusing(local *net.TCPAddr) *net.Dialer {
	return &net.Dialer{LocalAddr: local, Control: func(_, _ string, c syscall.RawConn) error {
		var optErr error
		err := c.Control(func(fd uintptr) {
			optErr = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
		})
		return errors.Join(err, optErr)
	}}
}

// TestSourceClientDirect has a client speak to a backend directly, past the listeners, while the balancer speaks to it from
// that client's address: what is not ours goes its own way.
func TestSourceClientDirect(t *testing.T) {
	bed := newBed(t, testbed.Options{Forward: true})
	startBackends(t, bed)
	attach(t, bed, sourceRoutes(bed, "client"))
	families(t, func(t *testing.T, v6 bool) {
		through := dialTLS(t, bed, vip(bed, v6), "a.example.com")
		direct := dialTLS(t, bed, at(bed, 1, v6, 443), "a.example.com")
		for range 3 {
			for _, c := range []net.Conn{through, direct} {
				if got := seenFrom(t, c, "b1"); got.String() != c.LocalAddr().String() {
					t.Errorf("the backend saw %s, the client is %s", got, c.LocalAddr())
				}
			}
		}
	})
}

// TestSourceClientNoWayBack takes the backends' route through the balancer away: nothing answers, and the log says why.
func TestSourceClientNoWayBack(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, sourceRoutes(bed, "client", "timeouts: {connect: 1s, attempt: 500ms}"))
	out, err := bed.Backend.Command(t.Context(), "ip", "route", "replace", "blackhole", "default").CombinedOutput()
	if err != nil {
		t.Fatalf("ip route: %v\n%s", err, out)
	}
	out, err = bed.Backend.Command(t.Context(), "ip", "route", "del", "default", "dev", "eth0").CombinedOutput()
	if err != nil {
		t.Fatalf("ip route: %v\n%s", err, out)
	}
	if _, err := goClient(t, bed, vip(bed, false), "a.example.com"); err == nil {
		t.Error("an answer without a way back")
	}
	if !strings.Contains(d.stderr.String(), "route to clients must lead through it") {
		t.Error("the log does not say what is missing")
	}
}

// TestSourceAddresses gives pools addresses and ports of their own, on the balancer's loopback device.
func TestSourceAddresses(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	for _, addr := range []string{"203.0.113.5/32", "203.0.113.6/32", "2001:db8:3::5/128", "2001:db8:3::6/128"} {
		if out, err := bed.LB.Command(t.Context(), "ip", "addr", "add", addr, "dev", "lo").CombinedOutput(); err != nil {
			t.Fatalf("ip addr: %v\n%s", err, out)
		}
	}
	d := attach(t, bed, sourceRoutes(bed, `{addresses: [203.0.113.5, 203.0.113.6, "2001:db8:3::5", "2001:db8:3::6"], ports: "9000-9099"}`))
	families(t, func(t *testing.T, v6 bool) {
		seen := map[netip.Addr]int{}
		for range 40 {
			c := dialTLS(t, bed, vip(bed, v6), "a.example.com")
			got := seenFrom(t, c, "b1")
			seen[got.Addr()]++
			if got.Port() < 9000 || got.Port() > 9099 {
				t.Errorf("source %s", got)
			}
			must(t, c.Close())
		}
		want := []netip.Addr{netip.MustParseAddr("203.0.113.5"), netip.MustParseAddr("203.0.113.6")}
		if v6 {
			want = []netip.Addr{netip.MustParseAddr("2001:db8:3::5"), netip.MustParseAddr("2001:db8:3::6")}
		}
		if len(seen) != 2 || seen[want[0]] < 5 || seen[want[1]] < 5 {
			t.Errorf("connections by source: %v", seen)
		}
	})
	d.stop(syscall.SIGTERM)
	refused := start(t, bed, instanceName(), bed.Uplinks, sourceRoutes(bed, `{addresses: [203.0.113.77]}`))
	<-refused.exited
	if refused.err == nil || !strings.Contains(refused.stderr.String(), "203.0.113.77 is no address of this node") {
		t.Errorf("a source address of somebody else: %v", refused.err)
	}
}

// TestSourceOverlap has two pools speak to one backend from ranges of ports that overlap: a port that both may use is never
// used twice, and whoever comes next has it once it is free.
func TestSourceOverlap(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	for _, addr := range []string{"203.0.113.5/32", "2001:db8:3::5/128"} {
		if out, err := bed.LB.Command(t.Context(), "ip", "addr", "add", addr, "dev", "lo").CombinedOutput(); err != nil {
			t.Fatalf("ip addr: %v\n%s", err, out)
		}
	}
	const source = `source: {addresses: [203.0.113.5, "2001:db8:3::5"], ports: "%s"}`
	d := attach(t, bed, "version: 1\nlisten: [\":443\"]\npools:\n"+
		pool(bed, "low", fmt.Sprintf(source, "9000-9003"), 1)+pool(bed, "high", fmt.Sprintf(source, "9002-9005"), 1)+
		"routes:\n  - {sni: a.example.com, pool: low}\n  - {sni: b.example.com, pool: high}\n", "--workers", "1")
	families(t, func(t *testing.T, v6 bool) {
		open := map[uint16]*tls.Conn{} // by the port that the backend sees
		defer func() {
			for _, c := range open {
				_ = c.Close()
			}
		}()
		dial := func(name string) (port uint16) {
			c := dialTLS(t, bed, vip(bed, v6), name)
			got, err := whoami(c)
			wantBody(t, got, err, "b1", name)
			port = netip.MustParseAddrPort(got[strings.LastIndex(got, " ")+1:]).Port()
			if open[port] != nil {
				t.Errorf("port %d is used twice", port)
			}
			open[port] = c
			return port
		}
		for range 4 {
			dial("a.example.com")
		}
		for range 2 { // in either order, as it begins anywhere: all others of its own are the other pool's
			if got := dial("b.example.com"); got != 9004 && got != 9005 {
				t.Errorf("port %d, want 9004 or 9005", got)
			}
		}
		if c, err := tryTLS(t, bed, vip(bed, v6), "b.example.com"); err == nil {
			_ = c.Close()
			t.Error("a seventh connection over six ports")
		}
		end := func(port uint16) { // without a RST, behind which a flow stays for a while
			must(t, open[port].NetConn().(*net.TCPConn).CloseWrite())
			_, _ = io.Copy(io.Discard, open[port])
			_ = open[port].Close()
			delete(open, port)
		}
		end(9003)
		d.waitFlows("one less", 10*time.Second, func(f []flow) bool { return len(f) == 5 })
		if got := dial("b.example.com"); got != 9003 {
			t.Errorf("port %d, want 9003, which alone is free", got)
		}
		for port, c := range open {
			if got, err := whoami(c); err != nil {
				t.Errorf("the connection from port %d: %q, %v", port, got, err)
			}
			end(port)
		}
		d.noFlows(15 * time.Second)
	})
}

// TestSourceClientOfProxy has a proxy in front that names its client: that one's address and port are what the backend sees,
// and what it answers finds the way back.
func TestSourceClientOfProxy(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, strings.Replace(sourceRoutes(bed, "client"), `listen: [":443"]`,
		`listen: {address: ":443", accept_proxy: ["198.51.100.0/24", "2001:db8:1::/64"]}`, 1), "--workers", "1")
	families(t, func(t *testing.T, v6 bool) {
		origin := netip.MustParseAddrPort("203.0.113.77:5555")
		if v6 {
			origin = netip.MustParseAddrPort("[2001:db8:77::1]:5555")
		}
		for range 3 { // again from the same port: the numbers must rise all the same
			raw, err := dialTCP(t, bed, vip(bed, v6))
			must(t, err)
			c := handshake(t, &headed{Conn: raw, header: proxyHeader(t, 2, origin, vip(bed, v6))}, classic("a.example.com"))
			if got := seenFrom(t, c, "b1"); got != origin {
				t.Errorf("the backend saw %s, the header said %s", got, origin)
			}
			if f := d.flows(); !slices.ContainsFunc(f, func(f flow) bool { return f.Client == origin.String() }) {
				t.Errorf("flows: %+v", f)
			}
			must(t, raw.SetLinger(0))
			must(t, raw.Close())
			d.waitFlows("none open", 2*time.Second, func(f []flow) bool {
				return !slices.ContainsFunc(f, func(f flow) bool { return f.State == "open" })
			})
		}
	})
}
