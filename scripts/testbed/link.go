// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// basics sets what every namespace needs before it gets interfaces: loopback up, and nothing that makes the first packets
// wait or take a way of their own.
func (ns *NS) basics() error {
	for key, value := range map[string]string{
		"ipv4/conf/all/rp_filter":                             "0",
		"ipv4/conf/default/rp_filter":                         "0",
		"ipv6/conf/all/accept_dad":                            "0",
		"ipv6/conf/default/accept_dad":                        "0",
		"ipv6/conf/default/router_solicitations":              "0",
		"ipv6/conf/default/accept_ra":                         "0",
		"ipv4/tcp_mtu_probing":                                "0",
		"ipv4/neigh/default/gc_stale_time":                    "3600",
		"ipv4/conf/default/send_redirects":                    "0",
		"ipv4/conf/all/send_redirects":                        "0",
		"ipv6/conf/default/force_mld_version":                 "2",
		"ipv6/conf/default/mldv2_unsolicited_report_interval": "60000",
	} {
		if err := ns.Sysctl(key, value); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("sysctl in %s: %w", ns.Name, err)
		}
	}
	return ns.setUp("lo", nil)
}

// veth joins a device of one namespace to a device of another.
func veth(a *NS, aDev string, z *NS, zDev string, mtu int) error {
	h, err := a.Netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = aDev, mtu
	link := &netlink.Veth{LinkAttrs: attrs, PeerName: zDev, PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(int(z.fd))}
	if err := h.LinkAdd(link); err != nil {
		return fmt.Errorf("add veth %s - %s: %w", aDev, zDev, err)
	}
	return nil
}

// vlanName is how a device's VLAN is called; VLAN 0 is the device itself.
func vlanName(dev string, vlan int) string {
	if vlan == 0 {
		return dev
	}
	return fmt.Sprintf("%s.%d", dev, vlan)
}

// addVLAN turns a device on and adds one of its VLANs.
func (ns *NS) addVLAN(dev string, vlan int) error {
	if err := ns.setUp(dev); err != nil {
		return err
	}
	if err := ns.Do(func() error { return tagInFrame(dev) }); err != nil {
		return err
	}
	return ns.withLink(dev, func(h *netlink.Handle, below netlink.Link) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.ParentIndex = vlanName(dev, vlan), below.Attrs().Index
		if err := h.LinkAdd(&netlink.Vlan{LinkAttrs: attrs, VlanId: vlan}); err != nil {
			return fmt.Errorf("add VLAN %d to %s: %w", vlan, dev, err)
		}
		return nil
	})
}

// tagInFrame is ethtool -K DEV txvlan off: otherwise a veth hands the tag over beside the frame, where XDP cannot see it.
func tagInFrame(dev string) error {
	const txVLAN = 1 << 7 // ETH_FLAG_TXVLAN of <linux/ethtool.h>
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	flags, err := ethtool(fd, dev, unix.ETHTOOL_GFLAGS, 0)
	if err != nil {
		return fmt.Errorf("read the flags of %s: %w", dev, err)
	}
	if _, err := ethtool(fd, dev, unix.ETHTOOL_SFLAGS, flags&^txVLAN); err != nil {
		return fmt.Errorf("keep VLAN tags of %s in the frame: %w", dev, err)
	}
	return nil
}

// setUp gives a device its addresses and turns it on.
func (ns *NS) setUp(dev string, addrs ...[]netip.Prefix) error {
	return ns.withLink(dev, func(h *netlink.Handle, link netlink.Link) error {
		for _, group := range addrs {
			for _, p := range group {
				// Without NODAD an IPv6 address cannot be used for the first second.
				a := &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NODAD}
				if err := h.AddrAdd(link, a); err != nil {
					return fmt.Errorf("add %s to %s: %w", p, dev, err)
				}
			}
		}
		return h.LinkSetUp(link)
	})
}

func (ns *NS) bridge(dev string, mtu int) error {
	h, err := ns.Netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = dev, mtu
	snooping := false // a bridge that learns multicast groups first would swallow neighbour discovery
	if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
		return fmt.Errorf("add bridge: %w", err)
	}
	return ns.setUp(dev)
}

func (ns *NS) enslave(dev, bridge string) error {
	return ns.withLink(bridge, func(h *netlink.Handle, br netlink.Link) error {
		link, err := h.LinkByName(dev)
		if err != nil {
			return err
		}
		return h.LinkSetMasterByIndex(link, br.Attrs().Index)
	})
}

