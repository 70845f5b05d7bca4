// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"snilb/scripts/testbed"
)

var (
	mode = flag.String("mode", cmp.Or(os.Getenv("SNILB_MODE"), "tc"), "attach mode: tc, xdp or xdp-generic")

	binary    string // the snilb under test
	binaryErr error  // why there is none

	// cert is what every backend shows; caFile holds it for clients that read files.
	cert   *testbed.Cert
	caFile string
)

// The names the backends have a certificate for.
var certNames = []string{"a.example.com", "b.example.com", "*.w.example.com", "local.example.com"}

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	switch *mode {
	case "tc", "xdp", "xdp-generic":
	default:
		fmt.Fprintf(os.Stderr, "-mode %s: there is tc, xdp and xdp-generic\n", *mode)
		return 2
	}
	dir, err := os.MkdirTemp("", "snilb-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if cert, err = testbed.NewCert(certNames...); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	caFile = filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(caFile, cert.CertPEM, 0o644); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	binary, binaryErr = build(dir)
	sweepPins()
	return m.Run()
}

// build compiles the command, or takes the one that the environment names.
func build(dir string) (string, error) {
	if path := os.Getenv("SNILB_BIN"); path != "" {
		return filepath.Abs(path)
	}
	path := filepath.Join(dir, "snilb")
	out, err := exec.Command("go", "build", "-buildvcs=false", "-o", path, "snilb/cmd/snilb").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
}

var (
	need     = testbed.Need
	needTool = testbed.NeedTool
	needRoot = testbed.NeedRoot
	must     = testbed.Must
)

// newBed builds a bed for the chosen mode and takes it down after the test.
func newBed(t *testing.T, opts testbed.Options) *testbed.Bed {
	t.Helper()
	needRoot(t)
	opts.XDP = *mode == "xdp"
	// Generic XDP runs behind GRO and would see merged packets with partial checksums.
	opts.NoOffload = opts.NoOffload || *mode == "xdp-generic"
	bed, err := testbed.New(opts)
	need(t, "network namespaces", err)
	t.Cleanup(func() {
		if err := bed.Close(); err != nil {
			t.Errorf("take the test-bed down: %v", err)
		}
	})
	return bed
}
