// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Level is how much a finding is in the way.
type Level string

// The levels.
const (
	LevelOK   Level = "ok"
	LevelWarn Level = "warn" // attach works, or works in another mode
	LevelFail Level = "fail" // attach does not work
)

// Finding is what one check of Doctor says.
type Finding struct {
	Level   Level  `json:"level"`
	Subject string `json:"check"`
	What    string `json:"what"`
	Remedy  string `json:"remedy,omitempty"`
}

// Doctor says what this machine can do, what is in the way, and what instances have left, in the calling thread's network
// namespace. It changes nothing. Without interfaces it looks at all Ethernet ones that are up, of which none has to work.
func Doctor(interfaces []string) []Finding {
	d := &doctor{o: Options{}.withDefaults(), named: len(interfaces) > 0}
	d.o.Name = "?" // no instance's: what any of them holds is in the way
	ns, err := currentNamespace()
	if err != nil {
		d.problem("network namespace", Problem{What: err.Error(), Remedy: "run as root"})
		return d.found
	}
	defer ns.close() //nolint:errcheck // only read
	d.ns = ns
	for _, c := range machineChecks(ns, &d.o) {
		problems := c.look()
		for _, p := range problems {
			d.problem(c.subject, p)
		}
		if len(problems) == 0 {
			d.ok(c.subject, "%s", c.fine())
		}
	}
	d.features()
	d.instances()
	if !d.named {
		interfaces = d.allInterfaces()
	}
	for _, name := range interfaces {
		d.inspectInterface(name)
	}
	return d.found
}

type doctor struct {
	o     Options
	ns    *namespace
	named bool // somebody named the interfaces, and means to attach each of them
	found []Finding
}

func (d *doctor) ok(subject, format string, args ...any) {
	d.found = append(d.found, Finding{LevelOK, subject, fmt.Sprintf(format, args...), ""})
}

func (d *doctor) warn(subject, what, remedy string) {
	d.found = append(d.found, Finding{LevelWarn, subject, what, remedy})
}

// problem notes what is in the way.
func (d *doctor) problem(subject string, p Problem) {
	level := LevelFail
	if p.Warning {
		level = LevelWarn
	}
	d.found = append(d.found, Finding{level, subject, p.What, p.Remedy})
}

// hidden notes what only others may see, and reports whether that is the error.
func (d *doctor) hidden(subject string, err error) bool {
	if !errors.Is(err, fs.ErrPermission) {
		return false
	}
	d.warn(subject, "not known: only root may look", "run as root")
	return true
}

// features says what follows of the kernel, beside the version.
func (d *doctor) features() {
	switch has, err := hasTCX(); {
	case d.hidden("tcx", err):
	case err != nil:
		d.warn("tcx", fmt.Sprintf("not known: %v", err), "run as root")
	case has:
		d.ok("tcx", "programs are attached by it")
	default:
		d.ok("tcx", "not in this kernel (it came with Linux 6.6): clsact takes its place")
	}
	if _, err := netlink.GenlFamilyGet(netdevFamily); err == nil {
		d.ok("XDP features", "drivers tell them")
	} else {
		d.ok("XDP features", "drivers do not tell them (that came with Linux 6.3): what XDP cannot send is left to TC")
	}
	switch has, err := probeCsumIPv6(); {
	case d.hidden("IPv6 checksums", err):
	case err != nil:
		d.warn("IPv6 checksums", fmt.Sprintf("not known: %v", err), "run as root")
	case has:
		d.ok("IPv6 checksums", "the kernel knows BPF_F_IPV6, and keeps what a network card has summed true")
	default:
		d.warn("IPv6 checksums", "the kernel does not know BPF_F_IPV6 (it came with Linux 6.16): IPv6 packets that a network card has summed may be refused by receivers on this node, as containers",
			"where its log tells of hw csum failure: ethtool -K IFACE rx off, or a newer kernel")
	}
}

// hasTCX asks the kernel by a question about the loopback device.
func hasTCX() (bool, error) {
	const loopback = 1
	_, has, err := queryTCX(loopback)
	return has, err
}

