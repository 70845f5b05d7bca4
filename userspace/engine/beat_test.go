// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"

	"snilb/maps"
	"snilb/userspace/ringbuf/ringbuftest"
)

// pulseDesk is a desk whose worker runs, with a control map that the heartbeat writes.
type pulseDesk struct {
	*desk
	heart *heart
}

func newPulseDesk(t *testing.T) *pulseDesk {
	t.Helper()
	main, quiet := ringbuftest.New(t, 0), ringbuftest.New(t, 0)
	control, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: uint32(unsafe.Sizeof(maps.Live{})), MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = control.Close() })
	d := newDesk(t, "")
	o := &d.e.o
	o.Tables, o.Rings = &maps.Tables{Control: control}, []*ebpf.Map{main.Ring}
	o.MSS = func() (uint16, uint16) { return 1460, 1440 }
	o.HasSockets = func() bool { return false }
	if err := d.openRings(main.Ring, quiet.Ring); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- d.run() }()
	t.Cleanup(func() {
		if err := d.stop(); err != nil {
			t.Error(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := d.free(); err != nil {
			t.Error(err)
		}
	})
	return &pulseDesk{d, newHeart(d.e)}
}

// beats lets the heart beat n times, and reports whether the last one came to the kernel.
func (d *pulseDesk) beats(n int) bool {
	d.t.Helper()
	zero, live := uint32(0), maps.Live{}
	for range n {
		live = maps.Live{}
		if err := d.e.o.Tables.SetLive(&live); err != nil {
			d.t.Fatal(err)
		}
		if err := d.heart.beat(); err != nil {
			d.t.Fatal(err)
		}
	}
	if err := d.e.o.Tables.Control.Lookup(&zero, &live); err != nil {
		d.t.Fatal(err)
	}
	return live.Beat != 0
}

// turn waits until the worker has come round.
func (d *pulseDesk) turn() {
	d.t.Helper()
	was := d.turns.Load()
	for limit := time.Now().Add(time.Minute); d.turns.Load() == was; time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			d.t.Fatal("the worker does not come round")
		}
	}
}

// A worker that does not get its lock stops the heartbeat, so that the kernel leaves SYNs to the stack and the service
// manager starts the daemon again; it is not given up at once, and comes back.
func TestHeartbeatStopsWithAWorker(t *testing.T) {
	d := newPulseDesk(t)
	d.turn()
	if d.e.Alive() {
		t.Error("alive before the first beat")
	}
	if !d.beats(1) || !d.e.Alive() {
		t.Error("no heartbeat of an engine that works")
	}
	d.mu.Lock()
	if !d.beats(stuckAfter - 1) {
		t.Errorf("the heartbeat stopped before beat %d without a turn", stuckAfter)
	}
	// One turn may have been under way.
	if d.beats(2) {
		t.Errorf("the heart beats with a worker that has made no turn in %d beats", stuckAfter)
	}
	d.beats(3)
	d.e.sourceClient.Store(true)
	d.e.dropSourceClient() // must not wait for it
	if !d.e.sourceClient.Load() {
		t.Error("nobody is known to go by source: client, and it was dropped")
	}
	d.e.beaten.Add(-int64(aliveFor)) // the time that passes meanwhile
	for _, who := range []string{"the heart", "a reload"} {
		if d.e.Alive() {
			t.Error("alive without a heartbeat: told by", who)
		}
		last := uint64(d.e.beaten.Load())
		must(t, d.e.beat()) // as a reload does
		var live maps.Live
		if must(t, d.e.o.Tables.Control.Lookup(uint32(0), &live)); live.Beat != last || live.WallOffset == 0 {
			t.Errorf("a reload while a worker is stuck: %+v, want the last beat, %d", live, last)
		}
	}
	d.mu.Unlock()
	d.turn()
	if !d.beats(1) || !d.e.Alive() {
		t.Error("the worker goes on, and the heart does not")
	}
	d.mu.Lock()
	if !d.beats(stuckAfter - 1) {
		t.Error("beats without a turn are counted from the worker's last standstill, not from its last turn")
	}
	d.mu.Unlock()
	for what, want := range map[string]int{"a worker is stuck": 1, "the worker goes on": 1} {
		if n := strings.Count(d.log.String(), what); n != want {
			t.Errorf("%q %d times in the log, want %d:\n%s", what, n, want, d.log.String())
		}
	}
}

// A daemon that goes on with the state of an earlier one is not taken for alive before it says that it steers: the kernel has
// its keys, and the earlier one's last sign of life. Without an earlier one it is alive from the first packet on.
func TestHeartbeatBeginsWhenReady(t *testing.T) {
	for name, c := range map[string]struct{ found, want uint64 }{
		"alive": {12345, 12345}, "drained": {0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKernel(t, 1, 10)
			must(t, k.tables.SetLive(&maps.Live{Beat: c.found}))
			d := k.start(firstPlan(t, kernelRoutes, Known{}), func(o *Options) { o.Adopted = true })
			must(t, d.beat())
			live, err := k.tables.Live()
			must(t, err)
			if live.Beat != c.want || live.Keys[0] == (maps.CookieKey{}) {
				t.Errorf("the kernel has beat %d and keys %v, want %d and keys", live.Beat, live.Keys, c.want)
			}
			if !d.Alive() {
				t.Error("the service manager is told that it hangs")
			}
			before := d.clock.now()
			must(t, d.Ready())
			if live, err = k.tables.Live(); err != nil || live.Beat < uint64(before) {
				t.Errorf("ready, and the kernel has beat %d, %v", live.Beat, err)
			}
			must(t, d.StopListening())
			if live, err = k.tables.Live(); err != nil || live.Beat != 0 {
				t.Errorf("draining, and the kernel has beat %d, %v", live.Beat, err)
			}
		})
	}
	k := newKernel(t, 1, 10)
	d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
	if live, err := k.tables.Live(); err != nil || live.Beat < uint64(d.clock.base) {
		t.Errorf("at the first start the kernel has beat %d, %v", live.Beat, err)
	}
}
