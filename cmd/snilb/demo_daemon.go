// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"snilb/scripts/testbed"
)

const (
	demoReadyTimeout   = 15 * time.Second
	demoStopTimeout    = 15 * time.Second
	demoCommandTimeout = 5 * time.Second
)

// demoSelf is this very binary, also if its file is gone meanwhile.
const demoSelf = "/proc/self/exe"

// demoDaemon is `snilb attach` in the balancer's namespace.
type demoDaemon struct {
	cmd    *exec.Cmd
	stderr *demoLog
	exited chan struct{} // closed once err is set
	err    error
}

// startDemoDaemon runs this binary in a namespace until stop. If the demo is
// killed, the kernel asks the daemon to end.
func startDemoDaemon(ns *testbed.NS, args ...string) (*demoDaemon, error) {
	d := &demoDaemon{cmd: demoExec(context.Background(), args...), stderr: newDemoLog(), exited: make(chan struct{})}
	d.cmd.Stderr = d.stderr
	// Ctrl-C reaches everything in the terminal's process group: the daemon is to outlive the requests.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	started := make(chan error, 1)
	go func() {
		// A child is born into the namespace of its thread, and Pdeathsig tells of the death of that thread:
		// Do keeps it until the child has ended.
		err := ns.Do(func() error {
			err := d.cmd.Start()
			started <- err
			if err == nil {
				d.err = d.cmd.Wait()
				close(d.exited)
			}
			return nil
		})
		if err != nil {
			started <- err // Not read if the child was started.
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start snilb %s: %w", args[0], err)
	}
	return d, nil
}

func demoExec(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, demoSelf, args...)
	cmd.Args[0] = "snilb"
	return cmd
}

func (d *demoDaemon) waitReady(ctx context.Context) error {
	select {
	case <-d.stderr.ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-d.exited:
		return fmt.Errorf("snilb attach ended before it was ready: %w\n%s", d.err, d.said())
	case <-time.After(demoReadyTimeout):
		return fmt.Errorf("snilb attach was not ready after %s:\n%s", demoReadyTimeout, d.said())
	}
}

// stop ends the daemon. An error means that it may have left something.
func (d *demoDaemon) stop() error {
	_ = d.cmd.Process.Signal(syscall.SIGTERM) // it may be gone already: Wait says how
	select {
	case <-d.exited:
		if d.err != nil {
			return fmt.Errorf("snilb attach: %w\n%s", d.err, d.said())
		}
		return nil
	case <-time.After(demoStopTimeout):
		_ = d.cmd.Process.Kill()
		<-d.exited
		return fmt.Errorf("snilb attach did not end in %s and was killed:\n%s", demoStopTimeout, d.said())
	}
}

func (d *demoDaemon) said() string { return strings.TrimSpace(d.stderr.String()) }

// demoOutput runs another command of this binary in a namespace.
func demoOutput(ctx context.Context, ns *testbed.NS, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, demoCommandTimeout)
	defer cancel()
	cmd := demoExec(ctx, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := ns.Do(cmd.Run); err != nil {
		return nil, fmt.Errorf("snilb %s: %w: %s", args[0], err, bytes.TrimSpace(errOut.Bytes()))
	}
	return out.Bytes(), nil
}

// demoLog keeps what a daemon says and waits for the line "ready".
type demoLog struct {
	ready chan struct{} // closed at that line

	mu    sync.Mutex
	text  []byte
	found bool
}

func newDemoLog() *demoLog { return &demoLog{ready: make(chan struct{})} }

func (l *demoLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, p...)
	if !l.found && bytes.Contains(append([]byte("\n"), l.text...), []byte("\nready\n")) {
		l.found = true
		close(l.ready)
	}
	return len(p), nil
}

func (l *demoLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}
