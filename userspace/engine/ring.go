// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// ring reads a ring buffer map in place (kernel/bpf/ringbuf.c). The library's reader copies each record and waits in
// a system call of its own, which costs the Go runtime a thread to stand in, and has deadlines of whole milliseconds
// that it spends the last one of awake. Here the runtime's poller waits, as for a socket.
type ring struct {
	file *os.File
	conn syscall.RawConn

	mapped   [2][]byte // the consumer's page; the producer's page and the data
	consumer *atomic.Uint64
	producer *atomic.Uint64
	data     []byte // twice the ring: no record wraps
	mask     uint64
	at       uint64 // how far this reader has come
	closed   atomic.Bool
	poll     unix.PollFd
	hasData  func(uintptr) bool // made once, so that waiting allocates nothing
}

const (
	// Of a record's header: 32 bits of length with two flags, and 32 bits of page offset.
	recordHeader  = 8
	recordBusy    = 1 << 31
	recordDiscard = 1 << 30
)

// newRing needs the map only while it runs.
func newRing(m *ebpf.Map) (_ *ring, err error) {
	size, page := int(m.MaxEntries()), os.Getpagesize()
	if m.Type() != ebpf.RingBuf || bits.OnesCount(uint(size)) != 1 {
		return nil, fmt.Errorf("map %v of size %d is no ring buffer", m.Type(), size)
	}
	fd, err := unix.FcntlInt(uintptr(m.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	// What the runtime polls must not block.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	r := &ring{file: os.NewFile(uintptr(fd), "ring"), poll: unix.PollFd{Fd: int32(fd)}, mask: uint64(size) - 1}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.file.Close(), r.unmap())
		}
	}()
	if r.conn, err = r.file.SyscallConn(); err != nil {
		return nil, err
	}
	if r.mapped[0], err = unix.Mmap(fd, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map the consumer's position: %w", err)
	}
	if r.mapped[1], err = unix.Mmap(fd, int64(page), page+2*size, unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map the ring: %w", err)
	}
	r.consumer = (*atomic.Uint64)(unsafe.Pointer(&r.mapped[0][0]))
	r.producer = (*atomic.Uint64)(unsafe.Pointer(&r.mapped[1][0]))
	r.data = r.mapped[1][page:]
	r.at = r.consumer.Load()
	r.hasData = func(uintptr) bool { return r.producer.Load() != r.at }
	return r, nil
}

// wait returns nil once there are records or the deadline has passed, at once with hurry, and os.ErrClosed when the ring
// was closed.
func (r *ring) wait(deadline time.Time, hurry bool) error {
	switch {
	case r.closed.Load():
		return os.ErrClosed
	case hurry || r.hasData(0):
		return nil
	}
	if r.waitAwake(deadline) {
		return nil
	}
	if err := r.file.SetReadDeadline(deadline); err != nil {
		return err
	}
	if err := r.conn.Read(r.hasData); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}

// awake is how long a wait keeps its thread and its place in the runtime: under 10 ms, after which the runtime would
// preempt it. With some hundred events a second it is never used up.
const awake = 5 * time.Millisecond

// waitAwake waits for a while as a C program does, without telling the runtime: parking and being woken through it costs
// more than all that is done for an event, because each time it also wakes another thread to look for more work. Returns
// true if there are records or the deadline has passed. A signal ends it early, so the garbage collector need not wait.
func (r *ring) waitAwake(deadline time.Time) bool {
	wait := min(time.Until(deadline), awake)
	if wait <= 0 {
		return true
	}
	timeout := unix.NsecToTimespec(int64(wait))
	r.poll.Events = unix.POLLIN
	_, _, _ = unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&r.poll)), 1, uintptr(unsafe.Pointer(&timeout)), 0, 0, 0)
	return r.hasData(0) || wait < awake
}

// next returns the next record, nil if there is none. It stands until done.
func (r *ring) next() []byte {
	for r.hasData(0) {
		header := (*atomic.Uint32)(unsafe.Pointer(&r.data[r.at&r.mask])).Load()
		if header&recordBusy != 0 {
			// A CPU is writing it, and will be done in well under a microsecond.
			continue
		}
		length := header &^ (recordBusy | recordDiscard)
		start := r.at&r.mask + recordHeader
		r.at += recordHeader + uint64(length+7)&^7
		if header&recordDiscard != 0 {
			r.done()
			continue
		}
		return r.data[start : start+uint64(length)]
	}
	return nil
}

// done gives the place of the records read back to the kernel.
func (r *ring) done() { r.consumer.Store(r.at) }

// close ends wait. The memory stays, a record may just be dealt with: who waited unmaps it.
func (r *ring) close() error {
	if r == nil {
		return nil
	}
	r.closed.Store(true)
	return r.file.Close()
}

func (r *ring) unmap() (err error) {
	for i, m := range r.mapped {
		if m != nil {
			err = errors.Join(err, unix.Munmap(m))
			r.mapped[i] = nil
		}
	}
	return err
}
