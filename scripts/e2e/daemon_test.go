// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"snilb/scripts/testbed"
)

const (
	pinRoot   = "/sys/fs/bpf/snilb"
	socketDir = "/run/snilb"

	readyTimeout = 60 * time.Second // on an emulated machine programs take long to be verified
	stopTimeout  = 20 * time.Second
	// commandTimeout is for other commands: detach --force alone waits for 15 s.
	commandTimeout = time.Minute
)

// daemon is a running `snilb attach`.
type daemon struct {
	t    *testing.T
	bed  *testbed.Bed
	name string // --name: unique, as instances share /sys/fs/bpf and /run
	file string // --routes

	cmd    *exec.Cmd
	stderr *lines
	exited chan struct{} // closed once err is set
	err    error
}

var instances atomic.Int64

// instanceName is e2e-PID-N: sweepPins finds what a killed run left by the pid.
func instanceName() string {
	return fmt.Sprintf("e2e-%d-%d", os.Getpid(), instances.Add(1))
}

// attach starts snilb on the bed's uplinks, waits until it steers, and after the test ends it by SIGTERM and looks that
// nothing is left, unless the test has ended it already.
func attach(t *testing.T, bed *testbed.Bed, routes string, args ...string) *daemon {
	t.Helper()
	d := start(t, bed, instanceName(), bed.Uplinks, routes, args...)
	d.waitReady()
	t.Cleanup(func() {
		if !d.hasExited() {
			d.stop(syscall.SIGTERM)
		}
	})
	return d
}

// start runs `snilb attach` and does not wait for it.
func start(t *testing.T, bed *testbed.Bed, name string, ifaces []string, routes string, args ...string) *daemon {
	t.Helper()
	return startBy(t, bed, (*exec.Cmd).Start, name, ifaces, routes, args...)
}

// startBy is start with something else that starts the command.
func startBy(t *testing.T, bed *testbed.Bed, begin func(*exec.Cmd) error, name string, ifaces []string, routes string, args ...string) *daemon {
	t.Helper()
	need(t, "the snilb binary", binaryErr)
	needBPFFS(t)
	file := filepath.Join(t.TempDir(), "routes.yaml")
	must(t, os.WriteFile(file, []byte(routes), 0o644))
	argv := slices.Concat([]string{"attach"}, ifaces, []string{"--routes", file, "--name", name, "--mode", *mode}, args)
	d := &daemon{t: t, bed: bed, name: name, file: file, stderr: newLines(), exited: make(chan struct{})}
	d.cmd = bed.LB.Command(context.Background(), binary, argv...)
	d.cmd.Stderr = d.stderr
	must(t, begin(d.cmd))
	go d.wait()
	t.Cleanup(func() {
		if !d.hasExited() {
			_ = d.cmd.Process.Kill()
			<-d.exited
		}
		if t.Failed() {
			t.Logf("snilb %s said:\n%s", strings.Join(argv, " "), d.stderr)
		}
	})
	return d
}

func (d *daemon) wait() {
	d.err = d.cmd.Wait()
	close(d.exited)
}

func (d *daemon) hasExited() bool {
	select {
	case <-d.exited:
		return true
	default:
		return false
	}
}

func (d *daemon) waitReady() {
	d.t.Helper()
	select {
	case <-d.stderr.saw("ready"):
	case <-d.exited:
		d.t.Fatalf("snilb attach ended before it was ready: %v", d.err)
	case <-time.After(readyTimeout):
		d.t.Fatalf("no line \"ready\" on stderr in %s", readyTimeout)
	}
}

// stop ends the daemon by a signal, and asserts that it exits by 0 and leaves nothing.
func (d *daemon) stop(sig syscall.Signal) {
	d.t.Helper()
	must(d.t, d.cmd.Process.Signal(sig))
	select {
	case <-d.exited:
	case <-time.After(stopTimeout):
		d.t.Fatalf("still running %s after %s", stopTimeout, sig)
	}
	if d.err != nil {
		d.t.Errorf("after %s: %v, want exit code 0", sig, d.err)
	}
	assertClean(d.t, d.bed, d.name)
}

// kill is kill -9.
func (d *daemon) kill() {
	d.t.Helper()
	must(d.t, d.cmd.Process.Kill())
	<-d.exited
}

// snilb runs another command of the binary in the load balancer's namespace.
func (d *daemon) snilb(args ...string) (stdout string, err error) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), commandTimeout)
	defer cancel()
	cmd := d.bed.LB.Command(ctx, binary, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("snilb %s: %w\n%s", strings.Join(args, " "), err, errOut.String())
	}
	return out.String(), nil
}

// flow is an object of `snilb flows`.
type flow struct {
	Client      string   `json:"client"`
	Peer        string   `json:"peer"`
	Listener    string   `json:"listener"`
	SNI         string   `json:"sni"`
	Pool        string   `json:"pool"`
	Backend     string   `json:"backend"`
	State       string   `json:"state"`
	AgeSeconds  *float64 `json:"age_seconds"`
	IdleSeconds *float64 `json:"idle_seconds"`
	BytesIn     *uint64  `json:"bytes_in"`
	BytesOut    *uint64  `json:"bytes_out"`
}

func (d *daemon) flows() []flow {
	d.t.Helper()
	out, err := d.snilb("flows", "--name", d.name, "-o", "jsonl")
	must(d.t, err)
	var flows []flow
	for dec := json.NewDecoder(strings.NewReader(out)); dec.More(); {
		var f flow
		must(d.t, dec.Decode(&f))
		flows = append(flows, f)
	}
	return flows
}

