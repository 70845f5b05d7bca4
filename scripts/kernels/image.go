// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"snilb/scripts/kernels/plan"
)

// tools are the real clients and servers of the end-to-end tests, and what those start besides.
var tools = []string{"curl", "openssl", "gnutls-cli", "nginx", "nsenter", "cat", "readlink", "sleep"}

// programs of this module go into a machine, by what the go command builds them from.
var programs = map[string][]string{
	"init":        {"build", "./scripts/kernels/init"},
	"snilb":       {"build", "./cmd/snilb"},
	"maps.test":   {"test", "-c", "./maps"},
	"loader.test": {"test", "-c", "./loader"},
	"e2e.test":    {"test", "-c", "-tags", "kernels", "./scripts/e2e"},
}

// buildPrograms compiles them into a directory, without cgo so that they need no libraries.
func buildPrograms(dir string) error {
	for name, how := range programs {
		args := append([]string{how[0], "-trimpath", "-buildvcs=false", "-o", filepath.Join(dir, name)}, how[1:]...)
		cmd := exec.Command("go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

// writeImage writes the initramfs of one run: the programs in dir, the tools of this machine and a kernel's modules.
func writeImage(file, dir string, k *kernel, steps []plan.Step) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // Close of the archive says what went wrong
	a := newArchive(f)
	for _, mountPoint := range []string{"/proc", "/sys", "/dev", "/tmp", "/run"} {
		a.addDir(mountPoint)
	}
	a.addConsole()
	for name := range programs {
		to := "/bin/" + name
		if name == "init" {
			to = "/init"
		}
		a.addFile(to, filepath.Join(dir, name))
	}
	for _, tool := range tools {
		if err := addTool(a, tool); err != nil {
			return err
		}
	}
	a.add("/etc/passwd", []byte("root:x:0:0::/:/bin/false\n"), 0o644) // nginx looks its user up
	a.add("/etc/group", []byte("root:x:0:\n"), 0o644)
	a.addFile("/maps/testdata/verifier-budget.json", "maps/testdata/verifier-budget.json")
	p := plan.Plan{
		// Nothing may be skipped here: all there is was brought along.
		Env:   []string{"PATH=/bin", "HOME=/tmp", "SNILB_BIN=/bin/snilb", "SNILB_REQUIRE=1"},
		Steps: steps,
	}
	for _, name := range moduleNames {
		if data := k.modules[name]; data != nil {
			path := "/modules/" + name + ".ko"
			a.add(path, data, 0o644)
			p.Modules = append(p.Modules, path)
		}
	}
	text, err := json.Marshal(p)
	if err != nil {
		return err
	}
	a.add(plan.File, text, 0o644)
	return a.Close()
}

// library is a line of ldd: "libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x...)", and the loader's without an arrow.
var library = regexp.MustCompile(`(?m)^\s+(?:\S+ => )?(/\S+) \(0x`)

// addTool puts a program with its libraries into the archive.
func addTool(a *archive, name string) error {
	path, err := exec.LookPath(name)
	if err != nil {
		return fmt.Errorf("%w: run scripts/install-test-tools.sh", err)
	}
	a.addFile("/bin/"+name, path)
	out, err := command("ldd", path)
	if err != nil {
		return err
	}
	for _, m := range library.FindAllStringSubmatch(string(out), -1) {
		a.addFile(m[1], m[1])
	}
	return nil
}
