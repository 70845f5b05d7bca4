// SPDX-License-Identifier: Apache-2.0

// Command kernels runs a part of the tests on the kernels that Debian's packages offer, each booted in a virtual machine with
// emulated processors: `make test-kernels`. It runs from the root of the tree, on amd64.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"snilb/scripts/kernels/plan"
)

func main() {
	cache := flag.String("cache", "", "directory that keeps downloaded packages")
	modes := flag.String("modes", "tc", "attach modes, separated by spaces")
	names := flag.String("kernels", "", "packages, separated by spaces; by default the newest of each series and flavour")
	only := flag.String("steps", "", "steps to run: a regular expression for programs, loader, requests-MODE")
	requests := flag.String("run", requestTests, "end-to-end tests to run: a regular expression")
	timeout := flag.Duration("timeout", 15*time.Minute, "for each machine")
	list := flag.Bool("list", false, "say which kernels there are, and do nothing")
	flag.Parse()
	kernels := strings.Fields(*names)
	if len(kernels) == 0 {
		var err error
		kernels, err = offered()
		exitOn(err)
	}
	if *list {
		fmt.Println(strings.Join(kernels, "\n"))
		return
	}
	steps, err := planned(strings.Fields(*modes), *requests, *only)
	exitOn(err)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	failed, err := runAll(ctx, *cache, kernels, steps, *timeout)
	exitOn(err)
	if failed > 0 {
		exitOn(fmt.Errorf("%d of %d kernels failed", failed, len(kernels)))
	}
}

func exitOn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		os.Exit(1)
	}
}

// The machines are small, so that a run fits beside other work.
const (
	memory = 1536 // MiB: the initramfs stays in it
	cpus   = 2    // tables are per processor, and packets arrive on several
)

// runAll runs the steps on each kernel, shows the table of results, and returns how many kernels failed.
func runAll(ctx context.Context, cache string, kernels []string, steps []plan.Step, timeout time.Duration) (failed int, err error) {
	dir, err := os.MkdirTemp("", "snilb-kernels-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // a temporary directory
	if err := errors.Join(os.MkdirAll(cache, 0o755), buildPrograms(dir)); err != nil {
		return 0, err
	}
	var report bytes.Buffer
	table := tabwriter.NewWriter(&report, 0, 0, 2, ' ', 0)
	for _, name := range kernels {
		k, err := get(cache, name)
		if err != nil {
			return 0, err
		}
		m := &machine{kernel: k, dir: dir, memory: memory, cpus: cpus, timeout: timeout}
		began := time.Now()
		console, err := m.run(ctx, steps, &digest{out: os.Stdout})
		if ctx.Err() != nil {
			return 0, errors.New("interrupted")
		}
		verdict := "PASS"
		if err != nil {
			failed++
			verdict = "FAIL: " + err.Error()
			fmt.Printf("--- the console of %s:\n%s\n", name, console)
		}
		took := time.Since(began).Round(time.Second)
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", name, verdict, took, verdicts(console)) //nolint:errcheck // memory
	}
	_ = table.Flush() // memory as well
	fmt.Print(report.String())
	return failed, nil
}

// get downloads a kernel's package and reads it.
func get(cache, name string) (*kernel, error) {
	deb, err := fetch(cache, name)
	if err != nil {
		return nil, err
	}
	fmt.Println("---", filepath.Base(deb))
	return unpack(name, deb)
}

// What runs on every kernel besides requests: what the verifier says of each program, and the loader's tests of what differs
// between kernels. Some of the others ask for what kernels before 6.3 or 6.6 do not have.
const (
	programTests = "^TestVerifierBudget$"
	loaderTests  = "^Test(Preflight.*|FewCapabilities|CloseLeavesNothing|ClsactOfOthersStays|PacketPasses|LeftoversAreRemoved|OneArmedOrder" +
		"|LoadedProgramsWork|XDPPasses|XDPLeftoversAreRemoved|XDPOldKernel)$"
)

// The end-to-end tests that every kernel runs in every mode: all clients by all names, one interface for both legs, VLANs, and
// a daemon that is killed.
const requestTests = "^Test(Names|OneArmed|VLAN|Kill)$"

// planned are the steps of a machine, or those that a regular expression wants.
func planned(modes []string, requests, only string) ([]plan.Step, error) {
	wanted, err := regexp.Compile(only)
	if err != nil {
		return nil, err
	}
	test := func(program string, args ...string) []string {
		return append([]string{"/bin/" + program, "-test.v", "-test.timeout", "10m"}, args...)
	}
	steps := []plan.Step{
		{Name: "programs", Dir: "/maps", Argv: test("maps.test", "-test.run", programTests)},
		{Name: "loader", Dir: "/tmp", Argv: test("loader.test", "-test.run", loaderTests)},
	}
	for _, mode := range modes {
		steps = append(steps, plan.Step{Name: "requests-" + mode, Dir: "/tmp", Argv: test("e2e.test", "-mode", mode, "-test.run", requests)})
	}
	return slices.DeleteFunc(steps, func(s plan.Step) bool { return !wanted.MatchString(s.Name) }), nil
}
