// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"snilb/maps"
	"snilb/scripts/testbed"
)

// again starts the daemon's successor: of the same name, and with its routes.
func (d *daemon) again(routes string, args ...string) *daemon {
	d.t.Helper()
	next := start(d.t, d.bed, d.name, d.bed.Uplinks, routes, args...)
	next.waitReady()
	d.t.Cleanup(func() {
		if !next.hasExited() {
			next.stop(syscall.SIGTERM)
		}
	})
	return next
}

// keep ends the daemon by SIGTERM, which leaves all for the next one.
func (d *daemon) keep() {
	d.t.Helper()
	must(d.t, d.cmd.Process.Signal(syscall.SIGTERM))
	select {
	case <-d.exited:
	case <-time.After(stopTimeout):
		d.t.Fatalf("still running %s after SIGTERM", stopTimeout)
	}
	if d.err != nil {
		d.t.Fatalf("after SIGTERM: %v, want exit code 0", d.err)
	}
}

// times is how often something is done: as the environment says, for the long runs.
func times(t *testing.T, variable string, otherwise int) int {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	must(t, err)
	return n
}

// survivors are connections that were open before something happened to the daemon, and must not notice.
type survivors struct {
	a, b   []net.Conn
	opened time.Time
}

func openSurvivors(t *testing.T, bed *testbed.Bed) survivors {
	t.Helper()
	return survivors{openMany(t, bed, 10, "a.example.com"), openMany(t, bed, 10, "b.example.com"), time.Now()}
}

func (s *survivors) wantAlive(t *testing.T) {
	t.Helper()
	wantAll(t, s.a, "b1", "a.example.com")
	wantAll(t, s.b, "b2", "b.example.com")
}

// waitNoted waits until the journal has all of them. It is written every 100 ms, and later on a busy machine; of connections that
// are younger, a killed daemon's successor may not know the names.
func (s *survivors) waitNoted(t *testing.T, d *daemon) {
	t.Helper()
	waitFor(t, "names in the journal", func() bool {
		for _, file := range runFiles(d.name) {
			text, err := os.ReadFile(file)
			if err == nil && bytes.Count(text, []byte("a.example.com")) >= len(s.a) && bytes.Count(text, []byte("b.example.com")) >= len(s.b) {
				return true
			}
		}
		return false
	})
}

// wantListed wants the survivors in the flow table as they are: who, and how much.
func (s *survivors) wantListed(t *testing.T, d *daemon) {
	t.Helper()
	age := time.Since(s.opened).Seconds()
	listed := make(map[string]flow)
	for _, f := range d.flows() {
		listed[f.Client] = f
	}
	for name, conns := range map[string][]net.Conn{"a.example.com": s.a, "b.example.com": s.b} {
		for _, c := range conns {
			f, ok := listed[c.LocalAddr().String()]
			if !ok || f.State != "open" || f.Listener != c.RemoteAddr().String() || f.SNI != name || f.Pool == "" || f.Backend == "" ||
				*f.AgeSeconds < age || *f.BytesIn < 1000 || *f.BytesOut < 1000 {
				t.Errorf("the connection of %s to %s is listed as %+v", c.LocalAddr(), name, f)
			}
		}
	}
}

