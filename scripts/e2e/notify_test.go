// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// manager stands in for the service manager: it keeps what the daemon tells it.
type manager struct {
	mu   sync.Mutex // guards what follows
	said []string
}

// newManager makes one that daemons started from now on find in their environment.
func newManager(t *testing.T) *manager {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	must(t, err)
	t.Setenv("NOTIFY_SOCKET", path)
	m := &manager{}
	var reader sync.WaitGroup
	reader.Go(func() {
		buffer := make([]byte, 4096)
		for {
			n, err := socket.Read(buffer)
			if err != nil {
				return // closed
			}
			m.mu.Lock()
			m.said = append(m.said, strings.Split(string(buffer[:n]), "\n")...)
			m.mu.Unlock()
		}
	})
	t.Cleanup(func() {
		_ = socket.Close()
		reader.Wait()
	})
	return m
}

func (m *manager) heard() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.said)
}

func (m *manager) count(word string) (n int) {
	for _, said := range m.heard() {
		if said == word {
			n++
		}
	}
	return n
}

// wait returns when a word has come n times.
func (m *manager) wait(t *testing.T, word string, n int) {
	t.Helper()
	for limit := time.Now().Add(readyTimeout); m.count(word) < n; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("the service manager did not hear %s %d times: %q", word, n, m.heard())
		}
	}
}

// TestNotify plays the service manager: it hears that the daemon steers, then again and again that it works, though not while
// the daemon stands still, and at last that it ends.
func TestNotify(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	m := newManager(t)
	t.Setenv("WATCHDOG_USEC", "300000")
	d := attach(t, bed, siteRoutes(bed))
	m.wait(t, "READY=1", 1)
	m.wait(t, "WATCHDOG=1", 3)

	must(t, d.cmd.Process.Signal(syscall.SIGSTOP))
	waitState(t, d.cmd.Process.Pid, 'T')
	before := m.settled()
	time.Sleep(time.Second)
	if now := m.count("WATCHDOG=1"); now != before {
		t.Errorf("%d pings of a daemon that stands still", now-before)
	}
	must(t, d.cmd.Process.Signal(syscall.SIGCONT))
	m.wait(t, "WATCHDOG=1", before+3)

	if m.count("STOPPING=1") != 0 {
		t.Errorf("the daemon ends before it is told to: %q", m.heard())
	}
	d.stop(syscall.SIGTERM)
	m.wait(t, "STOPPING=1", 1)
	if n := m.count("READY=1"); n != 1 {
		t.Errorf("READY=1 %d times: %q", n, m.heard())
	}
}

// TestNotifyUnasked has a service manager without a watchdog, or with one for another process: neither is pinged.
func TestNotifyUnasked(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	for name, env := range map[string][2]string{"no watchdog": {}, "another's": {"10000", "1"}} {
		t.Run(name, func(t *testing.T) {
			m := newManager(t)
			for i, key := range []string{"WATCHDOG_USEC", "WATCHDOG_PID"} {
				t.Setenv(key, env[i])
			}
			d := attach(t, bed, siteRoutes(bed))
			m.wait(t, "READY=1", 1)
			d.stop(syscall.SIGTERM)
			m.wait(t, "STOPPING=1", 1)
			if n := m.count("WATCHDOG=1"); n != 0 {
				t.Errorf("%d pings that nobody asked for", n)
			}
		})
	}
}

// settled is the count of pings once those under way have been read.
func (m *manager) settled() int {
	for was := m.count("WATCHDOG=1"); ; {
		time.Sleep(100 * time.Millisecond)
		now := m.count("WATCHDOG=1")
		if now == was {
			return now
		}
		was = now
	}
}

// waitState waits until a process is in a state of proc(5).
func waitState(t *testing.T, pid int, want byte) {
	t.Helper()
	for limit := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		state, err := processState(pid)
		must(t, err)
		if state == want {
			return
		}
		if time.Now().After(limit) {
			t.Fatalf("process %d is in state %c, want %c", pid, state, want)
		}
	}
}

func processState(pid int) (byte, error) {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, err
	}
	_, after, ok := strings.Cut(string(stat), ") ")
	if !ok || after == "" {
		return 0, errors.New("no state in /proc/PID/stat")
	}
	return after[0], nil
}
