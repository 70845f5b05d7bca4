// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// process is a program of a measurement that runs beside it. It has a process group of its own: Ctrl-C reaches this program
// alone, which then ends the others in order, their children too.
type process struct {
	name   string
	cmd    *exec.Cmd
	said   *output
	exited chan struct{} // closed once err is set
	err    error
}

func startProcess(name string, cmd *exec.Cmd) (*process, error) {
	p := &process{name: name, cmd: cmd, said: newOutput(), exited: make(chan struct{})}
	cmd.Stderr = p.said
	if cmd.Stdout == nil {
		cmd.Stdout = p.said
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = p.kill
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

// kill ends all of the group at once.
func (p *process) kill() error { return syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) }

// waitLine waits for a line of the output that begins so, and returns it.
func (p *process) waitLine(begins string, limit time.Duration) (string, error) {
	timeout := time.After(limit)
	for {
		line, changed := p.said.find(begins)
		if line != "" {
			return line, nil
		}
		select {
		case <-changed:
		case <-p.exited:
			if line, _ := p.said.find(begins); line != "" {
				return line, nil
			}
			return "", p.failure(fmt.Sprintf("ended (%v) before it said %q", p.err, begins))
		case <-timeout:
			return "", p.failure(fmt.Sprintf("did not say %q in %s", begins, limit))
		}
	}
}

// stop ends it by SIGTERM, and its whole group by SIGKILL if that takes too long. It returns an error if it had ended before.
func (p *process) stop() error {
	select {
	case <-p.exited:
		return p.failure(fmt.Sprintf("ended by itself: %v", p.err))
	default:
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
		_ = p.kill() // children that outlive it
		return nil
	case <-time.After(10 * time.Second):
		err := p.failure("still ran 10 s after SIGTERM")
		err = errors.Join(err, p.kill())
		<-p.exited
		return err
	}
}

func (p *process) failure(what string) error {
	text := fmt.Sprintf("%s %s", p.name, what)
	if said := strings.TrimSpace(p.said.String()); said != "" {
		text += "; it said:\n" + said
	}
	return errors.New(text)
}

// output keeps what a process says and wakes who waits for more.
type output struct {
	mu      sync.Mutex
	buf     bytes.Buffer
	changed chan struct{}
}

func newOutput() *output { return &output{changed: make(chan struct{})} }

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.changed)
	o.changed = make(chan struct{})
	return o.buf.Write(b)
}

// find returns the first whole line that begins so, or "" and a channel that is closed when more was said.
func (o *output) find(begins string) (string, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for line := range bytes.Lines(o.buf.Bytes()) {
		if bytes.HasPrefix(line, []byte(begins)) && bytes.HasSuffix(line, []byte("\n")) {
			return strings.TrimSpace(string(line)), nil
		}
	}
	return "", o.changed
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}
