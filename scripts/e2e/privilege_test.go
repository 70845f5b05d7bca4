// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"snilb/scripts/testbed"
)

// What a daemon may have, and what of it is in use while no program is loaded.
const (
	fewCaps    = uint64(1)<<unix.CAP_BPF | 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_PERFMON
	activeCaps = fewCaps &^ (1 << unix.CAP_PERFMON)
)

// TestPrivileges looks at every thread of a daemon that steers, built with and without cgo, and lets it live a full life:
// requests, an interface that goes and comes back, a reload, the end.
func TestPrivileges(t *testing.T) {
	for name, cgo := range map[string]string{"cgo": "1", "no-cgo": "0"} {
		t.Run(name, func(t *testing.T) {
			useBinary(t, cgo)
			bed := newBed(t, testbed.Options{})
			live(t, bed, attach(t, bed, bedWithSpare(t, bed)))
		})
	}
}

// TestFewPrivileges is the same for one that is born with these few, as a service may be.
func TestFewPrivileges(t *testing.T) {
	needTool(t, "setpriv")
	bed := newBed(t, testbed.Options{})
	routes := bedWithSpare(t, bed)
	d := startBy(t, bed, bornWith("-all,+bpf,+net_admin,+net_raw,+perfmon"), instanceName(), bed.Uplinks, routes)
	d.waitReady()
	live(t, bed, d)
	if said := d.stderr.String(); strings.Contains(said, "bounding set") || strings.Contains(said, "this process keeps") {
		t.Errorf("it complains of what it never had:\n%s", said)
	}
}

// useBinary builds the command with or without cgo for one test, unless the environment names one.
func useBinary(t *testing.T, cgo string) {
	t.Helper()
	if os.Getenv("SNILB_BIN") != "" {
		return
	}
	t.Setenv("CGO_ENABLED", cgo)
	before, beforeErr := binary, binaryErr
	binary, binaryErr = build(t.TempDir())
	t.Cleanup(func() { binary, binaryErr = before, beforeErr })
}

// TestAPIOwner has another user ask the daemon, by user and by group, and nobody else; and let it go at last.
func TestAPIOwner(t *testing.T) {
	needTool(t, "setpriv")
	const user, group, other = "4001", "4002", "4003"
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	readable := copyOf(t, binary)
	for _, c := range []struct {
		owner   string
		members bool // of the group may ask too
	}{{user, false}, {user + ":" + group, true}} {
		d := attach(t, bed, siteRoutes(bed), "--api-owner", c.owner)
		for _, who := range []struct {
			uid, gid string
			may      bool
		}{{user, other, true}, {other, group, c.members}, {other, other, false}} {
			out, err := exec.Command("setpriv", "--reuid", who.uid, "--regid", who.gid, "--clear-groups", "--",
				readable, "status", "--api", socketsOf(d.name)[0]).CombinedOutput()
			if (err == nil) != who.may {
				t.Errorf("owner %s: user %s, group %s: %v\n%s", c.owner, who.uid, who.gid, err, out)
			}
			if !who.may && !strings.Contains(string(out), "permission denied") {
				t.Errorf("owner %s: user %s, group %s is told\n%s", c.owner, who.uid, who.gid, out)
			}
		}
		asUser := func(uid string) ([]byte, error) {
			return bed.LB.Command(t.Context(), "setpriv", "--reuid", uid, "--regid", other, "--clear-groups", "--",
				readable, "detach", "--all", "--name", d.name).CombinedOutput()
		}
		if out, err := asUser(other); err == nil || !strings.Contains(string(out), "permission denied") {
			t.Errorf("owner %s: user %s detaches: %v\n%s", c.owner, other, err, out)
		}
		if out, err := asUser(user); err != nil || !strings.Contains(string(out), "detached instance "+d.name) {
			t.Fatalf("owner %s: user %s detaches: %v\n%s", c.owner, user, err, out)
		}
		<-d.exited
		if d.err != nil {
			t.Errorf("asked to detach it ended by %v", d.err)
		}
		assertClean(t, bed, d.name)
	}
}

// copyOf puts a file where every user can read it.
func copyOf(t *testing.T, path string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "snilb-e2e-")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	data, err := os.ReadFile(path)
	must(t, err)
	to := filepath.Join(dir, "snilb")
	must(t, os.WriteFile(to, data, 0o755))
	return to
}

const spare = "spare0"

// bedWithSpare starts the backends, adds an uplink that no client needs, and returns the routes.
func bedWithSpare(t *testing.T, bed *testbed.Bed) string {
	t.Helper()
	startBackends(t, bed)
	addSpare(t, bed)
	bed.Uplinks = append(bed.Uplinks, spare)
	return siteRoutes(bed)
}

