// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"snilb/scripts/testbed"
)

// reload writes the routes and has the daemon read them.
func (d *daemon) reload(routes string) error {
	d.t.Helper()
	must(d.t, os.WriteFile(d.file, []byte(routes), 0o644))
	out, err := d.snilb("reload", "--name", d.name)
	if err == nil && out != "reloaded\n" {
		d.t.Errorf("reload printed %q", out)
	}
	return err
}

type reloadResult struct {
	OK    bool      `json:"ok"`
	At    time.Time `json:"at"`
	Error string    `json:"error"`
}

// lastReload is what status says of it.
func (d *daemon) lastReload() reloadResult {
	d.t.Helper()
	out, err := d.snilb("status", "--name", d.name, "-o", "json")
	must(d.t, err)
	var s struct {
		Reload reloadResult `json:"reload"`
	}
	must(d.t, json.Unmarshal([]byte(out), &s))
	return s.Reload
}

// hangUp writes the routes, sends SIGHUP and waits until they were read.
func (d *daemon) hangUp(routes string) reloadResult {
	d.t.Helper()
	before := d.lastReload()
	must(d.t, os.WriteFile(d.file, []byte(routes), 0o644))
	must(d.t, d.cmd.Process.Signal(syscall.SIGHUP))
	for deadline := time.Now().Add(readyTimeout); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if now := d.lastReload(); now.At.After(before.At) {
			return now
		}
	}
	d.t.Fatal("SIGHUP was not followed")
	return reloadResult{}
}

// load is clients that ask for one name again and again, each of which must be answered.
type load struct {
	t      *testing.T
	stop   context.CancelFunc
	all    sync.WaitGroup
	asked  atomic.Int64
	failed atomic.Int64
}

// startLoad has curl, openssl and Go ask by both families, until end.
func startLoad(t *testing.T, bed *testbed.Bed, name string) *load {
	t.Helper()
	needTool(t, "curl", "openssl")
	ctx, stop := context.WithCancel(context.Background())
	l := &load{t: t, stop: stop}
	for _, c := range clients {
		if c.name == "gnutls" {
			continue
		}
		for _, v6 := range []bool{false, true} {
			l.all.Go(func() {
				for ctx.Err() == nil {
					got, err := c.get(t, bed, vip(bed, v6), name)
					l.asked.Add(1)
					if err != nil || !isBody(got) {
						l.failed.Add(1)
						t.Errorf("%s asks for %s: %q, %v", c.name, name, got, err)
					}
				}
			})
		}
	}
	t.Cleanup(func() { l.stop(); l.all.Wait() })
	return l
}

// since waits for more answers than there were.
func (l *load) since(before int64, more int64) {
	for deadline := time.Now().Add(clientTimeout); l.asked.Load() < before+more && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
}

func (l *load) end() {
	l.t.Helper()
	l.stop()
	l.all.Wait()
	l.t.Logf("%d requests, %d failed", l.asked.Load(), l.failed.Load())
	if l.asked.Load() == 0 {
		l.t.Error("no request was made")
	}
}

// openMany opens connections by turns of the family.
func openMany(t *testing.T, bed *testbed.Bed, n int, name string) []net.Conn {
	t.Helper()
	var all []net.Conn
	for i := range n {
		all = append(all, dialTLS(t, bed, vip(bed, i%2 == 1), name))
	}
	return all
}

// wantAll asks over each connection who answers.
func wantAll(t *testing.T, conns []net.Conn, backend, name string) {
	t.Helper()
	for _, c := range conns {
		got, err := whoami(c)
		wantBody(t, got, err, backend, name)
	}
}

// otherRoutes differs from siteRoutes in the number and place of everything: a goes to b2, b to nobody, and local to b3.
func otherRoutes(bed *testbed.Bed) string {
	return `version: 1
listen: [":8443", {name: main, address: ":443"}]
pools:
` + pool(bed, "three", "", 3) + pool(bed, "moved", "balance: maglev", 2) + `routes:
  - {sni: local.example.com, pool: three}
  - {sni: a.example.com, listen: main, pool: moved}
`
}

// TestReload changes routes, pools and listeners fifty times under load, by the command and by SIGHUP: nobody who asks for a
// name that all files have is refused, and open connections notice nothing.
func TestReload(t *testing.T) {
	const reloads, open = 50, 100
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	files := []string{siteRoutes(bed), otherRoutes(bed)}
	d := attach(t, bed, files[0], atOnce...)
	if r := d.lastReload(); !r.OK || r.At.IsZero() {
		t.Errorf("before the first reload: %+v", r)
	}
	held := openMany(t, bed, open, "a.example.com")
	wantAll(t, held, "b1", "a.example.com")
	l := startLoad(t, bed, "a.example.com")
	for i := 1; i <= reloads; i++ {
		before := l.asked.Load()
		if i%5 == 0 {
			if r := d.hangUp(files[i%2]); !r.OK || r.Error != "" {
				t.Errorf("reload %d by SIGHUP: %+v", i, r)
			}
		} else {
			must(t, d.reload(files[i%2]))
		}
		if i <= 4 {
			wantRoutes(t, bed, i%2 == 1)
		}
		l.since(before, 2)
	}
	wantAll(t, held, "b1", "a.example.com")
	l.end()
	d.onlyConnects("ok", "port_busy")
	if said := d.stderr.String(); strings.Contains(said, "level=ERROR") {
		t.Error("the log has errors")
	}
}