// TestSurviveKill kills the daemon in the middle of everything, again and again, and starts it anew within some seconds. No
// connection that is bound notices, and none fails that is being made, but those whose hello it had acknowledged.
func TestSurviveKill(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	args := []string{"--dead-after", "30s"} // a slow machine must not make the stack refuse new connections
	d := attach(t, bed, siteRoutes(bed), args...)
	old := openSurvivors(t, bed)
	old.wantAlive(t)
	old.waitNoted(t, d)
	l := startLoad(t, bed, "a.example.com")
	orphaned := 0
	kills := times(t, "SNILB_KILLS", 5)
	for n := range kills {
		l.since(l.asked.Load(), 5)
		time.Sleep(rand.N(300 * time.Millisecond))
		d.kill()
		old.wantAlive(t)
		away := rand.N(time.Second)
		if n == 0 {
			away = 4 * time.Second // and half a second to start
		}
		time.Sleep(away)
		d = d.again(siteRoutes(bed), args...)
		old.wantAlive(t)
		old.wantListed(t, d)
		c := d.counters()
		if c.Engine.Adopted < 20 {
			t.Errorf("only %d flows were taken over", c.Engine.Adopted)
		}
		orphaned += int(c.Engine.Hellos["orphaned"])
	}
	l.since(l.asked.Load(), 10)
	l.end()
	t.Logf("%d kills, %d connections, %d failed, %d whose hello the dead daemon had acknowledged", kills, l.asked.Load(), l.failed.Load(), orphaned)
	old.wantAlive(t)
	old.close()
	d.noFlows(time.Minute)
	d.stop(syscall.SIGTERM)
}

func (s *survivors) close() {
	for _, c := range append(s.a, s.b...) {
		_ = c.Close()
	}
}

// otherVersions are the binary under test and one that says that it is another version.
func otherVersions(t *testing.T) []string {
	t.Helper()
	need(t, "the snilb binary", binaryErr)
	path := filepath.Join(t.TempDir(), "snilb")
	out, err := exec.Command("go", "build", "-buildvcs=false", "-ldflags", "-X main.release=next", "-o", path, "snilb/cmd/snilb").CombinedOutput()
	if err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	before := binary
	t.Cleanup(func() { binary = before })
	return []string{before, path}
}

// TestSurviveUpgrade has a daemon of another version follow again and again under load, by --on-exit keep. Nothing is lost.
func TestSurviveUpgrade(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	args := []string{"--on-exit", "keep"}
	d := attach(t, bed, siteRoutes(bed), args...)
	old := openSurvivors(t, bed)
	l := startLoad(t, bed, "a.example.com")
	upgrades := times(t, "SNILB_UPGRADES", 8)
	versions := otherVersions(t)
	for n := range upgrades {
		l.since(l.asked.Load(), 3)
		d.keep()
		binary = versions[(n+1)%len(versions)]
		d = d.again(siteRoutes(bed), args...)
		if version := d.counters().Version; (version == "next") != (binary == versions[1]) {
			t.Errorf("version %s runs after upgrade %d", version, n)
		}
		if n := d.counters().Engine.Hellos["orphaned"]; n != 0 {
			t.Errorf("%d connections were left in the middle of their hello", n)
		}
		old.wantAlive(t)
	}
	old.wantListed(t, d)
	l.end()
	t.Logf("%d upgrades, %d connections, %d failed", upgrades, l.asked.Load(), l.failed.Load())
	old.wantAlive(t)

	t.Log("detach asks it to let go, whatever it does at its end")
	old.close()
	_, err := d.snilb("detach", "--all", "--name", d.name)
	must(t, err)
	<-d.exited
	assertClean(t, bed, d.name)
}

