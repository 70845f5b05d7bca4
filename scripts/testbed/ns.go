// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// nsDir is where ip(8) and nsenter(1) users look for namespaces by name.
const nsDir = "/run/netns"

// NS is one network namespace of a [Bed].
type NS struct {
	// Name is the name under /run/netns, for `nsenter --net=/run/netns/NAME`.
	Name string

	fd netns.NsHandle

	life context.Context // ends with the namespace, and ends its commands
	end  context.CancelFunc
}

// newNS makes a namespace and leaves the calling thread where it was.
func newNS(name string) (*NS, error) {
	if err := os.MkdirAll(nsDir, 0o755); err != nil {
		return nil, err
	}
	ns := &NS{Name: name}
	ns.life, ns.end = context.WithCancel(context.Background())
	err := onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("new network namespace: %w", err)
		}
		f, err := os.OpenFile(ns.Path(), os.O_CREATE|os.O_EXCL, 0o444)
		if err != nil {
			return err
		}
		_ = f.Close()
		self := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
		if err := unix.Mount(self, ns.Path(), "bind", unix.MS_BIND, ""); err != nil {
			_ = os.Remove(ns.Path())
			return fmt.Errorf("name network namespace %s: %w", name, err)
		}
		ns.fd, err = netns.Get()
		return err
	})
	if err != nil {
		return nil, err
	}
	return ns, nil
}

// Path is the file that names the namespace.
func (ns *NS) Path() string { return filepath.Join(nsDir, ns.Name) }

// Do runs fn on an OS thread that is in the namespace. Sockets that fn opens stay in the namespace for good; goroutines that
// fn starts are outside of it. It returns fn's error, or what kept the thread from entering.
func (ns *NS) Do(fn func() error) (err error) {
	runtime.LockOSThread()
	before, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("remember network namespace: %w", err)
	}
	// In a defer, because fn may be a test that ends the goroutine by t.Fatal.
	defer func() {
		if e := netns.Set(before); e != nil {
			// The thread stays locked and so dies with this goroutine: better than to go on in the wrong namespace.
			err = errors.Join(err, fmt.Errorf("leave network namespace %s: %w", ns.Name, e))
		} else {
			runtime.UnlockOSThread()
		}
		_ = before.Close()
	}()
	if err := netns.Set(ns.fd); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", ns.Name, err)
	}
	return fn()
}

// Command is exec.CommandContext for a process in the namespace. The mount namespace is the caller's, unlike with
// `ip netns exec`, so that /sys/fs/bpf is the real one and pins outlive the process. nsenter(1) replaces itself by
// the program: the pid is the program's own. [Bed.Close] kills what still runs.
func (ns *NS) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	path, lookErr := exec.LookPath(name)
	if lookErr != nil {
		path = name
	}
	ctx, cancel := context.WithCancel(ctx)
	context.AfterFunc(ns.life, cancel)
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + ns.Path(), "--", path}, args...)...)
	if lookErr != nil {
		cmd.Err = lookErr // otherwise the complaint would be nsenter's
	}
	return cmd
}

// Listen is net.Listen in the namespace.
func (ns *NS) Listen(network, address string) (l net.Listener, err error) {
	err = ns.Do(func() error {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// DialContext connects from the namespace. The address must be a literal one: the resolver's goroutines are outside.
func (ns *NS) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return ns.DialWith(ctx, &net.Dialer{}, network, address)
}

// DialWith is [NS.DialContext] with a dialer of one's own, to choose a source address or set socket options.
func (ns *NS) DialWith(ctx context.Context, d *net.Dialer, network, address string) (c net.Conn, err error) {
	err = ns.Do(func() error {
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Netlink opens a netlink handle in the namespace; the caller closes it.
func (ns *NS) Netlink() (*netlink.Handle, error) {
	h, err := netlink.NewHandleAt(ns.fd, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink in %s: %w", ns.Name, err)
	}
	return h, nil
}

// Sysctl sets one key below net/, written as a path: "ipv4/ip_forward".
func (ns *NS) Sysctl(key, value string) error {
	return ns.Do(func() error {
		return os.WriteFile(filepath.Join("/proc/sys/net", key), []byte(value), 0)
	})
}

// close kills the commands that still run and removes the namespace.
func (ns *NS) close() error {
	ns.end()
	_ = ns.fd.Close()
	return removeName(ns.Path())
}

func removeName(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return os.Remove(path)
}

// onOwnThread runs fn on a thread that nobody uses afterwards.
func onOwnThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- fn()
	}()
	return <-done
}

// sweep removes namespaces of beds whose process is gone, and the processes that it left in them. Only names that this
// package gives are looked at: snilb-PID-N-ROLE.
func sweep() {
	names, _ := filepath.Glob(filepath.Join(nsDir, namePrefix+"*"))
	for _, path := range names {
		pid, ok := ownerOf(filepath.Base(path))
		if !ok || Alive(pid) {
			continue
		}
		killInside(path)
		_ = removeName(path)
	}
}

// Alive says whether a process runs. A zombie does not: in a container nobody may ever reap it.
func Alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	// The name, in parentheses, may hold anything: the state comes after the last of them.
	_, after, _ := bytes.Cut(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" "))
	return len(after) > 0 && after[0] != 'Z' && after[0] != 'X'
}

const namePrefix = "snilb-"

func ownerOf(name string) (pid int, ok bool) {
	parts := strings.Split(strings.TrimPrefix(name, namePrefix), "-")
	if len(parts) != 3 {
		return 0, false
	}
	pid, err := strconv.Atoi(parts[0])
	return pid, err == nil && pid > 0
}

// killInside kills the processes whose network namespace is the one named by path.
func killInside(path string) {
	var want, have unix.Stat_t
	if unix.Stat(path, &want) != nil {
		return
	}
	procs, _ := fs.Glob(os.DirFS("/proc"), "[0-9]*")
	for _, p := range procs {
		pid, _ := strconv.Atoi(p)
		if unix.Stat("/proc/"+p+"/ns/net", &have) != nil || have.Ino != want.Ino || have.Dev != want.Dev {
			continue
		}
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}
