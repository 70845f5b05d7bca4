// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// TestSweepOrder has flows come and go: the order holds each once, and each flow knows its place.
func TestSweepOrder(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	w := &worker{}
	var all []*flow
	for range 5000 {
		if len(all) == 0 || random.IntN(5) < 3 {
			f := &flow{}
			w.enroll(f)
			all = append(all, f)
			continue
		}
		i := random.IntN(len(all))
		w.strike(all[i])
		all = slices.Delete(all, i, i+1)
	}
	if len(w.order) != len(all) {
		t.Fatalf("%d in the order, want %d", len(w.order), len(all))
	}
	for _, f := range all {
		if w.order[f.place] != f {
			t.Fatalf("a flow is not in its place %d", f.place)
		}
	}
}

// TestReviewOfRemoved looks at a flow that was removed while its turn came: nothing must be done to it once more.
func TestReviewOfRemoved(t *testing.T) {
	w := &worker{} // without jobs: to read it would panic
	f, other := &flow{}, &flow{}
	w.enroll(f)
	w.enroll(other)
	w.strike(f)
	w.review([]*flow{f})
	if len(w.order) != 1 || w.order[0] != other || other.place != 0 {
		t.Errorf("the order is %v", w.order)
	}
}
