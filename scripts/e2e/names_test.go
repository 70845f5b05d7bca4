// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// pool is one pool of a routes file: backends by number, on port 443 and in both families.
func pool(bed *testbed.Bed, name, settings string, backends ...int) string {
	var list []string
	for _, i := range backends {
		for _, v6 := range []bool{false, true} {
			list = append(list, fmt.Sprintf("%q", at(bed, i, v6, 443)))
		}
	}
	if settings != "" {
		settings += ", "
	}
	return fmt.Sprintf("  %s: {%sbackends: [%s]}\n", name, settings, strings.Join(list, ", "))
}

// siteRoutes is the usual routes file: a to b1, b to b2, the wildcard and a hello without a name to b3. Lines given are
// further settings of the top level.
func siteRoutes(bed *testbed.Bed, lines ...string) string {
	return "version: 1\n" + strings.Join(append(lines, ""), "\n") + `listen: [":443"]
pools:
` + pool(bed, "one", "", 1) + pool(bed, "two", "", 2) + pool(bed, "three", "", 3) + `routes:
  - {sni: a.example.com, pool: one}
  - {sni: b.example.com, pool: two}
  - {sni: "*.w.example.com", pool: three}
  - {sni: "", pool: three}
`
}

// TestNames sends every client to two names and by no name, over both families.
func TestNames(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	nginxBackends(t, bed)
	attach(t, bed, siteRoutes(bed))
	families(t, func(t *testing.T, v6 bool) {
		for _, c := range clients {
			t.Run(c.name, func(t *testing.T) {
				if c.tool != "" {
					needTool(t, c.tool)
				}
				for name, backend := range map[string]string{"a.example.com": "b1", "b.example.com": "b2", "x.w.example.com": "b3", "": "b3"} {
					if name == "" && c.name == "curl" {
						continue // curl cannot leave the name out
					}
					got, err := c.get(t, bed, vip(bed, v6), name)
					wantBody(t, got, err, backend, name)
				}
			})
		}
	})
}

// TestExtraVIP asks at an address of the load balancer that is on its loopback device.
func TestExtraVIP(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, siteRoutes(bed))
	for _, addr := range []netip.Addr{bed.ExtraVIP4, bed.ExtraVIP6} {
		got, err := goClient(t, bed, netip.AddrPortFrom(addr, 443), "a.example.com")
		wantBody(t, got, err, "b1", "a.example.com")
	}
}

// TestOneArmed is a balancer on the same LAN as everybody: in and out by one interface.
func TestOneArmed(t *testing.T) {
	bed := newBed(t, testbed.Options{Topology: testbed.OneArmed})
	startBackends(t, bed)
	attach(t, bed, siteRoutes(bed))
	families(t, func(t *testing.T, v6 bool) {
		got, err := goClient(t, bed, vip(bed, v6), "b.example.com")
		wantBody(t, got, err, "b2", "b.example.com")
	})
}

// endings are what may become of a connection that is not balanced, by the words of the routes file.
var endings = map[string]func(*testing.T, net.Conn){
	"reset": func(t *testing.T, c net.Conn) {
		if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %d bytes, %v, want a reset", n, err)
		}
	},
	"drop": func(t *testing.T, c net.Conn) {
		must(t, c.SetReadDeadline(time.Now().Add(3*time.Second)))
		if n, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read: %d bytes, %v, want silence", n, err)
		}
	},
}

// TestNoMatch asks for a name without a route, under each no_match.
func TestNoMatch(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	for word, ending := range endings {
		t.Run(word, func(t *testing.T) {
			attach(t, bed, siteRoutes(bed, "no_match: "+word))
			families(t, func(t *testing.T, v6 bool) {
				wantEnding(t, bed, vip(bed, v6), hello(t, &tls.Config{ServerName: "unknown.example.com"}), ending)
				got, err := goClient(t, bed, vip(bed, v6), "a.example.com")
				wantBody(t, got, err, "b1", "a.example.com")
			})
		})
	}
	t.Run("pool", func(t *testing.T) {
		attach(t, bed, siteRoutes(bed, `no_match: "pool:two"`))
		families(t, func(t *testing.T, v6 bool) {
			config := &tls.Config{ServerName: "local.example.com"}
			got, err := get(t, bed, vip(bed, v6), "/", config)
			wantBody(t, got, err, "b2", "local.example.com")
		})
	})
}

// wantEnding sends first bytes and looks at what comes of them.
func wantEnding(t *testing.T, bed *testbed.Bed, target netip.AddrPort, first []byte, ending func(*testing.T, net.Conn)) {
	t.Helper()
	c, err := dialTCP(t, bed, target)
	must(t, err)
	must(t, c.SetDeadline(time.Now().Add(clientTimeout)))
	_, err = c.Write(first)
	must(t, err)
	ending(t, c)
}

