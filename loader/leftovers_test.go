// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
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

// An interface that was renamed while the daemon was dead has our programs still, pinned under its old name.
func TestAdoptRenamed(t *testing.T) {
	eachWay(t, func(t *testing.T, o Options) {
		l := leave(t, o)
		links := func() (all []link.ID) {
			i := &Instance{ns: l.ns, dir: filepath.Join(stateDir, "test"+l.ns.suffix)}
			found, err := i.leftLinks()
			must(t, err)
			for _, f := range found {
				all = append(all, f.id)
			}
			slices.Sort(all)
			return all
		}
		before := links()
		must(t, netlink.LinkSetDown(device(t, "eth0")))
		must(t, netlink.LinkSetName(device(t, "eth0"), "eth9"))
		must(t, netlink.LinkSetUp(device(t, "eth9")))
		o.Interfaces = named("eth9")
		if !o.forceClsact {
			if name, err := Holder("eth9"); name != "test" || err != nil {
				t.Errorf("holder %q, %v", name, err)
			}
		}
		other := withPorts(o, "other", "eth9", 30000, 30999)
		refusedBy(t, other, "instance test")
		var said strings.Builder
		o.Logger = slog.New(slog.NewTextHandler(&said, nil))
		i, err := Load(o)
		must(t, err)
		_, err = i.AddBackend(addrPort("10.8.0.7:443"))
		must(t, err)
		must(t, i.Attach())
		if after := links(); !slices.Equal(after, before) {
			t.Errorf("links %v, were %v", after, before)
		}
		if strings.Contains(said.String(), "taking a program off") || strings.Contains(said.String(), "tidy up") {
			t.Errorf("said: %s", &said)
		}
		for _, a := range i.Interfaces() {
			if a.Name == "eth0" {
				t.Errorf("attached under the old name: %+v", a)
			}
		}
		must(t, i.Close())
		for _, s := range snapshot(t, l.ns) {
			if strings.Contains(s, "snilb") {
				t.Errorf("left: %s", s)
			}
		}
	})
}

// An interface that is away when the next daemon begins is no reason to let the connections by the others go: it is attached
// when it is back.
func TestAdoptAwayInterface(t *testing.T) {
	eachWay(t, func(t *testing.T, o Options) {
		l := leave(t, o)
		o.Interfaces = named("eth0", "eth2")
		addXDPVeth(t, "eth2", "10.7.0.1/24")
		i, err := Load(o)
		must(t, err)
		must(t, i.Attach())
		die(t, i)
		for _, away := range [][]string{{"eth2"}, {"eth0", "eth2"}} {
			for _, iface := range away {
				if d, err := netlink.LinkByName(iface); err == nil {
					must(t, netlink.LinkDel(d))
				}
			}
			if err := fatal(Preflight(o)); err != nil {
				t.Errorf("preflight: %v", err)
			}
			i := load(t, o)
			must(t, i.Attach())
			for _, name := range []string{"eth0", "eth2"} {
				there := programOn(t, i, name, RoleClient) != 0
				if want := !slices.Contains(away, name); there != want {
					t.Errorf("program on %s: %v, want %v", name, there, want)
				}
			}
			if len(away) == 1 {
				l.wantFlow(t)
				must(t, i.Leave())
				continue
			}
			run(t, i)
			for _, iface := range away {
				addXDPVeth(t, iface)
				eventually(t, iface+" is attached", func() bool { return programOn(t, i, iface, RoleClient) != 0 })
			}
		}
	})
}

// A first start has nothing to go on with: an interface that is not there is a mistake.
func TestAwayInterfaceAtFirst(t *testing.T) {
	ns := newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	before := snapshot(t, ns)
	refusedBy(t, testOptions(t, "eth0", "eth2"), "interface eth2: Link not found")
	wantSame(t, snapshot(t, ns), before)
}
