// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Without it the library drops the text with which a driver says why it refuses.
var _ = func() struct{} { nl.EnableErrorMessageReporting = true; return struct{}{} }()

// attachXDP puts a program into the one slot that an interface has for XDP. Its errors
// are Problems: another mode is never taken instead.
func (i *Instance) attachXDP(a *attachment, device netlink.Link) (hook, error) {
	flags := link.XDPDriverMode
	if a.mode == ModeXDPGeneric {
		flags = link.XDPGenericMode
	}
	l, err := link.AttachXDP(link.XDPOptions{Program: a.prog, Interface: a.ifindex, Flags: flags})
	if err != nil {
		return nil, refusedXDP(i.ns, a, device, err)
	}
	return &linkHook{link: l, name: "xdp"}, nil
}

// refusedXDP makes a Problem of an error of AttachXDP.
func refusedXDP(ns *namespace, a *attachment, device netlink.Link, err error) error {
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) {
		return slotTaken(ns, device)
	}
	if said := askDriver(device, a.prog, a.mode); said != nil {
		err = said
	}
	return Problem{
		What:   fmt.Sprintf("interface %s refuses mode %s: %v", a.iface, a.mode, err),
		Remedy: remedyFor(a.iface, a.mode, err),
	}
}

// askDriver tries once more by netlink: a link tells the error's number only, netlink the
// driver's own words. nil if now it does not refuse.
func askDriver(device netlink.Link, prog *ebpf.Program, mode Mode) error {
	flags := nl.XDP_FLAGS_DRV_MODE
	if mode == ModeXDPGeneric {
		flags = nl.XDP_FLAGS_SKB_MODE
	}
	err := netlink.LinkSetXdpFdWithFlags(device, prog.FD(), flags|nl.XDP_FLAGS_UPDATE_IF_NOEXIST)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetXdpFdWithFlags(device, -1, flags); err != nil {
		return fmt.Errorf("take the program off again: %w", err)
	}
	return nil
}

// remedyFor finds what drivers mean by their words, which are each driver's own.
func remedyFor(iface string, mode Mode, err error) string {
	otherwise := "use tc for it"
	if mode == ModeXDP {
		otherwise = "use xdp-generic or tc for it"
	}
	said := strings.ToLower(err.Error())
	for _, known := range []struct{ word, remedy string }{
		{"lro", "ethtool -K " + iface + " lro off"},
		{"gro_hw", "ethtool -K " + iface + " rx-gro-hw off"},
		{"mtu", "lower it: ip link set dev " + iface + " mtu 1500"},
		{"too large", "lower the MTU: ip link set dev " + iface + " mtu 1500"},
		{"queue", "change how many it has: ethtool -L " + iface + ", see ethtool -l " + iface},
		{"channel", "change how many it has: ethtool -L " + iface + ", see ethtool -l " + iface},
	} {
		if strings.Contains(said, known.word) {
			return known.remedy + "; or " + otherwise
		}
	}
	return otherwise
}

// checkXDP looks whether an interface can have XDP, as far as that can be known before
// it is tried. Its errors are Problems.
func (o *Options) checkXDP(ns *namespace, device netlink.Link, mode Mode) error {
	if x := device.Attrs().Xdp; x != nil && x.Attached {
		// What a dead daemon of this name left is taken over, also if the interface had another name then.
		if holder, err := linkHolder(ns, device.Attrs().Index, RoleXDP); err != nil || holder != o.Name {
			return errors.Join(err, slotTaken(ns, device))
		}
	}
	if mode != ModeXDP {
		return nil
	}
	name := device.Attrs().Name
	flags, err := offloads(ns, name)
	if err != nil {
		return fmt.Errorf("ask for the offloads of %s: %w", name, err)
	}
	links, err := ns.links()
	if err != nil {
		return err
	}
	if hidesTags(device, links, flags) {
		return Problem{
			What:   "interface " + name + " takes VLAN tags off before XDP in the driver sees them, and there are VLANs on it",
			Remedy: "ethtool -K " + name + " rxvlan off; or use tc for it",
		}
	}
	if flags&ethFlagLRO != 0 {
		return Problem{
			What:   "interface " + name + " merges packets itself (LRO), which XDP in the driver cannot have",
			Remedy: "ethtool -K " + name + " lro off; or use xdp-generic or tc for it",
		}
	}
	features, known, err := o.xdpFeatures(ns, device.Attrs().Index)
	if err != nil || !known {
		return err
	}
	return checkFeatures(ns, device, features)
}

