// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Problem is something about this machine that is in the way.
type Problem struct {
	What, Remedy string
	// Warning: it may do harm, but Load goes on.
	Warning bool

	absent bool // it is about an interface that is not there
}

func (p Problem) Error() string {
	return p.What + "; " + p.Remedy
}

// The oldest kernel the programs are made for (Debian 12).
const minMajor, minMinor = 6, 1

// Preflight looks whether an instance can be loaded here, and changes nothing.
// Interfaces may be empty.
func Preflight(o Options) []Problem {
	o = o.withDefaults()
	var problems []Problem
	ns, err := currentNamespace()
	if err != nil {
		return append(checkKernel(), Problem{What: err.Error(), Remedy: "run as root"})
	}
	defer ns.close() //nolint:errcheck // only read
	if len(o.Interfaces) > 0 {
		if err := o.validate(); err != nil {
			problems = append(problems, Problem{What: err.Error(), Remedy: "mend the options"})
		}
	}
	return append(problems, preflight(ns, &o)...)
}

// check is a question to this machine that Load and Doctor both ask.
type check struct {
	subject string
	look    func() []Problem
	fine    func() string // what there is, if look finds no problem
}

// machineChecks are those that concern no interface alone.
func machineChecks(ns *namespace, o *Options) []check {
	return []check{
		{"kernel", checkKernel, func() string { return "Linux " + kernelRelease() }},
		{"type information", checkBTF, func() string { return "BTF of the kernel is in " + vmlinuxBTF }},
		{"capabilities", checkCapabilities, describeCapabilities},
		{"bpffs", checkBPFFS, describeBPFFS},
		{"TAP device", checkTun, func() string { return tunDevice + " can be opened" }},
		{"JIT", checkJIT, func() string { return "programs are compiled, as far as can be seen" }},
		{"source ports", func() []Problem { return checkPorts(ns, o.SourcePortFirst, o.SourcePortLast) }, func() string {
			return fmt.Sprintf("%d-%d are free for connections to backends", o.SourcePortFirst, o.SourcePortLast)
		}},
	}
}

func preflight(ns *namespace, o *Options) []Problem {
	var problems []Problem
	for _, c := range machineChecks(ns, o) {
		problems = append(problems, c.look()...)
	}
	for _, i := range o.Interfaces {
		if err := o.checkInterface(ns, i.Name, i.Mode); err != nil {
			p := asProblem(err)
			if isAbsent(err) && hasLeft(ns, o.Name) {
				p = p.away()
			}
			problems = append(problems, p)
		}
	}
	return problems
}

// hasLeft reports whether a daemon of that name would go on with what an earlier one left.
func hasLeft(ns *namespace, name string) bool {
	_, err := os.Stat(filepath.Join(stateDir, name+ns.suffix))
	return err == nil
}

// away is a missing interface to a daemon that goes on: to let the connections by the
// others go is worse, and one that runs already waits for it too.
func (p Problem) away() Problem {
	p.Warning, p.Remedy = true, "none if it comes back: it is attached then; else "+p.Remedy
	return p
}

// checkInterface looks whether an interface can be attached in a mode. Its errors are
// Problems, but for what could not be asked.
func (o *Options) checkInterface(ns *namespace, name string, mode Mode) error {
	device, err := clientDevice(ns, name)
	if err == nil && mode != ModeTC {
		err = o.checkXDP(ns, device, mode)
	}
	return err
}

// fatal joins the problems that Load cannot live with.
func fatal(problems []Problem) error {
	var errs []error
	for _, p := range problems {
		if !p.Warning {
			errs = append(errs, p)
		}
	}
	return errors.Join(errs...)
}

func asProblem(err error) Problem {
	var p Problem
	if errors.As(err, &p) {
		return p
	}
	return Problem{What: err.Error(), Remedy: "see above"}
}

// isAbsent reports whether an error of clientDevice says that there is no such interface.
func isAbsent(err error) bool {
	var p Problem
	return errors.As(err, &p) && p.absent
}

func checkKernel() []Problem { return checkRelease(kernelRelease()) }

func kernelRelease() string {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return "of unknown version"
	}
	return unix.ByteSliceToString(uts.Release[:])
}

const vmlinuxBTF = "/sys/kernel/btf/vmlinux"

