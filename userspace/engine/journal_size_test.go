// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestJournalOfManyBackends has ids that take more than a small journal does: it is not begun anew for every flow.
func TestJournalOfManyBackends(t *testing.T) {
	var many strings.Builder
	for n := range 23_000 {
		fmt.Fprintf(&many, "%q, ", fmt.Sprintf("10.0.%d.%d:443", n>>8, n&255))
	}
	k, path := newKernel(t, 1, 100), filepath.Join(t.TempDir(), "flows")
	d := k.journaled(path, "listen: \":443\"\npools: {a-pool-with-a-long-name: {backends: ["+many.String()+"]}}\nroutes: [{sni: a.example.com, pool: a-pool-with-a-long-name}]\n")
	begun, err := os.Stat(path)
	must(t, err)
	if begun.Size() <= journalSmall {
		t.Fatalf("the journal has %d bytes, and is small", begun.Size())
	}
	for n := range 5 {
		f := d.binds(fmt.Sprintf("203.0.113.7:%d", 1000+n), "a.example.com", "")
		f.remove(d.workers[0], "test")
		d.journal.step()
		if now, err := os.Stat(path); err != nil || !os.SameFile(begun, now) {
			t.Fatalf("flow %d: the journal was begun anew, %v", n, err)
		}
	}
	// It is in time, be all flows still there.
	f := d.binds("203.0.113.7:2000", "a.example.com", "")
	for most := begun.Size() + begun.Size()/2 + journalSmall; ; {
		for range 1000 {
			d.workers[0].note(f)
		}
		d.journal.step()
		now, err := os.Stat(path)
		must(t, err)
		if !os.SameFile(begun, now) {
			break
		}
		if now.Size() > most {
			t.Fatalf("the journal has %d bytes, and is not begun anew", now.Size())
		}
	}
}

// TestJournalDiskFull has room for one journal, and not for two.
func TestJournalDiskFull(t *testing.T) {
	k, dir := newKernel(t, 1, 100), t.TempDir()
	// Nobody else sees this mount; it goes with the thread at the latest.
	runtime.LockOSThread()
	must(t, unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS))
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"))
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	path := filepath.Join(dir, "flows")
	d := k.journaled(path, journalRoutes)
	d.bindsSome()
	w := d.workers[0]
	for d.journal.size < 200<<10 {
		w.note(w.flows.at(1))
		d.journal.step()
	}
	if err := os.WriteFile(filepath.Join(dir, "others"), make([]byte, 256<<10), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("%v: there is still room", err)
	}
	for range 1000 {
		w.note(w.flows.at(1))
	}
	d.journal.step()
	d.journal.retryAt = 0
	d.journal.step()
	if all, torn := readAll(t, path); torn || len(all) < 12 {
		t.Errorf("%d records, torn %v: %s", len(all), torn, d.log.String())
	}
	if d.journal.failed {
		t.Error("it is not written")
	}
	same(t, k.journaled(path, journalRoutes).lives(), d.lives())
}
