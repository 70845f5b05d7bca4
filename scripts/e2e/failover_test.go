// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// connects is how often attempts at a backend have ended that way; no backend means all of them.
func (d *daemon) connects(backend, result string) uint64 {
	d.t.Helper()
	c := d.counters()
	return c.connects(backend, result)
}

// onlyConnects fails when an attempt at any backend ended in another way than the given ones.
func (d *daemon) onlyConnects(results ...string) {
	d.t.Helper()
	for _, c := range d.counters().Engine.Connects {
		if !strings.Contains(" "+strings.Join(results, " ")+" ", " "+c.Result+" ") {
			d.t.Errorf("%d attempts at %s ended by %q, want none but %v", c.Count, c.Backend, c.Result, results)
		}
	}
}

// filters counts the tables that filter has made, for their names.
var filters atomic.Int64

// filter adds nftables rules to a hook of a namespace (input or output) until the test ends or the returned function is
// called. The set `seen` of the table is there to know a connection by family and port.
func filter(t *testing.T, ns *testbed.NS, hook string, rules ...string) (remove func()) {
	t.Helper()
	needTool(t, "nft")
	table := fmt.Sprintf("inet e2e%d", filters.Add(1))
	nft(t, ns, fmt.Sprintf(`table %s {
	set seen { type nf_proto . inet_service; flags dynamic; size 65535; }
	chain filter { type filter hook %s priority -200
		%s
	}
}`, table, hook, strings.Join(rules, "\n\t\t")))
	gone := false
	remove = func() {
		if !gone {
			nft(t, ns, "delete table "+table)
			gone = true
		}
	}
	t.Cleanup(remove)
	return remove
}

// nft runs commands of nft(8). Its context is not the test's, which has ended when a clean-up runs.
func nft(t *testing.T, ns *testbed.NS, commands string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	cmd := ns.Command(ctx, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(commands)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("nft: %v\n%s\n%s", err, commands, out)
	}
}

// Rules for filter that drop the first packet of its kind of every connection, which is known by the port given as the
// expression of its side.
func dropFirstOfEach(match, port string) string {
	return fmt.Sprintf("%s meta nfproto . %s != @seen update @seen { meta nfproto . %s } drop", match, port, port)
}

const (
	matchSYN    = "tcp flags & (syn | ack) == syn"
	matchSYNACK = "tcp flags & (syn | ack) == (syn | ack)"
)

// nobody is an address of the backend network that no host has.
func nobody(bed *testbed.Bed, v6 bool, n int) netip.Addr {
	a := bed.Backends4[0].AsSlice()
	if v6 {
		a = bed.Backends6[0].AsSlice()
	}
	a[len(a)-1] = byte(200 + n)
	addr, _ := netip.AddrFromSlice(a)
	return addr
}

// failoverRoutes is one pool of the given backends, each a pair of addresses.
func failoverRoutes(timeouts string, backends [][2]netip.AddrPort, lines ...string) string {
	var list []string
	for _, b := range backends {
		list = append(list, fmt.Sprintf("%q, %q", b[0], b[1]))
	}
	return fmt.Sprintf("version: 1\n%slisten: [\":443\"]\npools:\n  all: {timeouts: {%s}, backends: [%s]}\nroutes:\n  - {sni: \"**\", pool: all}\n",
		strings.Join(append(lines, ""), "\n"), timeouts, strings.Join(list, ", "))
}

// both is a backend's address in both families.
func both(bed *testbed.Bed, i int, port uint16) [2]netip.AddrPort {
	return [2]netip.AddrPort{at(bed, i, false, port), at(bed, i, true, port)}
}

func bothNobody(bed *testbed.Bed, n int) [2]netip.AddrPort {
	return [2]netip.AddrPort{
		netip.AddrPortFrom(nobody(bed, false, n), 443), netip.AddrPortFrom(nobody(bed, true, n), 443),
	}
}