// route sets the route to a prefix, in place of an older one.
func (ns *NS) route(dev string, to netip.Prefix, via netip.Addr) error {
	return ns.withLink(dev, func(h *netlink.Handle, link netlink.Link) error {
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(to), Gw: via.AsSlice(), Priority: 1}
		if err := h.RouteReplace(r); err != nil {
			return fmt.Errorf("route %s via %s: %w", to, via, err)
		}
		return nil
	})
}

func (ns *NS) neighbour(dev string, addr netip.Addr, mac net.HardwareAddr) error {
	return ns.withLink(dev, func(h *netlink.Handle, link netlink.Link) error {
		n := &netlink.Neigh{
			LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT,
			IP: addr.AsSlice(), HardwareAddr: mac,
		}
		if err := h.NeighSet(n); err != nil {
			return fmt.Errorf("neighbour %s: %w", addr, err)
		}
		return nil
	})
}

func (ns *NS) mac(dev string) (mac net.HardwareAddr, err error) {
	err = ns.withLink(dev, func(_ *netlink.Handle, link netlink.Link) error {
		mac = link.Attrs().HardwareAddr
		return nil
	})
	return mac, err
}

// Index is the number of a device.
func (ns *NS) Index(dev string) (index int, err error) {
	err = ns.withLink(dev, func(_ *netlink.Handle, link netlink.Link) error {
		index = link.Attrs().Index
		return nil
	})
	return index, err
}

// SetLink turns a device on or off, to act out a cable that is pulled.
func (ns *NS) SetLink(dev string, up bool) error {
	return ns.withLink(dev, func(h *netlink.Handle, link netlink.Link) error {
		if up {
			return h.LinkSetUp(link)
		}
		return h.LinkSetDown(link)
	})
}

// SetMTU changes the MTU of one end of a link, which the other end does not hear of.
func (ns *NS) SetMTU(dev string, mtu int) error {
	return ns.withLink(dev, func(h *netlink.Handle, link netlink.Link) error { return h.LinkSetMTU(link, mtu) })
}

func (ns *NS) withLink(dev string, fn func(*netlink.Handle, netlink.Link) error) error {
	h, err := ns.Netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(dev)
	if err != nil {
		return fmt.Errorf("device %s in %s: %w", dev, ns.Name, err)
	}
	return fn(h, link)
}

// notUp lists the devices whose operational state is not up yet; a loopback device never has one.
func (ns *NS) notUp() (devs []string, err error) {
	h, err := ns.Netlink()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list devices in %s: %w", ns.Name, err)
	}
	for _, l := range links {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback == 0 && a.OperState != netlink.OperUp {
			devs = append(devs, ns.Name+"/"+a.Name)
		}
	}
	return devs, nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	addr := p.Addr()
	return &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(p.Bits(), addr.BitLen())}
}

// neverMerge lets a device have GRO on, which a peer with XDP asks for, and yet take every packet as it is.
func (ns *NS) neverMerge(dev string) error {
	return ns.withLink(dev, func(h *netlink.Handle, link netlink.Link) error {
		return errors.Join(h.LinkSetGROMaxSize(link, 1), h.LinkSetGROIPv4MaxSize(link, 1))
	})
}

// An Offload is something a network device may do in place of the stack.
type Offload uint32

// The offloads, by the ethtool command that sets them.
const (
	TSO        Offload = unix.ETHTOOL_STSO
	GSO        Offload = unix.ETHTOOL_SGSO
	GRO        Offload = unix.ETHTOOL_SGRO
	TxChecksum Offload = unix.ETHTOOL_STXCSUM
)

// Offload turns offloads of a device on or off, like ethtool -K.
func (ns *NS) Offload(dev string, on bool, which ...Offload) error {
	return ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		value := uint32(0)
		if on {
			value = 1
		}
		for _, o := range which {
			if _, err := ethtool(fd, dev, uint32(o), value); err != nil {
				return fmt.Errorf("set offload %#x of %s: %w", uint32(o), dev, err)
			}
		}
		return nil
	})
}

// ethtool is the SIOCETHTOOL ioctl with a struct ethtool_value; it returns what is in that afterwards.
func ethtool(fd int, dev string, cmd, data uint32) (uint32, error) {
	value := struct{ cmd, data uint32 }{cmd, data}
	var ifr struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte // struct ifreq is longer than what is used of it
	}
	copy(ifr.name[:unix.IFNAMSIZ-1], dev)
	ifr.data = unsafe.Pointer(&value)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&ifr)))
	if errno != 0 {
		return 0, errno
	}
	return value.data, nil
}
