// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
)

// Need ends the test when err is set. Where everything is there by definition (CI, or SNILB_REQUIRE=1) that is a failure:
// a test that is always skipped proves nothing and nobody notices.
func Need(t testing.TB, what string, err error) {
	t.Helper()
	if err == nil {
		return
	}
	if os.Getenv("CI") != "" || os.Getenv("SNILB_REQUIRE") != "" {
		t.Fatalf("needs %s: %v", what, err)
	}
	t.Skipf("needs %s: %v", what, err)
}

// NeedTool needs commands.
func NeedTool(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		_, err := exec.LookPath(name)
		Need(t, name, err)
	}
}

// NeedRoot needs to be user 0.
func NeedRoot(t testing.TB) {
	t.Helper()
	var err error
	if os.Geteuid() != 0 {
		err = fmt.Errorf("running as user %d", os.Geteuid())
	}
	Need(t, "root", err)
}

// Must is for steps of a test that are not what it is about.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