func checkBTF() []Problem {
	if _, err := os.Stat(vmlinuxBTF); err == nil {
		return nil
	}
	return []Problem{{
		What:   "the kernel has no type information (" + vmlinuxBTF + ")",
		Remedy: "run a kernel built with CONFIG_DEBUG_INFO_BTF=y, and mount /sys",
	}}
}

func checkRelease(release string) []Problem {
	major, minor, ok := parseRelease(release)
	if !ok || major > minMajor || major == minMajor && minor >= minMinor {
		return nil
	}
	return []Problem{{
		What:   "kernel " + release + " is too old",
		Remedy: fmt.Sprintf("run Linux %d.%d or newer", minMajor, minMinor),
	}}
}

func parseRelease(release string) (major, minor int, ok bool) {
	n, err := fmt.Sscanf(release, "%d.%d", &major, &minor)
	return major, minor, err == nil && n == 2
}

func checkCapabilities() []Problem {
	have, err := getCapabilities()
	if err != nil {
		return []Problem{{What: err.Error(), Remedy: "run as root"}}
	}
	wanted := capNetAdmin
	if have.effective&capSysAdmin == 0 {
		wanted |= capBPF | capPerfmon
	}
	missing := capNames(wanted &^ have.effective)
	if have.effective&capSysAdmin == 0 && !hasBPFFS() {
		missing = append(missing, "CAP_SYS_ADMIN (to mount bpffs)")
	}
	if missing == nil {
		return nil
	}
	return []Problem{{
		What:   "this process lacks " + strings.Join(missing, ", "),
		Remedy: "run as root, or give the service these capabilities (AmbientCapabilities= in systemd)",
	}}
}

func describeCapabilities() string {
	have, err := getCapabilities()
	if err != nil {
		return err.Error()
	}
	return "this process has " + strings.Join(capNames(have.effective), ", ")
}

func checkBPFFS() []Problem {
	if _, err := os.Stat(bpffs); err != nil {
		return []Problem{{
			What:   fmt.Sprintf("there is no place for bpffs: %v", err),
			Remedy: "mount /sys: mount -t sysfs sysfs /sys",
		}}
	}
	return nil
}

func describeBPFFS() string {
	if hasBPFFS() {
		return "mounted on " + bpffs
	}
	return "not mounted: attach mounts it on " + bpffs
}

func checkTun() []Problem {
	file, err := os.OpenFile(tunDevice, os.O_RDWR, 0)
	if err != nil {
		remedy := "modprobe tun; in a container pass the device in: --device " + tunDevice
		if errors.Is(err, fs.ErrPermission) {
			remedy = "run as root; " + remedy
		}
		return []Problem{{What: fmt.Sprintf("no TAP device can be made: %v", err), Remedy: remedy}}
	}
	file.Close() //nolint:errcheck // nothing was written
	return nil
}

// sysctlJIT is shown in the machine's first network namespace only.
const sysctlJIT = "/proc/sys/net/core/bpf_jit_enable"

func checkJIT() []Problem {
	value, _ := readLine(sysctlJIT) // what cannot be read is not known to be off
	return judgeJIT(value)
}

func judgeJIT(value string) []Problem {
	if value != "0" {
		return nil
	}
	return []Problem{{
		What:    "the kernel interprets BPF programs, which takes many times as long",
		Remedy:  "sysctl -w net.core.bpf_jit_enable=1",
		Warning: true,
	}}
}

// clientDevice looks an interface up and refuses what no client packet can come
// in by, or not as the programs need it. Its errors are Problems.
func clientDevice(ns *namespace, name string) (netlink.Link, error) {
	device, err := ns.LinkByName(name)
	if err != nil {
		return nil, Problem{
			What: fmt.Sprintf("interface %s: %v", name, err), Remedy: "see `ip link` for the names of this network namespace",
			absent: isGone(err),
		}
	}
	if device.Attrs().Flags&net.FlagLoopback != 0 {
		return nil, Problem{
			What:   "interface " + name + " is the loopback device, where no client's packet comes in",
			Remedy: "attach the interface that faces the clients",
		}
	}
	if !isEthernet(device) {
		return nil, notEthernet(device)
	}
	return device, nil
}

func notEthernet(device netlink.Link) error {
	return Problem{
		What: fmt.Sprintf("interface %s carries no Ethernet frames (%s, %s)", device.Attrs().Name, device.Type(),
			device.Attrs().EncapType),
		Remedy: "use an Ethernet-like one: a NIC, bond, VLAN, bridge, veth or macvlan",
	}
}

