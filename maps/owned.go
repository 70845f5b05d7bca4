// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// OwnedHello is what the next daemon must know of a connection that is no flow yet.
type OwnedHello struct {
	Cookie       uint32 // our initial sequence number
	Acknowledged bool   // bytes of the client's are, which it will not send again
	Backend      Tuple  // what the packets of the backend show that bytes were pushed to; all zero: none
	PushedTo     uint32 // our number behind these
}

// OwnHello notes that, or what it is by now. client is what its packets show.
func (t *Tables) OwnHello(client Tuple, h *OwnedHello) error {
	key, value := flow6Key(LegClient, client), bpfOwnedHello{Cookie: h.Cookie, PushedTo: h.PushedTo}
	if h.Acknowledged {
		value.Acknowledged = 1
	}
	if h.Backend != (Tuple{}) {
		value.Backend = flow6Key(LegBackend, h.Backend)
	}
	if err := t.Owned.Put(&key, &value); err != nil {
		return fmt.Errorf("note an unfinished connection: %w", err)
	}
	return nil
}

// DisownHello undoes OwnHello; that there is nothing to undo is no error.
func (t *Tables) DisownHello(client Tuple) error {
	key := flow6Key(LegClient, client)
	if err := t.Owned.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget an unfinished connection: %w", err)
	}
	return nil
}

// OwnedHellos calls each for every connection that OwnHello noted.
func (t *Tables) OwnedHellos(each func(client Tuple, h OwnedHello)) error {
	err := batch(t.Owned, func(key *Flow6Key, value *bpfOwnedHello) {
		h := OwnedHello{Cookie: value.Cookie, Acknowledged: value.Acknowledged != 0, PushedTo: value.PushedTo}
		if value.Backend != (Flow6Key{}) {
			h.Backend = tuple6(&value.Backend)
		}
		each(tuple6(key), h)
	})
	if err != nil {
		return fmt.Errorf("read the unfinished connections: %w", err)
	}
	return nil
}
