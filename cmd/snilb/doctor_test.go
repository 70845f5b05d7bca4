// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"

	"snilb/loader"
)

func TestPrintFindings(t *testing.T) {
	fine := loader.Finding{Level: loader.LevelOK, Subject: "kernel", What: "Linux 7"}
	warns := loader.Finding{Level: loader.LevelWarn, Subject: "eth0 xdp", What: "is taken", Remedy: "use tc"}
	fails := loader.Finding{Level: loader.LevelFail, Subject: "lo", What: "is lo", Remedy: "use eth0"}
	for _, tt := range []struct {
		format, want string
		found        []loader.Finding
		code         int
	}{
		{"table", "ok    kernel    Linux 7\nwarn  eth0 xdp  is taken; use tc\n", []loader.Finding{fine, warns}, 0},
		{"table", "ok    kernel  Linux 7\nfail  lo      is lo; use eth0\n", []loader.Finding{fine, fails}, exitFailed},
		{"jsonl", `{"level":"ok","check":"kernel","what":"Linux 7"}` + "\n" + `{"level":"fail","check":"lo","what":"is lo","remedy":"use eth0"}` + "\n",
			[]loader.Finding{fine, fails}, exitFailed},
		{"json", "{\n  \"ok\": true,\n  \"checks\": [\n    {\n      \"level\": \"ok\",\n      \"check\": \"kernel\",\n      \"what\": \"Linux 7\"\n    }\n  ]\n}\n",
			[]loader.Finding{fine}, 0},
	} {
		var out, errOut bytes.Buffer
		app := newApp()
		app.ErrWriter = &errOut
		err := printFindings(&out, tt.format, tt.found)
		if d := cmp.Diff(tt.want, out.String()); d != "" {
			t.Errorf("%s, -want +got:\n%s", tt.format, d)
		}
		if code := exitCode(app, err); code != tt.code {
			t.Errorf("%s: exit code %d, want %d", tt.format, code, tt.code)
		}
	}
}
