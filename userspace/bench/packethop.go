// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ethernet finds an interface and sees that frames can be made for it.
func ethernet(name string) (*net.Interface, error) {
	device, err := net.InterfaceByName(name)
	if err != nil {
		return nil, fmt.Errorf("interface %q: %w", name, err)
	}
	if len(device.HardwareAddr) != 6 {
		return nil, fmt.Errorf("interface %s is not Ethernet: packets need one that is", name)
	}
	return device, nil
}

// mssOf is the MSS to announce: wanted, or what the interface's MTU leaves.
func mssOf(device *net.Interface, v6 bool, wanted int) (int, error) {
	most := device.MTU - header4 - headerTCP
	if v6 {
		most = device.MTU - header6 - headerTCP
	}
	if wanted == 0 {
		wanted = min(most, 65535-128)
	}
	if wanted < 88 || wanted > most {
		return 0, fmt.Errorf("an MSS of %d: %s takes 88 to %d", wanted, device.Name, most)
	}
	return wanted, nil
}

// resolve finds the way to an address by an interface, as the kernel would take it.
func resolve(ctx context.Context, device *net.Interface, to netip.Addr) (hop, error) {
	routes, err := netlink.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{OifIndex: device.Index})
	if err != nil || len(routes) == 0 {
		return hop{}, fmt.Errorf("no route to %v by %s (%w): see `ip route get %v oif %s`", to, device.Name, err, to, device.Name)
	}
	next := to
	if gateway, ok := netip.AddrFromSlice(routes[0].Gw); ok {
		next = gateway.Unmap()
	} else if via, ok := routes[0].Via.(*netlink.Via); ok {
		next, _ = netip.AddrFromSlice(via.Addr)
	}
	for try := range 100 {
		if mac, ok := neighbour(device, next); ok {
			var h hop
			copy(h[:6], mac)
			copy(h[6:], device.HardwareAddr)
			return h, nil
		}
		if try%25 == 0 {
			provoke(ctx, device, next)
		}
		select {
		case <-ctx.Done():
			return hop{}, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	return hop{}, fmt.Errorf("%v, by which %v is reached, does not answer on %s: see `ip neigh show dev %s`",
		next, to, device.Name, device.Name)
}

func neighbour(device *net.Interface, of netip.Addr) (net.HardwareAddr, bool) {
	family := unix.AF_INET
	if of.Is6() {
		family = unix.AF_INET6
	}
	known, err := netlink.NeighList(device.Index, family)
	if err != nil {
		return nil, false
	}
	for _, n := range known {
		ip, _ := netip.AddrFromSlice(n.IP)
		if ip.Unmap() == of && len(n.HardwareAddr) == 6 && n.State&(unix.NUD_FAILED|unix.NUD_INCOMPLETE) == 0 {
			return n.HardwareAddr, true
		}
	}
	return nil, false
}

// provoke makes the kernel ask for a neighbour: it has to when it wants to send there. What it sends is for the port of the
// discard protocol.
func provoke(ctx context.Context, device *net.Interface, to netip.Addr) {
	bind := func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = unix.BindToDevice(int(fd), device.Name) })
	}
	dialer := net.Dialer{Control: bind}
	if to.IsLinkLocalUnicast() {
		to = to.WithZone(device.Name)
	}
	conn, err := dialer.DialContext(ctx, "udp", netip.AddrPortFrom(to, 9).String())
	if err != nil {
		return // the answer that does not come is what is reported
	}
	_, _ = conn.Write([]byte{0})
	_ = conn.Close()
}
