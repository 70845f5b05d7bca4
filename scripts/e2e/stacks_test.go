// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"snilb/scripts/testbed"
)

// bothWays is what every stack must move, each way.
const bothWays = 3 << 20

// stacks are Linux made to look like others.
var stacks = map[string]map[string]string{
	"no-timestamps":     {"ipv4/tcp_timestamps": "0"},
	"no-sack":           {"ipv4/tcp_sack": "0"},
	"no-window-scaling": {"ipv4/tcp_window_scaling": "0"},
	"ecn":               {"ipv4/tcp_ecn": "1"},
	"bare":              {"ipv4/tcp_timestamps": "0", "ipv4/tcp_sack": "0", "ipv4/tcp_window_scaling": "0"},
}

func setAll(t *testing.T, ns *testbed.NS, keys map[string]string) {
	t.Helper()
	for key, value := range keys {
		must(t, ns.Sysctl(key, value))
	}
}

// TestStacksClient has clients of every kind: with a namespace of its own for each, as sysctls are per namespace.
func TestStacksClient(t *testing.T) {
	for name, keys := range stacks {
		t.Run(name, func(t *testing.T) {
			bed := newBed(t, testbed.Options{})
			setAll(t, bed.Client, keys)
			startBackends(t, bed)
			attach(t, bed, siteRoutes(bed))
			families(t, func(t *testing.T, v6 bool) { moveBothWays(t, bed, v6) })
		})
	}
}

func moveBothWays(t *testing.T, bed *testbed.Bed, v6 bool) {
	t.Helper()
	downloadSize(t, bed, vip(bed, v6), "a.example.com", bothWays)
	uploadSize(t, bed, vip(bed, v6), "a.example.com", bothWays)
}

// TestStacksMTU has clients whose interface is small, as in a tunnel, and huge, as loopback is.
func TestStacksMTU(t *testing.T) {
	for _, mtu := range []int{1280, 9000, 65535} {
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			bed := newBed(t, testbed.Options{ClientMTU: mtu})
			startBackends(t, bed)
			attach(t, bed, siteRoutes(bed))
			families(t, func(t *testing.T, v6 bool) { moveBothWays(t, bed, v6) })
		})
	}
	for _, mtu := range []int{576, 1280} { // the client's end alone: its MSS is all that tells, and what is larger is dropped
		t.Run(fmt.Sprintf("one-end-%d", mtu), func(t *testing.T) {
			bed := newBed(t, testbed.Options{NoOffload: true})
			startBackends(t, bed)
			attach(t, bed, siteRoutes(bed))
			must(t, bed.Client.SetMTU("eth0", mtu))
			moveBothWays(t, bed, false)
			if mtu >= 1280 { // below that there is no IPv6
				moveBothWays(t, bed, true)
			}
		})
	}
}

// TestStacksSocket has clients that ask for something special by socket option.
func TestStacksSocket(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	must(t, bed.Client.Sysctl("ipv4/tcp_fastopen", "5")) // client, and data on the SYN without a cookie
	must(t, bed.Client.Sysctl("mptcp/enabled", "1"))
	startBackends(t, bed)
	attach(t, bed, siteRoutes(bed))
	option := func(level, name, value int) func(*net.Dialer) {
		return func(d *net.Dialer) {
			d.Control = func(_, _ string, c syscall.RawConn) (err error) {
				if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, name, value) }); e != nil {
					return e
				}
				return err
			}
		}
	}
	// What the kernel counts when it has done so, and we did not speak it.
	proofs := map[string]string{"fast-open": "TcpExt: TCPFastOpenActiveFail", "mptcp": "MPTcpExt: MPCapableSYNTX"}
	for name, set := range map[string]func(*net.Dialer){
		"mss-536":   option(unix.IPPROTO_TCP, unix.TCP_MAXSEG, 536),
		"mss-88":    option(unix.IPPROTO_TCP, unix.TCP_MAXSEG, 88),
		"fast-open": option(unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1),
		"mptcp":     func(d *net.Dialer) { d.SetMultipathTCP(true) },
	} {
		t.Run(name, func(t *testing.T) {
			families(t, func(t *testing.T, v6 bool) {
				for range 2 {
					var d net.Dialer
					set(&d)
					ctx, cancel := context.WithTimeout(t.Context(), clientTimeout)
					defer cancel()
					raw, err := bed.Client.DialWith(ctx, &d, "tcp", vip(bed, v6).String())
					must(t, err)
					c := handshake(t, raw, &tls.Config{ServerName: "a.example.com"})
					got, err := whoami(c)
					wantBody(t, got, err, "b1", "a.example.com")
					_ = c.Close()
				}
			})
			out, err := bed.Client.Command(t.Context(), "cat", "/proc/net/netstat").Output()
			must(t, err)
			if proof := proofs[name]; proof != "" && counted(string(out), proof) == 0 {
				t.Errorf("%s is zero: the client did not try", proof)
			}
		})
	}
}

