// SPDX-License-Identifier: Apache-2.0

package hello

// typeSet remembers extension types. The usual hello, with its twenty or so,
// costs no allocation; one built of thousands costs 8 KiB and stays linear.
// The zero value is empty.
type typeSet struct {
	low  uint64 // bit per type below 64: all the common ones
	n    int
	few  [12]uint16    // types from 64 on
	many *[1024]uint64 // bit per type, once few is full
}

// add returns false when t was there before.
func (s *typeSet) add(t uint16) bool {
	if t < 64 {
		return setBit(&s.low, t)
	}
	if s.many == nil {
		for _, known := range s.few[:s.n] {
			if known == t {
				return false
			}
		}
		if s.n < len(s.few) {
			s.few[s.n] = t
			s.n++
			return true
		}
		s.many = new([1024]uint64)
		for _, known := range s.few {
			setBit(&s.many[known/64], known%64)
		}
	}
	return setBit(&s.many[t/64], t%64)
}

// setBit returns false when the bit was set before.
func setBit(word *uint64, bit uint16) bool {
	mask := uint64(1) << bit
	fresh := *word&mask == 0
	*word |= mask
	return fresh
}