// wantRoutes looks that names go where one of the two files says.
func wantRoutes(t *testing.T, bed *testbed.Bed, other bool) {
	t.Helper()
	served, refused, backend := "b.example.com", "local.example.com", "b1"
	if other {
		served, refused, backend = refused, served, "b2"
	}
	families(t, func(t *testing.T, v6 bool) {
		got, err := goClient(t, bed, vip(bed, v6), "a.example.com")
		wantBody(t, got, err, backend, "a.example.com")
		if got, err := goClient(t, bed, vip(bed, v6), served); err != nil || !isBody(got) {
			t.Errorf("%s: %q, %v", served, got, err)
		}
		wantEnding(t, bed, vip(bed, v6), hello(t, classic(refused)), endings["reset"])
	})
}

// TestReloadRefused has files that cannot be put in force: nothing changes, and what is wrong is said by the command, the
// log and status.
func TestReloadRefused(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	good := siteRoutes(bed)
	d := attach(t, bed, good)
	c := dialTLS(t, bed, vip(bed, false), "a.example.com")
	for what, bad := range map[string][2]string{
		"syntax":      {"version: 1\nlisten: [\":443\"\n", "routes.yaml:"},
		"unknown key": {strings.Replace(good, "listen:", "lissten:", 1), "routes.yaml:2:1: "},
		"unreachable": {strings.Replace(good, "192.0.2.12:443", "203.0.114.9:443", 1), "no route to 203.0.114.9"},
		"own address": {strings.Replace(good, "192.0.2.12:443", bed.VIP4.String()+":443", 1), "routes.yaml:5:"},
		"source":      {strings.Replace(good, "two: {", "two: {source: {addresses: [203.0.113.77]}, ", 1), "203.0.113.77 is no address of this node"},
		"flows":       {strings.Replace(good, "listen:", "limits: {flows: 1000001}\nlisten:", 1), "limits.flows is 1000001"},
		"ports":       {strings.Replace(good, "two: {", `two: {source: {ports: "9000-9099"}}, `, 1), "routes.yaml:"},
	} {
		if bad[0] == good {
			t.Fatalf("%s: the file is not bad", what)
		}
		err := d.reload(bad[0])
		if err == nil || !strings.Contains(err.Error(), bad[1]) || !strings.Contains(err.Error(), "exit status 1") {
			t.Errorf("%s: %v, want %q", what, err, bad[1])
		}
		if r := d.lastReload(); r.OK || !strings.Contains(r.Error, bad[1]) {
			t.Errorf("%s: status has %+v", what, r)
		}
		if r := d.hangUp(bad[0]); r.OK || !strings.Contains(d.stderr.String(), "not reloaded") {
			t.Errorf("%s: by SIGHUP %+v", what, r)
		}
		for name, backend := range map[string]string{"a.example.com": "b1", "b.example.com": "b2"} {
			got, err := goClient(t, bed, vip(bed, false), name)
			wantBody(t, got, err, backend, name)
		}
	}
	must(t, os.Remove(d.file))
	if _, err := d.snilb("reload", "--name", d.name); err == nil || !strings.Contains(err.Error(), "read routes") {
		t.Errorf("without a file: %v", err)
	}
	got, err := whoami(c)
	wantBody(t, got, err, "b1", "a.example.com")
	must(t, d.reload(good))
	if r := d.lastReload(); !r.OK {
		t.Errorf("status after a good one: %+v", r)
	}
	if _, err := d.snilb("reload", "--name", instanceName()); err == nil || !strings.Contains(err.Error(), "no daemon") {
		t.Errorf("reload of nobody: %v", err)
	}
}

