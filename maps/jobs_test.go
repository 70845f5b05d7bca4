// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// newJobs are the jobs of one worker of several: each has its own memory.
func newJobs(r *rig, worker int) *Jobs {
	r.Helper()
	j, err := NewJobs(r.coll.Programs[ProgramJobs], r.coll.Maps[MapJobs], worker)
	must(r, err)
	r.Cleanup(func() { must(r, j.Close()) })
	return j
}

// pairOf is a flow of a client port of its own.
func (f family) pairOf(n int) *Pair {
	up, down := f.entry(LegClient), f.entry(LegBackend)
	client := netip.AddrPortFrom(f.client.Addr(), uint16(1000+n))
	source := netip.AddrPortFrom(f.source.Addr(), uint16(2000+n))
	up.Flow.Generation, down.Flow.Generation = uint16(n), uint16(n)
	up.To.Src, down.To.Dst = source, client
	return &Pair{Tuple{client, f.vip}, Tuple{f.backend, source}, &up, &down}
}

// wantEntries compares what the tables hold of a pair: nil is nothing.
func (r *rig) wantEntries(p *Pair, up, down *Entry) {
	r.Helper()
	for leg, want := range map[Leg]*Entry{LegClient: up, LegBackend: down} {
		got, err := r.tables.LookupFlow(leg, map[Leg]Tuple{LegClient: p.Client, LegBackend: p.Backend}[leg])
		if want == nil {
			if !errors.Is(err, ebpf.ErrKeyNotExist) {
				r.Errorf("leg %d: %v, want no entry", leg, err)
			}
			continue
		}
		got.Flow.Sport, got.Flow.Dport = 0, 0 // from To
		if diff := cmp.Diff(*want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); err != nil || diff != "" {
			r.Errorf("leg %d: %v (-want +got):\n%s", leg, err, diff)
		}
	}
}

func (r *rig) clear(pairs ...*Pair) {
	r.Helper()
	for _, p := range pairs {
		must(r, r.tables.DeleteFlow(LegClient, p.Client))
		must(r, r.tables.DeleteFlow(LegBackend, p.Backend))
	}
}

func TestJobsBind(t *testing.T) {
	r := newRig(t, settings{workers: 3})
	j := newJobs(r, 2)
	bothFamilies(t, func(t *testing.T, f family) {
		r := r.with(t)
		p := f.pairOf(1)
		must(t, j.Bind(p, false))
		r.wantEntries(p, p.Up, p.Down)

		// All or nothing: the client's tuple is taken, the backend's is another.
		other := f.pairOf(2)
		other.Client = p.Client
		if err := j.Bind(other, false); !errors.Is(err, ebpf.ErrKeyExist) {
			t.Errorf("a tuple bound twice: %v", err)
		}
		r.wantEntries(&Pair{Client: p.Client, Backend: other.Backend}, p.Up, nil)

		// The backend's tuple is taken.
		other = f.pairOf(3)
		other.Backend = p.Backend
		if err := j.Bind(other, false); !errors.Is(err, ebpf.ErrKeyExist) {
			t.Errorf("a backend's tuple bound twice: %v", err)
		}
		r.wantEntries(&Pair{Client: other.Client, Backend: p.Backend}, nil, p.Down)
		r.clear(p)
	})
}

func TestJobsBindPending(t *testing.T) {
	r := newRig(t, settings{})
	j := newJobs(r, 0)
	bothFamilies(t, func(t *testing.T, f family) {
		r := r.with(t)
		p := f.pairOf(1)
		if err := j.Bind(p, true); !errors.Is(err, ebpf.ErrKeyNotExist) {
			t.Errorf("nothing was pending: %v", err)
		}
		r.wantEntries(p, nil, nil)
		pending := Entry{To: p.Backend, Flow: Flow{Control: FlowPending}}
		must(t, r.tables.InsertFlow(LegBackend, p.Backend, &pending))
		must(t, j.Bind(p, true))
		r.wantEntries(p, p.Up, p.Down)
		r.clear(p)
	})
}

