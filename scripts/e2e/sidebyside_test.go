// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

var (
	bulkRounds = flag.Int("bulk-rounds", 1, "rounds of TestSideBySide; `make bench-bulk` takes 7")
	bulkMiB    = flag.Int("bulk-mib", 256, "MiB of one download of TestSideBySide; `make bench-bulk` takes 4096")
)

// way is one way for a download from backend 1 to the client.
type way struct {
	name   string
	target netip.AddrPort
	mbps   []float64 // MB a second, one a round
	cpu    []float64 // CPU seconds of the whole machine per GB
}

// TestSideBySide downloads through plain routing, nginx stream with ssl_preread and snilb, one after the other in the
// same namespaces. That all bytes come decides the test; the figures are for reading.
func TestSideBySide(t *testing.T) {
	needTool(t, "nginx")
	bed := newBed(t, testbed.Options{Forward: true})
	serveBulk(t, bed, at(bed, 1, false, 443))
	proxy := netip.AddrPortFrom(bed.VIP4, 8443)
	startStreamProxy(t, bed, proxy)
	attach(t, bed, siteRoutes(bed))
	ways := []*way{
		{name: "plainly routed", target: at(bed, 1, false, 443)},
		{name: "nginx stream", target: proxy},
		{name: "snilb " + *mode, target: vip(bed, false)},
	}
	first := hello(t, classic("a.example.com"))
	for range *bulkRounds {
		for _, w := range ways {
			w.measure(t, bed, first)
		}
	}
	report(t, ways)
}

// serveBulk reads a hello and then sends what the test asks for, without TLS: the balancer's cost is the question, not
// that of a cipher.
func serveBulk(t *testing.T, bed *testbed.Bed, addr netip.AddrPort) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "bulk")
	must(t, os.WriteFile(file, make([]byte, 1<<20), 0o644))
	serve(t, bed.Backend, addr, func(c net.Conn) {
		defer func() { _ = c.Close() }()
		if _, err := c.Read(make([]byte, 4096)); err != nil {
			return
		}
		f, err := os.Open(file)
		if err != nil {
			return
		}
		defer func() { _ = f.Close() }()
		for range *bulkMiB {
			if _, err := f.Seek(0, io.SeekStart); err != nil {
				return
			}
			if _, err := io.Copy(c, f); err != nil { // sendfile
				return
			}
		}
	})
}

// measure downloads once. The client counts and throws away by one read buffer.
func (w *way) measure(t *testing.T, bed *testbed.Bed, first []byte) {
	t.Helper()
	busy, began := machineCPU(t), time.Now()
	var got int64
	must(t, bed.Client.Do(func() error {
		c, err := net.DialTimeout("tcp", w.target.String(), clientTimeout)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		if err := c.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
			return err
		}
		if _, err := c.Write(first); err != nil {
			return err
		}
		got, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 1<<20))
		return err
	}))
	took, used := time.Since(began), machineCPU(t)-busy
	if want := int64(*bulkMiB) << 20; got != want {
		t.Fatalf("%s: %d bytes of %d came", w.name, got, want)
	}
	w.mbps = append(w.mbps, float64(got)/1e6/took.Seconds())
	w.cpu = append(w.cpu, used.Seconds()/(float64(got)/1e9))
}

// startStreamProxy runs nginx as its documentation of ssl_preread shows it, with the worker count that suits the machine.
func startStreamProxy(t *testing.T, bed *testbed.Bed, addr netip.AddrPort) {
	t.Helper()
	dir := t.TempDir()
	conf := fmt.Sprintf(`load_module /usr/lib/nginx/modules/ngx_stream_module.so;
user root;
daemon off;
worker_processes %d;
pid %[2]s/nginx.pid;
error_log stderr warn;
events { worker_connections 4096; }
stream {
	map $ssl_preread_server_name $backend { a.example.com %[3]s; default %[4]s; }
	server { listen %[5]s reuseport; ssl_preread on; proxy_pass $backend; proxy_buffer_size 64k; }
}
`, runtime.NumCPU(), dir, at(bed, 1, false, 443), at(bed, 2, false, 443), addr)
	file := filepath.Join(dir, "nginx.conf")
	must(t, os.WriteFile(file, []byte(conf), 0o644))
	cmd := bed.LB.Command(context.Background(), "nginx", "-p", dir, "-c", file, "-e", "stderr")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() && out.Len() > 0 {
			t.Logf("nginx said:\n%s", out.String())
		}
	})
	waitAccept(t, bed.LB, addr)
}

// machineCPU is what all CPUs together have worked since boot, soft interrupts included: what steering costs does not
// show in any process.
func machineCPU(t *testing.T) time.Duration {
	t.Helper()
	stat, err := os.ReadFile("/proc/stat")
	must(t, err)
	line, _, _ := strings.Cut(string(stat), "\n")
	var ticks int64
	for i, field := range strings.Fields(line)[1:] {
		n, err := strconv.ParseInt(field, 10, 64)
		must(t, err)
		if i != 3 && i != 4 && i < 8 { // all but idle, iowait and the guests counted in user
			ticks += n
		}
	}
	return time.Duration(ticks) * time.Second / 100
}

func report(t *testing.T, ways []*way) {
	t.Helper()
	nginx, _ := exec.Command("nginx", "-v").CombinedOutput()
	t.Logf("%d rounds of %d MiB, %d CPUs, %s", *bulkRounds, *bulkMiB, runtime.NumCPU(), strings.TrimSpace(string(nginx)))
	floor := median(ways[0].cpu)
	for _, w := range ways {
		t.Logf("%-15s %6.0f MB/s (%.0f to %.0f), %.2f of plainly routed; CPU %.2f s/GB, adds %.2f", w.name,
			median(w.mbps), slices.Min(w.mbps), slices.Max(w.mbps), median(w.mbps)/median(ways[0].mbps),
			median(w.cpu), median(w.cpu)-floor)
	}
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}