// TestStacksBackend has backends that can do less than others. What was announced before that is known may cost a client its
// first connection, in as many words; the second works, and none hangs.
func TestStacksBackend(t *testing.T) {
	for name, keys := range stacks {
		t.Run(name, func(t *testing.T) {
			bed := newBed(t, testbed.Options{})
			setAll(t, bed.Backend, keys)
			startBackends(t, bed)
			attach(t, bed, siteRoutes(bed))
			families(t, func(t *testing.T, v6 bool) {
				secondWorks(t, bed, v6)
				moveBothWays(t, bed, v6)
			})
		})
	}
}

// TestStacksWindow looks at the windows that arrive where one side scales and the other does not, and where both do: taken as they stand, they
// would be a thousandth of what was meant, or a hundred times as much.
func TestStacksWindow(t *testing.T) {
	const key = "ipv4/tcp_window_scaling"
	for name, off := range map[string]func(*testbed.Bed) *testbed.NS{
		"client":  func(b *testbed.Bed) *testbed.NS { return b.Client },
		"backend": func(b *testbed.Bed) *testbed.NS { return b.Backend },
		"neither": func(*testbed.Bed) *testbed.NS { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			bed := newBed(t, testbed.Options{})
			if ns := off(bed); ns != nil {
				must(t, ns.Sysctl(key, "0"))
			}
			attach(t, bed, siteRoutes(bed))
			families(t, func(t *testing.T, v6 bool) {
				accepted := make(chan *net.TCPConn, 1)
				serve(t, bed.Backend, at(bed, 1, v6, 443), func(c net.Conn) { accepted <- c.(*net.TCPConn) })
				client, err := dialTCP(t, bed, vip(bed, v6))
				must(t, err)
				first := hello(t, classic("a.example.com"))
				_, err = client.Write(first)
				must(t, err)
				backend := <-accepted
				defer func() { _ = backend.Close() }()
				_, err = io.ReadFull(backend, make([]byte, len(first)))
				must(t, err)
				must(t, echo(client, backend, "to the backend"))
				must(t, echo(backend, client, "to the client"))
				for who, c := range map[string]*net.TCPConn{"client": client, "backend": backend} {
					if window := tcpInfo(t, c).Snd_wnd; window < 16<<10 || window > 1<<20 {
						t.Errorf("the %s may send %d bytes", who, window)
					}
				}
			})
		})
	}
}

// tcpInfo is what the kernel says of a TCP connection.
func tcpInfo(t *testing.T, c net.Conn) *unix.TCPInfo {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	must(t, err)
	var info *unix.TCPInfo
	var infoErr error
	must(t, raw.Control(func(fd uintptr) { info, infoErr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }))
	must(t, infoErr)
	return info
}

// secondWorks asks twice.
func secondWorks(t *testing.T, bed *testbed.Bed, v6 bool) {
	t.Helper()
	for i := range 2 {
		began := time.Now()
		err := request(t, bed, v6)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("request %d took %s", i+1, took)
		}
		if err != nil {
			t.Logf("request %d: %v", i+1, err)
		}
		if err != nil && i == 1 {
			t.Error("the second request failed too")
		}
	}
}

// TestStacksBackendMTU has a backend whose interface takes less than the balancer's on the same link gives.
func TestStacksBackendMTU(t *testing.T) {
	for _, noOffload := range []bool{false, true} {
		t.Run(fmt.Sprintf("no-offload-%t", noOffload), func(t *testing.T) {
			bed := newBed(t, testbed.Options{NoOffload: noOffload})
			must(t, bed.Backend.SetMTU("eth0", 1280))
			startBackends(t, bed)
			attach(t, bed, siteRoutes(bed))
			families(t, func(t *testing.T, v6 bool) {
				// The first connection was told of more than the backend takes.
				began := time.Now()
				uploadSize(t, bed, vip(bed, v6), "a.example.com", 2<<20)
				if took := time.Since(began); took > 10*time.Second {
					t.Errorf("the first upload took %s", took)
				}
				secondWorks(t, bed, v6)
				moveBothWays(t, bed, v6)
			})
		})
	}
}

