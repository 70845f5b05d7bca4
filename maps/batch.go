// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"sync"

	"github.com/cilium/ebpf"
)

// batchRows are read at once.
const batchRows = 4096

// rows are what one reading of a map gives.
type rows[K, V any] struct {
	keys   []K
	values []V
	n      int
}

func newRows[K, V any]() *rows[K, V] {
	return &rows[K, V]{keys: make([]K, batchRows), values: make([]V, batchRows)}
}

// read takes the next ones, and reports whether they are the last.
func (r *rows[K, V]) read(m *ebpf.Map, cursor *ebpf.MapBatchCursor) (last bool, err error) {
	r.n, err = m.BatchLookup(cursor, r.keys, r.values, nil)
	switch {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return true, nil
	case err != nil:
		return true, fmt.Errorf("read %s: %w", m, err)
	}
	return false, nil
}

// batch calls each for all there is.
func batch[K, V any](m *ebpf.Map, each func(*K, *V)) error {
	r := newRows[K, V]()
	var cursor ebpf.MapBatchCursor
	for {
		last, err := r.read(m, &cursor)
		for i := range r.n {
			each(&r.keys[i], &r.values[i])
		}
		if last {
			return err
		}
	}
}

// batchByWorker calls each[n] for all whose control says worker n. The caller reads, as the kernel has to be gone through only once,
// and a goroutine for each worker looks through all that was read.
func batchByWorker[K, V any](m *ebpf.Map, each []func(*K, *V), control func(*V) uint32) error {
	var all sync.WaitGroup
	queues := make([]chan *rows[K, V], len(each))
	for n, take := range each {
		queue := make(chan *rows[K, V], 1)
		queues[n] = queue
		all.Go(func() {
			for r := range queue {
				for i := range r.n {
					if workerOf(control(&r.values[i])) == n {
						take(&r.keys[i], &r.values[i])
					}
				}
			}
		})
	}
	defer all.Wait()
	defer func() {
		for _, queue := range queues {
			close(queue)
		}
	}()
	// One is read while others wait in the queues and are looked through. A queue that takes one is of a worker that has begun with
	// the one before, and so has done with the one before that: three.
	turns := []*rows[K, V]{newRows[K, V](), newRows[K, V](), newRows[K, V]()}
	var cursor ebpf.MapBatchCursor
	for turn := 0; ; turn++ {
		r := turns[turn%len(turns)]
		last, err := r.read(m, &cursor)
		if err == nil {
			err = r.within(len(each), control)
		}
		if err != nil {
			return err
		}
		for _, queue := range queues {
			queue <- r
		}
		if last {
			return nil
		}
	}
}

// within returns an error if a worker has none of the numbers below workers.
func (r *rows[K, V]) within(workers int, control func(*V) uint32) error {
	for i := range r.n {
		if n := workerOf(control(&r.values[i])); n >= workers {
			return fmt.Errorf("there is a flow of worker %d, and there are %d workers: the number of workers differs from that of the daemon that bound it",
				n, workers)
		}
	}
	return nil
}
