// SPDX-License-Identifier: Apache-2.0

package ringbuf

import (
	"bytes"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"snilb/userspace/ringbuf/ringbuftest"
)

func openRing(t *testing.T, m *ebpf.Map) *Reader {
	t.Helper()
	r, err := NewReader(m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// TestRing reads what was written, over many turns of the ring, in portions up to a full ring.
func TestRing(t *testing.T) {
	p := ringbuftest.New(t, 0)
	r := openRing(t, p.Ring)
	var next, read byte
	for portion := range 100 {
		for range portion % 25 {
			if !p.Write(next) {
				break
			}
			next++
		}
		for record := r.Next(); record != nil; record = r.Next() {
			if want := bytes.Repeat([]byte{read}, ringbuftest.RecordSize); !bytes.Equal(record, want) {
				t.Fatalf("record %d is %x", read, record)
			}
			read++
			r.Done()
		}
		if read != next || r.HasData() {
			t.Fatalf("%d read of %d written", read, next)
		}
	}
	if read == 0 {
		t.Fatal("nothing was read")
	}
}

// TestRingIsFull sees that a record's place is only free again after done, and that a second reader goes on where the
// first one ended.
func TestRingIsFull(t *testing.T) {
	p := ringbuftest.New(t, 0)
	first := openRing(t, p.Ring)
	written := 0
	for p.Write(byte(written)) {
		written++
	}
	if first.Next() == nil || p.Write(99) {
		t.Error("the place of a record that is being read was given away")
	}
	first.Done()
	if !p.Write(byte(written)) {
		t.Error("the place of a record that was read is not free")
	}
	second := openRing(t, p.Ring)
	for want := 1; want <= written; want++ {
		if record := second.Next(); record == nil || record[0] != byte(want) {
			t.Fatalf("record %d is %v", want, record)
		}
	}
	if second.Next() != nil {
		t.Error("more was read than written")
	}
}

func TestRingIsNoRing(t *testing.T) {
	ringbuftest.NeedRoot(t)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	if _, err := NewReader(m); err == nil {
		t.Error("an array was taken for a ring")
	}
}

func TestWaiter(t *testing.T) {
	for name, polite := range map[string]bool{"awake": false, "polite": true} {
		t.Run(name, func(t *testing.T) { testWaiter(t, polite) })
	}
}

// testWaiter waits for a record, which comes at once or when the thread is given up, for a time, and for the end.
func testWaiter(t *testing.T, polite bool) {
	const long = time.Minute
	p := ringbuftest.New(t, 0)
	r := openRing(t, p.Ring)
	w, err := NewWaiter(p.Ring, polite)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.Free(); err != nil {
			t.Error(err)
		}
	}()
	for _, after := range []time.Duration{0, awake / 5, 4 * awake} {
		begun := time.Now()
		var writer sync.WaitGroup
		writer.Go(func() {
			time.Sleep(after)
			p.Write(1)
		})
		for !r.HasData() { // a signal may end a wait early
			if err := w.Wait(long); err != nil {
				t.Fatal(err)
			}
			if time.Since(begun) > long/2 {
				t.Fatalf("a record after %v woke nobody", after)
			}
		}
		writer.Wait()
		r.Next()
		r.Done()
	}
	for _, d := range []time.Duration{-time.Second, 0, awake / 5, awake, 20 * awake} {
		waits := 0
		for end := time.Now().Add(d); waits == 0 || time.Until(end) > 0; waits++ {
			if err := w.Wait(time.Until(end)); err != nil {
				t.Fatal(err)
			}
		}
		if waits > 8 { // more than signals end early
			t.Errorf("%d waits took %v", waits, d)
		}
	}
	// What is there already ends a wait at once.
	p.Write(2)
	begun := time.Now()
	for range 400 {
		if err := w.Wait(awake); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(begun); took > 400*awake/2 {
		t.Errorf("400 waits for what was there took %v", took)
	}
	r.Next()
	r.Done()
	var closer sync.WaitGroup
	closer.Go(func() {
		time.Sleep(4 * awake)
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	defer closer.Wait()
	for !w.Closed() {
		if err := w.Wait(long); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Wait(long); err != nil {
		t.Fatal(err)
	}
}

// TestWaiterIsQuiet is not woken by what goes into a quiet ring.
func TestWaiterIsQuiet(t *testing.T) {
	const noWakeup = 1 // BPF_RB_NO_WAKEUP
	p := ringbuftest.New(t, noWakeup)
	r := openRing(t, p.Ring)
	if p.Write(7); !r.HasData() {
		t.Fatal("a quiet record is not there")
	}
	if record := r.Next(); record == nil || record[0] != 7 {
		t.Fatalf("record %v", record)
	}
}

// TestWaiterLetsCollect has garbage collected while workers wait: with all of the runtime's places taken by waits that it
// knows nothing of, a collection must not take longer than a wait.
func TestWaiterLetsCollect(t *testing.T) {
	p := ringbuftest.New(t, 0)
	var waiters []*Waiter
	done := make(chan error)
	for range runtime.GOMAXPROCS(0) {
		w, err := NewWaiter(p.Ring, false)
		if err != nil {
			t.Fatal(err)
		}
		waiters = append(waiters, w)
		go func() {
			var err error
			for err == nil && !w.Closed() {
				err = w.Wait(awake)
			}
			done <- err
		}()
	}
	begun := time.Now()
	for range 10 {
		runtime.GC()
	}
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("ten collections took %v", took)
	}
	for _, w := range waiters {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, w := range waiters {
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := w.Free(); err != nil {
			t.Error(err)
		}
	}
}
