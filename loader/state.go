// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	bpffs    = "/sys/fs/bpf"
	stateDir = bpffs + "/snilb"
	runDir   = "/run/snilb"

	// unfinished marks a state directory that is being built, or removed.
	unfinished = "~new"
)

// Dir returns the directory of an instance's pins, for the calling thread's network
// namespace. It need not exist.
func Dir(name string) (string, error) {
	return placed(stateDir, name, "")
}

// SocketPath returns where an instance's daemon listens for commands, for the
// calling thread's network namespace. Its directory need not exist.
func SocketPath(name string) (string, error) {
	return placed(runDir, name, ".sock")
}

// journalIn is where an instance's engine notes what the next one shall know of flows.
func journalIn(ns *namespace, name string) string {
	return filepath.Join(runDir, name+ns.suffix+".journal")
}

// removeJournal removes it, and one that was not finished.
func removeJournal(ns *namespace, name string) error {
	path := journalIn(ns, name)
	return errors.Join(removeFile(path), removeFile(path+".new"))
}

func placed(dir, name, extension string) (string, error) {
	if err := checkName(name); err != nil {
		return "", err
	}
	suffix, err := namespaceSuffix()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, name+suffix+extension), nil
}

// escape makes an interface's name fit for bpffs, which refuses dots. Everything
// but letters, digits, _ and - becomes %XX, so unescape finds the way back.
func escape(iface string) string {
	var b strings.Builder
	for _, c := range []byte(iface) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '-':
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02x", c)
		}
	}
	return b.String()
}

func unescape(name string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(name); i++ {
		if name[i] != '%' {
			b.WriteByte(name[i])
			continue
		}
		if i+3 > len(name) {
			return "", fmt.Errorf("pin name %q ends within an escape", name)
		}
		c, err := strconv.ParseUint(name[i+1:i+3], 16, 8)
		if err != nil {
			return "", fmt.Errorf("pin name %q: %w", name, err)
		}
		b.WriteByte(byte(c))
		i += 2
	}
	return b.String(), nil
}

// linkPin is where the link of a role on an interface is pinned.
func linkPin(dir, iface string, role Role) string {
	return filepath.Join(dir, "links", escape(iface)+"-"+string(role))
}

// parseLinkPin is the reverse of linkPin, for the last part of its path.
func parseLinkPin(base string) (iface string, role Role, err error) {
	cut := strings.LastIndexByte(base, '-')
	if cut < 0 {
		return "", "", fmt.Errorf("pin name %q has no role", base)
	}
	iface, err = unescape(base[:cut])
	return iface, Role(base[cut+1:]), err
}

// clsactMark is the directory that says we made the clsact qdisc of an interface.
func clsactMark(dir, iface string) string {
	return filepath.Join(dir, "clsact", escape(iface))
}

// hasBPFFS reports whether a bpffs is mounted where the pins go.
func hasBPFFS() bool {
	var st unix.Statfs_t
	return unix.Statfs(bpffs, &st) == nil && st.Type == unix.BPF_FS_MAGIC
}

// mountBPFFS mounts it if it is missing: a container or `ip netns exec` hides it.
func mountBPFFS(log *slog.Logger) error {
	if hasBPFFS() {
		return nil
	}
	if err := unix.Mount("bpffs", bpffs, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount bpffs: %w; mount it yourself: mount -t bpf bpffs %s", err, bpffs)
	}
	log.Info("mounted bpffs, which was missing", "path", bpffs)
	return nil
}

// removeEmpty removes directories that nothing else uses: in a container or a service's
// mount namespace one may be a mount, and stays.
func removeEmpty(dirs ...string) error {
	inUse := []error{fs.ErrNotExist, unix.ENOTEMPTY, unix.EBUSY, unix.EROFS}
	var errs []error
	for _, dir := range dirs {
		err := os.Remove(dir)
		if err != nil && !slices.ContainsFunc(inUse, func(known error) bool { return errors.Is(err, known) }) {
			errs = append(errs, fmt.Errorf("remove directory: %w", err))
		}
	}
	return errors.Join(errs...)
}
