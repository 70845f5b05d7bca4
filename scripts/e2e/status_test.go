// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// TestStatusOfDead kills a daemon with connections open. What is left is shown, changes by that in nothing, and the ways
// out that it names are ways out.
func TestStatusOfDead(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	dialTLS(t, bed, vip(bed, false), "a.example.com")
	dialTLS(t, bed, vip(bed, true), "b.example.com")
	d.waitFlows("two", clientTimeout, func(f []flow) bool { return len(f) == 2 })
	roles := rolesOn(t, d, bed.Uplinks[0])

	// Another name than the one that there is.
	_, err := d.snilb("status")
	wantFailure(t, err, "there is "+d.name+" (pid ")
	d.kill()
	_, err = d.snilb("flows")
	wantFailure(t, err, "there is "+d.name+" (dead): name it by --name")
	_, err = d.snilb("flows", "--name", d.name)
	wantFailure(t, err, "snilb detach --all --name "+d.name)

	before := leftovers(t, bed, d.name)
	out, err := d.snilb("status", "--name", d.name, "-o", "json")
	wantFailure(t, err, "daemon "+d.name+" does not steer: it is dead")
	var s struct {
		Name, Daemon, Directory, Remedy string
		Ready                           *bool
		Layout                          int
		Silent                          *float64 `json:"silent_seconds"`
		SourcePorts                     []int    `json:"source_ports"`
		Interfaces                      []struct {
			Name, Role, Mode string
			Packets          map[string]uint64
		}
		Engine struct{ Flows int }
	}
	must(t, json.Unmarshal([]byte(out), &s))
	if s.Name != d.name || s.Daemon != "dead" || s.Ready == nil || *s.Ready || !strings.HasPrefix(s.Directory, pinRoot+"/"+d.name) ||
		!strings.Contains(s.Remedy, "snilb detach --all --name "+d.name) {
		t.Errorf("status of a dead daemon:\n%s", out)
	}
	var left []string
	packets := uint64(0)
	for _, i := range s.Interfaces {
		if i.Name == bed.Uplinks[0] {
			left = append(left, i.Role+" "+i.Mode)
		}
		for _, n := range i.Packets {
			packets += n
		}
	}
	if !slices.Equal(left, roles) {
		t.Errorf("on %s the living daemon had %q, the dead one has %q", bed.Uplinks[0], roles, left)
	}
	if s.Layout == 0 || s.Engine.Flows != 2 || s.Silent == nil || len(s.SourcePorts) != 2 || packets == 0 {
		t.Errorf("want 2 flows, the silence, ports and packets:\n%s", out)
	}
	table, err := d.snilb("status", "--name", d.name)
	wantFailure(t, err, "does not steer")
	for _, want := range []string{d.name, "dead", s.Directory, bed.Uplinks[0] + " client", "way out"} {
		if !strings.Contains(table, want) {
			t.Errorf("no %q in\n%s", want, table)
		}
	}
	if after := leftovers(t, bed, d.name); !slices.Equal(before, after) {
		t.Errorf("status changed %q into %q", before, after)
	}
	for _, command := range []string{"status", "flows", "reload"} {
		out, err := d.snilb(command, "--name", d.name, "--api", filepath.Join(t.TempDir(), "x.sock"))
		wantFailure(t, err, "no daemon "+d.name+" here")
		if out != "" || strings.Contains(err.Error(), pinRoot) {
			t.Errorf("%s of another socket tells of what the dead daemon left:\n%s\n%v", command, out, err)
		}
	}
	_, err = d.snilb("detach", "--all", "--name", d.name)
	must(t, err)
	assertClean(t, bed, d.name)
	_, err = d.snilb("status", "--name", d.name)
	wantFailure(t, err, "no daemon "+d.name+" here")
}

// wantFailure wants exit code 1 and a text on stderr.
func wantFailure(t *testing.T, err error, text string) {
	t.Helper()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(err.Error(), text) {
		t.Errorf("got %v, want exit code 1 and %q", err, text)
	}
}

// TestStatusLeaving asks a daemon that leaves to the next one, and waits for the end of a hello that it has acknowledged.
func TestStatusLeaving(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed), "--on-exit", "keep")
	owned, err := bed.Raw(vip(bed, false))
	must(t, err)
	defer func() { _ = owned.Close() }()
	_, err = owned.Open(testbed.LinuxSYN(owned.TSVal), 3*time.Second)
	must(t, err)
	must(t, owned.Send(owned.At(0, hello(t, classic("a.example.com"))[:100])))
	_, err = owned.Recv(3 * time.Second)
	must(t, err)
	must(t, d.cmd.Process.Signal(syscall.SIGTERM))
	seen, client := false, statusClient(d)
	for !seen && !d.hasExited() {
		response, err := client.Get("http://snilb/v1/status")
		if err != nil {
			continue // it has ended
		}
		var s struct{ Ready, Draining, Leaving bool }
		must(t, errors.Join(json.NewDecoder(response.Body).Decode(&s), response.Body.Close()))
		seen = s.Leaving && !s.Ready && !s.Draining
	}
	if !seen {
		t.Error("it did not say that it leaves")
	}
	<-d.exited
	_, err = d.snilb("detach", "--all", "--name", d.name)
	must(t, err)
}

// statusClient asks a daemon at its socket, which is quicker than a command.
func statusClient(d *daemon) *http.Client {
	d.t.Helper()
	sockets := socketsOf(d.name)
	if len(sockets) != 1 {
		d.t.Fatalf("sockets %q", sockets)
	}
	return &http.Client{Timeout: clientTimeout, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", sockets[0])
		},
		DisableKeepAlives: true,
	}}
}
