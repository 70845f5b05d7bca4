// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	tunDevice = "/dev/net/tun"

	// The most a TAP device takes: 65535 without its Ethernet header.
	tapMTU = 65535 - 14
	// Nobody reads from the device, so what the stack sends there need not wait.
	tapQueueLength = 16
	// IN6_ADDR_GEN_MODE_NONE: no link-local address, so no router solicitations.
	noAddressMode = 1
)

// tap is the device by which the engine sends packets. It is persistent, because
// flows may be bound while no daemon runs and the link on it must stay alive.
type tap struct {
	name    string
	index   int
	queues  []*os.File
	adopted bool // an earlier daemon made it
}

func tapAlias(instance string) string {
	return "snilb " + instance
}

// createTap makes the device with one queue a worker, or opens as many of an earlier
// daemon's. What exists of it when an error is returned is in i.tap and removed by Close.
func (i *Instance) createTap() error {
	wanted, err := i.tapToOpen()
	if err != nil {
		return err
	}
	return i.ns.do(func() error {
		first, name, err := openQueue(wanted)
		if err != nil {
			return err
		}
		i.tap = &tap{name: name, queues: []*os.File{first}, adopted: name == wanted}
		device, err := i.ns.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find TAP device %s: %w", name, err)
		}
		i.tap.index = device.Attrs().Index
		// The alias before it is made persistent: a device that outlives us says whose it is.
		if err := i.ns.LinkSetAlias(device, tapAlias(i.opts.Name)); err != nil {
			return fmt.Errorf("set alias of %s: %w", name, err)
		}
		if err := unix.IoctlSetInt(int(first.Fd()), unix.TUNSETPERSIST, 1); err != nil {
			return fmt.Errorf("make %s persistent: %w", name, err)
		}
		for range i.opts.Workers - 1 {
			queue, _, err := openQueue(name)
			if err != nil {
				return err
			}
			i.tap.queues = append(i.tap.queues, queue)
		}
		return i.configureTap(device)
	})
}

// tapToOpen names the device of an earlier daemon, or one that the kernel gives the next
// free number.
func (i *Instance) tapToOpen() (string, error) {
	if i.state == nil {
		return "snilb%d", nil
	}
	left, err := leftTaps(i.ns, i.opts.Name)
	if err != nil || len(left) == 0 {
		return "snilb%d", err
	}
	return left[0].Attrs().Name, nil
}

// openQueue opens a queue of a device, and makes the device if there is none. The
// file blocks: it is never given to the runtime's poller.
func openQueue(name string) (*os.File, string, error) {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, "", fmt.Errorf("open %s: %w; modprobe tun", tunDevice, err)
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_MULTI_QUEUE)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err != nil {
		return nil, "", errors.Join(fmt.Errorf("open a queue of TAP device %s: %w", name, err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), tunDevice), request.Name(), nil
}

// configureTap makes the device silent: all that leaves or enters it is written by
// the engine.
func (i *Instance) configureTap(device netlink.Link) error {
	name := device.Attrs().Name
	steps := []struct {
		what string
		err  error
	}{
		{"turn ARP off", i.ns.LinkSetARPOff(device)},
		{"set MTU", i.ns.LinkSetMTU(device, tapMTU)},
		{"set queue length", i.ns.LinkSetTxQLen(device, tapQueueLength)},
		{"turn the choice of queues off", steerNowhere(i.tap.queues[0])},
		{"turn IPv6 off", quietIPv6(i.ns, device)},
		{"set up", i.ns.LinkSetUp(device)},
	}
	for _, step := range steps {
		if step.err != nil {
			return fmt.Errorf("%s on %s: %w", step.what, name, step.err)
		}
	}
	return nil
}

// steerNowhere gives the device a program that chooses the queue of a packet to be read: none ever is. Without one the
// kernel learns from each packet written by which queue its flow should be answered (tun_flow_update), which costs a hash
// and an entry a connection.
func steerNowhere(queue *os.File) error {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "snilb_queue0", Type: ebpf.SocketFilter, License: "Apache-2.0",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		return err
	}
	defer func() { _ = prog.Close() }() // the device holds it
	return unix.IoctlSetPointerInt(int(queue.Fd()), unix.TUNSETSTEERINGEBPF, prog.FD())
}

// quietIPv6 wants the sysctl or the address mode: in a container /proc/sys may be
// read-only, and a kernel without IPv6 has neither.
func quietIPv6(ns *namespace, device netlink.Link) error {
	mode := ns.LinkSetIP6AddrGenMode(device, noAddressMode)
	off := os.WriteFile("/proc/sys/net/ipv6/conf/"+device.Attrs().Name+"/disable_ipv6", []byte("1"), 0)
	if mode == nil || off == nil || errors.Is(off, fs.ErrNotExist) {
		return nil
	}
	return errors.Join(mode, off)
}

func (t *tap) close(ns *namespace, stay bool) error {
	var errs []error
	for _, queue := range t.queues {
		errs = append(errs, queue.Close())
	}
	if t.index != 0 && !stay {
		errs = append(errs, deleteLink(ns, t.index))
	}
	return errors.Join(errs...)
}

func deleteLink(ns *namespace, index int) error {
	device, err := ns.LinkByIndex(index)
	if err == nil {
		err = ns.LinkDel(device)
	}
	if err != nil && !isGone(err) {
		return fmt.Errorf("remove TAP device: %w", err)
	}
	return nil
}

// leftTaps lists the TAP devices of an instance.
func leftTaps(ns *namespace, instance string) ([]netlink.Link, error) {
	all, err := ns.links()
	if err != nil {
		return nil, err
	}
	var ours []netlink.Link
	for _, device := range all {
		if device.Type() == "tuntap" && device.Attrs().Alias == tapAlias(instance) {
			ours = append(ours, device)
		}
	}
	return ours, nil
}
