// SPDX-License-Identifier: Apache-2.0

package packaging

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// machine is a root directory with a dpkg of its own, and stand-ins for what maintainer scripts call.
type machine struct {
	t     *testing.T
	root  string
	stubs string
}

const runningUnits = `snilb@a.service loaded active running snilb
snilb@b.service loaded active running snilb`

func newMachine(t *testing.T) *machine {
	t.Helper()
	needTool(t, "dpkg")
	m := &machine{t: t, root: t.TempDir(), stubs: t.TempDir()}
	for _, dir := range []string{"var/lib/dpkg/updates", "var/lib/dpkg/info"} {
		must(t, os.MkdirAll(filepath.Join(m.root, dir), 0o755))
	}
	must(t, os.WriteFile(filepath.Join(m.root, "var/lib/dpkg/status"), nil, 0o644))
	for name, says := range map[string]string{"systemctl": "[ \"$1\" != list-units ] || echo '" + runningUnits + "'", "deb-systemd-invoke": "", "snilb": ""} {
		script := "#!/bin/sh\necho \"" + name + " $*\" >>\"$CALLS\"\n" + says + "\n"
		must(t, os.WriteFile(filepath.Join(m.stubs, name), []byte(script), 0o755))
	}
	return m
}

// run runs a command, and returns what the maintainer scripts have called.
func (m *machine) run(env []string, args ...string) (calls []string) {
	m.t.Helper()
	record := filepath.Join(m.t.TempDir(), "calls")
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), append(env, "CALLS="+record, "PATH="+m.stubs+":"+os.Getenv("PATH"))...)
	_, err := output(cmd)
	must(m.t, err)
	text, err := os.ReadFile(record)
	if err == nil {
		calls = strings.Split(strings.TrimSpace(string(text)), "\n")
	}
	return calls
}

func (m *machine) dpkg(args ...string) []string {
	m.t.Helper()
	return m.run(nil, append([]string{"dpkg", "--root=" + m.root, "--log=/dev/null", "--force-script-chrootless", "--force-not-root",
		"--force-confold"}, args...)...)
}

func (m *machine) path(name string) string { return filepath.Join(m.root, name) }

func assertCalls(t *testing.T, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("called:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

const listUnits = "systemctl list-units --plain --no-legend --state=active,activating snilb@*.service"

// TestDpkg installs, upgrades, removes and purges the package. No step but the removal stops anything, and none starts
// anything that did not run.
func TestDpkg(t *testing.T) {
	needRoot(t) // the files are root's
	d := theDeb(t)
	m := newMachine(t)
	assertCalls(t, m.dpkg("-i", d.file)) // no systemd runs
	mustRun(t, m.path("usr/bin/snilb"), "version")
	m.dpkg("-P", "snilb")

	must(t, os.MkdirAll(m.path("run/systemd/system"), 0o755))
	assertCalls(t, m.dpkg("-i", d.file), "systemctl --system daemon-reload")
	const mine = "# mine\n"
	must(t, os.WriteFile(m.path("etc/snilb/default.yaml"), []byte(mine), 0o644))
	assertCalls(t, m.dpkg("-i", d.file),
		"systemctl --system daemon-reload", listUnits,
		"deb-systemd-invoke try-restart snilb@a.service", "deb-systemd-invoke try-restart snilb@b.service")
	if text, _ := os.ReadFile(m.path("etc/snilb/default.yaml")); string(text) != mine {
		t.Errorf("the upgrade wrote over the routes: %s", text)
	}

	assertCalls(t, m.dpkg("-r", "snilb"), "systemctl list-units --all --plain --no-legend snilb@*.service",
		"deb-systemd-invoke stop snilb@a.service", "deb-systemd-invoke stop snilb@b.service", "systemctl --system daemon-reload")
	if text, _ := os.ReadFile(m.path("etc/snilb/default.yaml")); string(text) != mine {
		t.Errorf("the removal took the routes: %s", text)
	}
	m.dpkg("-P", "snilb")
	if _, err := os.Stat(m.path("etc/snilb")); !os.IsNotExist(err) {
		t.Errorf("after a purge /etc/snilb: %v", err)
	}
}

// TestPrerm: what is in the kernel is removed with the package, and by no upgrade.
func TestPrerm(t *testing.T) {
	m := newMachine(t)
	const prerm = tree + "/scripts/deb/prerm"
	if calls := m.run([]string{"DPKG_ROOT="}, "sh", prerm, "remove"); !slices.Contains(calls, "snilb detach --all") {
		t.Errorf("removal calls %q", calls)
	}
	for _, args := range [][]string{{"upgrade", "2.0"}, {"deconfigure"}, {"failed-upgrade", "1.0"}} {
		assertCalls(t, m.run([]string{"DPKG_ROOT="}, append([]string{"sh", prerm}, args...)...))
	}
}
