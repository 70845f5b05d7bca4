// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"

	"snilb/userspace/hello"
	"snilb/userspace/pool"
)

// hello results: what became of the bytes a client sent.
const (
	helloOK = iota
	helloNotTLS
	helloMalformed
	helloTooLong
	helloTimeout
	helloCut         // the client closed in the middle of it
	helloReset       // the client reset
	helloNone        // the client closed without a word
	helloMemory      // limits.hello_memory
	helloSourceLimit // limits.hellos_per_source
	helloOrphaned    // an earlier daemon died with it
	helloLen
)

var helloNames = [helloLen]string{
	"ok", "not_tls", "malformed", "too_long", "timeout", "cut", "reset", "none",
	"memory_limit", "source_limit", "orphaned",
}

func helloResult(err error) int {
	switch {
	case errors.Is(err, hello.ErrNotTLS):
		return helloNotTLS
	case errors.Is(err, hello.ErrTooLong):
		return helloTooLong
	}
	return helloMalformed
}

// stats are one worker's counters, guarded by its mu.
type stats struct {
	hellos    [helloLen]uint64
	decisions map[decisionKey]uint64
	connects  map[connectKey]uint64
	closed    map[string]uint64 // flows, by reason

	handshakes, handshakeNanoseconds uint64

	acks        uint64 // sent to clients before the bind
	late        uint64 // events of flows that were bound meanwhile
	icmp        uint64 // errors told to the other leg
	tooBig      uint64 // packets of bound flows cut to fit
	unknown     uint64 // packets of no connection
	badEvents   uint64 // wrong checksum, or no TCP
	staleEvents uint64
	outOfWindow uint64 // segments no hello could reach
	unroutable  uint64
	writeErrors uint64
}

type decisionKey struct{ route, pool, result string }

// connectKey has names and no pointer, which would keep all that is reloaded.
type connectKey struct{ pool, backend, result string }

func newStats() stats {
	return stats{
		decisions: make(map[decisionKey]uint64),
		connects:  make(map[connectKey]uint64),
		closed:    make(map[string]uint64),
	}
}

func (s *stats) decision(d *decision) {
	s.decisions[decisionKey{d.routeName(), d.poolName(), d.reason + "/" + d.action.String()}]++
}

func (s *stats) connect(b *pool.Backend, result string) {
	s.connects[connectKey{b.Pool, b.Name, result}]++
}
