// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrRunning says that a living daemon has the instance.
var ErrRunning = errors.New("a daemon is running")

// lockFile is held by flock for a daemon's life: the kernel gives it up when the
// daemon dies, however it dies.
type lockFile struct {
	file *os.File
	path string
}

// owner is what a lock file says of who holds it.
type owner struct {
	pid        int
	interfaces []string
	ports      [2]uint16 // towards backends, first and last
}

func lockPath(ns *namespace, name string) string {
	return filepath.Join(runDir, name+ns.suffix+".lock")
}

// acquire takes an instance's lock. Returns an error that is ErrRunning if another
// process has it.
func acquire(ns *namespace, name string) (*lockFile, error) {
	path := lockPath(ns, name)
	for attempt := 0; ; attempt++ {
		l, err := tryLock(path)
		switch {
		case err == nil:
			return l, nil
		// Its holder removed the directory or the file just now.
		case errors.Is(err, fs.ErrNotExist) && attempt < 10:
		// Somebody may only be looking whether it is held.
		case errors.Is(err, unix.EWOULDBLOCK) && attempt < 5:
			time.Sleep(10 * time.Millisecond)
		case errors.Is(err, unix.EWOULDBLOCK):
			return nil, fmt.Errorf("instance %s: %w (pid %d); stop it first, or choose another name", name, ErrRunning, readOwner(path).pid)
		default:
			return nil, fmt.Errorf("lock instance %s: %w", name, err)
		}
	}
}

func tryLock(path string) (*lockFile, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	// For its owner alone: whoever may open it may lock it, and so keep a daemon from starting.
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	// Between open and lock the last holder may have removed the name: then this is a lock that nobody else can see.
	held, err := file.Stat()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	named, err := os.Stat(path)
	if err == nil && !os.SameFile(held, named) {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &lockFile{file: file, path: path}, nil
}

// write says who holds the lock, for the error of whoever wants it too.
func (l *lockFile) write(o owner) error {
	text := fmt.Sprintf("pid %d\ninterfaces %s\nports %d %d\n", o.pid, strings.Join(o.interfaces, " "), o.ports[0], o.ports[1])
	if err := l.file.Truncate(0); err != nil {
		return fmt.Errorf("write lock: %w", err)
	}
	if _, err := l.file.WriteAt([]byte(text), 0); err != nil {
		return fmt.Errorf("write lock: %w", err)
	}
	return nil
}

// release removes the file before it lets go: see tryLock for who comes between.
func (l *lockFile) release() error {
	return errors.Join(os.Remove(l.path), l.file.Close(), removeEmpty(runDir))
}

func readOwner(path string) (o owner) {
	file, err := os.Open(path)
	if err != nil {
		return o
	}
	defer file.Close() //nolint:errcheck // only read
	text, err := io.ReadAll(io.LimitReader(file, 64<<10))
	if err != nil {
		return o
	}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch key {
		case "pid":
			o.pid, _ = strconv.Atoi(value) // 0 is as good as any wrong number
		case "interfaces":
			o.interfaces = strings.Fields(value)
		case "ports":
			_, _ = fmt.Sscan(value, &o.ports[0], &o.ports[1]) // none overlap with anybody's
		}
	}
	return o
}

// isHeld reports whether a living process holds the lock. Who may not look hears that one does.
func isHeld(path string) bool {
	held, err := look(path)
	return held || err != nil
}

// look is isHeld with an error that is fs.ErrPermission for who may not look.
func look(path string) (held bool, err error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrPermission) {
		return false, err
	}
	if err != nil {
		return false, nil
	}
	defer file.Close() //nolint:errcheck // only read
	return errors.Is(unix.Flock(int(file.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK), nil
}

// Running reports the process that holds an instance of the calling thread's
// network namespace, or 0. Returns an error that is fs.ErrPermission if only the
// daemon's user may look.
func Running(name string) (pid int, err error) {
	pid, _, err = Held(name)
	return pid, err
}

// Held is Running with the interfaces that face clients.
func Held(name string) (pid int, interfaces []string, err error) {
	path, err := placed(runDir, name, ".lock")
	if err != nil {
		return 0, nil, err
	}
	held, err := look(path)
	if err != nil {
		return 0, nil, fmt.Errorf("see whether a daemon has instance %s: %w; run this as the daemon's user, or as root", name, err)
	}
	if !held {
		return 0, nil, nil
	}
	o := readOwner(path)
	return o.pid, o.interfaces, nil
}

// Kill kills the process that holds an instance, and waits until it is gone. Nobody else
// is hit, also if it ends by itself meanwhile, or counts processes otherwise than we do.
func Kill(ctx context.Context, name string) error {
	path, err := placed(runDir, name, ".lock")
	if err != nil {
		return err
	}
	pid := readOwner(path).pid
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("find process %d, which has instance %s: %w", pid, name, err)
	}
	defer unix.Close(fd) //nolint:errcheck // nothing is written there
	// Only now: the process that the descriptor is of cannot become another one any more.
	if !isHeld(path) || readOwner(path).pid != pid || !hasOpen(pid, path) {
		return fmt.Errorf("process %d is not the one that has instance %s: is it in a container? Kill it there", pid, name)
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	for isHeld(path) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("process %d was killed and does not end: %w", pid, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

// hasOpen reports whether a process has a file open.
func hasOpen(pid int, path string) bool {
	want, err := os.Stat(path)
	if err != nil {
		return false
	}
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	open, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	for _, e := range open {
		if file, err := os.Stat(filepath.Join(dir, e.Name())); err == nil && os.SameFile(file, want) {
			return true
		}
	}
	return false
}

// Instances lists the instances of the calling thread's network namespace that
// have state, living or dead.
func Instances() ([]string, error) {
	suffix, err := namespaceSuffix()
	if err != nil {
		return nil, err
	}
	return instancesIn(stateDir, suffix, "")
}

// Remains lists the instances of which anything is pinned: those that have state, and those
// whose daemon died while it made or removed it.
func Remains() ([]string, error) {
	suffix, err := namespaceSuffix()
	if err != nil {
		return nil, err
	}
	return remainsIn(stateDir, suffix)
}

func remainsIn(dir, suffix string) ([]string, error) {
	whole, err := instancesIn(dir, suffix, "")
	if err != nil {
		return nil, err
	}
	parts, err := instancesIn(dir, suffix, unfinished)
	all := append(whole, parts...)
	slices.Sort(all)
	return slices.Compact(all), err
}

// instancesIn lists the instances that have a file or directory there.
func instancesIn(dir, suffix, extension string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list instances: %w", err)
	}
	var names []string
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), suffix+extension)
		if ok && validName.MatchString(name) {
			names = append(names, name)
		}
	}
	return names, nil
}
