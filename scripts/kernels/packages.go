// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// concrete is the name of a package that holds a kernel: its series, the rest of its version and its flavour. Packages that
// only depend on the newest one have no third number, those for signing and debugging a word behind.
var concrete = regexp.MustCompile(`^linux-image-(\d+\.\d+)(\.\S+?)-((?:[a-z]+-)?)amd64$`)

// offered lists the kernels that Debian's packages offer: the newest of each series and flavour, oldest series first.
func offered() ([]string, error) {
	names, err := search()
	if err == nil && len(names) == 0 { // a new machine, or a container's
		if err = update(); err == nil {
			names, err = search()
		}
	}
	if err == nil && len(names) == 0 {
		err = errors.New("apt knows no kernel: has /etc/apt/sources.list one of Debian's archives?")
	}
	return names, err
}

func update() error {
	_, err := command("apt-get", "-q", "update")
	return err
}

func search() ([]string, error) {
	out, err := command("apt-cache", "search", "--names-only", "^linux-image-[0-9].*-amd64$")
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		name, _, _ := strings.Cut(line, " ")
		names = append(names, name)
	}
	return newest(names), nil
}

// oldest is the series that snilb is made for at least.
var oldest = []int{6, 1}

// newest keeps the newest package of each series and flavour.
func newest(names []string) []string {
	best := map[string]string{}
	for _, name := range names {
		m := concrete.FindStringSubmatch(name)
		if m == nil || slices.Compare(numbers(m[1]), oldest) < 0 {
			continue
		}
		key := m[1] + " " + m[3]
		if old, ok := best[key]; !ok || slices.Compare(numbers(name), numbers(old)) > 0 {
			best[key] = name
		}
	}
	var kernels []string
	for _, name := range best {
		kernels = append(kernels, name)
	}
	slices.SortFunc(kernels, func(a, b string) int {
		if c := slices.Compare(numbers(a), numbers(b)); c != 0 {
			return c
		}
		return strings.Compare(a, b)
	})
	return kernels
}

var digits = regexp.MustCompile(`\d+`)

// numbers are those in a version, so that 6.12 comes after 6.2.
func numbers(version string) []int {
	var all []int
	for _, text := range digits.FindAllString(strings.TrimSuffix(version, "amd64"), -1) {
		n, _ := strconv.Atoi(text)
		all = append(all, n)
	}
	return all
}

// kernel is what a machine needs of a package.
type kernel struct {
	name    string            // of the package
	image   []byte            // vmlinuz
	modules map[string][]byte // by name, uncompressed
}

// The modules that tests need, each after those it depends on. Debian builds them all as modules; a kernel may as well have
// them built in.
var moduleNames = []string{"llc", "stp", "garp", "mrp", "8021q", "bridge", "veth", "tun", "sch_ingress", "cls_bpf", "inet_diag", "tcp_diag"}

// fetch downloads a package into a directory, unless it is there, and returns its file.
func fetch(dir, name string) (string, error) {
	// apt knows the file's name and its sum, and leaves a file alone that is right.
	download := func() error {
		cmd := exec.Command("apt-get", "-q", "download", name)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get download %s: %w\n%s", name, err, out)
		}
		return nil
	}
	// Its lists may be older than the archive, which keeps no version for long.
	if err := download(); err != nil && errors.Join(update(), download()) != nil {
		return "", fmt.Errorf("%w; see which kernels there are now: go run ./scripts/kernels -list", err)
	}
	out, err := command("apt-get", "-q", "download", "--print-uris", name)
	if err != nil {
		return "", err
	}
	fields := strings.Fields(string(out)) // 'URI' FILE SIZE SUM
	if len(fields) < 2 {
		return "", fmt.Errorf("apt-get download --print-uris %s said %q", name, out)
	}
	return filepath.Join(dir, fields[1]), nil
}

// unpack reads a kernel out of its package.
func unpack(name, deb string) (*kernel, error) {
	k := &kernel{name: name, modules: map[string][]byte{}}
	builtin := ""
	err := members(deb, func(file string, r io.Reader) error {
		base := path.Base(file)
		module, _, isModule := strings.Cut(base, ".ko")
		switch {
		case strings.HasPrefix(file, "./boot/vmlinuz-"):
			return readInto(&k.image, r)
		case base == "modules.builtin":
			var data []byte
			err := readInto(&data, r)
			builtin = string(data)
			return err
		case isModule && slices.Contains(moduleNames, module):
			data, err := uncompressed(base, r)
			k.modules[module] = data
			return err
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", deb, err)
	}
	if k.image == nil {
		return nil, fmt.Errorf("%s holds no boot/vmlinuz", deb)
	}
	for _, module := range moduleNames {
		if k.modules[module] == nil && !strings.Contains(builtin, "/"+module+".ko\n") {
			return nil, fmt.Errorf("%s has no module %s", deb, module)
		}
	}
	return k, nil
}

// members goes through the files of a package.
func members(deb string, visit func(file string, r io.Reader) error) (err error) {
	cmd := exec.Command("dpkg-deb", "--fsys-tarfile", deb)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	for r := tar.NewReader(out); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			_, _ = io.Copy(io.Discard, out) // the padding: dpkg-deb would die of a closed pipe
			break
		}
		if err == nil && h.Typeflag == tar.TypeReg {
			err = visit(h.Name, r)
		}
		if err != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			return err
		}
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("dpkg-deb: %w\n%s", err, said.Bytes())
	}
	return nil
}

func readInto(to *[]byte, r io.Reader) (err error) {
	*to, err = io.ReadAll(r)
	return err
}

// uncompressed is a module as the oldest kernels take it.
func uncompressed(name string, r io.Reader) ([]byte, error) {
	switch path.Ext(name) {
	case ".ko":
		return io.ReadAll(r)
	case ".xz":
		cmd := exec.Command("xz", "-dc")
		cmd.Stdin = r
		data, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("xz -dc %s: %w", name, err)
		}
		return data, nil
	}
	return nil, fmt.Errorf("module %s is compressed in a way unknown here", name)
}

// command runs a program and returns what it prints; its complaints are part of the error.
func command(name string, args ...string) ([]byte, error) {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, said.Bytes())
	}
	return out, nil
}