// synLayouts are SYN options of real systems, and broken ones, and what the backend's SYN then has: an MSS by family, and
// options. Timestamps are 0x11223344.
var synLayouts = map[string]struct {
	options    string
	mss4, mss6 int
	asked      string
}{
	"linux":             {"020405b40402080a11223344000000000103030a", 1460, 1440, "sack ts wscale-10"},
	"linux-2.2":         {"020405b40402080a112233440000000001030300", 1460, 1440, "sack ts wscale-0"},
	"linux-2.0":         {"020405b4", 1460, 1440, ""},
	"android-1430":      {"020405960402080a112233440000000001030306", 1400, 1420, "sack ts wscale-6"},
	"loopback-16396":    {"0204400c0402080a112233440000000001030304", 1460, 1440, "sack ts wscale-4"},
	"windows-10":        {"020405b40103030801010402", 1460, 1440, "sack wscale-8"},
	"windows-xp":        {"020405b401010402", 1460, 1440, "sack"},
	"windows-ts":        {"020405b40103030801010402080a1122334400000000", 1460, 1440, "sack ts wscale-8"},
	"macos":             {"020405b4010303060101080a112233440000000004020000", 1460, 1440, "sack ts wscale-6"},
	"freebsd":           {"020405b4010303060402080a1122334400000000", 1460, 1440, "sack ts wscale-6"},
	"openbsd":           {"020405b401010402010303060101080a1122334400000000", 1460, 1440, "sack ts wscale-6"},
	"none":              {"", 536, 1220, ""},
	"wscale-14":         {"020405b40103030e", 1460, 1440, "wscale-14"},
	"wscale-15":         {"020405b40103030f", 1460, 1440, "wscale-14"},
	"mss-536":           {"02040218", 536, 1220, ""},
	"mss-65535":         {"0204ffff", 1460, 1440, ""},
	"mptcp":             {"020405b40402080a112233440000000001030307" + "1e0c01810102030405060708", 1460, 1440, "sack ts wscale-7"},
	"fast-open":         {"020405b40402080a112233440000000001030307" + "22020101", 1460, 1440, "sack ts wscale-7"},
	"md5":               {"020405b40101" + "131200112233445566778899aabbccddeeff", 1460, 1440, ""},
	"ao":                {"020405b4" + "1d10010100112233445566778899aabb", 1460, 1440, ""},
	"odd-offset":        {"01020405b4030307080a1122334400000000040200000000", 1460, 1440, "sack ts wscale-7"},
	"mss-twice":         {"020405b402040100", 1460, 1440, ""},
	"length-zero":       {"020405b403000000", 1460, 1440, ""},
	"length-past-end":   {"020405b4080a0101", 1460, 1440, ""},
	"mss-of-length-3":   {"02030500020405b401000000", 536, 1220, ""},
	"after-end-of-list": {"020405b400020402", 1460, 1440, ""},
}

// TestStacksSYN speaks TLS by hand behind each of those SYNs.
func TestStacksSYN(t *testing.T) {
	bed := wired(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, siteRoutes(bed))
	for name, layout := range synLayouts {
		options, err := hex.DecodeString(layout.options)
		must(t, err)
		t.Run(name, func(t *testing.T) {
			families(t, func(t *testing.T, v6 bool) {
				bed.ClientWire.Record()
				bed.BackendWire.Record()
				speakBehind(t, bed, v6, options)
				_, backend := checkAgreed(t, bed, v6, true)
				mss := layout.mss4
				if v6 {
					mss = layout.mss6
				}
				if got := backend.mss(backend.syn); got != mss || askedIn(backend.syn) != layout.asked {
					t.Errorf("the backend was asked for %q and an MSS of %d, want %q and %d", askedIn(backend.syn), got, layout.asked, mss)
				}
			})
		})
	}
}

// speakBehind has a connection whose SYN has those options.
func speakBehind(t *testing.T, bed *testbed.Bed, v6 bool, options []byte) {
	t.Helper()
	r, err := bed.Raw(vip(bed, v6))
	must(t, err)
	defer func() { _ = r.Close() }()
	r.TSVal = 0x11223344
	if mss, ok := (testbed.Segment{Options: options}).Option(testbed.OptMSS); ok && len(mss) == 2 {
		r.MSS = min(r.MSS, int(mss[0])<<8|int(mss[1]))
	} else {
		r.MSS = 536
	}
	r.MSS = max(r.MSS-12, 64)
	synAck, err := r.Open(options, 3*time.Second)
	must(t, err)
	if synAck.BadChecksum {
		t.Error("SYN-ACK with a bad checksum")
	}
	c := handshake(t, r, &tls.Config{ServerName: "a.example.com"})
	got, err := whoami(c)
	wantBody(t, got, err, "b1", "a.example.com")
	_ = r.Send(r.Bare(testbed.RST)) // nothing more is wanted of this connection
}

// askedIn lists the options of a SYN that may be negotiated.
func askedIn(syn testbed.Segment) string {
	var all []string
	if has(syn, testbed.OptSACKOK) {
		all = append(all, "sack")
	}
	if has(syn, testbed.OptTimestamps) {
		all = append(all, "ts")
	}
	if scale, ok := syn.Option(testbed.OptWScale); ok {
		all = append(all, fmt.Sprintf("wscale-%d", scale[0]))
	}
	return strings.Join(all, " ")
}
