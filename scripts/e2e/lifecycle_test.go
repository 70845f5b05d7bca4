// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// TestSignals ends the daemon by each signal that asks for it, idle and with a connection open.
func TestSignals(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			d := attach(t, bed, siteRoutes(bed))
			d.stop(sig)
		})
		t.Run(sig.String()+"-connected", func(t *testing.T) {
			d := attach(t, bed, siteRoutes(bed), "--drain-timeout", "1s")
			got, err := whoami(dialTLS(t, bed, vip(bed, false), "a.example.com"))
			wantBody(t, got, err, "b1", "a.example.com")
			d.stop(sig)
		})
	}
}

// TestAttachAgain attaches many times in a row: what one run forgets the next trips over.
func TestAttachAgain(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	for range 5 {
		d := attach(t, bed, siteRoutes(bed))
		got, err := goClient(t, bed, vip(bed, false), "a.example.com")
		wantBody(t, got, err, "b1", "a.example.com")
		d.stop(syscall.SIGTERM)
	}
}

// TestKill kills the daemon the hard way. Its connections go on, and detach --all removes what it left.
func TestKill(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	c4, c6 := dialTLS(t, bed, vip(bed, false), "a.example.com"), dialTLS(t, bed, vip(bed, true), "b.example.com")
	d.kill()
	for range 3 {
		got, err := whoami(c4)
		wantBody(t, got, err, "b1", "a.example.com")
		got, err = whoami(c6)
		wantBody(t, got, err, "b2", "b.example.com")
		time.Sleep(300 * time.Millisecond)
	}
	if len(leftovers(t, bed, d.name)) == 0 {
		t.Error("kill -9 left nothing: the connections cannot have gone through the kernel alone")
	}
	_, err := d.snilb("detach", "--all")
	must(t, err)
	assertClean(t, bed, d.name)
}

// TestSecondAttach is refused on an interface that another instance has, by name, and does not harm that one.
func TestSecondAttach(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	first := attach(t, bed, siteRoutes(bed))
	for _, name := range []string{instanceName(), first.name} { // another instance, and the same one twice
		second := start(t, bed, name, bed.Uplinks, siteRoutes(bed))
		select {
		case <-second.exited:
		case <-time.After(readyTimeout):
			t.Fatal("a second attach on the same interface is still running")
		}
		if code := second.cmd.ProcessState.ExitCode(); code != 1 {
			t.Errorf("exit code %d, want 1", code)
		}
		if said := second.stderr.String(); !strings.Contains(said, first.name) {
			t.Errorf("the refusal does not name %s:\n%s", first.name, said)
		}
		got, err := goClient(t, bed, vip(bed, false), "a.example.com")
		wantBody(t, got, err, "b1", "a.example.com")
	}
	first.stop(syscall.SIGTERM)
}

// TestBadRoutes refuses a routes file that does not parse, and leaves nothing.
func TestBadRoutes(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	d := start(t, bed, instanceName(), bed.Uplinks, "version: 1\nlisten: [\":443\"]\nrutes: []\n")
	select {
	case <-d.exited:
	case <-time.After(readyTimeout):
		t.Fatal("attached by a bad routes file")
	}
	if code := d.cmd.ProcessState.ExitCode(); code == 0 {
		t.Error("exit code 0")
	}
	if said := d.stderr.String(); !strings.Contains(said, "routes.yaml:3:") {
		t.Errorf("no file:line:column in:\n%s", said)
	}
	assertClean(t, bed, d.name)
}
