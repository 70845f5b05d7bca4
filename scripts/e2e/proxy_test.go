// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"

	"snilb/scripts/testbed"
)

// noDrain ends snilb without waiting for connections to close.
var noDrain = []string{"--drain-timeout", "0s"}

// startHAProxy runs HAProxy with the given sections in ns until the test ends, and waits until it accepts at probe. The
// certificate is the file CERT.
func startHAProxy(t *testing.T, ns *testbed.NS, sections string, probe netip.AddrPort) {
	t.Helper()
	needTool(t, "haproxy")
	dir := t.TempDir()
	pem := filepath.Join(dir, "cert.pem")
	must(t, os.WriteFile(pem, slices.Concat(cert.CertPEM, cert.KeyPEM), 0o600))
	conf := "defaults\n	timeout connect 20s\n	timeout client 60s\n	timeout server 60s\n" + strings.ReplaceAll(sections, "CERT", pem)
	file := filepath.Join(dir, "haproxy.cfg")
	must(t, os.WriteFile(file, []byte(conf), 0o644))
	cmd := ns.Command(context.Background(), "haproxy", "-db", "-f", file)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // without -W there is one process
		_ = cmd.Wait()
		if t.Failed() && out.Len() > 0 {
			t.Logf("haproxy said:\n%s", out.String())
		}
	})
	waitAccept(t, ns, probe)
}

// proxyReceivers serves b1 and b2 by nginx and b3 by HAProxy, all of which want a PROXY header and tell what it said:
//
//	NAME "SNI" "AUTHORITY" ADDRESS PORT LISTENER-ADDRESS LISTENER-PORT
func proxyReceivers(t *testing.T, bed *testbed.Bed) {
	t.Helper()
	var servers strings.Builder
	for i := 1; i <= 2; i++ {
		fmt.Fprintf(&servers, "	server { listen %s ssl proxy_protocol; listen %s ssl proxy_protocol;\n", at(bed, i, false, 443), at(bed, i, true, 443))
		fmt.Fprintf(&servers, "		location / { return 200 'b%d \"$ssl_server_name\" \"\" $proxy_protocol_addr $proxy_protocol_port "+
			"$proxy_protocol_server_addr $proxy_protocol_server_port\\n'; }\n	}\n", i)
	}
	startNginx(t, bed.Backend, servers.String(), at(bed, 2, true, 443))
	startHAProxy(t, bed.Backend, fmt.Sprintf(`
frontend b3
	mode http
	bind %s accept-proxy ssl crt CERT
	bind %s accept-proxy ssl crt CERT
	http-request return status 200 content-type text/plain lf-string "b3 \"%%[ssl_fc_sni]\" \"%%[fc_pp_authority]\" %%[src] %%[src_port] %%[dst] %%[dst_port]\n"
`, at(bed, 3, false, 443), at(bed, 3, true, 443)), at(bed, 3, true, 443))
}

// proxyRoutes leads a to nginx by v1, b to nginx by v2 and the wildcard to HAProxy by v2.
func proxyRoutes(bed *testbed.Bed) string {
	return `version: 1
listen: [":443"]
pools:
` + pool(bed, "one", "proxy_protocol: v1", 1) + pool(bed, "two", "proxy_protocol: v2", 2) + pool(bed, "three", "proxy_protocol: v2", 3) + `routes:
  - {sni: a.example.com, pool: one}
  - {sni: b.example.com, pool: two}
  - {sni: "*.w.example.com", pool: three}
`
}

// proxySites are the names of proxyRoutes, and what a receiver answers before the addresses.
var proxySites = map[string]string{
	"a.example.com":   `b1 "a.example.com" ""`,
	"b.example.com":   `b2 "b.example.com" ""`,
	"x.w.example.com": `b3 "x.w.example.com" "x.w.example.com"`,
}

// told is how a receiver tells of a connection.
func told(site string, client, listener netip.AddrPort) string {
	return fmt.Sprintf("%s %s %d %s %d", proxySites[site], client.Addr(), client.Port(), listener.Addr(), listener.Port())
}