// TestNotTLS sends plain HTTP, under each not_tls.
func TestNotTLS(t *testing.T) {
	request := []byte("GET / HTTP/1.1\r\nHost: a.example.com\r\n\r\n")
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	for word, ending := range endings {
		t.Run(word, func(t *testing.T) {
			attach(t, bed, siteRoutes(bed, "not_tls: "+word))
			families(t, func(t *testing.T, v6 bool) { wantEnding(t, bed, vip(bed, v6), request, ending) })
		})
	}
	t.Run("pool", func(t *testing.T) {
		for _, v6 := range []bool{false, true} {
			serve(t, bed.Backend, at(bed, 3, v6, 80), answerPlain)
		}
		plain := fmt.Sprintf("  plain: {backends: [%q, %q]}\n", at(bed, 3, false, 80), at(bed, 3, true, 80))
		routes := strings.Replace(siteRoutes(bed, `not_tls: "pool:plain"`), "pools:\n", "pools:\n"+plain, 1)
		attach(t, bed, routes)
		families(t, func(t *testing.T, v6 bool) {
			wantEnding(t, bed, vip(bed, v6), request, func(t *testing.T, c net.Conn) {
				got, err := io.ReadAll(c)
				if string(got) != "plain GET / HTTP/1.1\n" {
					t.Errorf("answer %q, %v", got, err)
				}
			})
		})
	})
}

// answerPlain repeats the first line, once all of the request is there.
func answerPlain(c net.Conn) {
	defer func() { _ = c.Close() }()
	in := bufio.NewReader(c)
	first, _ := in.ReadString('\n')
	for line := first; len(line) > 2; {
		var err error
		if line, err = in.ReadString('\n'); err != nil {
			return
		}
	}
	_, _ = fmt.Fprintf(c, "plain %s\n", strings.TrimSpace(first))
}

// TestALPN routes one name by what the client wants to speak.
func TestALPN(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, `version: 1
listen: [":443"]
pools:
`+pool(bed, "one", "", 1)+pool(bed, "two", "", 2)+`routes:
  - {name: modern, sni: a.example.com, alpn: [h2], pool: two}
  - {name: other, sni: a.example.com, pool: one}
`)
	families(t, func(t *testing.T, v6 bool) {
		for alpn, backend := range map[string]string{"h2": "b2", "http/1.1": "b1"} {
			got, err := get(t, bed, vip(bed, v6), "/", &tls.Config{ServerName: "a.example.com", NextProtos: []string{alpn}})
			wantBody(t, got, err, backend, "a.example.com")
			if want := fmt.Sprintf(" %q ", alpn); !strings.Contains(got, want) {
				t.Errorf("answer %q, want it to speak %s", got, alpn)
			}
		}
	})
}

// answersBy asks n times and counts who answers.
func answersBy(t *testing.T, bed *testbed.Bed, n int, from netip.Addr) map[string]int {
	t.Helper()
	count := map[string]int{}
	for range n {
		raw := dialFrom(t, bed, from, vip(bed, from.Is6()))
		body, err := whoami(handshake(t, raw, &tls.Config{ServerName: "a.example.com"}))
		must(t, errors.Join(err, raw.Close()))
		backend, _, _ := strings.Cut(body, " ")
		count[backend]++
	}
	return count
}

// TestWeights gives one backend three times the connections of another.
func TestWeights(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, fmt.Sprintf(`version: 1
listen: [":443"]
pools:
  p:
    balance: round_robin
    backends:
      - {address: %q, weight: 3}
      - {address: %q, weight: 1}
routes:
  - {sni: a.example.com, pool: p}
`, at(bed, 1, false, 443), at(bed, 2, false, 443)))
	const asked = 80
	count := answersBy(t, bed, asked, bed.Clients4[0])
	// Workers keep turns of their own, so that a few connections more or less are no fault.
	if b1 := count["b1"]; b1 < 52 || b1 > 68 || b1+count["b2"] != asked {
		t.Errorf("of %d connections the weights 3 and 1 got %v", asked, count)
	}
}

// TestMaglev sends a client to the same backend each time, and not all clients to one.
func TestMaglev(t *testing.T) {
	bed := newBed(t, testbed.Options{Clients: 24})
	startBackends(t, bed)
	attach(t, bed, `version: 1
listen: [":443"]
pools:
`+pool(bed, "p", "balance: maglev, hash: client", 1, 2, 3)+`routes:
  - {sni: a.example.com, pool: p}
`)
	for _, clients := range [][]netip.Addr{bed.Clients4, bed.Clients6} {
		used := map[string]bool{}
		for _, from := range clients {
			count := answersBy(t, bed, 4, from)
			if len(count) != 1 {
				t.Errorf("client %s was sent to %v", from, count)
			}
			for backend := range count {
				used[backend] = true
			}
		}
		if len(used) < 2 {
			t.Errorf("%d clients all went to %v", len(clients), used)
		}
	}
}
