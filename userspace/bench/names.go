// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
)

// Names says which server names the hellos carry.
type Names struct {
	// List are the names, the most wanted first.
	List []string
	// Skew is the s of a Zipf distribution over List: above 1, or 0 for names that are all wanted alike.
	Skew float64
	// Without is the share of hellos that carry no name, between 0 and 1.
	Without float64
}

// Numbered is a list of count names made of a pattern: every "#" in it becomes the number, from 0.
func Numbered(pattern string, count int) ([]string, error) {
	if count > 1 && !strings.Contains(pattern, "#") {
		return nil, fmt.Errorf("%q has no # in the place of the number", pattern)
	}
	if count < 1 || count > 1<<20 {
		return nil, fmt.Errorf("%d names: between 1 and %d", count, 1<<20)
	}
	list := make([]string, count)
	for i := range list {
		list[i] = strings.ReplaceAll(pattern, "#", fmt.Sprint(i))
	}
	return list, nil
}

func (n Names) check() error {
	switch {
	case len(n.List) == 0 && n.Without < 1:
		return errors.New("no names: give some, or 1 as the share of hellos without a name")
	case n.Skew != 0 && n.Skew <= 1:
		return fmt.Errorf("a Zipf exponent of %g: above 1, or 0 for none", n.Skew)
	case n.Without < 0 || n.Without > 1:
		return fmt.Errorf("a share of %g without a name: between 0 and 1", n.Without)
	}
	return nil
}

// nameless stands for the hello without a name.
const nameless = -1

// picker draws indexes of names. It belongs to one goroutine.
type picker struct {
	names Names
	rand  *rand.Rand
	zipf  *rand.Zipf
}

func newPicker(n Names, seed uint64) *picker {
	p := &picker{names: n, rand: rand.New(rand.NewPCG(seed, 0x736e696c62))}
	if n.Skew > 1 {
		p.zipf = rand.NewZipf(p.rand, n.Skew, 1, uint64(len(n.List)-1))
	}
	return p
}

func (p *picker) next() int {
	switch {
	case p.names.Without > 0 && p.rand.Float64() < p.names.Without:
		return nameless
	case p.zipf != nil:
		return int(p.zipf.Uint64())
	default:
		return p.rand.IntN(len(p.names.List))
	}
}