// TestSurviveOwned kills the daemon after it has acknowledged a part of a hello, which nobody has any more: the client is
// reset, not left hanging. Another one has got no more than the SYN-ACK, and finds the next daemon.
func TestSurviveOwned(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	families(t, func(t *testing.T, v6 bool) {
		owned, err := bed.Raw(vip(bed, v6))
		must(t, err)
		defer func() { _ = owned.Close() }()
		_, err = owned.Open(testbed.LinuxSYN(owned.TSVal), 3*time.Second)
		must(t, err)
		waiting, err := bed.Raw(vip(bed, v6))
		must(t, err)
		defer func() { _ = waiting.Close() }()
		_, err = waiting.Open(testbed.LinuxSYN(waiting.TSVal), 3*time.Second)
		must(t, err)
		bytes := hello(t, classic("a.example.com"))
		must(t, owned.Send(owned.At(0, bytes[:100])))
		ack, err := owned.Recv(3 * time.Second)
		if err != nil || ack.Ack != owned.At(100, nil).Seq {
			t.Fatalf("the first part was not acknowledged: %s, %v", ack, err)
		}
		d.kill()
		d = d.again(siteRoutes(bed))
		rst, err := owned.Recv(3 * time.Second)
		if err != nil || rst.Flags&testbed.RST == 0 || rst.BadChecksum {
			t.Errorf("the client of a lost hello gets %s, %v", rst, err)
		}
		if n := d.counters().Engine.Hellos["orphaned"]; n != 1 {
			t.Errorf("%d are counted as orphaned", n)
		}
		got, err := whoami(handshake(t, waiting, classic("b.example.com")))
		wantBody(t, got, err, "b2", "b.example.com")
		_ = waiting.Send(waiting.Bare(testbed.RST))
	})
}

// TestSurviveChange has the next daemon find other routes, another number of workers, or a backend less: what is bound goes on.
func TestSurviveChange(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed), "--workers", "2", "--on-exit", "keep")
	old := openSurvivors(t, bed)
	old.wantAlive(t)
	d.keep()
	d = d.again(otherRoutes(bed), "--workers", "3", "--source-ports", "9000-30001")
	old.wantAlive(t)
	for _, name := range []string{"a.example.com", "b.example.com"} {
		got, err := goClient(t, bed, vip(bed, false), name)
		if name == "a.example.com" && !isBody(got) || name == "b.example.com" && err == nil {
			t.Errorf("%s by the new routes: %q, %v", name, got, err)
		}
	}
	old.wantAlive(t)
	d.kill()
	d = d.again(siteRoutes(bed))
	old.wantAlive(t)
	old.wantListed(t, d)
	got, err := goClient(t, bed, vip(bed, true), "b.example.com")
	wantBody(t, got, err, "b2", "b.example.com")
}

// TestSurviveAway starts the next daemon while there is no route to one of the backends: it serves the others, and that one too
// when the route is back. A daemon that has nothing to go on with is refused.
func TestSurviveAway(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	setAway(t, bed, "add")
	refused(t, bed, bed.Uplinks[0], "no route")
	setAway(t, bed, "del")
	d := attach(t, bed, siteRoutes(bed))
	old := openSurvivors(t, bed)
	d.kill()
	setAway(t, bed, "add")
	d = d.again(siteRoutes(bed))
	old.wantAlive(t)
	families(t, func(t *testing.T, v6 bool) {
		got, err := goClient(t, bed, vip(bed, v6), "a.example.com")
		wantBody(t, got, err, "b1", "a.example.com")
	})
	if said := d.stderr.String(); !strings.Contains(said, "a backend waits for a route to it") {
		t.Errorf("it says nothing of the backend:\n%s", said)
	}
	setAway(t, bed, "del")
	families(t, func(t *testing.T, v6 bool) {
		waitFor(t, "answer of the backend that was away", func() bool {
			got, err := goClient(t, bed, vip(bed, v6), "b.example.com")
			return err == nil && isBody(got)
		})
	})
	old.wantAlive(t)
}

// setAway puts an unreachable route before the way to b2, or takes it away again.
func setAway(t *testing.T, bed *testbed.Bed, do string) {
	t.Helper()
	for _, v6 := range []bool{false, true} {
		to := at(bed, 2, v6, 443).Addr()
		_, err := bed.LB.Command(t.Context(), "ip", "route", do, "unreachable", netip.PrefixFrom(to, to.BitLen()).String()).Output()
		must(t, err)
	}
}

