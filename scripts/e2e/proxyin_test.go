// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"

	"snilb/scripts/testbed"
)

// The client's addresses in these tests: a proxy whose word is taken, a client that has a route of its own, and another.
const (
	front = iota
	known
	other
)

func clientAt(bed *testbed.Bed, i int, v6 bool) netip.Addr {
	if v6 {
		return bed.Clients6[i]
	}
	return bed.Clients4[i]
}

// frontBed is a bed with these addresses.
func frontBed(t *testing.T) *testbed.Bed {
	t.Helper()
	return newBed(t, testbed.Options{Clients: other + 1})
}

// rawProxies are addresses of no kernel that speak for clients like front.
var rawProxies = map[bool]netip.Prefix{false: netip.MustParsePrefix("198.51.100.112/28"), true: netip.MustParsePrefix("2001:db8:1::7000/116")}

// frontRoutes take headers from front, and lead a to b1 for known and to b2 for all others; b leads to b3.
func frontRoutes(bed *testbed.Bed, lines ...string) string {
	return fmt.Sprintf("version: 1\n"+strings.Join(append(lines, ""), "\n")+`listen:
  - address: ":443"
    accept_proxy: [%s/32, %s/128, %s, "%s"]
pools:
`, bed.Clients4[front], bed.Clients6[front], rawProxies[false], rawProxies[true]) +
		pool(bed, "one", "", 1) + pool(bed, "two", "", 2) + pool(bed, "three", "", 3) + fmt.Sprintf(`routes:
  - {name: known, sni: a.example.com, clients: ["%s/32", "%s/128"], pool: one}
  - {sni: a.example.com, pool: two}
  - {sni: b.example.com, pool: three}
`, bed.Clients4[known], bed.Clients6[known])
}