// TestReloadListeners takes listeners away, moves them in the file and brings them back. Connections that came by one that
// is gone go on; new ones there are the stack's.
func TestReloadListeners(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	routes := func(listen, served string) string {
		return "version: 1\nlisten: [" + listen + "]\npools:\n" + pool(bed, "one", "", 1) + pool(bed, "two", "", 2) +
			"routes:\n  - {sni: a.example.com, listen: \"" + served + "\", pool: one}\n  - {sni: a.example.com, pool: two}\n"
	}
	d := attach(t, bed, routes(`":443", ":8443"`, ":8443"), atOnce...)
	families(t, func(t *testing.T, v6 bool) {
		port := func(p uint16) netip.AddrPort { return netip.AddrPortFrom(vip(bed, v6).Addr(), p) }
		ask := func(p uint16, backend string) {
			t.Helper()
			got, err := goClient(t, bed, port(p), "a.example.com")
			wantBody(t, got, err, backend, "a.example.com")
		}
		stack := func(p uint16) {
			t.Helper()
			if _, err := dialTCP(t, bed, port(p)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("port %d: %v, want it refused by the stack", p, err)
			}
		}
		must(t, d.reload(routes(`":443", ":8443"`, ":8443")))
		ask(443, "b2")
		ask(8443, "b1")
		old := dialTLS(t, bed, port(8443), "a.example.com")
		must(t, d.reload(routes(`":9443", ":443"`, ":9443")))
		stack(8443)
		ask(443, "b2")
		ask(9443, "b1")
		wantAll(t, []net.Conn{old}, "b1", "a.example.com")
		must(t, d.reload(routes(`":8443", ":9443", ":443"`, ":8443")))
		ask(8443, "b1")
		ask(9443, "b2")
		wantAll(t, []net.Conn{old}, "b1", "a.example.com")
	})
}

// pathCount is how many ways of backends' answers the kernel knows.
func (d *daemon) pathCount() (n int) {
	d.t.Helper()
	found, err := filepath.Glob(filepath.Join(pinRoot, d.name+"*", "paths"))
	if err != nil || len(found) != 1 {
		d.t.Fatalf("the pin of paths: %v, %v", found, err)
	}
	m, err := ebpf.LoadPinnedMap(found[0], &ebpf.LoadPinOptions{ReadOnly: true})
	must(d.t, err)
	defer func() { _ = m.Close() }()
	key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	it := m.Iterate()
	for it.Next(&key, &value) {
		n++
	}
	must(d.t, it.Err())
	return n
}

// TestReloadBackendGone takes a pool and its backend away: its connections go on to their end, and the backend is forgotten.
func TestReloadBackendGone(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	held := openMany(t, bed, 10, "a.example.com")
	before := d.pathCount()
	must(t, d.reload(otherRoutes(bed)))
	for deadline := time.Now().Add(readyTimeout); d.pathCount() != before-2; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d paths, before there were %d: b1 has two", d.pathCount(), before)
		}
	}
	wantAll(t, held, "b1", "a.example.com")
	for _, f := range d.flows() {
		if f.Pool != "one" {
			t.Errorf("flow %+v, want it in the pool that it began in", f)
		}
	}
	for _, c := range held {
		must(t, c.Close())
	}
	d.noFlows(15 * time.Second)
	must(t, d.reload(siteRoutes(bed)))
	got, err := goClient(t, bed, vip(bed, false), "a.example.com")
	wantBody(t, got, err, "b1", "a.example.com")
}

// TestReloadSourceClient has pools come to speak from their clients' addresses, and stop again: connections of before go on.
func TestReloadSourceClient(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	seen := func(c net.Conn, own bool, when string) {
		t.Helper()
		if got := seenFrom(t, c, "b1"); (got.String() == c.LocalAddr().String()) != own {
			t.Errorf("%s: the backend saw %s, the client is %s", when, got, c.LocalAddr())
		}
	}
	families(t, func(t *testing.T, v6 bool) {
		target := vip(bed, v6)
		nat := dialTLS(t, bed, target, "a.example.com")
		must(t, d.reload(sourceRoutes(bed, "client")))
		client := dialTLS(t, bed, target, "a.example.com")
		seen(nat, false, "begun by nat")
		seen(client, true, "begun by client")
		must(t, d.reload(siteRoutes(bed)))
		for range 4 { // the daemon looks once a second whether anybody needs it
			seen(client, true, "still client")
			seen(dialTLS(t, bed, target, "a.example.com"), false, "nat again")
			time.Sleep(700 * time.Millisecond)
		}
	})
	d.onlyConnects("ok")
}

// TestReloadInHello has a client in the middle of its hello while its route and backend are taken away: it began before, and
// is served.
func TestReloadInHello(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed, "timeouts: {hello: 20s}"))
	families(t, func(t *testing.T, v6 bool) {
		must(t, d.reload(siteRoutes(bed, "timeouts: {hello: 20s}")))
		raw, err := dialTCP(t, bed, vip(bed, v6))
		must(t, err)
		before := d.pathCount()
		half := &splitter{Conn: raw, size: 150}
		half.between = func() {
			must(t, d.reload(otherRoutes(bed)))
			time.Sleep(10 * 100 * time.Millisecond) // many looks for what can be forgotten
			if n := d.pathCount(); n != before {
				t.Errorf("%d paths, %d before: its backend is forgotten", n, before)
			}
		}
		got, err := whoami(handshake(t, half, classic("a.example.com")))
		wantBody(t, got, err, "b1", "a.example.com")
	})
}
