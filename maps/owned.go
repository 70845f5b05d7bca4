// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// OwnHello notes that bytes of a client's hello are acknowledged to it, and what our
// initial sequence number is there. client is what its packets show.
func (t *Tables) OwnHello(client Tuple, cookie uint32) error {
	key := flow6Key(LegClient, client)
	if err := t.Owned.Put(&key, &OwnedHello{Cookie: cookie}); err != nil {
		return fmt.Errorf("note an acknowledged hello: %w", err)
	}
	return nil
}

// DisownHello undoes OwnHello; that there is nothing to undo is no error.
func (t *Tables) DisownHello(client Tuple) error {
	key := flow6Key(LegClient, client)
	if err := t.Owned.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget an acknowledged hello: %w", err)
	}
	return nil
}

// OwnedHellos calls each for every hello that OwnHello noted.
func (t *Tables) OwnedHellos(each func(client Tuple, cookie uint32)) error {
	err := batch(t.Owned, func(key *Flow6Key, value *OwnedHello) {
		each(tuple6(key), value.Cookie)
	})
	if err != nil {
		return fmt.Errorf("read the acknowledged hellos: %w", err)
	}
	return nil
}