// checkFeatures looks whether the driver can do what the program returns. A veth has no
// features at all when its peer has more queues than it: attaching tells that better.
func checkFeatures(ns *namespace, device netlink.Link, features uint64) error {
	name, isVeth := device.Attrs().Name, device.Type() == "veth"
	if features&featureBasic == 0 && !isVeth {
		return Problem{
			What:   "the driver of interface " + name + " has no XDP of its own",
			Remedy: "use xdp-generic or tc for it",
		}
	}
	if !isVeth || features&featureBasic == 0 || features&featureXmit != 0 {
		return nil
	}
	peer := "PEER"
	if at := device.Attrs(); at.NetNsID < 0 {
		if d, err := ns.LinkByIndex(at.ParentIndex); err == nil {
			peer = d.Attrs().Name
		}
	}
	return Problem{
		What:   "the other end of veth " + name + " cannot receive what XDP sends",
		Remedy: "on its peer: ethtool -K " + peer + " gro on; or use xdp-generic or tc for it",
	}
}

// slotTaken says who has the XDP slot of an interface.
func slotTaken(ns *namespace, device netlink.Link) error {
	name := device.Attrs().Name
	holder, err := linkHolder(ns, device.Attrs().Index, RoleXDP)
	if err == nil && holder != "" {
		return Problem{
			What:   fmt.Sprintf("XDP on interface %s is taken by snilb instance %s", name, holder),
			Remedy: "remove that one first: snilb detach --all --name " + holder + "; or use tc for it",
		}
	}
	// Looked up again: it may have been taken since.
	by := "a program"
	if now, err := ns.LinkByIndex(device.Attrs().Index); err == nil && now.Attrs().Xdp != nil {
		by = describeProgram(ebpf.ProgramID(now.Attrs().Xdp.ProgId))
	}
	return Problem{
		What:   fmt.Sprintf("XDP on interface %s is taken by %s", name, by),
		Remedy: fmt.Sprintf("stop what put it there, or take it off: ip link set dev %s xdp off; or use tc for it", name),
	}
}

// describeProgram names a program as bpftool lists it. 0 is how the kernel says several.
func describeProgram(id ebpf.ProgramID) string {
	if id == 0 {
		return "several programs"
	}
	name := ""
	if prog, err := ebpf.NewProgramFromID(id); err == nil {
		if info, err := prog.Info(); err == nil {
			name = " " + info.Name
		}
		_ = prog.Close() // only read
	}
	return fmt.Sprintf("program%s (id %d)", name, id)
}

// warnOfOldKernel says what XDP does less, and what may go wrong, on a kernel that does
// not tell what drivers can do.
func (i *Instance) warnOfOldKernel() {
	if !i.opts.usesNative() {
		return
	}
	_, known, err := i.opts.xdpFeatures(i.ns, i.tap.index)
	if err != nil || known {
		return
	}
	sends := "bound connections are left to TC"
	if sole := i.opts.soleXDP(); sole != "" {
		sends = "connections bound for others than " + sole + " are left to TC"
	}
	i.log.Warn("this kernel does not tell by which interfaces XDP can send (that came with Linux 6.3): " + sends +
		"; on a veth, its peer must have GRO on (ethtool -K PEER gro on) or nothing that XDP answers arrives")
}