// queryTCX lists what tcx has on an interface; has is false on a kernel without it.
func queryTCX(index int) (programs []link.AttachedProgram, has bool, err error) {
	result, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: ebpf.AttachTCXIngress})
	switch {
	case err == nil:
		return result.Programs, true, nil
	case errors.Is(err, unix.EINVAL):
		return nil, false, nil
	case errors.Is(err, ebpf.ErrNotSupported): // what the library makes of it where it may not ask
		err = unix.EPERM
	}
	return nil, false, fmt.Errorf("list tcx programs: %w", err)
}

// instances lists those that have state, and those that only have a daemon yet.
func (d *doctor) instances() {
	const subject = "instances"
	names, err := instancesIn(stateDir, d.ns.suffix, "")
	unknown := d.hidden(subject, err)
	locked, lockErr := instancesIn(runDir, d.ns.suffix, ".lock")
	if unknown {
		err = nil
	}
	if err = errors.Join(err, lockErr); err != nil {
		d.warn(subject, fmt.Sprintf("not known: %v", err), "run as root")
	}
	for _, name := range locked {
		if !slices.Contains(names, name) && isHeld(lockPath(d.ns, name)) {
			names = append(names, name)
		}
	}
	parts := d.unfinished(names)
	if len(names)+parts == 0 && err == nil && !unknown {
		d.ok(subject, "none")
	}
	for _, name := range names {
		path := lockPath(d.ns, name)
		held, err := look(path)
		if d.hidden("instance "+name, err) {
			continue
		}
		if held {
			has := readOwner(path)
			d.ok("instance "+name, "its daemon runs (pid %d), on %s", has.pid, strings.Join(has.interfaces, ", "))
			continue
		}
		d.warn("instance "+name, "its daemon is dead and has left its state, by which connections go on",
			fmt.Sprintf("see snilb status --name %s; start it again, or remove it: snilb detach --all --name %s", name, name))
	}
}

// unfinished tells of instances that are not whole, and of which no daemon is at work. Returns how many.
func (d *doctor) unfinished(known []string) (count int) {
	parts, _ := instancesIn(stateDir, d.ns.suffix, unfinished) // its error was told already
	for _, name := range parts {
		if slices.Contains(known, name) {
			continue
		}
		count++
		d.warn("instance "+name, "its daemon died while it began or ended, and has left tables that nobody uses",
			fmt.Sprintf("snilb detach --all --name %s, or start it", name))
	}
	return count
}

// allInterfaces lists those that a client's packets could come in by. Our TAP devices are not among them.
func (d *doctor) allInterfaces() []string {
	links, err := d.ns.links()
	if err != nil {
		d.problem("interfaces", Problem{What: err.Error(), Remedy: "name one"})
		return nil
	}
	var names []string
	for _, l := range links {
		a := l.Attrs()
		if isEthernet(l) && a.Flags&(net.FlagUp|net.FlagLoopback) == net.FlagUp && !strings.HasPrefix(a.Alias, tapAlias("")) {
			names = append(names, a.Name)
		}
	}
	if names == nil {
		d.warn("interfaces", "no Ethernet interface is up", "see `ip link`, and set the one up that faces the clients")
	}
	return names
}

func (d *doctor) inspectInterface(name string) {
	device, err := clientDevice(d.ns, name)
	if err != nil {
		d.interfaceProblem(name, err)
		return
	}
	a := device.Attrs()
	if a.Flags&net.FlagUp == 0 {
		d.warn(name, "is down: no packet comes in", "ip link set dev "+name+" up")
	} else {
		d.ok(name, "Ethernet (%s), up, MTU %d", device.Type(), a.MTU)
	}
	d.heldBy(name)
	// TC is on every interface; what else could be is no fault.
	for _, mode := range Modes {
		subject := name + " " + string(mode)
		err := d.o.checkInterface(d.ns, name, mode)
		switch {
		case d.hidden(subject, err):
		case err != nil && mode == ModeTC:
			d.interfaceProblem(subject, err)
		case err != nil:
			p := asProblem(err)
			d.warn(subject, p.What, p.Remedy)
		case mode == ModeTC:
			d.ok(subject, "works")
		default:
			d.ok(subject, "nothing is in the way; the driver has the last word")
		}
	}
	d.others(name, device)
}

