// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"snilb/scripts/kernels/plan"
)

// A machine is one run of one kernel.
type machine struct {
	kernel  *kernel
	dir     string // for its files, and where the programs are
	memory  int    // MiB
	cpus    int
	timeout time.Duration
}

// run boots the machine, follows its console and returns all of it, with an error when the steps did not all pass.
func (m *machine) run(ctx context.Context, steps []plan.Step, follow io.Writer) (console []byte, err error) {
	vmlinuz, initrd := filepath.Join(m.dir, "vmlinuz"), filepath.Join(m.dir, "initrd")
	if err := os.WriteFile(vmlinuz, m.kernel.image, 0o644); err != nil {
		return nil, err
	}
	if err := writeImage(initrd, m.dir, m.kernel, steps); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, m.timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
		// Emulated even where the processor could run it: the same test on every machine.
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", fmt.Sprint(m.cpus), "-m", fmt.Sprint(m.memory),
		"-kernel", vmlinuz, "-initrd", initrd,
		// A panic restarts, which -no-reboot makes an end.
		"-append", "console=ttyS0 loglevel=4 panic=-1 random.trust_cpu=on mitigations=off")
	var all bytes.Buffer
	cmd.Stdout = io.MultiWriter(&all, follow)
	cmd.Stderr = cmd.Stdout
	err = cmd.Run()
	switch {
	case ctx.Err() != nil:
		err = fmt.Errorf("not done after %s", m.timeout)
	case err == nil && !passed(all.Bytes()):
		err = errors.New("the steps did not all pass")
	}
	return all.Bytes(), err
}

// passed looks for the line of the first process.
func passed(console []byte) bool {
	for line := range bytes.Lines(console) {
		if string(bytes.TrimSpace(line)) == plan.Passed {
			return true
		}
	}
	return false
}

var stepEnd = regexp.MustCompile(`(?m)^(ok  |FAIL) (\S+) (?:in|after) (\S+?):?\s`)

// verdicts lists what became of the steps, and how long each took.
func verdicts(console []byte) string {
	var all []string
	for _, m := range stepEnd.FindAllSubmatch(console, -1) {
		all = append(all, fmt.Sprintf("%s %s (%s)", m[2], bytes.TrimSpace(m[1]), m[3]))
	}
	return strings.Join(all, ", ")
}

// digest shows what is worth a line on the screen while a machine runs.
type digest struct {
	out     io.Writer
	partial []byte
}

var worth = regexp.MustCompile(`^(--- |ok |FAIL |panic:|init:| +--- (FAIL|SKIP)| +budget_test.go)|Kernel panic|BUG:|WARNING:|Out of memory`)

func (d *digest) Write(p []byte) (int, error) {
	d.partial = append(d.partial, p...)
	for {
		line, rest, ok := bytes.Cut(d.partial, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		d.partial = rest
		if text := strings.TrimRight(string(line), "\r"); worth.MatchString(text) {
			fmt.Fprintln(d.out, "   ", text) //nolint:errcheck // the screen
		}
	}
}