// askServed makes a few connections by curl and by Go, each of which b2 must answer within a time, and returns how long the
// slowest took.
func askServed(t *testing.T, bed *testbed.Bed, v6 bool, within time.Duration) (slowest time.Duration) {
	t.Helper()
	for i := range 4 {
		ask := goClient
		if i == 0 {
			needTool(t, "curl")
			ask = curl
		}
		began := time.Now()
		got, err := ask(t, bed, vip(bed, v6), "a.example.com")
		slowest = max(slowest, time.Since(began))
		wantBody(t, got, err, "b2", "a.example.com")
	}
	if slowest > within {
		t.Errorf("a connection took %s, want at most %s", slowest, within)
	}
	return slowest
}

const (
	// failoverMargin is what a connection may take beyond the wait for a backend, on a busy machine. A SYN that is lost there
	// costs its client a second.
	failoverMargin = 5 * time.Second
	// icmpAttempt is the attempt timeout of TestFailoverICMP, and icmpWithin the time in which the next backend must serve.
	icmpAttempt = 15 * time.Second
	icmpWithin  = failoverMargin
)

// atOnce ends a daemon without a wait for connections that are closed and not yet forgotten.
var atOnce = []string{"--drain-timeout", "0s"}

// TestFailoverRefused has a first backend with a closed port: the next one serves, long before any timeout.
func TestFailoverRefused(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, failoverRoutes("connect: 30s, attempt: 15s", [][2]netip.AddrPort{both(bed, 1, 9), both(bed, 2, 443)}), atOnce...)
	families(t, func(t *testing.T, v6 bool) {
		t.Logf("the slowest took %s", askServed(t, bed, v6, failoverMargin))
		if n := d.connects(at(bed, 1, v6, 9).String(), "refused"); n == 0 {
			t.Error("the first backend was never asked")
		}
	})
	d.onlyConnects("ok", "refused")
}

// TestFailoverSilent has a first backend that does not answer: one that drops SYNs, and an address nobody has, so that not
// even the neighbour is found.
func TestFailoverSilent(t *testing.T) {
	const attempt = 500 * time.Millisecond
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	filter(t, bed.Backend, "input", matchSYN+" tcp dport 9 drop")
	for name, first := range map[string][2]netip.AddrPort{"dropped": both(bed, 1, 9), "no-neighbour": bothNobody(bed, 0)} {
		t.Run(name, func(t *testing.T) {
			d := attach(t, bed, failoverRoutes("connect: 20s, attempt: 500ms", [][2]netip.AddrPort{first, both(bed, 2, 443)}), atOnce...)
			families(t, func(t *testing.T, v6 bool) {
				t.Logf("the slowest took %s", askServed(t, bed, v6, attempt+failoverMargin))
			})
			for _, addr := range first {
				if n := d.connects(addr.String(), "timeout"); n == 0 {
					t.Errorf("the silent backend %s was never asked", addr)
				}
			}
			d.onlyConnects("ok", "timeout")
		})
	}
}

// TestFailoverICMP has a first backend whose side answers the SYN by an ICMP error.
func TestFailoverICMP(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	for name, reject := range map[string][2]string{
		"host":  {"icmp host-unreachable", "icmpv6 addr-unreachable"},
		"admin": {"icmp admin-prohibited", "icmpv6 admin-prohibited"},
		"port":  {"icmp port-unreachable", "icmpv6 port-unreachable"},
	} {
		t.Run(name, func(t *testing.T) {
			remove := filter(t, bed.Backend, "input",
				"meta nfproto ipv4 tcp dport 9 reject with "+reject[0], "meta nfproto ipv6 tcp dport 9 reject with "+reject[1])
			defer remove()
			d := attach(t, bed, failoverRoutes("connect: 20s, attempt: "+icmpAttempt.String(), [][2]netip.AddrPort{both(bed, 1, 9), both(bed, 2, 443)}), atOnce...)
			families(t, func(t *testing.T, v6 bool) {
				t.Logf("the slowest took %s", askServed(t, bed, v6, icmpWithin))
			})
			if d.connects("", "ok") != 8 {
				t.Errorf("connects: %+v, want 8 ok", d.counters().Engine.Connects)
			}
		})
	}
}

