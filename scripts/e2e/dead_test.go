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
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"

	"snilb/scripts/testbed"
)

// deadAfter is the shortest --dead-after that is taken.
const deadAfter = "2s"

// suspend stops a daemon where it is, by SIGSTOP, at the longest until the test ends.
func (d *daemon) suspend() {
	d.t.Helper()
	must(d.t, d.cmd.Process.Signal(syscall.SIGSTOP))
	d.t.Cleanup(d.resume)
}

func (d *daemon) resume() { _ = d.cmd.Process.Signal(syscall.SIGCONT) }

// connect makes a connection and closes it. Where SYNs are not answered it gives up soon.
func connect(t *testing.T, bed *testbed.Bed, target netip.AddrPort) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
	defer cancel()
	c, err := bed.Client.DialContext(ctx, "tcp", target.String())
	if err != nil {
		return err
	}
	return c.Close()
}

// keepalive are connections that must outlive what a test does: to b1 by one request after the other, and a download.
type keepalive struct {
	conns []net.Conn
	bulk  <-chan error
}

func newKeepalive(t *testing.T, bed *testbed.Bed, v6 bool) *keepalive {
	t.Helper()
	k := &keepalive{}
	for range 3 {
		k.conns = append(k.conns, dialTLS(t, bed, vip(bed, v6), "a.example.com"))
	}
	k.live(t)
	k.bulk = slowDownload(t, bed, vip(bed, v6), "a.example.com")
	return k
}

// slowDownload has curl fetch /big at a speed that makes it last some five seconds, and returns once it has begun.
func slowDownload(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name string) <-chan error {
	t.Helper()
	file, done := filepath.Join(t.TempDir(), "big"), make(chan error, 1)
	go func() {
		out, err := curlPath(t, bed, target, name, "/big", "--limit-rate", "20M", "-o", file, "-w", "%{size_download}")
		if err == nil && out != fmt.Sprint(bulkSize) {
			err = fmt.Errorf("curl took %s bytes, want %d", out, bulkSize)
		}
		done <- err
	}()
	waitFor(t, "byte of "+name, func() bool {
		info, err := os.Stat(file)
		return err == nil && info.Size() > 0
	})
	return done
}

func (k *keepalive) live(t *testing.T) {
	t.Helper()
	for _, c := range k.conns {
		got, err := whoami(c)
		wantBody(t, got, err, "b1", "a.example.com")
	}
}

// end sees the download to its end.
func (k *keepalive) end(t *testing.T) {
	t.Helper()
	k.live(t)
	if err := <-k.bulk; err != nil {
		t.Errorf("the download: %v", err)
	}
}

// localNginx serves the listeners' port on the load balancer itself, as b9.
func localNginx(t *testing.T, bed *testbed.Bed) {
	t.Helper()
	root := startNginx(t, bed.LB, `	keepalive_timeout 600s;
	server { listen 443 ssl; listen [::]:443 ssl ipv6only=on;
		location = / { return 200 'b9 "$ssl_server_name" "" $remote_addr:$remote_port\n'; }
		location = /big { }
	}
`, vip(bed, false))
	f, err := os.Create(filepath.Join(root, "big"))
	must(t, err)
	_, err = io.CopyN(f, testbed.Noise(2), bulkSize)
	must(t, errors.Join(err, f.Close()))
}

// lastRequest asks over a connection, and wants it closed by its server behind the answer.
func lastRequest(c net.Conn) (string, error) {
	if err := c.SetDeadline(time.Now().Add(clientTimeout)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: backend\r\nConnection: close\r\n\r\n"); err != nil {
		return "", err
	}
	all, err := io.ReadAll(c)
	_, body, _ := strings.Cut(string(all), "\r\n\r\n")
	return strings.TrimSpace(body), err
}

// awaitRefused waits until new connections are refused.
func awaitRefused(t *testing.T, bed *testbed.Bed, target netip.AddrPort) {
	t.Helper()
	waitFor(t, "refusal", func() bool { return errors.Is(connect(t, bed, target), syscall.ECONNREFUSED) })
}

