// SPDX-License-Identifier: Apache-2.0

package packaging

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

var scratch string // of the test run

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	var err error
	if scratch, err = os.MkdirTemp("", "snilb-packaging-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(scratch) }()
	return m.Run()
}

var (
	need     = testbed.Need
	needTool = testbed.NeedTool
	needRoot = testbed.NeedRoot
	must     = testbed.Must
)

// tree is the root of the sources.
const tree = "../.."

// output runs a command, and returns its stdout without the last newline.
func output(cmd *exec.Cmd) (string, error) {
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w\n%s%s", strings.Join(cmd.Args, " "), err, out.String(), errOut.String())
	}
	return strings.TrimSuffix(out.String(), "\n"), nil
}

func mustRun(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := output(exec.Command(name, args...))
	must(t, err)
	return out
}

// deb is the package and what is in it, made once for all tests.
type deb struct {
	file string
	root string // where it is unpacked
}

var buildDeb = sync.OnceValues(func() (deb, error) {
	dir := filepath.Join(scratch, "deb")
	d := deb{root: filepath.Join(scratch, "root")}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return d, err
	}
	var err error
	if d.file, err = output(exec.Command(tree+"/scripts/deb/build.sh", dir)); err != nil {
		return d, err
	}
	_, err = output(exec.Command("dpkg-deb", "-x", d.file, d.root))
	return d, err
})

func theDeb(t *testing.T) deb {
	t.Helper()
	needTool(t, "dpkg-deb", "git", "go")
	d, err := buildDeb()
	must(t, err)
	return d
}

func (d deb) snilb() string { return filepath.Join(d.root, "usr/bin/snilb") }

// newBed is a client, a node and a backend in network namespaces, removed after the test.
func newBed(t *testing.T) *testbed.Bed {
	t.Helper()
	needRoot(t)
	bed, err := testbed.New(testbed.Options{})
	need(t, "network namespaces", err)
	t.Cleanup(func() {
		if err := bed.Close(); err != nil {
			t.Errorf("take the test-bed down: %v", err)
		}
	})
	return bed
}

// routesOf are routes to the bed's first backend.
func routesOf(bed *testbed.Bed) string {
	return fmt.Sprintf("version: 1\nlisten: \":443\"\npools:\n  p: {backends: [\"%v:443\"]}\nroutes: [{sni: a.example.com, pool: p}]\n", bed.Backends4[0])
}

// site is a TLS server behind the load balancer.
type site struct {
	bed  *testbed.Bed
	cert *testbed.Cert
}

func startSite(t *testing.T, bed *testbed.Bed) *site {
	t.Helper()
	cert, err := testbed.NewCert("a.example.com")
	must(t, err)
	backend, err := testbed.StartBackend(bed.Backend, "b1", netip.AddrPortFrom(bed.Backends4[0], 443), cert)
	must(t, err)
	t.Cleanup(func() { _ = backend.Close() })
	return &site{bed, cert}
}

// assertServed has a client get an answer of the backend by way of the load balancer.
func (s *site) assertServed(t *testing.T) {
	t.Helper()
	client := http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{RootCAs: s.cert.Pool, ServerName: "a.example.com"},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return s.bed.Client.DialContext(ctx, "tcp", netip.AddrPortFrom(s.bed.VIP4, 443).String())
		},
	}}
	answer, err := client.Get("https://a.example.com/")
	if err != nil {
		t.Error(err)
		return
	}
	defer func() { _ = answer.Body.Close() }()
	if body, err := io.ReadAll(answer.Body); err != nil || !strings.HasPrefix(string(body), "b1 ") {
		t.Errorf("the answer is %q, %v", body, err)
	}
}
