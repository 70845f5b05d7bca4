// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"snilb/maps"
)

// What <linux/netdev.h> says of the generic netlink family that tells what a driver can
// do for XDP (Linux 6.3).
const (
	netdevFamily  = "netdev"
	netdevVersion = 1
	netdevGroup   = "mgmt" // hears of changes

	netdevDevGet       = 1 // NETDEV_CMD_DEV_GET
	netdevIfindex      = 1 // NETDEV_A_DEV_IFINDEX
	netdevXDPFeatures  = 3 // NETDEV_A_DEV_XDP_FEATURES
	featureBasic       = 1 << 0
	featureXmit        = 1 << 2 // takes what is redirected to it
	featureXmitBuffers = 1 << 6 // also in several buffers
)

// xdpFeatures asks what a driver can do. known is false on a kernel that does not tell.
func (o *Options) xdpFeatures(ns *namespace, ifindex int) (features uint64, known bool, err error) {
	if o.hideDrivers {
		return 0, false, nil
	}
	var messages [][]byte
	err = ns.do(func() error {
		family, err := netlink.GenlFamilyGet(netdevFamily)
		if err != nil {
			return err
		}
		known = true
		req := nl.NewNetlinkRequest(int(family.ID), 0)
		// nl.Genlmsg leaves the last two bytes as they were in memory, which the kernel refuses.
		header := []byte{netdevDevGet, netdevVersion, 0, 0}
		req.AddRawData(append(header, nl.NewRtAttr(netdevIfindex, nl.Uint32Attr(uint32(ifindex))).Serialize()...))
		messages, err = req.Execute(unix.NETLINK_GENERIC, 0)
		return err
	})
	if !known && errors.Is(err, unix.ENOENT) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("ask what interface %d can do for XDP: %w", ifindex, err)
	}
	for _, m := range messages {
		attrs, err := nl.ParseRouteAttr(m[nl.SizeofGenlmsg:])
		if err != nil {
			return 0, false, fmt.Errorf("read what interface %d can do for XDP: %w", ifindex, err)
		}
		for _, a := range attrs {
			if a.Attr.Type == netdevXDPFeatures && len(a.Value) == 8 {
				features = binary.NativeEndian.Uint64(a.Value)
			}
		}
	}
	return features, true, nil
}

// subscribeToDrivers hears when what drivers can do changes: that of a veth does with its
// peer. Returns nil on a kernel that does not tell.
func subscribeToDrivers(ns *namespace) (changes, error) {
	var socket *nl.NetlinkSocket
	err := ns.do(func() error {
		family, err := netlink.GenlFamilyGet(netdevFamily)
		if err != nil {
			return err
		}
		group := slices.IndexFunc(family.Groups, func(g netlink.GenlMulticastGroup) bool { return g.Name == netdevGroup })
		if group < 0 {
			return fmt.Errorf("generic netlink family %s has no group %s", netdevFamily, netdevGroup)
		}
		if socket, err = nl.Subscribe(unix.NETLINK_GENERIC); err != nil {
			return err
		}
		return unix.SetsockoptInt(socket.GetFd(), unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, int(family.Groups[group].ID))
	})
	if err != nil {
		if socket != nil {
			socket.Close()
		}
		if errors.Is(err, unix.ENOENT) {
			return nil, nil
		}
		return nil, fmt.Errorf("subscribe to changes of drivers: %w", err)
	}
	return socket, nil
}

// Of <linux/ethtool.h>.
const (
	ethFlagRXVLAN = 1 << 8  // the device takes VLAN tags off
	ethFlagLRO    = 1 << 15 // it merges packets
)

// offloads returns what a device does to packets before XDP sees them, as ethFlag bits.
func offloads(ns *namespace, iface string) (flags uint32, err error) {
	err = ns.do(func() (err error) {
		flags, err = ethtool(iface, unix.ETHTOOL_GFLAGS, 0)
		return err
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return 0, nil
	}
	return flags, err
}

// hidesTags reports whether XDP would take packets of a VLAN for untagged ones, and answer
// them so. Of a veth its other end decides that, which cannot be asked.
func hidesTags(device netlink.Link, links []netlink.Link, flags uint32) bool {
	if flags&ethFlagRXVLAN == 0 || device.Type() == "veth" {
		return false
	}
	return slices.ContainsFunc(links, func(l netlink.Link) bool {
		_, isVLAN := l.(*netlink.Vlan)
		return isVLAN && l.Attrs().ParentIndex == device.Attrs().Index
	})
}

// ethtool is the SIOCETHTOOL ioctl with a struct ethtool_value, in the calling thread's
// network namespace.
func ethtool(iface string, command, data uint32) (uint32, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	value := struct{ command, data uint32 }{command, data}
	var request struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte // struct ifreq is longer than what is used of it
	}
	copy(request.name[:unix.IFNAMSIZ-1], iface)
	request.data = unsafe.Pointer(&value)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	if errno != 0 {
		return 0, errno
	}
	return value.data, nil
}

// xdpOutput is how XDP sends by an interface; the zero value: not at all.
type xdpOutput struct {
	ifindex           int  // the interface, or the one below a VLAN
	buffers           bool // takes frames in several buffers
	address           [6]byte
	vlanProto, vlanID uint16 // in network order; no tag: 0
}

// xdpSender decides by which interfaces XDP can send.
type xdpSender struct {
	native   bool   // the rule for mixed modes is the stricter one
	sole     string // Options.soleXDP
	link     func(ifindex int) (netlink.Link, error)
	features func(ifindex int) (features uint64, known bool, err error)
}

func (i *Instance) newSender() *xdpSender {
	return &xdpSender{
		native: i.opts.usesNative(), sole: i.opts.soleXDP(),
		link: i.ns.LinkByIndex,
		features: func(ifindex int) (uint64, bool, error) {
			return i.opts.xdpFeatures(i.ns, ifindex)
		},
	}
}

// output returns how to send by a route's interface.
func (s *xdpSender) output(device netlink.Link) (xdpOutput, error) {
	const working = unix.IFF_UP | unix.IFF_LOWER_UP
	a := device.Attrs()
	if !isEthernet(device) || a.RawFlags&working != working {
		return xdpOutput{}, nil
	}
	out := xdpOutput{ifindex: a.Index, address: [6]byte(a.HardwareAddr)}
	if vlan, ok := device.(*netlink.Vlan); ok {
		if a.NetNsID >= 0 {
			return xdpOutput{}, nil // the one below is in another network namespace
		}
		below, err := s.link(a.ParentIndex)
		if err != nil {
			return xdpOutput{}, fmt.Errorf("find the interface below %s: %w", a.Name, err)
		}
		device = below
		out.ifindex = below.Attrs().Index
		out.vlanProto, out.vlanID = maps.Port(uint16(vlan.VlanProtocol)), maps.Port(uint16(vlan.VlanId))
	}
	if !s.native {
		out.buffers = true // an ordinary packet by then
		return out, nil
	}
	features, known, err := s.features(out.ifindex)
	if err != nil {
		return xdpOutput{}, err
	}
	// Back by the way it came in (XDP_TX), only a veth asks more of the device than that it has XDP.
	backOnly := s.sole == device.Attrs().Name && device.Type() != "veth"
	if (!known || features&featureXmit == 0) && !backOnly {
		return xdpOutput{}, nil
	}
	out.buffers = known && features&featureXmitBuffers != 0
	return out, nil
}
