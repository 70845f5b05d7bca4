// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"unsafe"

	"github.com/cilium/ebpf"
)

// ReadRecord reads the value of a map that is `instance` in whatever version. Of another layout only Layout is set.
func ReadRecord(m *ebpf.Map) (*InstanceRecord, error) {
	raw, err := m.LookupBytes(uint32(0))
	if err != nil {
		return nil, fmt.Errorf("read the instance's record: %w", err)
	}
	if len(raw) < 4 {
		return nil, fmt.Errorf("the instance's record has %d bytes", len(raw))
	}
	r := &InstanceRecord{Layout: binary.NativeEndian.Uint32(raw)}
	if r.Layout != LayoutVersion {
		return r, nil
	}
	if len(raw) != int(unsafe.Sizeof(*r)) {
		return nil, fmt.Errorf("the instance's record has %d bytes, not %d", len(raw), unsafe.Sizeof(*r))
	}
	zero := uint32(0)
	if err := m.Lookup(&zero, r); err != nil {
		return nil, fmt.Errorf("read the instance's record: %w", err)
	}
	return r, nil
}

// UserOf is who counts in a slot; both names are cut to what a CounterUser holds.
func UserOf(iface, role string) (u CounterUser) {
	fill := func(to []int8, from string) {
		for i := range min(len(from), len(to)-1) {
			to[i] = int8(from[i])
		}
	}
	fill(u.Iface[:], iface)
	fill(u.Role[:], role)
	return u
}

// Names are the reverse of UserOf.
func (u *CounterUser) Names() (iface, role string) {
	text := func(from []int8) string {
		var b bytes.Buffer
		for _, c := range from {
			if c == 0 {
				break
			}
			b.WriteByte(byte(c))
		}
		return b.String()
	}
	return text(u.Iface[:]), text(u.Role[:])
}

// UsedNexthops reads what is set of the next hops, by index.
func (t *Tables) UsedNexthops() (map[uint16]Nexthop, error) {
	used := make(map[uint16]Nexthop)
	err := batch(t.Nexthops, func(index *uint32, hop *Nexthop) {
		if hop.Ifindex != 0 {
			used[uint16(*index)] = *hop
		}
	})
	return used, err
}

// PathAddresses are the addresses of a path.
type PathAddresses struct {
	Source  netip.Addr
	Backend netip.AddrPort
}

// PathKeys lists the paths.
func (t *Tables) PathKeys() ([]PathAddresses, error) {
	var all []PathAddresses
	err := batch(t.Paths, func(key *PathKey, _ *Path) {
		all = append(all, PathAddresses{Addr(key.Source), netip.AddrPortFrom(Addr(key.Backend), Port(key.Port))})
	})
	return all, err
}