// waitFlows waits until the table satisfies ok.
func (d *daemon) waitFlows(what string, wait time.Duration, ok func([]flow) bool) []flow {
	d.t.Helper()
	var last []flow
	for deadline := time.Now().Add(wait); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if last = d.flows(); ok(last) {
			return last
		}
	}
	d.t.Fatalf("flow table: want %s within %s, have %d flows, the first of them %+v", what, wait, len(last), head(last, 3))
	return nil
}

// noFlows waits until the flow table is empty.
func (d *daemon) noFlows(wait time.Duration) {
	d.t.Helper()
	d.waitFlows("none", wait, func(f []flow) bool { return len(f) == 0 })
}

func head[T any](s []T, n int) []T { return s[:min(n, len(s))] }

// assertClean fails when an instance has left something in the namespace of the load balancer or on the machine.
func assertClean(t *testing.T, bed *testbed.Bed, name string) {
	t.Helper()
	for _, left := range leftovers(t, bed, name) {
		t.Errorf("left behind: %s", left)
	}
}

func leftovers(t *testing.T, bed *testbed.Bed, name string) []string {
	t.Helper()
	var left []string
	must(t, bed.LB.Do(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			left = append(left, leftOnLink(l)...)
		}
		return nil
	}))
	left = append(left, pinsOf(name)...)
	return append(left, runFilesOf(name)...)
}

// socketsOf lists an instance's.
func socketsOf(name string) []string {
	sockets, _ := filepath.Glob(filepath.Join(socketDir, name+"@*.sock*"))
	return sockets
}

// runFilesOf lists an instance's socket, lock and journal, behind whose name stands that of its network namespace.
func runFilesOf(name string) []string {
	files, _ := filepath.Glob(filepath.Join(socketDir, name+"@*"))
	return files
}

func leftOnLink(l netlink.Link) []string {
	var left []string
	a := l.Attrs()
	if strings.HasPrefix(a.Name, "snilb") {
		left = append(left, "device "+a.Name)
	}
	if a.Xdp != nil && a.Xdp.Attached {
		left = append(left, "XDP program on "+a.Name)
	}
	for dir, at := range map[string]ebpf.AttachType{"ingress": ebpf.AttachTCXIngress, "egress": ebpf.AttachTCXEgress} {
		res, err := link.QueryPrograms(link.QueryOptions{Target: a.Index, Attach: at})
		if err != nil {
			continue // no tcx on this kernel: then clsact is the place to look at
		}
		for _, p := range res.Programs {
			left = append(left, fmt.Sprintf("tcx %s program %d on %s", dir, p.ID, a.Name))
		}
	}
	qdiscs, _ := netlink.QdiscList(l)
	for _, q := range qdiscs {
		if q.Type() == "clsact" {
			left = append(left, "qdisc clsact on "+a.Name)
		}
	}
	neighs, _ := netlink.NeighList(a.Index, 0)
	for _, n := range neighs {
		if n.FlagsExt&netlink.NTF_EXT_MANAGED != 0 {
			left = append(left, "managed neighbour "+n.IP.String()+" on "+a.Name)
		}
	}
	return left
}

// pinsOf lists what belongs to an instance below the pin directory, whatever the level.
func pinsOf(name string) []string {
	var pins []string
	_ = filepath.WalkDir(pinRoot, func(path string, _ fs.DirEntry, err error) error {
		if err == nil && strings.Contains(path, name) {
			pins = append(pins, "pin "+path)
		}
		return nil
	})
	return pins
}

// sweepPins removes the pins, locks and sockets of test runs whose process is gone.
func sweepPins() {
	for _, root := range []string{pinRoot, socketDir} {
		entries, _ := os.ReadDir(root)
		for _, e := range entries {
			parts := strings.Split(e.Name(), "-")
			if len(parts) != 3 || parts[0] != "e2e" {
				continue
			}
			if pid, err := strconv.Atoi(parts[1]); err == nil && !testbed.Alive(pid) {
				_ = os.RemoveAll(filepath.Join(root, e.Name()))
			}
		}
	}
}

// needBPFFS asks for the file system of the pins.
func needBPFFS(t *testing.T) {
	t.Helper()
	const bpfMagic = 0xcafe4a11
	var st syscall.Statfs_t
	err := syscall.Statfs("/sys/fs/bpf", &st)
	if err == nil && uint32(st.Type) != bpfMagic {
		err = errors.New("not mounted: mount -t bpf bpf /sys/fs/bpf")
	}
	need(t, "/sys/fs/bpf", err)
}

// lines is a writer that keeps everything and lets others wait for a line.
type lines struct {
	mu      sync.Mutex // guards all below
	text    bytes.Buffer
	partial []byte
	seen    map[string]bool
	waiters map[string]chan struct{}
}

func newLines() *lines {
	return &lines{seen: map[string]bool{}, waiters: map[string]chan struct{}{}}
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(p)
	l.partial = append(l.partial, p...)
	for {
		line, rest, ok := bytes.Cut(l.partial, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		l.partial = rest
		s := string(line)
		if c := l.waiters[s]; c != nil && !l.seen[s] {
			close(c)
		}
		l.seen[s] = true
	}
}

// saw returns a channel that is closed once a line equals want.
func (l *lines) saw(want string) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.waiters[want]
	if c == nil {
		c = make(chan struct{})
		l.waiters[want] = c
		if l.seen[want] {
			close(c)
		}
	}
	return c
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}