// TestSurviveLayout refuses state of another version, and says how to go on; its connections do not notice.
func TestSurviveLayout(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	old := openSurvivors(t, bed)
	d.kill()
	record := openPins(t, d.name, "instance")
	zero := uint32(0)
	r, err := maps.ReadRecord(record)
	must(t, err)
	r.Layout += 7
	must(t, record.Put(&zero, r))
	refused := start(t, bed, d.name, bed.Uplinks, siteRoutes(bed))
	<-refused.exited
	if code := refused.cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	if said := refused.stderr.String(); !strings.Contains(said, "snilb detach --all --name "+d.name) {
		t.Errorf("no way out in:\n%s", said)
	}
	old.wantAlive(t)
	_, err = d.snilb("detach", "--all", "--name", d.name)
	must(t, err)
	assertClean(t, bed, d.name)
	d.again(siteRoutes(bed))
	got, err := goClient(t, bed, vip(bed, false), "a.example.com")
	wantBody(t, got, err, "b1", "a.example.com")
}

// openPins opens a pinned map of an instance.
func openPins(t *testing.T, instance, name string) *ebpf.Map {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(pinRoot, instance+"@*", name)) // behind @ is the namespace's cookie
	must(t, err)
	if len(found) != 1 {
		t.Fatalf("pins of %s: %q", name, found)
	}
	m, err := ebpf.LoadPinnedMap(found[0], nil)
	must(t, err)
	t.Cleanup(func() { _ = m.Close() })
	return m
}

// TestSecondSignal ends a daemon at once that waits for its connections.
func TestSecondSignal(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed), "--drain-timeout", "10m")
	old := openSurvivors(t, bed)
	must(t, d.cmd.Process.Signal(syscall.SIGTERM))
	d.waitLogged("ending")
	old.wantAlive(t)
	if d.hasExited() {
		t.Fatal("it did not wait for its connections")
	}
	d.stop(syscall.SIGINT)
}

// waitLogged waits until the daemon has said something.
func (d *daemon) waitLogged(text string) {
	d.t.Helper()
	for deadline := time.Now().Add(readyTimeout); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if strings.Contains(d.stderr.String(), text) {
			return
		}
	}
	d.t.Fatalf("not said: %s", text)
}

// TestSurviveSourceClient has connections that speak to their backend from their client's address be taken over by a daemon whose
// routes know nothing of that.
func TestSurviveSourceClient(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, sourceRoutes(bed, "client"), "--on-exit", "keep")
	old := openMany(t, bed, 2, "a.example.com")
	wantAll(t, old, "b1", "a.example.com")
	d.keep()
	d = d.again(siteRoutes(bed))
	for range 4 { // the daemon looks once a second whether anybody needs it
		wantAll(t, old, "b1", "a.example.com")
		time.Sleep(700 * time.Millisecond)
	}
	d.kill()
	d = d.again(sourceRoutes(bed, "nat"))
	wantAll(t, old, "b1", "a.example.com")
	for _, c := range old {
		_ = c.Close()
	}
	d.noFlows(time.Minute)
}

// TestSurviveListeners has hellos wait for a daemon that numbers its listeners otherwise than the dead one, which had been
// reloaded: they are decided by the listener that they came to.
func TestSurviveListeners(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	routes := func(listen string) string {
		return "version: 1\nlisten: [" + listen + "]\npools:\n" + pool(bed, "one", "", 1) + "routes:\n  - {sni: a.example.com, listen: main, pool: one}\n"
	}
	const main = `{name: main, address: ":443"}`
	last := routes(main + `, ":9443"`)
	d := attach(t, bed, routes(`":8443", `+main))
	must(t, d.reload(last))
	d.kill()
	var conns []net.Conn
	for i := range 4 {
		raw, err := dialTCP(t, bed, vip(bed, i%2 == 1))
		must(t, err)
		_, err = raw.Write(hello(t, classic("a.example.com")))
		must(t, err)
		conns = append(conns, raw)
	}
	d.again(last)
	for _, c := range conns {
		must(t, c.SetReadDeadline(time.Now().Add(clientTimeout)))
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Errorf("no answer to a hello that waited: %v", err)
		}
	}
}
