// SPDX-License-Identifier: Apache-2.0

// Command init is the first process in the virtual machines of `make test-kernels`: it mounts what programs expect, loads the
// kernel's modules, runs the steps of its plan and turns the machine off. What is said goes to the console.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"snilb/scripts/kernels/plan"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "this is the first process of a virtual machine: run `make test-kernels`")
		os.Exit(2)
	}
	if err := run(); err != nil {
		fmt.Println("init:", err)
	} else {
		fmt.Println(plan.Passed)
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	if err := mountAll(); err != nil {
		return err
	}
	data, err := os.ReadFile(plan.File)
	if err != nil {
		return err
	}
	var p plan.Plan
	if err := json.Unmarshal(data, &p); err != nil {
		return err
	}
	for _, file := range p.Modules {
		if err := load(file); err != nil {
			return err
		}
	}
	failed := 0
	for _, s := range p.Steps {
		if !do(s, p.Env) {
			failed++
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d steps failed", failed, len(p.Steps))
	}
	return nil
}

// mountAll mounts /sys before what is inside of it.
func mountAll() error {
	for _, m := range []struct{ kind, at string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"}, {"bpf", "/sys/fs/bpf"},
	} {
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	return nil
}

func load(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
		return fmt.Errorf("load module %s: %w", file, err)
	}
	return nil
}

// do runs a step and reports whether it went well.
func do(s plan.Step, env []string) bool {
	began := time.Now()
	cmd := exec.Command(s.Argv[0], s.Argv[1:]...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = s.Dir, env, os.Stdout, os.Stdout
	err := cmd.Run()
	took := time.Since(began).Round(time.Second)
	if err != nil {
		fmt.Printf("FAIL %s after %s: %v\n", s.Name, took, err)
		return false
	}
	fmt.Printf("ok   %s in %s\n", s.Name, took)
	return true
}
