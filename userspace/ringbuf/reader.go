// SPDX-License-Identifier: Apache-2.0

// Package ringbuf reads BPF ring buffer maps in place and waits for them.
package ringbuf

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"runtime"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Reader reads a ring buffer map in place (kernel/bpf/ringbuf.c). It is for one goroutine. The library's reader copies each
// record, and has deadlines of whole milliseconds that it spends the last one of awake.
type Reader struct {
	mapped   [2][]byte // the consumer's page; the producer's page and the data
	consumer *atomic.Uint64
	producer *atomic.Uint64
	data     []byte // twice the ring: no record wraps
	mask     uint64
	at       uint64 // how far this reader has come
}

const (
	// Of a record's header: 32 bits of length with two flags, and 32 bits of page offset.
	recordHeader  = 8
	recordBusy    = 1 << 31
	recordDiscard = 1 << 30
)

// NewReader goes on where the last reader of the map ended. It needs the map only while it runs.
func NewReader(m *ebpf.Map) (_ *Reader, err error) {
	size, page := int(m.MaxEntries()), os.Getpagesize()
	if m.Type() != ebpf.RingBuf || bits.OnesCount(uint(size)) != 1 {
		return nil, fmt.Errorf("map %v of size %d is no ring buffer", m.Type(), size)
	}
	r := &Reader{mask: uint64(size) - 1}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	if r.mapped[0], err = unix.Mmap(m.FD(), 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map the consumer's position: %w", err)
	}
	if r.mapped[1], err = unix.Mmap(m.FD(), int64(page), page+2*size, unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map the ring: %w", err)
	}
	r.consumer = (*atomic.Uint64)(unsafe.Pointer(&r.mapped[0][0]))
	r.producer = (*atomic.Uint64)(unsafe.Pointer(&r.mapped[1][0]))
	r.data = r.mapped[1][page:]
	r.at = r.consumer.Load()
	return r, nil
}

// HasData reports whether there are records that were not read.
func (r *Reader) HasData() bool { return r.producer.Load() != r.at }

// Next returns the next record, nil if there is none. It stands until Done.
func (r *Reader) Next() []byte {
	for spins := 0; r.HasData(); spins++ {
		header := (*atomic.Uint32)(unsafe.Pointer(&r.data[r.at&r.mask])).Load()
		if header&recordBusy != 0 {
			// A CPU is writing it, and will be done in well under a microsecond, unless its host took it away.
			if spins > 1000 {
				runtime.Gosched()
			}
			continue
		}
		length := header &^ (recordBusy | recordDiscard)
		start := r.at&r.mask + recordHeader
		r.at += recordHeader + uint64(length+7)&^7
		if header&recordDiscard != 0 {
			r.Done()
			continue
		}
		return r.data[start : start+uint64(length)]
	}
	return nil
}

// Done gives the place of the records read back to the kernel.
func (r *Reader) Done() { r.consumer.Store(r.at) }

// Close unmaps the memory.
func (r *Reader) Close() (err error) {
	for i, m := range r.mapped {
		if m != nil {
			err = errors.Join(err, unix.Munmap(m))
			r.mapped[i] = nil
		}
	}
	return err
}