// dialFrom connects from one of the client's addresses; the connection is closed with the test.
func dialFrom(t *testing.T, bed *testbed.Bed, from netip.Addr, target netip.AddrPort) *net.TCPConn {
	t.Helper()
	d := net.Dialer{Timeout: clientTimeout, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
	c, err := bed.Client.DialWith(t.Context(), &d, "tcp", target.String())
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return c.(*net.TCPConn)
}

// proxyHeader is what a proxy writes before the bytes of source.
func proxyHeader(t *testing.T, version byte, source, destination netip.AddrPort) []byte {
	t.Helper()
	h := proxyproto.HeaderProxyFromAddrs(version, net.TCPAddrFromAddrPort(source), net.TCPAddrFromAddrPort(destination))
	raw, err := h.Format()
	must(t, err)
	return raw
}

// headed writes a header before the first bytes, in one piece with them.
type headed struct {
	net.Conn
	header []byte
}

func (h *headed) Write(p []byte) (int, error) {
	n, err := h.Conn.Write(append(h.header, p...))
	n = max(n-len(h.header), 0)
	h.header = nil
	return n, err
}

// TestProxyIn has HAProxy in front, as a proxy speaks for its clients: by both versions, and with a checksum.
func TestProxyIn(t *testing.T) {
	bed := frontBed(t)
	startBackends(t, bed)
	d := attach(t, bed, frontRoutes(bed), noDrain...)
	startHAProxy(t, bed.Client, frontSections(bed), netip.AddrPortFrom(bed.Clients6[front], 8002))
	families(t, func(t *testing.T, v6 bool) {
		for port, how := range map[uint16]string{8001: "v1", 8002: "v2"} {
			t.Run(how, func(t *testing.T) {
				proxy := netip.AddrPortFrom(clientAt(bed, front, v6), port)
				for i, backend := range map[int]string{known: "b1", other: "b2"} {
					raw := dialFrom(t, bed, clientAt(bed, i, v6), proxy)
					c := handshake(t, raw, &tls.Config{ServerName: "a.example.com"})
					got, err := whoami(c)
					wantBody(t, got, err, backend, "a.example.com")
					f := flowOf(t, d, addrOf(raw.LocalAddr()))
					peer, err := netip.ParseAddrPort(f.Peer)
					if err != nil || peer.Addr() != proxy.Addr() {
						t.Errorf("flow: peer %q, want one of %s", f.Peer, proxy.Addr())
					}
				}
			})
		}
	})
}

// frontSections are two HAProxy listeners at front's addresses: 8001 speaks version 1, 8002 version 2.
func frontSections(bed *testbed.Bed) string {
	var sections strings.Builder
	for _, v6 := range []bool{false, true} {
		from := clientAt(bed, front, v6)
		for port, how := range map[uint16]string{8001: "send-proxy", 8002: "send-proxy-v2 proxy-v2-options crc32c,unique-id"} {
			fmt.Fprintf(&sections, "listen p%d-%t\n	mode tcp\n	unique-id-format %%pid\n	bind %s\n	server s %s %s source %s\n",
				port, v6, netip.AddrPortFrom(from, port), vip(bed, v6), how, netip.AddrPortFrom(from, 0))
		}
	}
	return sections.String()
}

// TestProxyInOut chains proxies: what the first one said of the client is what the backend is told.
func TestProxyInOut(t *testing.T) {
	bed := frontBed(t)
	proxyReceivers(t, bed)
	attach(t, bed, strings.Replace(proxyRoutes(bed), `[":443"]`,
		fmt.Sprintf(`{address: ":443", accept_proxy: [%s/32, "%s/128"]}`, bed.Clients4[front], bed.Clients6[front]), 1), noDrain...)
	startHAProxy(t, bed.Client, frontSections(bed), netip.AddrPortFrom(bed.Clients6[front], 8002))
	families(t, func(t *testing.T, v6 bool) {
		for site := range proxySites {
			for _, port := range []uint16{8001, 8002} {
				proxy := netip.AddrPortFrom(clientAt(bed, front, v6), port)
				raw := dialFrom(t, bed, clientAt(bed, known, v6), proxy)
				got, err := whoami(handshake(t, raw, &tls.Config{ServerName: site}))
				wantTold(t, "haproxy", got, err, told(site, addrOf(raw.LocalAddr()), proxy))
			}
			// Of the other family there. In one piece, and so that the engine takes bytes over of both header and hello.
			source, destination := netip.AddrPortFrom(clientAt(bed, other, !v6), 999), vip(bed, !v6)
			for _, size := range []int{1 << 20, 85} {
				split := &splitter{Conn: dialFrom(t, bed, clientAt(bed, front, v6), vip(bed, v6)), size: size, pause: 60 * time.Millisecond}
				c := handshake(t, &headed{Conn: split, header: proxyHeader(t, 1, source, destination)}, small(site))
				got, err := whoami(c)
				wantTold(t, "other family", got, err, told(site, source, destination))
			}
		}
	})
}

// TestProxyInCurl has curl write the header.
func TestProxyInCurl(t *testing.T) {
	needTool(t, "curl")
	bed := frontBed(t)
	startBackends(t, bed)
	attach(t, bed, frontRoutes(bed), noDrain...)
	families(t, func(t *testing.T, v6 bool) {
		got, err := curlPath(t, bed, vip(bed, v6), "a.example.com", "/", "--haproxy-protocol", "--interface", clientAt(bed, front, v6).String())
		wantBody(t, got, err, "b2", "a.example.com")
		// From known it is not to be believed, although what it says is true.
		_, err = curlPath(t, bed, vip(bed, v6), "a.example.com", "/", "--haproxy-protocol", "--interface", clientAt(bed, known, v6).String())
		if err == nil || !strings.Contains(err.Error(), "reset") {
			t.Errorf("a header from elsewhere: %v, want a reset", err)
		}
		got, err = curlPath(t, bed, vip(bed, v6), "a.example.com", "/", "--interface", clientAt(bed, known, v6).String())
		wantBody(t, got, err, "b1", "a.example.com")
	})
}

// TestProxyInRefused sends what is not believed, or nothing to believe, and looks for its counter.
func TestProxyInRefused(t *testing.T) {
	bed := frontBed(t)
	startBackends(t, bed)
	d := attach(t, bed, frontRoutes(bed), noDrain...)
	families(t, func(t *testing.T, v6 bool) {
		target := vip(bed, v6)
		client := netip.AddrPortFrom(clientAt(bed, known, v6), 999)
		first := hello(t, classic("a.example.com")) // one segment: what comes behind a reset would be judged by itself
		v1, v2 := proxyHeader(t, 1, client, target), proxyHeader(t, 2, client, target)
		for _, tt := range []struct {
			name   string
			from   int
			first  []byte
			result string
		}{
			{"v1 from elsewhere", other, append(v1, first...), "not_tls"},
			{"v2 from elsewhere", other, append(v2, first...), "not_tls"},
			{"a hello without", front, first, "not_tls"},
			{"HTTP without", front, []byte("GET / HTTP/1.1\r\n\r\n"), "not_tls"},
			{"HTTP behind", front, append(v2, "GET / HTTP/1.1\r\n\r\n"...), "not_tls"},
			{"SSH behind", front, append(v1, "SSH-2.0-x\r\n"...), "not_tls"},
			{"a second header", front, append(v1, append(v1, first...)...), "not_tls"},
			{"a broken v1", front, append([]byte("PROXY TCP4 here there 1 2\r\n"), first...), "malformed"},
			{"an endless v1", front, []byte("PROXY " + strings.Repeat("x", 200)), "malformed"},
			{"a broken v2", front, append([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x00"), first...), "malformed"},
			{"a large v2", front, append([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11\xff\xff"), first...), "malformed"},
		} {
			t.Run(tt.name, func(t *testing.T) {
				before := d.counters().Engine.Hellos[tt.result]
				c := dialFrom(t, bed, clientAt(bed, tt.from, v6), target)
				must(t, c.SetDeadline(time.Now().Add(clientTimeout)))
				_, err := c.Write(tt.first)
				must(t, err)
				endings["reset"](t, c)
				if got := d.counters().Engine.Hellos[tt.result]; got != before+1 {
					t.Errorf("result %s went from %d to %d: %v", tt.result, before, got, d.counters().Engine.Hellos)
				}
			})
		}
	})
}

// TestProxyInNotTLS has the not_tls of the file take what comes without a header, and what comes behind one.
func TestProxyInNotTLS(t *testing.T) {
	bed := frontBed(t)
	for _, v6 := range []bool{false, true} {
		serve(t, bed.Backend, at(bed, 3, v6, 443), answerPlain)
	}
	attach(t, bed, frontRoutes(bed, `not_tls: "pool:three"`), noDrain...)
	families(t, func(t *testing.T, v6 bool) {
		header := proxyHeader(t, 1, netip.AddrPortFrom(clientAt(bed, known, v6), 999), vip(bed, v6))
		for first, want := range map[string]string{
			"GET / HTTP/1.1\r\n\r\n":                   "plain GET / HTTP/1.1\n",
			string(header) + "GET /b HTTP/1.1\r\n\r\n": "plain GET /b HTTP/1.1\n",
		} {
			c := dialFrom(t, bed, clientAt(bed, front, v6), vip(bed, v6))
			must(t, c.SetDeadline(time.Now().Add(clientTimeout)))
			_, err := io.WriteString(c, first)
			must(t, err)
			if got, err := io.ReadAll(c); string(got) != want {
				t.Errorf("answer %q, %v, want %q", got, err, want)
			}
		}
	})
}

// TestProxyInOwn speaks for no one: a LOCAL header, and one that does not know.
func TestProxyInOwn(t *testing.T) {
	bed := frontBed(t)
	startBackends(t, bed)
	d := attach(t, bed, frontRoutes(bed), noDrain...)
	families(t, func(t *testing.T, v6 bool) {
		for name, header := range map[string]string{
			"v1": "PROXY UNKNOWN ffff::1 whatever\r\n",
			"v2": "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x03abc",
		} {
			raw := dialFrom(t, bed, clientAt(bed, front, v6), vip(bed, v6))
			got, err := whoami(handshake(t, &headed{Conn: raw, header: []byte(header)}, &tls.Config{ServerName: "a.example.com"}))
			wantBody(t, got, err, "b2", "a.example.com")
			if f := flowOf(t, d, addrOf(raw.LocalAddr())); f.Peer != "" {
				t.Errorf("%s: flow: peer %q, want none", name, f.Peer)
			}
			// A health check that says LOCAL, then closes.
			raw = dialFrom(t, bed, clientAt(bed, front, v6), vip(bed, v6))
			must(t, raw.SetDeadline(time.Now().Add(clientTimeout)))
			_, err = io.WriteString(raw, header)
			must(t, errors.Join(err, raw.CloseWrite()))
			if n, err := raw.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
				t.Errorf("%s: after header and FIN: %d bytes, %v, want EOF", name, n, err)
			}
		}
	})
}

// TestProxyInPieces hands header and hello over in all the ways they may come.
func TestProxyInPieces(t *testing.T) {
	bed := frontBed(t)
	startBackends(t, bed)
	d := attach(t, bed, frontRoutes(bed), noDrain...)
	families(t, func(t *testing.T, v6 bool) {
		client := netip.AddrPortFrom(clientAt(bed, known, v6), 999)
		for _, version := range []byte{1, 2} {
			header := proxyHeader(t, version, client, vip(bed, v6))
			ask := func(name string, write func(*net.TCPConn) net.Conn) {
				t.Run(fmt.Sprintf("v%d-%s", version, name), func(t *testing.T) {
					raw := dialFrom(t, bed, clientAt(bed, front, v6), vip(bed, v6))
					count := &counter{Conn: write(raw)}
					c := handshake(t, count, classic("a.example.com"))
					got, err := whoami(c)
					wantBody(t, got, err, "b1", "a.example.com")
					f := flowByPeer(t, d, addrOf(raw.LocalAddr()))
					if f.Client != client.String() {
						t.Errorf("flow: client %s, want %s", f.Client, client)
					}
					wantBytes(t, bed, f, count, raw) // which counts behind the header
				})
			}
			ask("one-segment", func(c *net.TCPConn) net.Conn { return &headed{Conn: c, header: header} })
			ask("two-segments", func(c *net.TCPConn) net.Conn {
				_, err := c.Write(header)
				must(t, err)
				return c
			})
			ask("pause", func(c *net.TCPConn) net.Conn {
				_, err := c.Write(header)
				must(t, err)
				time.Sleep(300 * time.Millisecond)
				return c
			})
			ask("nagle", func(c *net.TCPConn) net.Conn { // the hello waits for the header's ACK
				must(t, c.SetNoDelay(false))
				_, err := c.Write(header)
				must(t, err)
				return c
			})
			ask("bytes", func(c *net.TCPConn) net.Conn {
				return &headed{Conn: &splitter{Conn: c, size: 1}, header: header}
			})
			ask("slow", func(c *net.TCPConn) net.Conn {
				return &headed{Conn: &splitter{Conn: c, size: 70, pause: 60 * time.Millisecond}, header: header}
			})
			ask("half-a-header", func(c *net.TCPConn) net.Conn {
				_, err := c.Write(header[:20])
				must(t, err)
				time.Sleep(100 * time.Millisecond) // it is ACKed meanwhile
				return &headed{Conn: c, header: header[20:]}
			})
		}
	})
}

// flowByPeer is the flow of a proxy's connection.
func flowByPeer(t *testing.T, d *daemon, peer netip.AddrPort) flow {
	t.Helper()
	flows := d.flows()
	for _, f := range flows {
		if f.Peer == peer.String() {
			return f
		}
	}
	t.Fatalf("no flow of %s in %+v", peer, flows)
	return flow{}
}

// TestProxyInShapes sends header and hello in segments that come in disorder, among them the hello before the header.
func TestProxyInShapes(t *testing.T) {
	bed := frontBed(t)
	startBackends(t, bed)
	attach(t, bed, frontRoutes(bed), noDrain...)
	port := uint16(20000)
	families(t, func(t *testing.T, v6 bool) {
		client := netip.AddrPortFrom(clientAt(bed, known, v6), 999)
		header := proxyHeader(t, 2, client, vip(bed, v6))
		for name, shape := range shapes {
			for _, mss := range []int{1400, len(header)} {
				t.Run(fmt.Sprintf("%s-%d", name, mss), func(t *testing.T) {
					port++
					r, err := bed.RawFrom(netip.AddrPortFrom(rawProxies[v6].Addr().Next(), port), vip(bed, v6))
					must(t, err)
					defer func() { _ = r.Close() }()
					_, err = r.Open(testbed.LinuxSYN(r.TSVal), 3*time.Second)
					must(t, err)
					r.Shape, r.MSS = shape, mss
					c := handshake(t, &headed{Conn: r, header: header}, &tls.Config{ServerName: "a.example.com"})
					r.Shape = nil
					got, err := whoami(c)
					wantBody(t, got, err, "b1", "a.example.com")
					_ = r.Send(r.Bare(testbed.RST))
				})
			}
		}
	})
}

// TestProxyInBulk moves bytes both ways behind a header of the client's.
func TestProxyInBulk(t *testing.T) {
	bed := frontBed(t)
	startBackends(t, bed)
	attach(t, bed, frontRoutes(bed), noDrain...)
	families(t, func(t *testing.T, v6 bool) {
		client := netip.AddrPortFrom(clientAt(bed, known, v6), 999)
		for _, version := range []byte{1, 2} {
			header := proxyHeader(t, version, client, vip(bed, v6))
			asking := httpClient(bed, vip(bed, v6), &tls.Config{ServerName: "a.example.com"})
			asking.Transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) {
				return &headed{Conn: dialFrom(t, bed, clientAt(bed, front, v6), vip(bed, v6)), header: header}, nil
			}
			downloadBy(t, asking, proxyBulk)
			uploadBy(t, asking, proxyBulk)
		}
	})
}

// TestProxyInMaglev hashes what the header says: all clients of one proxy would go to one backend else.
func TestProxyInMaglev(t *testing.T) {
	bed := frontBed(t)
	startBackends(t, bed)
	routes := strings.Replace(frontRoutes(bed), "  - {sni: b.example.com", "  - {sni: x.w.example.com, pool: hashed}\n  - {sni: b.example.com", 1)
	routes = strings.Replace(routes, "pools:\n", "pools:\n"+pool(bed, "hashed", "balance: maglev, hash: client", 1, 2, 3), 1)
	attach(t, bed, routes, noDrain...)
	families(t, func(t *testing.T, v6 bool) {
		used := map[string]bool{}
		for i := range 12 {
			source := clientAt(bed, known, v6)
			for range 16 + i {
				source = source.Next()
			}
			answers := map[string]bool{}
			for try := range 3 {
				header := proxyHeader(t, 2, netip.AddrPortFrom(source, uint16(1000+try)), vip(bed, v6))
				raw := &headed{Conn: dialFrom(t, bed, clientAt(bed, front, v6), vip(bed, v6)), header: header}
				got, err := whoami(handshake(t, raw, &tls.Config{ServerName: "x.w.example.com"}))
				must(t, err)
				backend, _, _ := strings.Cut(got, " ")
				answers[backend], used[backend] = true, true
			}
			if len(answers) != 1 {
				t.Errorf("client %s was sent to %v", source, answers)
			}
		}
		if len(used) < 2 {
			t.Errorf("all clients went to %v", used)
		}
	})
}

// TestProxyInLimit holds more unfinished hellos open from a proxy than one address may have.
func TestProxyInLimit(t *testing.T) {
	bed := frontBed(t)
	startBackends(t, bed)
	d := attach(t, bed, frontRoutes(bed, "limits: {hellos_per_source: 2}"), noDrain...)
	families(t, func(t *testing.T, v6 bool) {
		header := proxyHeader(t, 2, netip.AddrPortFrom(clientAt(bed, known, v6), 999), vip(bed, v6))
		for _, from := range []int{front, other} {
			for range 4 {
				c := dialFrom(t, bed, clientAt(bed, from, v6), vip(bed, v6))
				begin := hello(t, classic("a.example.com"))[:100]
				if from == front {
					begin = append(header, begin...)
				}
				_, err := c.Write(begin)
				must(t, err)
			}
		}
		raw := &headed{Conn: dialFrom(t, bed, clientAt(bed, front, v6), vip(bed, v6)), header: header}
		got, err := whoami(handshake(t, raw, &tls.Config{ServerName: "a.example.com"}))
		wantBody(t, got, err, "b1", "a.example.com")
		if n := d.counters().Engine.Hellos["source_limit"]; n == 0 {
			t.Error("another address has no limit either")
		}
	})
}