// TestConnectTimeout has a pool of three silent backends: connect bounds the attempts at all of them together.
func TestConnectTimeout(t *testing.T) {
	const connect = 2 * time.Second
	bed := newBed(t, testbed.Options{})
	filter(t, bed.Backend, "input", matchSYN+" tcp dport 9 drop")
	d := attach(t, bed, failoverRoutes("connect: 2s, attempt: 1s", [][2]netip.AddrPort{both(bed, 1, 9), bothNobody(bed, 0), both(bed, 2, 9)}))
	families(t, func(t *testing.T, v6 bool) {
		began := time.Now()
		wantEnding(t, bed, vip(bed, v6), hello(t, classic("a.example.com")), endings["reset"])
		if took := time.Since(began); took < connect || took > connect+failoverMargin {
			t.Errorf("refused after %s, want %s", took, connect)
		}
	})
	if n := d.connects("", "timeout"); n != 4 {
		t.Errorf("%d attempts timed out, want two a connection", n)
	}
	d.onlyConnects("timeout")
	d.wantDecisions("no_backend/reset", 2)
}

// wantDecisions looks how often a connection was decided that way.
func (d *daemon) wantDecisions(result string, want uint64) {
	d.t.Helper()
	decisions := d.counters().Engine.Decisions
	var n uint64
	for _, one := range decisions {
		if one.Result == result {
			n += one.Count
		}
	}
	if n != want {
		d.t.Errorf("%d decisions %s, want %d: %+v", n, result, want, decisions)
	}
}

// TestNoBackend has a pool that refuses as a whole, under each no_backend.
func TestNoBackend(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	down := [][2]netip.AddrPort{both(bed, 1, 9), both(bed, 2, 9)}
	first := hello(t, classic("a.example.com"))
	for word, ending := range endings {
		t.Run(word, func(t *testing.T) {
			d := attach(t, bed, failoverRoutes("connect: 20s", down, "no_backend: "+word), atOnce...)
			families(t, func(t *testing.T, v6 bool) { wantEnding(t, bed, vip(bed, v6), first, ending) })
			if n := d.connects("", "refused"); n != 4 {
				t.Errorf("%d attempts refused, want two a connection", n)
			}
			d.wantDecisions("no_backend/"+word, 2)
		})
	}
	t.Run("pool", func(t *testing.T) {
		routes := failoverRoutes("connect: 20s", down, `no_backend: "pool:spare"`)
		routes = strings.Replace(routes, "pools:\n", "pools:\n"+pool(bed, "spare", "", 2), 1)
		d := attach(t, bed, routes, atOnce...)
		families(t, func(t *testing.T, v6 bool) { askServed(t, bed, v6, failoverMargin) })
		d.wantDecisions("no_backend/pool", 8)
	})
}

// TestLostHandshake loses one packet of each handshake with a backend: its repetition comes after 250 ms, and neither a
// failure nor another backend is the price.
func TestLostHandshake(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	for name, lost := range map[string]struct{ hook, rule string }{
		"syn":     {"input", dropFirstOfEach(matchSYN+" tcp dport 443", "tcp sport")},
		"syn-ack": {"output", dropFirstOfEach(matchSYNACK+" tcp sport 443", "tcp dport")},
	} {
		t.Run(name, func(t *testing.T) {
			remove := filter(t, bed.Backend, lost.hook, lost.rule)
			defer remove()
			d := attach(t, bed, failoverRoutes("connect: 20s", [][2]netip.AddrPort{both(bed, 2, 443), both(bed, 1, 9)}), atOnce...)
			families(t, func(t *testing.T, v6 bool) {
				for range 2 { // the other backend's turn is a refusal
					began := time.Now()
					got, err := goClient(t, bed, vip(bed, v6), "a.example.com")
					wantBody(t, got, err, "b2", "a.example.com")
					took := time.Since(began)
					t.Logf("took %s", took)
					if took < 200*time.Millisecond {
						t.Errorf("took %s: nothing can have been lost", took)
					}
				}
			})
			d.onlyConnects("ok", "refused")
		})
	}
}

// timeWaits counts the connections that a namespace holds in TIME_WAIT at a local address.
func timeWaits(t *testing.T, ns *testbed.NS, local netip.AddrPort) int {
	t.Helper()
	return countSockets(t, ns, "time-wait", local)
}

