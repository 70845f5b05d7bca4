// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"snilb/scripts/testbed"
)

type finding struct{ Level, Check, What, Remedy string }

// doctor returns the exit code and what was found.
func doctor(t *testing.T, cmd *exec.Cmd) (code int, found []finding) {
	t.Helper()
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code, err = exit.ExitCode(), nil
	}
	must(t, err)
	for dec := json.NewDecoder(strings.NewReader(string(out))); dec.More(); {
		var f finding
		must(t, dec.Decode(&f))
		if !slices.Contains([]string{"ok", "warn", "fail"}, f.Level) || f.Check == "" || f.What == "" || (f.Level == "ok") != (f.Remedy == "") {
			t.Errorf("%+v is no finding", f)
		}
		found = append(found, f)
	}
	return code, found
}

func failing(found []finding) []string {
	var all []string
	for _, f := range found {
		if f.Level == "fail" {
			all = append(all, f.Check)
		}
	}
	return all
}

// TestDoctor lets it look at a machine that can be attached, at one that has a daemon, at what that leaves when it is
// killed, and as somebody who may see little. It changes nothing, and is right about whether attach works.
func TestDoctor(t *testing.T) {
	needTool(t, "setpriv")
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	uplink := bed.Uplinks[0]
	look := func(args ...string) (int, []finding) {
		t.Helper()
		before := machine(t, bed)
		code, found := doctor(t, bed.LB.Command(t.Context(), args[0], args[1:]...))
		if after := machine(t, bed); !slices.Equal(before, after) {
			t.Errorf("%q changed\n%s\ninto\n%s", args, strings.Join(before, "\n"), strings.Join(after, "\n"))
		}
		return code, found
	}
	if code, found := look(binary, "doctor", uplink, "-o", "jsonl"); code != 0 || failing(found) != nil {
		t.Errorf("before attach: code %d, %+v", code, found)
	}
	if code, found := look(binary, "doctor", "lo", "-o", "jsonl"); code != 1 || !slices.Equal(failing(found), []string{"lo"}) {
		t.Errorf("of lo: code %d, failing %q", code, failing(found))
	}
	nobody := []string{"setpriv", "--reuid", "4001", "--regid", "4001", "--clear-groups", "--bounding-set", "-all", "--"}
	code, found := look(append(nobody, copyOf(t, binary), "doctor", uplink, "-o", "jsonl")...)
	if got := failing(found); code != 1 || got == nil || got[0] != "capabilities" || slices.Contains(got, uplink) {
		t.Errorf("as nobody: code %d, %+v", code, found)
	}

	d := attach(t, bed, siteRoutes(bed))
	if code, found := look(binary, "doctor", uplink, "-o", "jsonl"); code != 1 || !slices.Equal(failing(found), []string{uplink + " instance"}) {
		t.Errorf("beside a daemon: code %d, %+v", code, found)
	}
	if code, found := look(binary, "doctor", "-o", "jsonl"); code != 0 || failing(found) != nil {
		t.Errorf("beside a daemon, no interface named: code %d, %+v", code, found)
	}
	dialTLS(t, bed, vip(bed, false), "a.example.com")
	d.kill()
	_, found = look(binary, "doctor", "-o", "jsonl")
	if !slices.ContainsFunc(found, func(f finding) bool {
		return f.Check == "instance "+d.name && f.Level == "warn" && strings.Contains(f.Remedy, "snilb detach --all --name "+d.name)
	}) {
		t.Errorf("after a kill: %+v", found)
	}
	_, err := d.snilb("detach", "--all", "--name", d.name)
	must(t, err)
}

// machine lists what a command could change: links with their programs, qdiscs and flags, pins, files of instances, mounts
// and modules.
func machine(t *testing.T, bed *testbed.Bed) []string {
	t.Helper()
	var all []string
	must(t, bed.LB.Do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			a := l.Attrs()
			// Whether it runs is told late: a TAP device whose daemon was killed stops by and by.
			all = append(all, fmt.Sprintf("%s %s %d %s %s", a.Name, l.Type(), a.MTU, a.Flags&^net.FlagRunning, a.Alias))
			all = append(all, leftOnLink(l)...)
			qdiscs, err := netlink.QdiscList(l)
			if err != nil {
				return err
			}
			for _, q := range qdiscs {
				all = append(all, "qdisc "+q.Type()+" on "+a.Name)
			}
		}
		return err
	}))
	// Other tests of this machine have instances in other namespaces: those of this one have its cookie, and theirs come and go.
	for _, root := range []string{pinRoot, socketDir} {
		_ = filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			if err == nil && strings.Contains(path, fmt.Sprintf("e2e-%d-", os.Getpid())) {
				all = append(all, path)
			}
			return nil
		})
	}
	// Of the whole machine, what attach may need and another test does not bring.
	for file, ours := range map[string]*regexp.Regexp{
		"/proc/self/mountinfo": regexp.MustCompile(` - bpf `),
		"/proc/modules":        regexp.MustCompile(`^(tun|sch_ingress|cls_bpf) `),
	} {
		text, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without modules
		}
		must(t, err)
		for line := range strings.Lines(string(text)) {
			if ours.MatchString(line) {
				all = append(all, strings.Fields(line)[0])
			}
		}
	}
	slices.Sort(all)
	return all
}