// interfaceProblem is fatal for an interface that somebody named.
func (d *doctor) interfaceProblem(subject string, err error) {
	p := asProblem(err)
	p.Warning = p.Warning || !d.named
	d.problem(subject, p)
}

// heldBy says which instance has an interface.
func (d *doctor) heldBy(name string) {
	// A daemon's lock tells it to everybody.
	locked, err := instancesIn(runDir, d.ns.suffix, ".lock")
	if err != nil {
		d.warn(name+" instance", fmt.Sprintf("not known: %v", err), "run as root")
	}
	for _, instance := range locked {
		path := lockPath(d.ns, instance)
		if has := readOwner(path); isHeld(path) && slices.Contains(has.interfaces, name) {
			d.interfaceProblem(name+" instance", Problem{
				What:   fmt.Sprintf("%s has it (pid %d)", instance, has.pid),
				Remedy: "none if it shall; another one can only have it after snilb detach " + name,
			})
			return
		}
	}
	dead, err := holder(d.ns, name)
	switch {
	case d.hidden(name+" instance", err):
	case err != nil:
		d.warn(name+" instance", fmt.Sprintf("not known: %v", err), "run as root")
	case dead != "":
		d.interfaceProblem(name+" instance", Problem{
			What:    dead + " has it, whose daemon is dead",
			Remedy:  fmt.Sprintf("start it under that name, or remove it: snilb detach --all --name %s", dead),
			Warning: dead == DefaultName,
		})
	default:
		d.ok(name+" instance", "none has it")
	}
}

// others says which programs are on the hook beside ours.
func (d *doctor) others(name string, device netlink.Link) {
	subject := name + " other programs"
	names, err := otherPrograms(d.ns, device)
	switch {
	case d.hidden(subject, err):
	case err != nil:
		d.warn(subject, fmt.Sprintf("not known: %v", err), "run as root")
	case names == nil:
		d.ok(subject, "none")
	default:
		d.warn(subject, strings.Join(names, ", "), "snilb goes in front of them, and they do not see what it takes; behind them: --order last")
	}
}

// otherPrograms lists what is on an interface's ingress that is not ours, in the order it runs.
func otherPrograms(ns *namespace, device netlink.Link) ([]string, error) {
	var names []string
	index := device.Attrs().Index
	ours, err := ourLinks(ns, index)
	if err != nil {
		return nil, err
	}
	var programs []link.AttachedProgram
	err = ns.do(func() (err error) {
		programs, _, err = queryTCX(index)
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, p := range programs {
		if id, ok := p.LinkID(); !ok || !slices.Contains(ours, id) {
			names = append(names, "tcx "+describeProgram(p.ID))
		}
	}
	filters, err := listFilters(ns, index, ingress)
	if err != nil {
		return nil, err
	}
	ourFilters, err := instanceFilters(ns, index, "")
	if err != nil {
		return nil, err
	}
	for _, f := range filters {
		priority := f.Attrs().Priority
		if slices.ContainsFunc(ourFilters, func(our *netlink.BpfFilter) bool { return our.Priority == priority }) {
			continue
		}
		name := f.Type()
		if b, ok := f.(*netlink.BpfFilter); ok {
			name = b.Name
		}
		names = append(names, fmt.Sprintf("clsact filter %s (priority %d)", name, priority))
	}
	return names, nil
}

// ourLinks lists the ids of all instances' links on an interface.
func ourLinks(ns *namespace, index int) ([]link.ID, error) {
	pins, err := filepath.Glob(filepath.Join(stateDir, "*"+ns.suffix, "links", "*"))
	if err != nil {
		return nil, err
	}
	if _, err := os.ReadDir(stateDir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list instances: %w", err) // which Glob is silent about
	}
	var ids []link.ID
	for _, pin := range pins {
		l, err := link.LoadPinnedLink(pin, nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue // since it was listed
		}
		if err != nil {
			return nil, fmt.Errorf("open pinned link %s: %w", pin, err)
		}
		info, err := l.Info()
		if err := errors.Join(err, l.Close()); err != nil {
			return nil, fmt.Errorf("ask pinned link %s: %w", pin, err)
		}
		if tcx := info.TCX(); tcx != nil && tcx.Ifindex == uint32(index) {
			ids = append(ids, info.ID)
		}
	}
	return ids, nil
}
