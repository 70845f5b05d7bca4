// SPDX-License-Identifier: Apache-2.0

package packaging

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestUnitFile: systemd takes every line of the unit, and rates its hardening. 10 is a service without any; what is left is the
// network, root, and the rights that the job is made of.
func TestUnitFile(t *testing.T) {
	needTool(t, "systemd-analyze")
	d := theDeb(t)
	for _, args := range [][]string{
		{"verify", "--root=" + d.root, "--man=no", "--recursive-errors=no", "snilb@test.service"},
		{"security", "--root=" + d.root, "--offline=true", "--no-pager", "--threshold=28", "snilb@test.service"},
	} {
		out, err := exec.Command("systemd-analyze", args...).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", args[0], err, out)
		}
		// A key that it does not know is only a warning.
		if args[0] == "verify" && len(out) > 0 {
			t.Errorf("verify says:\n%s", out)
		}
	}
}

// unitCommand is a command of the unit, as systemd would run it for an instance.
func unitCommand(t *testing.T, d deb, key, instance, interfaces, options string) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(d.root, "lib/systemd/system/snilb@.service"))
	must(t, err)
	m := regexp.MustCompile(`(?m)^` + key + `=/usr/bin/snilb (.*)$`).FindStringSubmatch(string(text))
	if m == nil {
		t.Fatalf("no %s= in the unit", key)
	}
	return strings.Fields(strings.NewReplacer("%i", instance, "$SNILB_INTERFACES", interfaces, "$SNILB_OPTIONS", options).Replace(m[1]))
}

// TestUnitCommand gives the unit's command line to the command: it knows every flag, and what the administrator adds comes last.
func TestUnitCommand(t *testing.T) {
	bed := newBed(t)
	d := theDeb(t)
	args := unitCommand(t, d, "ExecStart", "test", "nosuch0 nosuch1=xdp", "--order last --drain-timeout 3s")
	args[indexOf(args, "/etc/snilb/test.yaml")] = filepath.Join(d.root, "etc/snilb/default.yaml")
	_, err := output(bed.LB.Command(t.Context(), d.snilb(), args...))
	if err == nil {
		t.Fatal("attached to interfaces that there are not")
	}
	if said := err.Error(); !strings.Contains(said, "nosuch0") || strings.Contains(said, "flag provided") {
		t.Errorf("%q ends by %v", args, err)
	}
}

func indexOf(words []string, word string) int {
	for i, w := range words {
		if w == word {
			return i
		}
	}
	return 0
}