// TestDeadRefused stops the daemon for longer than --dead-after where new connections are then refused: by the stack, as
// nobody listens there, or in its place although somebody does.
func TestDeadRefused(t *testing.T) {
	needTool(t, "curl")
	for policy, counter := range map[string]string{"pass": "pass/daemon_dead", "reset": "answer/dead_reset"} {
		t.Run(policy, func(t *testing.T) {
			bed := newBed(t, testbed.Options{})
			nginxBackends(t, bed)
			if policy == "reset" {
				localNginx(t, bed)
			}
			families(t, func(t *testing.T, v6 bool) {
				d := attach(t, bed, siteRoutes(bed), "--dead-after", deadAfter, "--on-dead", policy)
				old := newKeepalive(t, bed, v6)
				d.suspend()
				awaitRefused(t, bed, vip(bed, v6))
				for range 3 {
					var exit *exec.ExitError
					if _, err := curl(t, bed, vip(bed, v6), "b.example.com"); !errors.As(err, &exit) || exit.ExitCode() != 7 {
						t.Errorf("curl: %v, want exit code 7: it is refused", err)
					}
				}
				old.live(t)
				d.resume()
				waitFor(t, "new connection", func() bool { return connect(t, bed, vip(bed, v6)) == nil })
				askByName(t, bed, vip(bed, v6), "b2")
				old.end(t)
				if c := d.counters(); c.packets(counter) < 4 {
					t.Errorf("%s counted %d", counter, c.packets(counter))
				}
				waitFor(t, "log line", func() bool {
					_, reason, _ := strings.Cut(counter, "/")
					return strings.Contains(d.stderr.String(), "reason="+reason)
				})
			})
		})
	}
}

// TestDeadHold stops the daemon for longer than --dead-after: who connects meanwhile waits, and is served afterwards.
func TestDeadHold(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	nginxBackends(t, bed)
	families(t, func(t *testing.T, v6 bool) {
		d := attach(t, bed, siteRoutes(bed), "--dead-after", deadAfter, "--on-dead", "hold")
		old := newKeepalive(t, bed, v6)
		d.suspend()
		waitFor(t, "SYN without an answer", func() bool {
			err := connect(t, bed, vip(bed, v6))
			if err != nil && !errors.Is(err, context.DeadlineExceeded) && !os.IsTimeout(err) {
				t.Fatalf("a new connection: %v, want it held", err)
			}
			return err != nil
		})
		type answer struct {
			client, body string
			err          error
		}
		answers := make(chan answer, len(clients))
		for _, c := range clients {
			if c.tool != "" {
				needTool(t, c.tool)
			}
			go func() {
				body, err := c.get(t, bed, vip(bed, v6), "b.example.com")
				answers <- answer{c.name, body, err}
			}()
		}
		time.Sleep(1500 * time.Millisecond) // some of them repeat their SYN
		if len(answers) > 0 {
			t.Errorf("%+v, while nobody is there to answer", <-answers)
		}
		old.live(t)
		d.resume()
		for range clients {
			a := <-answers
			wantBody(t, a.body, a.err, "b2", "b.example.com")
		}
		old.end(t)
		if c := d.counters(); c.packets("drop/dead_hold") < uint64(len(clients)) {
			t.Errorf("%d SYNs were held, of %d clients", c.packets("drop/dead_hold"), len(clients))
		}
	})
}

// TestDeadProxy has an nginx on the listeners' port, from the beginning or only once the daemon is dead: it serves new
// connections, while old flows keep flowing, and ends them after the daemon is back and has the new ones again. With SYN
// cookies no socket tells of a connection until its client's first ACK.
func TestDeadProxy(t *testing.T) {
	needTool(t, "curl")
	for _, c := range []struct{ name, cookies string }{{"before", "0"}, {"later", "2"}} {
		t.Run(c.name, func(t *testing.T) {
			families(t, func(t *testing.T, v6 bool) {
				bed := newBed(t, testbed.Options{})
				nginxBackends(t, bed)
				must(t, bed.LB.Sysctl("ipv4/tcp_syncookies", c.cookies))
				if c.name == "before" {
					localNginx(t, bed)
				}
				d := attach(t, bed, siteRoutes(bed), "--dead-after", deadAfter)
				old, ended := newKeepalive(t, bed, v6), dialTLS(t, bed, vip(bed, v6), "a.example.com")
				d.suspend()
				if c.name == "later" {
					awaitRefused(t, bed, vip(bed, v6))
					localNginx(t, bed)
				}
				servedBy(t, bed, vip(bed, v6), "b9")
				askByName(t, bed, vip(bed, v6), "b9")
				samePortAgain(t, bed, ended.NetConn())
				theirs := dialTLS(t, bed, vip(bed, v6), "local.example.com")
				got, err := whoami(theirs)
				wantBody(t, got, err, "b9", "local.example.com")
				bulk := slowDownload(t, bed, vip(bed, v6), "local.example.com")
				old.live(t)
				d.resume()
				servedBy(t, bed, vip(bed, v6), "b2")
				askByName(t, bed, vip(bed, v6), "b2")
				old.end(t)
				got, err = lastRequest(theirs)
				wantBody(t, got, err, "b9", "local.example.com")
				if err := <-bulk; err != nil {
					t.Errorf("the local nginx's download: %v", err)
				}
			})
		})
	}
}