// addrOf is the address of one end of a connection.
func addrOf(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// client0 is an address of the client with a port of its own for each call.
func client0(bed *testbed.Bed, v6 bool) netip.AddrPort {
	clientPorts++
	if v6 {
		return netip.AddrPortFrom(bed.Clients6[0], clientPorts)
	}
	return netip.AddrPortFrom(bed.Clients4[0], clientPorts)
}

var clientPorts uint16 = 20000 // below what the kernel gives out

// TestProxyOut asks nginx and HAProxy what they were told of a client.
func TestProxyOut(t *testing.T) {
	needTool(t, "curl", "openssl")
	bed := newBed(t, testbed.Options{})
	proxyReceivers(t, bed)
	attach(t, bed, proxyRoutes(bed), noDrain...)
	families(t, func(t *testing.T, v6 bool) {
		for site := range proxySites {
			t.Run(site, func(t *testing.T) { proxyOut(t, bed, v6, site) })
		}
	})
}

func proxyOut(t *testing.T, bed *testbed.Bed, v6 bool, site string) {
	target, from := vip(bed, v6), client0(bed, v6)
	got, err := curlPath(t, bed, target, site, "/", "--interface", from.Addr().String(), "--local-port", fmt.Sprint(from.Port()))
	wantTold(t, "curl", got, err, told(site, from, target))

	from = client0(bed, v6)
	got, err = output(t, bed, "GET / HTTP/1.0\r\n\r\n", "openssl", "s_client", "-connect", target.String(), "-bind", from.String(),
		"-CAfile", caFile, "-verify_return_error", "-quiet", "-servername", site)
	wantTold(t, "openssl", got, err, told(site, from, target))

	raw, err := dialTCP(t, bed, target)
	must(t, err)
	got, err = whoami(handshake(t, raw, &tls.Config{ServerName: site}))
	wantTold(t, "go", got, err, told(site, addrOf(raw.LocalAddr()), target))
}

func wantTold(t *testing.T, client, got string, err error, want string) {
	t.Helper()
	if err != nil || got != want {
		t.Errorf("%s: answer %q, %v, want %q", client, got, err, want)
	}
}

// TestProxyOutPieces has a client that hands its hello over bit by bit, so that the engine takes bytes over: they must
// reach the backend behind the header, once, and be counted.
func TestProxyOutPieces(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	proxyReceivers(t, bed)
	d := attach(t, bed, proxyRoutes(bed), noDrain...)
	families(t, func(t *testing.T, v6 bool) {
		for site := range proxySites {
			for _, size := range []int{1 << 20, 1, 100} {
				t.Run(fmt.Sprintf("%s-%d", site, size), func(t *testing.T) {
					raw, err := dialTCP(t, bed, vip(bed, v6))
					must(t, err)
					count := &counter{Conn: raw}
					split := &splitter{Conn: count, size: size}
					if size == 100 {
						split.pause = 60 * time.Millisecond // longer than the engine waits before it ACKs
					}
					c := handshake(t, split, small(site))
					split.size = 1 << 20
					got, err := whoami(c)
					wantTold(t, "go", got, err, told(site, addrOf(raw.LocalAddr()), vip(bed, v6)))
					wantBytes(t, bed, flowOf(t, d, addrOf(raw.LocalAddr())), count, raw)
				})
			}
		}
	})
}

// small is a hello that fits into one segment, for servers that have a P-256 certificate and speak TLS 1.2.
func small(name string) *tls.Config {
	return &tls.Config{ServerName: name, CurvePreferences: []tls.CurveID{tls.X25519, tls.CurveP256}}
}

// flowOf is the flow of a client.
func flowOf(t *testing.T, d *daemon, client netip.AddrPort) flow {
	t.Helper()
	flows := d.flows()
	i := slices.IndexFunc(flows, func(f flow) bool { return f.Client == client.String() })
	if i < 0 {
		t.Fatalf("no flow of %s in %+v", client, flows)
	}
	return flows[i]
}

// TestProxyOutALPN looks at the ALPN record: it is there when the client leaves no choice.
func TestProxyOutALPN(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	headers := make(chan *proxyproto.Header, 10)
	for _, v6 := range []bool{false, true} {
		serve(t, bed.Backend, at(bed, 1, v6, 443), func(c net.Conn) {
			defer func() { _ = c.Close() }()
			if h, err := proxyproto.Read(bufio.NewReader(c)); err == nil {
				headers <- h
			}
		})
	}
	attach(t, bed, "version: 1\nlisten: [\":443\"]\npools:\n"+pool(bed, "p", "proxy_protocol: v2", 1)+"routes:\n  - {sni: [a.example.com, \"\"], pool: p}\n", noDrain...)
	families(t, func(t *testing.T, v6 bool) {
		for _, tt := range []struct {
			name string
			alpn []string
			want []proxyproto.TLV
		}{
			{"a.example.com", []string{"h2"}, []proxyproto.TLV{{Type: 1, Value: []byte("h2")}, {Type: 2, Value: []byte("a.example.com")}}},
			{"a.example.com", []string{"h2", "http/1.1"}, []proxyproto.TLV{{Type: 2, Value: []byte("a.example.com")}}},
			{"", []string{"http/1.1"}, []proxyproto.TLV{{Type: 1, Value: []byte("http/1.1")}}},
			{"", nil, nil},
		} {
			c, err := dialTCP(t, bed, vip(bed, v6))
			must(t, err)
			_, err = c.Write(hello(t, &tls.Config{ServerName: tt.name, NextProtos: tt.alpn}))
			must(t, err)
			select {
			case h := <-headers:
				got, err := h.TLVs()
				if !slices.EqualFunc(got, tt.want, func(a, b proxyproto.TLV) bool { return a.Type == b.Type && bytes.Equal(a.Value, b.Value) }) {
					t.Errorf("%q, %v: records %v, %v, want %v", tt.name, tt.alpn, got, err, tt.want)
				}
			case <-time.After(clientTimeout):
				t.Errorf("%q, %v: no header", tt.name, tt.alpn)
			}
		}
	})
}

// TestProxyOutLoss loses the segment with the header, or the backend's first words: the engine repeats, the request works.
func TestProxyOutLoss(t *testing.T) {
	needTool(t, "nft")
	bed := newBed(t, testbed.Options{})
	proxyReceivers(t, bed)
	attach(t, bed, proxyRoutes(bed), noDrain...)
	families(t, func(t *testing.T, v6 bool) {
		for _, site := range []string{"a.example.com", "x.w.example.com"} {
			for _, loss := range []struct {
				name, hook, rule string
				packets          int
			}{
				{"header", "input", "tcp dport 443 tcp flags & (syn|fin|rst) == 0 meta length > 100", 1},
				{"header-again", "input", "tcp dport 443 tcp flags & (syn|fin|rst) == 0 meta length > 100", 4},
				{"answer", "output", "tcp sport 443 tcp flags & (syn|fin|rst) == 0", 2},
			} {
				t.Run(site+"-"+loss.name, func(t *testing.T) {
					dropFirst(t, bed.Backend, loss.hook, loss.rule, loss.packets)
					raw, err := dialTCP(t, bed, vip(bed, v6))
					must(t, err)
					got, err := whoami(handshake(t, raw, &tls.Config{ServerName: site}))
					wantTold(t, "go", got, err, told(site, addrOf(raw.LocalAddr()), vip(bed, v6)))
					wantDropped(t, bed.Backend, loss.packets)
					must(t, raw.Close())
				})
			}
		}
	})
}

// dropFirst drops the first packets in ns that match a rule of nftables.
func dropFirst(t *testing.T, ns *testbed.NS, hook, rule string, packets int) {
	t.Helper()
	needTool(t, "nft")
	nft(t, ns, fmt.Sprintf(`table inet loss
delete table inet loss
table inet loss {
	chain loss {
		type filter hook %s priority 0;
		%s numgen inc mod 1000000 < %d counter drop
	}
}
`, hook, rule, packets))
}

func wantDropped(t *testing.T, ns *testbed.NS, packets int) {
	t.Helper()
	out, err := ns.Command(t.Context(), "nft", "list", "table", "inet", "loss").CombinedOutput()
	must(t, err)
	if want := fmt.Sprintf("counter packets %d ", packets); !strings.Contains(string(out), want) {
		t.Errorf("want %q in:\n%s", want, out)
	}
}

// proxyBulk is what goes each way behind a header: enough for GSO on every leg, and for numbers that are off by a header
// to show.
const proxyBulk = 20 << 20

// TestProxyOutBulk moves bytes both ways behind a header of ours that HAProxy takes off.
func TestProxyOutBulk(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	var sections strings.Builder
	for _, v6 := range []bool{false, true} {
		b, err := testbed.StartBackend(bed.Backend, "b1", at(bed, 1, v6, 8443), cert)
		must(t, err)
		t.Cleanup(func() { _ = b.Close() })
		fmt.Fprintf(&sections, "listen v%t\n	mode tcp\n	bind %s accept-proxy\n	server b1 %s\n", v6, at(bed, 1, v6, 443), at(bed, 1, v6, 8443))
	}
	startHAProxy(t, bed.Backend, sections.String(), at(bed, 1, true, 443))
	for _, version := range []string{"v1", "v2"} {
		t.Run(version, func(t *testing.T) {
			attach(t, bed, "version: 1\nlisten: [\":443\"]\npools:\n"+pool(bed, "p", "proxy_protocol: "+version, 1)+"routes:\n  - {sni: a.example.com, pool: p}\n", noDrain...)
			families(t, func(t *testing.T, v6 bool) {
				client := httpClient(bed, vip(bed, v6), &tls.Config{ServerName: "a.example.com"})
				downloadBy(t, client, proxyBulk)
				uploadBy(t, client, proxyBulk)
			})
		})
	}
}

// TestProxyOutMTU has a narrow leg to the backends, no offloads, and a hello that fills the client's segments: with a header
// before it they would be too large.
func TestProxyOutMTU(t *testing.T) {
	bed := newBed(t, testbed.Options{BackendMTU: 1280, NoOffload: true})
	proxyReceivers(t, bed)
	attach(t, bed, proxyRoutes(bed), noDrain...)
	families(t, func(t *testing.T, v6 bool) {
		for site := range proxySites {
			raw, err := dialTCP(t, bed, vip(bed, v6))
			must(t, err)
			got, err := whoami(handshake(t, raw, &tls.Config{ServerName: site}))
			wantTold(t, "go", got, err, told(site, addrOf(raw.LocalAddr()), vip(bed, v6)))
		}
	})
}

// TestProxyOutRefused has a backend in the pool that nobody serves: the next one gets the header as well.
func TestProxyOutRefused(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	proxyReceivers(t, bed)
	attach(t, bed, fmt.Sprintf(`version: 1
listen: [":443"]
pools:
  p: {proxy_protocol: v2, backends: [%q, %q, %q, %q]}
routes:
  - {sni: b.example.com, pool: p}
`, at(bed, 1, false, 9), at(bed, 1, true, 9), at(bed, 2, false, 443), at(bed, 2, true, 443)), noDrain...)
	families(t, func(t *testing.T, v6 bool) {
		for range 4 {
			raw, err := dialTCP(t, bed, vip(bed, v6))
			must(t, err)
			got, err := whoami(handshake(t, raw, &tls.Config{ServerName: "b.example.com"}))
			wantTold(t, "go", got, err, told("b.example.com", addrOf(raw.LocalAddr()), vip(bed, v6)))
		}
	})
}
