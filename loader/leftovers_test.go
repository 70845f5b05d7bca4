// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// stopUnlinks has the removal of state stop for good after so many unlinks, as a kill would.
func stopUnlinks(t *testing.T, after int) {
	t.Helper()
	was := unlinkAll
	t.Cleanup(func() { unlinkAll = was })
	unlinkAll = func(path string) error {
		var all []string
		err := filepath.WalkDir(path, func(p string, _ fs.DirEntry, err error) error {
			all = append(all, p)
			return err
		})
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		slices.Reverse(all) // what is in a directory before it
		for _, p := range all {
			if after == 0 {
				return errors.New("killed")
			}
			after--
			if err := os.Remove(p); err != nil {
				return err
			}
		}
		return nil
	}
}

// A daemon, or a detach, that is killed while it removes the state leaves nothing that keeps the next one from starting.
func TestKilledWhileRemoving(t *testing.T) {
	for name, remove := range map[string]func(t *testing.T, i *Instance) error{
		"close":  func(_ *testing.T, i *Instance) error { return i.Close() },
		"detach": func(t *testing.T, i *Instance) error { die(t, i); return Detach("test", i.log) },
	} {
		t.Run(name, func(t *testing.T) {
			ns := newNetns(t)
			addVeth(t, "eth0", "10.9.0.1/24")
			before := snapshot(t, ns)
			o := testOptions(t, "eth0")
			t.Cleanup(func() { _ = Detach("test", o.Logger) }) // nothing, but after a failure
			for after, done := 0, false; !done; after++ {
				i, err := Load(o)
				must(t, err)
				if i.Adopted() {
					die(t, i)
					t.Fatalf("after %d unlinks the rest was taken for state", after-1)
				}
				was := unlinkAll
				stopUnlinks(t, after)
				err = remove(t, i)
				unlinkAll = was
				if done = err == nil; done && after < 10 {
					t.Fatalf("removed by only %d unlinks", after)
				}
			}
			wantSame(t, snapshot(t, ns), before)
		})
	}
}

// What a daemon leaves that is killed before its state is in place, or after it was taken from there, is found without its name.
func TestRemainsUnfinished(t *testing.T) {
	ns := newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	before := snapshot(t, ns)
	o := testOptions(t, "eth0")
	i, err := Load(o)
	must(t, err)
	t.Cleanup(func() { _ = Detach("test", o.Logger) })
	must(t, os.Rename(i.dir, i.dir+unfinished))
	die(t, i)
	wantFinding(t, Doctor(nil), LevelWarn, "instance test", "died while it began or ended", "snilb detach --all --name test")
	remains, err := Remains()
	must(t, err)
	wantSame(t, remains, []string{"test"})
	if names, err := Instances(); err != nil || names != nil {
		t.Errorf("instances with state: %q, %v", names, err)
	}
	must(t, Detach("test", o.Logger))
	wantSame(t, snapshot(t, ns), before)
}