// servedBy waits until b.example.com is answered by a backend.
func servedBy(t *testing.T, bed *testbed.Bed, target netip.AddrPort, backend string) {
	t.Helper()
	waitFor(t, "answer of "+backend, func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		cmd := bed.Client.Command(ctx, "curl", "-sS", "--cacert", caFile, "--resolve",
			fmt.Sprintf("b.example.com:443:%s", target.Addr()), "https://b.example.com/")
		out, _ := cmd.Output()
		return strings.HasPrefix(string(out), backend+" ")
	})
}

// askByName asks for b.example.com by all clients.
func askByName(t *testing.T, bed *testbed.Bed, target netip.AddrPort, backend string) {
	t.Helper()
	for _, c := range clients {
		if c.tool != "" {
			needTool(t, c.tool)
		}
		got, err := c.get(t, bed, target, "b.example.com")
		wantBody(t, got, err, backend, "b.example.com")
	}
}

// samePortAgain ends a balanced connection by a RST, and connects from its port again: the local nginx has it, and with
// it all of its packets.
func samePortAgain(t *testing.T, bed *testbed.Bed, c net.Conn) {
	t.Helper()
	local, remote := c.LocalAddr(), c.RemoteAddr()
	must(t, c.(*net.TCPConn).SetLinger(0))
	must(t, c.Close())
	ctx, cancel := context.WithTimeout(t.Context(), clientTimeout)
	defer cancel()
	raw, err := bed.Client.DialWith(ctx, &net.Dialer{LocalAddr: local}, "tcp", remote.String())
	must(t, err)
	defer func() { _ = raw.Close() }()
	got, err := whoami(handshake(t, raw, &tls.Config{ServerName: "a.example.com"}))
	wantBody(t, got, err, "b9", "a.example.com")
}

// TestDeadCrashLoop kills the daemon, and starts it again and again by a routes file with an error in it, as a service
// manager would. None of that touches what the dead one has left; the next good start takes over.
func TestDeadCrashLoop(t *testing.T) {
	needTool(t, "curl")
	bed := newBed(t, testbed.Options{})
	nginxBackends(t, bed)
	localNginx(t, bed)
	families(t, func(t *testing.T, v6 bool) {
		d := attach(t, bed, siteRoutes(bed), "--dead-after", deadAfter)
		old := newKeepalive(t, bed, v6)
		d.kill()
		crash := func() {
			t.Helper()
			broken := start(t, bed, d.name, bed.Uplinks, siteRoutes(bed, "rutes: []"), "--dead-after", deadAfter)
			select {
			case <-broken.exited:
			case <-time.After(readyTimeout):
				t.Fatal("attached by a bad routes file")
			}
			if code := broken.cmd.ProcessState.ExitCode(); code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			old.live(t)
		}
		for range 3 {
			crash()
		}
		servedBy(t, bed, vip(bed, v6), "b9")
		theirs := dialTLS(t, bed, vip(bed, v6), "local.example.com")
		for range 3 {
			crash()
			got, err := goClient(t, bed, vip(bed, v6), "local.example.com")
			wantBody(t, got, err, "b9", "local.example.com")
		}
		old.end(t)

		again := start(t, bed, d.name, bed.Uplinks, siteRoutes(bed), "--dead-after", deadAfter)
		again.waitReady()
		askByName(t, bed, vip(bed, v6), "b2")
		got, err := lastRequest(theirs)
		wantBody(t, got, err, "b9", "local.example.com")
		again.stop(syscall.SIGTERM)
	})
}

// TestDeadStarts has daemons that cannot attach follow a killed one, again and again, as a service manager would: none of
// them puts off what new connections meet, and what is bound goes on.
func TestDeadStarts(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed), "--dead-after", deadAfter)
	old := openSurvivors(t, bed)
	addSpare(t, bed)
	var others []*neighbour
	for range 63 { // as many as the kernel takes
		others = append(others, newNeighbour(t, bed, spare, link.Tail()))
	}
	d.kill()
	killed := time.Now()
	for {
		next := start(t, bed, d.name, []string{spare, bed.Uplinks[0]}, siteRoutes(bed), "--dead-after", deadAfter)
		<-next.exited
		gone := connect(t, bed, vip(bed, false))
		if said := next.stderr.String(); next.cmd.ProcessState.ExitCode() != 1 || strings.Contains(said, "ready\n") {
			t.Fatalf("it did not fail to attach: %v\n%s", next.err, said)
		}
		if errors.Is(gone, syscall.ECONNREFUSED) {
			break
		}
		if away := time.Since(killed); away > 10*time.Second { // five times --dead-after
			t.Fatalf("no daemon has steered for %s, and a new connection still waits: %v", away, gone)
		}
	}
	for _, n := range others {
		n.close()
	}
	old.wantAlive(t)
	d.again(siteRoutes(bed))
	got, err := goClient(t, bed, vip(bed, false), "a.example.com")
	wantBody(t, got, err, "b1", "a.example.com")
	old.close()
}