const (
	sysctlPortRange = "/proc/sys/net/ipv4/ip_local_port_range"
	sysctlReserved  = "/proc/sys/net/ipv4/ip_local_reserved_ports"

	nodePortFirst, nodePortLast = 30000, 32767
)

// checkPorts looks whether our source ports could also be some socket's: both
// would speak to one backend by one tuple, and the kernel programs would take the
// socket's packets.
func checkPorts(ns *namespace, first, last uint16) []Problem {
	var problems []Problem
	var ephemeral, reserved string
	err := ns.do(func() error {
		var errs [2]error
		ephemeral, errs[0] = readLine(sysctlPortRange)
		reserved, errs[1] = readLine(sysctlReserved)
		return errors.Join(errs[:]...)
	})
	if err != nil {
		return []Problem{{What: fmt.Sprintf("read the local port range: %v", err), Remedy: "mount /proc", Warning: true}}
	}
	low, high, ok := parsePortRange(ephemeral)
	if ok && first <= high && last >= low && !coversPorts(reserved, max(first, low), min(last, high)) {
		problems = append(problems, Problem{
			What: fmt.Sprintf("the source ports %d-%d overlap the ports %d-%d this node gives its own connections", first, last, low, high),
			Remedy: fmt.Sprintf("keep them apart: sysctl -w net.ipv4.ip_local_reserved_ports=%s",
				joinPorts(reserved, max(first, low), min(last, high))),
		})
	}
	if first <= nodePortLast && last >= nodePortFirst {
		problems = append(problems, Problem{
			What:    fmt.Sprintf("the source ports %d-%d overlap Kubernetes' NodePorts (%d-%d)", first, last, nodePortFirst, nodePortLast),
			Remedy:  "on a Kubernetes node choose others",
			Warning: true,
		})
	}
	return problems
}

func readLine(path string) (string, error) {
	text, err := os.ReadFile(path)
	return strings.TrimSpace(string(text)), err
}

func parsePortRange(text string) (low, high uint16, ok bool) {
	n, err := fmt.Sscan(text, &low, &high)
	return low, high, err == nil && n == 2
}

// coversPorts reports whether a list like "8080,9000-9100" has all of first to last.
func coversPorts(list string, first, last uint16) bool {
	ports := make(map[uint16]bool)
	scan := bufio.NewScanner(strings.NewReader(strings.ReplaceAll(list, ",", "\n")))
	for scan.Scan() {
		from, to, isRange := strings.Cut(scan.Text(), "-")
		low, err := strconv.ParseUint(from, 10, 16)
		high := low
		if err == nil && isRange {
			high, err = strconv.ParseUint(to, 10, 16)
		}
		if err != nil {
			continue // then it reserves nothing that we could rely on
		}
		for p := low; p <= high; p++ {
			ports[uint16(p)] = true
		}
	}
	for p := int(first); p <= int(last); p++ {
		if !ports[uint16(p)] {
			return false
		}
	}
	return true
}

func joinPorts(list string, first, last uint16) string {
	ours := fmt.Sprintf("%d-%d", first, last)
	if list == "" {
		return ours
	}
	return list + "," + ours
}

// CheckBackend looks whether this machine could reach a backend by snilb: there is
// a route, it is not this very node, and it leaves by an Ethernet interface.
// Returns an error that is ErrUnreachable or ErrLocal if that is the reason.
func CheckBackend(addr netip.AddrPort) error {
	ns, err := currentNamespace()
	if err != nil {
		return err
	}
	defer ns.close() //nolint:errcheck // only read
	r, err := lookupRoute(ns, addr.Addr().Unmap())
	if err != nil {
		return err
	}
	device, err := ns.LinkByIndex(r.ifindex)
	if err != nil {
		return fmt.Errorf("interface towards %v: %w", addr, err)
	}
	if !isEthernet(device) {
		return fmt.Errorf("backend %v: %w", addr, notEthernet(device))
	}
	return nil
}

// CheckSource reports whether this node has an address, so that what backends answer
// to it comes here.
func CheckSource(addr netip.Addr) error {
	ns, err := currentNamespace()
	if err != nil {
		return err
	}
	defer ns.close() //nolint:errcheck // only read
	if _, err := lookupRoute(ns, addr.Unmap()); !errors.Is(err, ErrLocal) {
		return fmt.Errorf("%v is no address of this node", addr)
	}
	return nil
}
