// SPDX-License-Identifier: Apache-2.0

package ringbuf

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Waiter waits for the kernel to write into a ring.
type Waiter struct {
	fds    [2]unix.PollFd // the ring, and an eventfd that ends the wait
	closed atomic.Bool
	polite bool
}

// NewWaiter makes a waiter that tells the Go runtime of each wait if it is polite, for more waiters than that has places.
func NewWaiter(ring *ebpf.Map, polite bool) (*Waiter, error) {
	fd, err := unix.FcntlInt(uintptr(ring.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("wait for the ring: %w", err)
	}
	end, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("wait for the ring: %w", err), unix.Close(fd))
	}
	return &Waiter{
		fds:    [2]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(end), Events: unix.POLLIN}},
		polite: polite,
	}, nil
}

// awake is how long a wait keeps its thread and its place in the Go runtime: under 10 ms, after which the runtime would
// preempt it. With some hundred events a second it is never used up.
const awake = 5 * time.Millisecond

// Wait returns when there may be records, or d is over, or the waiter was closed.
//
// At first it waits as a C program does, without telling the runtime. To be parked and woken by that costs more than all
// that is done for an event, because each time it also wakes another thread to look for more work. A signal ends this
// wait, so that the garbage collector need not wait for it.
func (w *Waiter) Wait(d time.Duration) error {
	if d <= 0 {
		return nil
	}
	if w.polite {
		return w.waitParked(d)
	}
	timeout := unix.NsecToTimespec(int64(min(d, awake)))
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&w.fds)), uintptr(len(w.fds)),
		uintptr(unsafe.Pointer(&timeout)), 0, 0, 0)
	if errno != 0 && errno != unix.EINTR {
		return fmt.Errorf("wait for the ring: %w", errno)
	}
	if errno != 0 || n != 0 || d <= awake {
		return nil
	}
	return w.waitParked(d - awake)
}

// waitParked is Wait in a system call that the runtime knows of: others run meanwhile.
func (w *Waiter) waitParked(d time.Duration) error {
	timeout := unix.NsecToTimespec(int64(d))
	if _, err := unix.Ppoll(w.fds[:], &timeout, nil); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("wait for the ring: %w", err)
	}
	return nil
}

// Closed reports whether Close was called.
func (w *Waiter) Closed() bool { return w.closed.Load() }

// Close ends Wait for good.
func (w *Waiter) Close() error {
	w.closed.Store(true)
	_, err := unix.Write(int(w.fds[1].Fd), []byte{1, 0, 0, 0, 0, 0, 0, 0})
	return err
}

// Free closes the descriptors, when nobody waits any more.
func (w *Waiter) Free() error {
	return errors.Join(unix.Close(int(w.fds[0].Fd)), unix.Close(int(w.fds[1].Fd)))
}
