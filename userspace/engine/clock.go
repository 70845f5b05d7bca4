// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"crypto/sha256"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"snilb/userspace/config"
	"snilb/userspace/pool"
)

// clock reads CLOCK_MONOTONIC, which the kernel programs stamp events and flows
// with, without a system call a reading.
type clock struct {
	start time.Time
	base  int64
}

func newClock() clock {
	var ts unix.Timespec
	// Cannot fail: the clock exists on every Linux, and the pointer is good.
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return clock{start: time.Now(), base: ts.Nano()}
}

// now is CLOCK_MONOTONIC in ns.
func (c clock) now() int64 { return c.base + int64(time.Since(c.start)) }

// idle is how long ago a flow's last_seen (units of 2^20 ns, modulo 2^32) was.
func idle(now int64, lastSeen uint32) time.Duration {
	age := int32(uint32(now>>20) - lastSeen)
	// The kernel's stamp is of the coarse clock, or of a packet after now.
	return time.Duration(max(age, 0)) << 20
}

// bootSecret keys sequence numbers and timestamps: nobody else's to know, and the
// same for every daemon of this boot, so that they go on rising over a restart.
func bootSecret() (pool.Key, error) {
	id, err := bootID()
	if err != nil {
		return pool.Key{}, err
	}
	sum := sha256.Sum256(append([]byte("snilb sequence numbers "), id...))
	return pool.Key(sum[:16]), nil
}

// bootID is another one after each boot.
func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return string(id), nil
}

// numbers are the initial sequence number and timestamp of a connection from
// source to backend (RFC 6528: a clock plus a keyed hash of the tuple; RFC 7323
// 5.4 for timestamps). Both rise over the uses of a tuple, which a backend that
// holds it in TIME_WAIT asks for.
func (e *Engine) numbers(now int64, source, backend netip.AddrPort) (isn, tsval uint32) {
	h := pool.Hash(config.HashFlow, source, backend, "", e.secret)
	return uint32(h) + uint32(now>>6), uint32(h>>32) + uint32(now/int64(time.Millisecond))
}
