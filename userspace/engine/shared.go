// SPDX-License-Identifier: Apache-2.0

package engine

// shared keeps values that many flows have in common once each, under numbers, as long as somebody holds them.
type shared[T comparable] struct {
	numbers map[T]uint32
	all     []held[T]
	free    []uint32
}

type held[T any] struct {
	value T
	users uint32
}

func newShared[T comparable]() shared[T] { return shared[T]{numbers: make(map[T]uint32)} }

// hold returns the number of a value, which is good until as many calls of release.
func (s *shared[T]) hold(value T) uint32 {
	n, ok := s.numbers[value]
	if !ok {
		n = s.take()
		s.numbers[value] = n
		s.all[n].value = value
	}
	s.all[n].users++
	return n
}

func (s *shared[T]) take() uint32 {
	last := len(s.free) - 1
	if last < 0 {
		s.all = append(s.all, held[T]{})
		return uint32(len(s.all) - 1)
	}
	n := s.free[last]
	s.free = s.free[:last]
	return n
}

func (s *shared[T]) value(n uint32) T { return s.all[n].value }

func (s *shared[T]) release(n uint32) {
	one := &s.all[n]
	if one.users--; one.users > 0 {
		return
	}
	delete(s.numbers, one.value)
	*one = held[T]{}
	s.free = append(s.free, n)
}
