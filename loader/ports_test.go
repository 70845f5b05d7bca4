// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"snilb/maps"
)

// withPorts is another instance on other interfaces, or the same one as before.
func withPorts(o Options, name, iface string, first, last uint16) Options {
	o.Name, o.Interfaces = name, named(iface)
	o.SourcePortFirst, o.SourcePortLast = first, last
	return o
}

func refusedBy(t *testing.T, o Options, want string) {
	t.Helper()
	i, err := Load(o)
	if err == nil {
		must(t, i.Close())
	}
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
}

// keepAndLeave has an instance that ended with all of its connections going on.
func keepAndLeave(t *testing.T, o Options) {
	t.Helper()
	i, err := Load(o)
	must(t, err)
	t.Cleanup(func() { must(t, Detach(o.Name, o.Logger)) })
	must(t, i.Attach())
	must(t, i.Leave())
}

// An instance that left its connections has no lock any more, but has its ports still.
func TestPortsOfLeftInstance(t *testing.T) {
	ns := newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	addVeth(t, "eth1", "10.8.0.1/24")
	o := testOptions(t)
	keepAndLeave(t, withPorts(o, "other", "eth1", 10000, 19999))
	kept := snapshot(t, ns)
	refusedBy(t, withPorts(o, "test", "eth0", 15000, 15999), "instance other, whose daemon is dead, still has connections from the source ports 10000-19999")
	wantSame(t, snapshot(t, ns), kept)
	i, err := Load(withPorts(o, "third", "eth0", 20000, 20999))
	must(t, err)
	must(t, i.Close())

	t.Log("of another layout: the ports are not known, the interfaces are")
	tables := pinnedTables(t, filepath.Join(stateDir, "other"+ns.suffix))
	zero := uint32(0)
	record, err := maps.ReadRecord(tables.Instance)
	must(t, err)
	record.Layout++
	must(t, tables.Instance.Put(&zero, record))
	load(t, withPorts(o, "test", "eth0", 15000, 15999))
	refusedBy(t, withPorts(o, "fourth", "eth1", 25000, 25999), "interface eth1 still has the program of instance other")
}

// What an instance takes over widens its source ports: by all of them it may have connections.
func TestPortsOfMergedRange(t *testing.T) {
	ns := newNetns(t)
	for n, iface := range []string{"eth0", "eth1", "eth2"} {
		addVeth(t, iface, "10."+string(rune('7'+n))+".0.1/24")
	}
	o := testOptions(t)
	keepAndLeave(t, withPorts(o, "test", "eth0", 20000, 20999))
	other, err := Load(withPorts(o, "other", "eth1", 15000, 15999))
	must(t, err)
	before := snapshot(t, ns)
	refusedBy(t, withPorts(o, "test", "eth0", 10000, 10999), "the source ports 10000-20999 overlap with those of instance other (15000-15999")
	wantSame(t, snapshot(t, ns), before)
	must(t, other.Close())

	load(t, withPorts(o, "test", "eth0", 10000, 10999))
	if got := readOwner(lockPath(ns, "test")); got.ports != [2]uint16{10000, 20999} || got.pid != os.Getpid() {
		t.Errorf("the lock says %+v", got)
	}
	refusedBy(t, withPorts(o, "other", "eth1", 15000, 15999), "overlap with those of instance test (10000-20999")
}

// Between old and new source ports may lie those that the node gives its own connections.
func TestMergedRangeIsChecked(t *testing.T) {
	ns := newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	o := testOptions(t)
	keepAndLeave(t, withPorts(o, "test", "eth0", 10000, 29999))
	before := snapshot(t, ns)
	refusedBy(t, withPorts(o, "test", "eth0", 61100, 62000),
		"source ports 61100-62000 cannot be added to those that connections have, 10000-29999: the source ports 10000-62000 overlap the ports 32768-60999")
	wantSame(t, snapshot(t, ns), before)

	var said strings.Builder
	next := withPorts(o, "test", "eth0", 32700, 32767)
	next.Logger = slog.New(slog.NewTextHandler(&said, nil))
	i := load(t, next)
	if got := i.SourcePorts(); got != [2]uint16{10000, 32767} {
		t.Errorf("source ports %v", got)
	}
	if want := "the source ports 10000-32767 overlap Kubernetes' NodePorts"; !strings.Contains(said.String(), want) {
		t.Errorf("not said: %s\n%s", want, &said)
	}
}
