// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespace is the network namespace an instance belongs to. Its netlink handle is
// safe for concurrent use.
type namespace struct {
	*netlink.Handle
	fd netns.NsHandle
	// suffix tells its instances from those of other namespaces: "" for the machine's first.
	suffix string
}

// currentNamespace opens the calling thread's.
func currentNamespace() (_ *namespace, err error) {
	// Everything below must see one thread's namespace.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	n := &namespace{}
	if n.suffix, err = namespaceSuffix(); err != nil {
		return nil, err
	}
	if n.fd, err = netns.Get(); err != nil {
		return nil, fmt.Errorf("open the network namespace: %w", err)
	}
	if n.Handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, errors.Join(fmt.Errorf("open netlink: %w", err), n.fd.Close())
	}
	return n, nil
}

func (n *namespace) close() error {
	n.Close()
	return n.fd.Close()
}

// do runs f on a thread that is in the namespace: attaching, sysctls and sockets
// take the calling thread's, and a daemon's threads need not all be in one.
func (n *namespace) do(f func() error) (err error) {
	runtime.LockOSThread()
	here, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open the network namespace: %w", err)
	}
	if here.Equal(n.fd) {
		defer runtime.UnlockOSThread()
		return errors.Join(here.Close(), f())
	}
	if err := netns.Set(n.fd); err != nil {
		runtime.UnlockOSThread()
		return errors.Join(fmt.Errorf("enter the network namespace of the instance: %w", err), here.Close())
	}
	defer func() {
		back := netns.Set(here)
		if back == nil {
			runtime.UnlockOSThread()
		} // else the thread stays locked and ends with its goroutine
		err = errors.Join(err, back, here.Close())
	}()
	return f()
}

// globalSysctl is one of those that a kernel shows in its first network namespace
// only, as they are for the whole machine.
const globalSysctl = "/proc/sys/net/core/netdev_budget"

// namespaceSuffix is "" in the machine's first network namespace, else "@" and the
// namespace's cookie, which unlike its inode number is never used twice. To compare
// with the namespace of process 1 would want the right to trace it, which a service
// with few capabilities lacks and its operator has, so that they would disagree; and
// a container's process 1 is not the machine's, while its bpffs may be.
func namespaceSuffix() (string, error) {
	if _, err := os.Stat("/proc/sys/net"); err != nil {
		return "", fmt.Errorf("tell the network namespace: %w; mount /proc", err)
	}
	if _, err := os.Stat(globalSysctl); err == nil {
		return "", nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return "", fmt.Errorf("read the cookie of the network namespace: %w; it needs Linux 5.14", err)
	}
	return "@" + strconv.FormatUint(cookie, 10), nil
}

// dump repeats a netlink listing that a change cut short: half a list of addresses
// would take listeners away.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	for range 5 {
		all, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return nil, netlink.ErrDumpInterrupted
}

func (n *namespace) links() ([]netlink.Link, error) {
	all, err := dump(n.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	return all, nil
}

// isEthernet reports whether packets of the device begin with an Ethernet header,
// as the programs need it.
func isEthernet(device netlink.Link) bool {
	return device.Attrs().EncapType == "ether" && len(device.Attrs().HardwareAddr) == 6
}

func isGone(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound) || errors.Is(err, unix.ENODEV)
}