func TestJobsFull(t *testing.T) {
	r := newRig(t, settings{})
	j := newJobs(r, 0)
	bothFamilies(t, func(t *testing.T, f family) {
		r := r.with(t)
		var all []*Pair
		var err error
		for n := 0; err == nil && n < 2000; n++ {
			p := f.pairOf(n)
			if err = j.Bind(p, false); err == nil {
				all = append(all, p)
			} else {
				r.wantEntries(p, nil, nil)
			}
		}
		if !errors.Is(err, unix.E2BIG) {
			t.Errorf("after %d flows: %v, want E2BIG", len(all), err)
		}
		r.clear(all...)
	})
}

// TestJobsReadRemove has a whole list done, with flows among them that are not the engine's any more.
func TestJobsReadRemove(t *testing.T) {
	r := newRig(t, settings{workers: 2})
	j := newJobs(r, 1)
	bothFamilies(t, func(t *testing.T, f family) {
		r := r.with(t)
		// What makes a client's entry that of another flow, by number; all others are found.
		foreign := map[int]func(*Entry){
			3:  func(e *Entry) { e.Flow.Generation++ },
			5:  func(e *Entry) { e.To.Src = netip.AddrPortFrom(e.To.Src.Addr(), 9) },
			7:  func(e *Entry) { e.To.Dst = netip.AddrPortFrom(e.To.Dst.Addr(), 9) },
			9:  func(e *Entry) { e.To.Src = netip.AddrPortFrom(e.To.Src.Addr().Next(), e.To.Src.Port()) },
			11: func(e *Entry) { e.To.Dst = netip.AddrPortFrom(e.To.Dst.Addr().Next(), e.To.Dst.Port()) },
		}
		var bound []*Pair
		for n := range FlowJobs {
			p := f.pairOf(n)
			if change := foreign[n]; change != nil {
				change(p.Up)
			}
			must(t, j.Bind(p, false))
			bound = append(bound, p)
		}
		anothers := bound[30]
		must(t, r.tables.DeleteFlow(LegBackend, anothers.Backend))
		anothers.Down.Flow.Generation++
		must(t, r.tables.InsertFlow(LegBackend, anothers.Backend, anothers.Down))
		missing := []int{20, 21, 30}
		must(t, r.tables.DeleteFlow(LegClient, bound[20].Client))
		must(t, r.tables.DeleteFlow(LegBackend, bound[21].Backend))

		for n, p := range bound {
			j.Read(p.Client, p.Backend, uint16(n))
		}
		must(t, j.Run())
		for n, p := range bound {
			if foreign[n] != nil || slices.Contains(missing, n) {
				if err := j.Result(n); !errors.Is(err, ebpf.ErrKeyNotExist) {
					t.Errorf("flow %d: %v, want none", n, err)
				}
				continue
			}
			must(t, j.Result(n))
			up, down := j.Flows(n)
			up.Flow.Sport, up.Flow.Dport, down.Flow.Sport, down.Flow.Dport = 0, 0, 0, 0
			if up.Flow != p.Up.Flow || down.Flow != p.Down.Flow {
				t.Errorf("flow %d: %+v %+v, want %+v %+v", n, up.Flow, down.Flow, p.Up.Flow, p.Down.Flow)
			}
		}

		for n, p := range bound {
			j.Remove(p.Client, p.Backend, uint16(n))
		}
		must(t, j.Run())
		for n, p := range bound {
			must(t, j.Result(n))
			switch {
			case foreign[n] != nil:
				r.wantEntries(p, p.Up, nil)
				r.clear(p)
			case p == anothers:
				r.wantEntries(p, nil, p.Down)
				r.clear(p)
			default:
				r.wantEntries(p, nil, nil)
			}
		}
	})
}

// TestJobsCount does no more than was added: what lies behind is of an earlier run.
func TestJobsCount(t *testing.T) {
	r := newRig(t, settings{})
	j := newJobs(r, 0)
	f := families[0]
	one, two := f.pairOf(1), f.pairOf(2)
	must(t, j.Bind(one, false))
	must(t, j.Bind(two, false))
	j.Remove(one.Client, one.Backend, 1)
	j.Remove(two.Client, two.Backend, 2)
	must(t, j.Run())
	must(t, j.Bind(one, false))
	must(t, j.Bind(two, false))
	j.Remove(one.Client, one.Backend, 1) // the second place still says to remove two
	must(t, j.Run())
	r.wantEntries(one, nil, nil)
	r.wantEntries(two, two.Up, two.Down)
	r.clear(two)
}
