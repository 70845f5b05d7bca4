// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"
	"sync"
)

// sources counts the half-open handshakes of each client address. The lock is
// held for one map operation; workers meet at it once a connection.
type sources struct {
	mu    sync.Mutex
	count map[netip.Addr]int
}

// enter counts one more, unless the address has limit already; 0 is no limit.
func (s *sources) enter(addr netip.Addr, limit int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count == nil {
		s.count = make(map[netip.Addr]int)
	}
	if limit > 0 && s.count[addr] >= limit {
		return false
	}
	s.count[addr]++
	return true
}

func (s *sources) leave(addr netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count[addr]--; s.count[addr] <= 0 {
		delete(s.count, addr)
	}
}