func addSpare(t *testing.T, bed *testbed.Bed) {
	t.Helper()
	must(t, bed.LB.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = spare
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: spare + "-far"})
	}))
	must(t, bed.LB.Offload(spare+"-far", true, testbed.GRO)) // for XDP
	must(t, bed.LB.Do(func() error {
		for _, name := range []string{spare + "-far", spare} {
			device, err := netlink.LinkByName(name)
			if err == nil {
				err = netlink.LinkSetUp(device)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}))
}

func live(t *testing.T, bed *testbed.Bed, d *daemon) {
	t.Helper()
	ask := func() {
		t.Helper()
		families(t, func(t *testing.T, v6 bool) {
			got, err := goClient(t, bed, vip(bed, v6), "a.example.com")
			wantBody(t, got, err, "b1", "a.example.com")
		})
	}
	wantPrivileges(t, d.cmd.Process.Pid)
	sockets := socketsOf(d.name)
	if len(sockets) != 1 {
		t.Fatalf("sockets %q", sockets)
	}
	info, err := os.Stat(sockets[0])
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %v", info.Mode())
	}
	ask()

	before := rolesOn(t, d, spare)
	must(t, bed.LB.Do(func() error {
		device, err := netlink.LinkByName(spare)
		if err != nil {
			return err
		}
		return netlink.LinkDel(device)
	}))
	waitFor(t, "loss of the interface", func() bool { return len(rolesOn(t, d, spare)) == 0 })
	addSpare(t, bed)
	waitFor(t, "interface attached again", func() bool { return slices.Equal(rolesOn(t, d, spare), before) })

	must(t, d.cmd.Process.Signal(syscall.SIGHUP))
	waitFor(t, "answer to SIGHUP", func() bool { return strings.Contains(d.stderr.String(), "reload") })
	ask()
	wantPrivileges(t, d.cmd.Process.Pid)
	d.stop(syscall.SIGTERM)
}

// wantPrivileges looks at all threads of a process, but not at some of what they have.
func wantPrivileges(t *testing.T, pid int, but ...string) {
	t.Helper()
	want := map[string]string{
		"CapInh": hexCaps(0), "CapPrm": hexCaps(fewCaps), "CapEff": hexCaps(activeCaps), "CapBnd": hexCaps(fewCaps),
		"CapAmb": hexCaps(0), "NoNewPrivs": "1",
	}
	for _, key := range but {
		delete(want, key)
	}
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	must(t, err)
	if len(files) < 3 {
		t.Fatalf("process %d has %d threads: Go's has more", pid, len(files))
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // a thread that has ended
		}
		found := 0
		for line := range strings.Lines(string(text)) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
			if wanted, ok := want[key]; ok {
				found++
				if got := strings.TrimSpace(value); got != wanted {
					t.Errorf("%s: %s is %s, want %s", file, key, got, wanted)
				}
			}
		}
		if found != len(want) {
			t.Errorf("%s has %d of %d lines", file, found, len(want))
		}
	}
}

func hexCaps(set uint64) string { return fmt.Sprintf("%016x", set) }

// rolesOn lists what status says of an interface.
func rolesOn(t *testing.T, d *daemon, iface string) []string {
	t.Helper()
	out, err := d.snilb("status", "--name", d.name, "-o", "json")
	must(t, err)
	var s struct {
		Interfaces []struct{ Name, Role, Mode string }
	}
	must(t, json.Unmarshal([]byte(out), &s))
	var roles []string
	for _, i := range s.Interfaces {
		if i.Name == iface {
			roles = append(roles, i.Role+" "+i.Mode)
		}
	}
	return roles
}

// TestPrivilegesRefused takes from a daemon the right to cut its bounding set, as a service may: nothing of that set can be
// gained, so that it is no news, and it serves.
func TestPrivilegesRefused(t *testing.T) {
	needTool(t, "setpriv")
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := startBy(t, bed, bornWith("-setpcap"), instanceName(), bed.Uplinks, siteRoutes(bed))
	d.waitReady()
	if said := d.stderr.String(); strings.Contains(said, "WARN") {
		t.Errorf("it complains:\n%s", said)
	}
	wantPrivileges(t, d.cmd.Process.Pid, "CapBnd")
	got, err := goClient(t, bed, vip(bed, false), "a.example.com")
	wantBody(t, got, err, "b1", "a.example.com")
	d.stop(syscall.SIGTERM)
}

// bornWith starts a command with a bounding set, which is what root's capabilities come from. nsenter is to go to the
// namespace before.
func bornWith(bounding string) func(*exec.Cmd) error {
	return func(cmd *exec.Cmd) error {
		at := slices.Index(cmd.Args, "--") + 1
		cmd.Args = slices.Insert(cmd.Args, at, "setpriv", "--bounding-set", bounding, "--")
		return cmd.Start()
	}
}