// countSockets counts the sockets of a state of ss(8) at a local address.
func countSockets(t *testing.T, ns *testbed.NS, state string, local netip.AddrPort) int {
	t.Helper()
	needTool(t, "ss")
	host := local.Addr().String()
	if local.Addr().Is6() {
		host = "[" + host + "]"
	}
	out, err := ns.Command(t.Context(), "ss", "-Htn", "state", state, "src", fmt.Sprintf("%s:%d", host, local.Port())).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		t.Fatalf("ss: %v\n%s", err, exit.Stderr)
	}
	must(t, err)
	return bytes.Count(out, []byte("\n"))
}

// answerAndClose answers the first bytes by one byte and closes first.
func answerAndClose(c net.Conn) {
	defer func() { _ = c.Close() }()
	buf := make([]byte, 4096)
	if _, err := c.Read(buf); err != nil {
		return
	}
	_, _ = c.Write(buf[:1])
}

// TestTimeWait uses source ports again that the backend, which closed first, holds in TIME_WAIT: the numbers of our SYN rise,
// so that it takes every one, with timestamps and without.
func TestTimeWait(t *testing.T) {
	const ports = 25
	bed := newBed(t, testbed.Options{})
	for _, v6 := range []bool{false, true} {
		serve(t, bed.Backend, at(bed, 1, v6, 443), answerAndClose)
	}
	first := hello(t, classic("a.example.com"))
	for name, timestamps := range map[string]string{"timestamps": "1", "no-timestamps": "0"} {
		t.Run(name, func(t *testing.T) {
			must(t, bed.Client.Sysctl("ipv4/tcp_timestamps", timestamps))
			base := 20000
			if timestamps == "0" {
				base = 21000
			}
			d := attach(t, bed, siteRoutes(bed), "--workers", "1", "--source-ports", fmt.Sprintf("%d-%d", base, base+ports-1))
			for round := range 2 {
				for _, v6 := range []bool{false, true} {
					for range ports {
						c, err := dialTCP(t, bed, vip(bed, v6))
						must(t, err)
						if err := exchange(c, first); err != nil {
							t.Fatalf("round %d: %v", round, err)
						}
						_, err = io.Copy(io.Discard, c) // until the backend has closed
						must(t, errors.Join(err, c.Close()))
					}
				}
				d.noFlows(15 * time.Second)
				for _, v6 := range []bool{false, true} {
					if n := timeWaits(t, bed.Backend, at(bed, 1, v6, 443)); n < ports {
						t.Errorf("round %d: the backend holds %d connections in TIME_WAIT, want %d", round, n, ports)
					}
				}
			}
			d.onlyConnects("ok")
		})
	}
}

// TestPortHeld starts anew, with the same source ports, over a backend that still holds the connections of a daemon that was
// killed: it answers a SYN of theirs by a challenge ACK. Every new connection works all the same.
func TestPortHeld(t *testing.T) {
	const ports = 4
	bed := echoBed(t, testbed.Options{}, nil)
	args := []string{"--drain-timeout", "0s", "--workers", "1", "--source-ports", fmt.Sprintf("22000-%d", 22000+ports-1)}
	old := attach(t, bed, siteRoutes(bed), args...)
	for range ports {
		for _, v6 := range []bool{false, true} {
			must(t, ping(dialTLS(t, bed, vip(bed, v6), "a.example.com"), "old"))
		}
	}
	time.Sleep(300 * time.Millisecond) // no delayed ACK may meet the time without programs, and a reset
	old.kill()
	_, err := old.snilb("detach", "--all", "--name", old.name)
	must(t, err)
	d := attach(t, bed, siteRoutes(bed), args...)
	families(t, func(t *testing.T, v6 bool) {
		backend := at(bed, 1, v6, 443)
		if n := countSockets(t, bed.Backend, "established", backend); n != ports {
			t.Fatalf("the backend holds %d old connections, want %d", n, ports)
		}
		for range ports {
			must(t, ping(dialTLS(t, bed, vip(bed, v6), "a.example.com"), "new"))
		}
		if n := countSockets(t, bed.Backend, "established", backend); n != ports {
			t.Errorf("the backend holds %d connections, want the %d new ones", n, ports)
		}
	})
	if n := d.connects("", "port_busy"); n != 2*ports {
		t.Errorf("%d ports were found held, want %d", n, 2*ports)
	}
	d.onlyConnects("ok", "port_busy")
}
