// SPDX-License-Identifier: Apache-2.0

package packaging

import (
	"bufio"
	"context"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// dockerfile has what its tests need of it.
type dockerfile struct {
	build  string   // the command that builds the binary into /snilb, in sh
	image  []string // the lines of the last stage
	rights []string // what the comment's `docker run` adds: "BPF"
	mounts []string // and mounts of the host
}

func readDockerfile(t *testing.T) (d dockerfile) {
	t.Helper()
	raw, err := os.ReadFile(tree + "/scripts/docker/Dockerfile")
	must(t, err)
	text := string(raw)
	for _, m := range regexp.MustCompile(`--cap-add (\S+)`).FindAllStringSubmatch(text, -1) {
		d.rights = append(d.rights, m[1])
	}
	for _, m := range regexp.MustCompile(`(?:-v|--device) (/[^ :]+)`).FindAllStringSubmatch(text, -1) {
		d.mounts = append(d.mounts, m[1])
	}
	for line := range strings.SplitSeq(text, "\n") {
		if run, ok := strings.CutPrefix(line, "RUN "); ok && strings.Contains(run, "/snilb") {
			d.build = run
		}
		if strings.HasPrefix(line, "FROM ") {
			d.image = nil
		}
		if line != "" && !strings.HasPrefix(line, "#") {
			d.image = append(d.image, line)
		}
	}
	return d
}

// buildImage builds the binary as the container file does.
func buildImage(t *testing.T, d dockerfile) (binary string) {
	t.Helper()
	binary = filepath.Join(t.TempDir(), "snilb")
	cmd := exec.Command("sh", "-c", strings.Replace(d.build, "/snilb", binary, 1))
	cmd.Dir, cmd.Env = tree, append(os.Environ(), "VERSION=1.2.3")
	_, err := output(cmd)
	must(t, err)
	return binary
}

// TestImageBinary: an image of nothing but the binary needs one without a loader and libraries.
func TestImageBinary(t *testing.T) {
	d := readDockerfile(t)
	want := []string{"FROM scratch", "COPY --from=build /snilb /snilb", `ENTRYPOINT ["/snilb"]`}
	if !slices.Equal(d.image, want) {
		t.Errorf("the image is %q, want %q", d.image, want)
	}
	binary := buildImage(t, d)
	file, err := elf.Open(binary)
	must(t, err)
	defer func() { _ = file.Close() }()
	for _, p := range file.Progs {
		if p.Type == elf.PT_INTERP {
			t.Error("the binary wants a loader: it is not static")
		}
	}
	if libraries, _ := file.ImportedLibraries(); len(libraries) > 0 {
		t.Errorf("the binary wants %q", libraries)
	}
	if said := mustRun(t, binary, "version"); !strings.HasPrefix(said, "snilb 1.2.3 ") {
		t.Errorf("version: %s", said)
	}
}

// TestContainer does by hand what `docker run` does with the options of the container file's comment: a root that has only
// the binary, /proc and /sys read-only as there, the mounts and the rights that are named, and no others.
func TestContainer(t *testing.T) {
	bed := newBed(t)
	needTool(t, "setpriv", "unshare", "chroot")
	site := startSite(t, bed)
	d := readDockerfile(t)
	root := t.TempDir()
	mustRun(t, "cp", buildImage(t, d), filepath.Join(root, "snilb"))
	name := fmt.Sprintf("container-%d", os.Getpid())
	state := t.TempDir() // of the host: /run/snilb and /etc/snilb
	for _, dir := range []string{"run", "etc"} {
		must(t, os.MkdirAll(filepath.Join(state, dir), 0o755))
	}
	must(t, os.WriteFile(filepath.Join(state, "etc/routes.yaml"), []byte(routesOf(bed)), 0o644))

	script := `set -eu
		cd "$1"
		mkdir -p proc sys dev
		mount -t proc proc proc && mount -o remount,bind,ro proc
		mount -t sysfs -o ro sysfs sys
		place() { if [ -d "$1" ]; then mkdir -p ".$2"; else mkdir -p ".${2%/*}"; : >>".$2"; fi; mount --bind "$1" ".$2"; }
		`
	for _, mount := range d.mounts {
		from := mount
		switch mount {
		case "/run/snilb":
			from = state + "/run"
		case "/etc/snilb":
			from = state + "/etc"
		}
		script += fmt.Sprintf("place %s %s\n", from, mount)
	}
	// CAP_SYS_CHROOT is for chroot(1) alone.
	rights := "-all,+sys_chroot"
	for _, right := range d.rights {
		rights += ",+" + strings.ToLower(right)
	}
	script += `exec setpriv --no-new-privs --inh-caps=-all --bounding-set=` + rights + ` chroot . /snilb attach ` + strings.Join(bed.Uplinks, " ") +
		` --routes /etc/snilb/routes.yaml --name ` + name
	cmd := bed.LB.Command(context.Background(), "unshare", "--mount", "sh", "-c", script, "sh", root)
	ready, said := watchFor(t, cmd, "ready")
	must(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		if t.Failed() {
			t.Logf("it said:\n%s", said())
		}
		_, _ = output(bed.LB.Command(context.Background(), filepath.Join(root, "snilb"), "detach", "--all", "--name", name))
		if left := pins(name); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	})
	select {
	case <-ready:
	case err := <-ended:
		t.Fatalf("ended before it was ready: %v", err)
	case <-time.After(patience):
		t.Fatal("not ready")
	}
	site.assertServed(t)
	if len(pins(name)) == 0 {
		t.Error("nothing of it is in the host's bpffs: it would not outlive the container")
	}
	if sockets, _ := filepath.Glob(filepath.Join(state, "run", name+"*.sock")); len(sockets) != 1 {
		t.Errorf("on the host the daemon takes commands at %q", sockets)
	}
	must(t, cmd.Process.Signal(syscall.SIGTERM))
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("after SIGTERM: %v", err)
		}
	case <-time.After(patience):
		t.Fatal("does not end")
	}
}

// watchFor returns a channel that is closed when a command has said a line on stderr, and a function that returns all of them.
func watchFor(t *testing.T, cmd *exec.Cmd, want string) (seen chan struct{}, all func() string) {
	t.Helper()
	read, write, err := os.Pipe()
	must(t, err)
	cmd.Stderr = write
	seen = make(chan struct{})
	var mu sync.Mutex
	var text strings.Builder
	t.Cleanup(func() { _ = read.Close(); _ = write.Close() })
	go func() {
		var once sync.Once
		for scan := bufio.NewScanner(read); scan.Scan(); {
			mu.Lock()
			text.WriteString(scan.Text() + "\n")
			mu.Unlock()
			if scan.Text() == want {
				once.Do(func() { close(seen) })
			}
		}
	}()
	return seen, func() string {
		mu.Lock()
		defer mu.Unlock()
		return text.String()
	}
}
