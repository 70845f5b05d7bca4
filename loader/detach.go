// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
)

// ErrNothing says that an instance has left nothing.
var ErrNothing = errors.New("nothing of this instance is left")

// Detach removes what a dead daemon left in the calling thread's network
// namespace: links, filters, pins, TAP device. Returns an error that is ErrRunning
// if a living daemon has the instance, and one that is ErrNothing if there is
// nothing to remove.
func Detach(name string, log *slog.Logger) (err error) {
	if err := checkName(name); err != nil {
		return err
	}
	ns, err := currentNamespace()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ns.close()) }()
	lock, err := acquire(ns, name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.release()) }()
	found, err := removeLeftovers(ns, name, log)
	if err == nil && !found {
		err = fmt.Errorf("instance %s: %w", name, ErrNothing)
	}
	return errors.Join(err, removeEmpty(stateDir))
}

// removeLeftovers removes all of an instance and reports whether there was
// anything. The caller holds its lock. It goes on after an error.
func removeLeftovers(ns *namespace, name string, log *slog.Logger) (found bool, err error) {
	if log == nil {
		log = slog.Default()
	}
	dir := filepath.Join(stateDir, name+ns.suffix)
	var errs []error
	for _, d := range []string{dir, dir + unfinished} {
		if _, err := os.Stat(d); err == nil {
			found = true
			errs = append(errs, removeLinks(d, log), releaseMarked(ns, d))
		}
	}
	links, err := ns.links()
	if err != nil {
		return found, errors.Join(append(errs, err)...)
	}
	for _, device := range links {
		filters, err := removeFilters(ns, device, name, dir, log)
		found = found || filters
		errs = append(errs, err)
	}
	taps, err := leftTaps(ns, name)
	errs = append(errs, err)
	for _, device := range taps {
		found = true
		log.Info("removing TAP device", "interface", device.Attrs().Name)
		errs = append(errs, deleteLink(ns, device.Attrs().Index))
	}
	// Whoever listened there is dead, as the lock is ours.
	errs = append(errs, removeFile(filepath.Join(runDir, name+ns.suffix+".sock")))
	errs = append(errs, removeJournal(ns, name), removeDir(dir))
	return found, errors.Join(errs...)
}

func removeLinks(dir string, log *slog.Logger) error {
	entries, err := os.ReadDir(filepath.Join(dir, "links"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list links: %w", err)
	}
	var errs []error
	for _, e := range entries {
		iface, role, err := parseLinkPin(e.Name())
		if err != nil {
			iface = e.Name() // not ours to name, but in our directory
		}
		log.Info("removing link", "interface", iface, "role", role)
		errs = append(errs, removePinnedLink(filepath.Join(dir, "links", e.Name())))
	}
	return errors.Join(errs...)
}

func removeFilters(ns *namespace, device netlink.Link, name, dir string, log *slog.Logger) (found bool, err error) {
	index, iface := device.Attrs().Index, device.Attrs().Name
	filters, err := instanceFilters(ns, index, name)
	if err != nil {
		if isGone(err) { // since it was listed
			return false, nil
		}
		return false, err
	}
	var errs []error
	for _, f := range filters {
		log.Info("removing filter", "interface", iface, "filter", f.Name)
		errs = append(errs, removeFilter(ns, f))
	}
	errs = append(errs, removeQdisc(ns, index, clsactMark(dir, iface)))
	return len(filters) > 0, errors.Join(errs...)
}

// unlinkAll is a seam: tests stop it on its way.
var unlinkAll = os.RemoveAll

// removeDir removes a state directory. Only files and directories that we make are
// in it, all at most two levels down. It goes under its other name first: a daemon that is
// killed meanwhile leaves all of it or what is known for incomplete, never a part under
// its own name, that the next one would go on with.
func removeDir(dir string) error {
	if dir == "" {
		return nil
	}
	if err := removeUnfinished(dir); err != nil {
		return err
	}
	if err := os.Rename(dir, dir+unfinished); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove state: %w", err)
	}
	return removeUnfinished(dir)
}

// removeUnfinished removes what of a state directory has its other name.
func removeUnfinished(dir string) error {
	if dir == "" {
		return nil
	}
	if err := unlinkAll(dir + unfinished); err != nil {
		return fmt.Errorf("remove state: %w", err)
	}
	return nil
}

// Holder returns the instance that has its client program on an interface of the
// calling thread's network namespace, be its daemon alive or dead; "" if there is
// none.
func Holder(iface string) (name string, err error) {
	ns, err := currentNamespace()
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, ns.close()) }()
	return holder(ns, iface)
}

// holder is Holder in a namespace.
func holder(ns *namespace, iface string) (string, error) {
	if name, err := pinHolder(ns, iface, RoleClient); err != nil || name != "" {
		return name, err
	}
	device, err := ns.LinkByName(iface)
	if err != nil {
		return "", fmt.Errorf("interface %s: %w", iface, err)
	}
	if name, err := linkHolder(ns, device.Attrs().Index, RoleClient); err != nil || name != "" {
		return name, err
	}
	filters, err := instanceFilters(ns, device.Attrs().Index, "")
	if err != nil {
		return "", err
	}
	for _, f := range filters {
		if name, ok := strings.CutPrefix(f.Name, programOf[RoleClient]+" "); ok {
			return name, nil
		}
	}
	return "", nil
}

// pinHolder returns the instance that has pinned a link of a role under the name of an
// interface, which may be gone; "" if there is none.
func pinHolder(ns *namespace, iface string, role Role) (string, error) {
	return findPin(ns, func(dir string) (bool, error) {
		_, err := os.Stat(linkPin(dir, iface, role))
		return err == nil, nil
	})
}

// linkHolder returns the instance that has the link of a role on an interface, be it
// pinned under a name that the interface had before; "" if there is none.
func linkHolder(ns *namespace, ifindex int, role Role) (string, error) {
	return findPin(ns, func(dir string) (bool, error) {
		path, err := pinOn(dir, ifindex, role)
		return path != "", err
	})
}

// findPin returns the first instance whose state directory has what is looked for.
func findPin(ns *namespace, has func(dir string) (bool, error)) (string, error) {
	names, err := instancesIn(stateDir, ns.suffix, "")
	if err != nil {
		return "", err
	}
	for _, name := range names {
		if found, err := has(filepath.Join(stateDir, name+ns.suffix)); err != nil || found {
			return name, err
		}
	}
	return "", nil
}

// pinOn returns where the link of a role on an interface is pinned; "" if there is none.
func pinOn(dir string, ifindex int, role Role) (string, error) {
	entries, err := os.ReadDir(filepath.Join(dir, "links"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("list links: %w", err)
	}
	for _, e := range entries {
		if _, has, err := parseLinkPin(e.Name()); err != nil || has != role {
			continue
		}
		path := filepath.Join(dir, "links", e.Name())
		h, err := openPinnedLink(path, role)
		if errors.Is(err, fs.ErrNotExist) {
			continue // since it was listed
		}
		if err != nil {
			return "", err
		}
		on, err := h.ifindex()
		if err := errors.Join(err, h.release()); err != nil {
			return "", err
		}
		if on == ifindex {
			return path, nil
		}
	}
	return "", nil
}
