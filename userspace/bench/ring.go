// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

const (
	txBatch  = 64
	rxBlock  = 1 << 18
	sendRoom = 16 << 20 // of the socket, so that the device is what limits
)

// ring is a line on an interface: packet sockets beside the kernel's TCP.
type ring struct {
	rx, tx int

	frames    []byte // shared with the kernel
	frameSize int
	at        int // the frame that the kernel fills next
	poll      [1]unix.PollFd

	out     []byte // txBatch rooms
	room1   int    // their size
	vectors []unix.Iovec
	msgs    []mmsghdr
	queued  int
}

// mmsghdr is the C library's.
type mmsghdr struct {
	header unix.Msghdr
	length uint32
	_      [4]byte
}

// openRing binds sockets to the interface, in the namespace of the calling thread. It captures what the filter takes, at
// most capture bytes of a frame; with none it only sends.
func openRing(device *net.Interface, filter *ebpf.Program, capture, frames int) (_ *ring, err error) {
	r := &ring{rx: -1, tx: -1}
	defer func() {
		if err != nil {
			_ = r.close()
		}
	}()
	if err := r.openTx(device); err != nil {
		return nil, fmt.Errorf("packet socket to send on %s: %w", device.Name, err)
	}
	if filter == nil {
		return r, nil
	}
	if err := r.openRx(device, filter, capture, frames); err != nil {
		return nil, fmt.Errorf("packet socket to receive on %s: %w", device.Name, err)
	}
	return r, nil
}

func (r *ring) openTx(device *net.Interface) (err error) {
	if r.tx, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	err = errors.Join(
		unix.SetsockoptInt(r.tx, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1),
		unix.SetsockoptInt(r.tx, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendRoom),
		unix.Bind(r.tx, &unix.SockaddrLinklayer{Ifindex: device.Index}))
	r.room1 = device.MTU + 64
	r.out = make([]byte, txBatch*r.room1)
	r.vectors, r.msgs = make([]unix.Iovec, txBatch), make([]mmsghdr, txBatch)
	for i := range r.msgs {
		r.vectors[i].Base = &r.out[i*r.room1]
		r.msgs[i].header.Iov, r.msgs[i].header.Iovlen = &r.vectors[i], 1
	}
	return err
}

func (r *ring) openRx(device *net.Interface, filter *ebpf.Program, capture, frames int) (err error) {
	// No protocol until the filter is there: what comes in between would be taken.
	if r.rx, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	r.frameSize = 256
	for r.frameSize < capture+unix.SizeofTpacket2Hdr+unix.SizeofSockaddrLinklayer+32 && r.frameSize < rxBlock {
		r.frameSize *= 2
	}
	size := r.frameSize * frames
	request := &unix.TpacketReq{
		Block_size: rxBlock, Block_nr: uint32(size / rxBlock), Frame_size: uint32(r.frameSize), Frame_nr: uint32(frames),
	}
	err = errors.Join(
		unix.SetsockoptInt(r.rx, unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V2),
		unix.SetsockoptInt(r.rx, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptInt(r.rx, unix.SOL_SOCKET, unix.SO_ATTACH_BPF, filter.FD()),
		unix.SetsockoptTpacketReq(r.rx, unix.SOL_PACKET, unix.PACKET_RX_RING, request))
	if err != nil {
		return err
	}
	if r.frames, err = unix.Mmap(r.rx, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return err
	}
	r.poll[0] = unix.PollFd{Fd: int32(r.rx), Events: unix.POLLIN}
	// All protocols: a tap for one stands behind the tcx program that keeps our packets from the kernel.
	return unix.Bind(r.rx, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: device.Index})
}

func htons(n uint16) uint16 { return n<<8 | n>>8 }

func (r *ring) close() error {
	var errs []error
	if r.frames != nil {
		errs = append(errs, unix.Munmap(r.frames))
	}
	for _, fd := range []int{r.rx, r.tx} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	return errors.Join(errs...)
}

func (r *ring) room() []byte { return r.out[r.queued*r.room1:][:r.room1:r.room1] }

func (r *ring) send(n int) {
	r.vectors[r.queued].SetLen(n)
	if r.queued++; r.queued == txBatch {
		_ = r.flush() // an error stays, and the next flush of a turn returns it
	}
}

func (r *ring) flush() error {
	for done := 0; done < r.queued; {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(r.tx), uintptr(unsafe.Pointer(&r.msgs[done])),
			uintptr(r.queued-done), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			done += int(n)
		case unix.EINTR:
		case unix.EAGAIN, unix.ENOBUFS:
			done++ // lost on the way, as packets are
		default:
			r.queued = 0
			return fmt.Errorf("send packets: %w", errno)
		}
	}
	r.queued = 0
	return nil
}

func (r *ring) receive(most int, take func(frame []byte)) int {
	for n := range most {
		frame := r.frames[r.at*r.frameSize:][:r.frameSize]
		header := (*unix.Tpacket2Hdr)(unsafe.Pointer(&frame[0]))
		if atomic.LoadUint32(&header.Status)&unix.TP_STATUS_USER == 0 {
			return n
		}
		take(frame[header.Mac:][:header.Snaplen])
		atomic.StoreUint32(&header.Status, unix.TP_STATUS_KERNEL)
		if r.at++; r.at == len(r.frames)/r.frameSize {
			r.at = 0
		}
	}
	return most
}

func (r *ring) wait(d time.Duration) error { return ppoll(r.poll[:], d) }

func ppoll(fds []unix.PollFd, d time.Duration) error {
	timeout := unix.NsecToTimespec(int64(d))
	_, err := unix.Ppoll(fds, &timeout, nil)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("wait for packets: %w", err)
	}
	return nil
}
