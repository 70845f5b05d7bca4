// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestNewest(t *testing.T) {
	got := newest([]string{
		"linux-image-amd64", "linux-image-6.12-amd64", "linux-image-6.1.0-9-amd64", "linux-image-6.1.0-56-amd64",
		"linux-image-6.1.0-47-cloud-amd64", "linux-image-6.1.0-56-amd64-dbg", "linux-image-6.1.0-56-amd64-unsigned",
		"linux-image-6.12.117+deb12-amd64", "linux-image-6.12.9+bpo-amd64", "linux-image-6.12.117+deb12-rt-amd64",
		"linux-image-5.10.0-34-amd64", "linux-image-6.0.0-6-amd64", "linux-image-6.1.0-56-686",
	})
	want := []string{
		"linux-image-6.1.0-47-cloud-amd64", "linux-image-6.1.0-56-amd64",
		"linux-image-6.12.117+deb12-amd64", "linux-image-6.12.117+deb12-rt-amd64",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
}

// members of a cpio archive, as the kernel's documentation of initramfs buffers has them: "NAME MODE MAJOR:MINOR DATA".
func list(t *testing.T, data []byte) []string {
	t.Helper()
	var all []string
	for at := 0; at < len(data); {
		if at%4 != 0 || string(data[at:at+6]) != "070701" {
			t.Fatalf("no header at %d: %q", at, data[at:])
		}
		field := func(i int) (v int) {
			if _, err := fmt.Sscanf(string(data[at+6+8*i:at+14+8*i]), "%08x", &v); err != nil {
				t.Fatal(err)
			}
			return v
		}
		size, nameSize := field(6), field(11)
		name := string(data[at+110 : at+110+nameSize-1])
		begin := (at + 110 + nameSize + 3) &^ 3
		all = append(all, fmt.Sprintf("%s %o %d:%d %s", name, field(1), field(9), field(10), data[begin:begin+size]))
		at = (begin + size + 3) &^ 3
	}
	return all
}

func TestArchive(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tool")
	if err := os.WriteFile(file, []byte("12345"), 0o755); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	a := newArchive(&out)
	a.addConsole()
	a.addFile("/usr/bin/tool", file)
	a.addFile("/usr/bin/tool", "/a file named twice is not read again")
	a.add("/usr/lib", nil, 0o600)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"dev 40755 0:0 ", "dev/console 20600 5:1 ", "usr 40755 0:0 ", "usr/bin 40755 0:0 ", "usr/bin/tool 100755 0:0 12345",
		"usr/lib 100600 0:0 ", "TRAILER!!! 0 0:0 ",
	}
	if got := list(t, out.Bytes()); !slices.Equal(got, want) {
		t.Errorf("got\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
	a = newArchive(&out)
	a.addFile("/lost", file+"-lost")
	if err := a.Close(); err == nil {
		t.Error("a lost file is no error")
	}
}

func TestVerdicts(t *testing.T) {
	console := "[    1.0] boot\r\nok  \tsnilb/maps 1s\r\nok   programs in 2s\r\nFAIL\r\nFAIL loader after 1m45s: exit status 1\r\ninit: 1 of 2 steps failed\r\n"
	if got := verdicts([]byte(console)); got != "programs ok (2s), loader FAIL (1m45s)" {
		t.Errorf("got %q", got)
	}
	if passed([]byte(console)) || !passed([]byte("ok   programs in 2s\r\nkernels: passed\r\n[    9.0] reboot: Power down\r\n")) {
		t.Error("passed is told by one line")
	}
}

func TestDigest(t *testing.T) {
	var out strings.Builder
	d := &digest{out: &out}
	for _, part := range []string{"=== RUN TestA\r\n--- PASS: Te", "stA (1s)\r\n    --- FAIL: TestA/b\r\n[  3.0] Kernel panic - not", " syncing\r\n"} {
		if n, err := d.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatal(n, err)
		}
	}
	want := "    --- PASS: TestA (1s)\n        --- FAIL: TestA/b\n    [  3.0] Kernel panic - not syncing\n"
	if out.String() != want {
		t.Errorf("got %q", out.String())
	}
}
