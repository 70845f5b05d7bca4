// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"snilb/maps"
)

// eachWay runs a test for each way in which programs are attached.
func eachWay(t *testing.T, test func(t *testing.T, o Options)) {
	for name, change := range map[string]func(*Options){
		"tcx":         func(*Options) {},
		"clsact":      func(o *Options) { o.forceClsact = true },
		"xdp":         func(o *Options) { o.Mode = ModeXDP },
		"xdp-generic": func(o *Options) { o.Mode = ModeXDPGeneric },
	} {
		t.Run(name, func(t *testing.T) {
			o := testOptions(t, "eth0")
			change(&o)
			test(t, o)
		})
	}
}

// left is what a dead daemon left, and how it looked.
type left struct {
	ns       *namespace
	empty    []string // before it
	snapshot []string // after it
	tap      int
	record   maps.InstanceRecord
	slots    []InterfaceStatus
	pair     maps.Pair
}

// leave has an instance with a backend behind eth1 and a flow to it die.
func leave(t *testing.T, o Options) *left {
	t.Helper()
	l := &left{ns: newNetns(t)}
	addXDPVeth(t, "eth0", "10.9.0.1/24")
	addXDPVeth(t, "eth1", "10.8.0.1/24")
	l.empty = snapshot(t, l.ns)
	i, err := Load(o)
	must(t, err)
	_, err = i.AddBackend(addrPort("10.8.0.7:443"))
	must(t, err)
	must(t, i.SetListeners([]ListenerSpec{{ID: 1, Addr: addrPort("10.9.0.1:443")}}))
	must(t, i.Attach())
	l.pair = flowBetween(t, i, "10.9.0.9:5000", "10.9.0.1:443", "10.8.0.1:10000", "10.8.0.7:443")
	l.tap, l.record, l.slots = i.tap.index, i.record, i.Interfaces()
	die(t, i)
	l.snapshot = l.look(t)
	return l
}

// look is a snapshot in which it does not matter how many queues the TAP device has just now.
func (l *left) look(t *testing.T) []string {
	t.Helper()
	all := slices.DeleteFunc(snapshot(t, l.ns), func(s string) bool { return s == "qdisc mq on snilb0" })
	return slices.Compact(all)
}

// flowBetween enters a flow as the engine does.
func flowBetween(t *testing.T, i *Instance, client, listener, local, backend string) maps.Pair {
	t.Helper()
	up := maps.Tuple{Src: addrPort(client), Dst: addrPort(listener)}
	down := maps.Tuple{Src: addrPort(backend), Dst: addrPort(local)}
	toBackend, err := i.NextHop(down.Src.Addr())
	must(t, err)
	toClient, err := i.NextHop(up.Src.Addr())
	must(t, err)
	pair := maps.Pair{
		Client: up, Backend: down,
		Up:   &maps.Entry{To: down.Reverse(), Flow: maps.Flow{Control: maps.FlowControl(toBackend.Index, 0, 0), Generation: 7}},
		Down: &maps.Entry{To: up.Reverse(), Flow: maps.Flow{Control: maps.FlowControl(toClient.Index, 0, 0), Generation: 7}},
	}
	must(t, i.tables.InsertFlow(maps.LegBackend, down, pair.Down))
	must(t, i.tables.InsertFlow(maps.LegClient, up, pair.Up))
	return pair
}

// wantFlow wants the flow in the tables, and next hops that lead where they led.
func (l *left) wantFlow(t *testing.T) {
	t.Helper()
	tables := pinnedTables(t, filepath.Join(stateDir, "test"+l.ns.suffix))
	for leg, tuple := range map[maps.Leg]maps.Tuple{maps.LegClient: l.pair.Client, maps.LegBackend: l.pair.Backend} {
		e, err := tables.LookupFlow(leg, tuple)
		if err != nil || e.Flow.Generation != 7 {
			t.Fatalf("leg %d: %+v, %v", leg, e, err)
		}
		index := uint32(e.Nexthop())
		var hop maps.Nexthop
		must(t, tables.Nexthops.Lookup(&index, &hop))
		want := map[maps.Leg]string{maps.LegClient: "eth1", maps.LegBackend: "eth0"}[leg]
		if hop.Ifindex != uint32(device(t, want).Attrs().Index) {
			t.Errorf("leg %d leaves by interface %d, not %s", leg, hop.Ifindex, want)
		}
	}
}

// pinnedTables opens some of an instance's tables.
func pinnedTables(t *testing.T, dir string) *maps.Tables {
	t.Helper()
	tables := &maps.Tables{}
	for name, to := range map[string]**ebpf.Map{
		"flows4": &tables.Flows4, "flows6": &tables.Flows6, "nexthops": &tables.Nexthops, "counters": &tables.Counters,
		"paths": &tables.Paths, "listeners": &tables.Listeners, "instance": &tables.Instance,
	} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
		must(t, err)
		t.Cleanup(func() { must(t, m.Close()) })
		*to = m
	}
	return tables
}

// ids lists the programs on an interface that see packets, by their ids.
func ids(t *testing.T, i *Instance) map[attachKey]ebpf.ProgramID {
	t.Helper()
	all := make(map[attachKey]ebpf.ProgramID)
	for key, a := range i.attached {
		h, ok := a.hook.(*linkHook)
		if !ok {
			continue
		}
		info, err := h.link.Info()
		must(t, err)
		all[key] = info.Program
	}
	return all
}

// A daemon that begins where another one died goes on with its tables, links, device, record and counters.
func TestAdopt(t *testing.T) {
	eachWay(t, func(t *testing.T, o Options) {
		l := leave(t, o)
		tables := pinnedTables(t, filepath.Join(stateDir, "test"+l.ns.suffix))
		slot := l.slots[len(l.slots)-1].Slot
		count(t, tables, slot, 5)

		i, err := Load(o)
		must(t, err)
		if !i.Adopted() {
			t.Fatal("not adopted")
		}
		l.wantFlow(t)
		_, err = i.AddBackend(addrPort("10.8.0.7:443"))
		must(t, err)
		must(t, i.Attach())
		wantSame(t, l.look(t), l.snapshot)
		if i.tap.index != l.tap {
			t.Error("another TAP device")
		}
		if i.record != l.record || i.Secret() != l.record.Secret || l.record.Secret == ([32]byte{}) {
			t.Error("another record")
		}
		if got := i.Interfaces(); !slices.Equal(got, l.slots) {
			t.Errorf("interfaces %+v, were %+v", got, l.slots)
		}
		if packets, err := i.tables.Packets(slot); err != nil || packets.Packets[0] != 5 {
			t.Errorf("counters begin anew: %d, %v", packets.Packets[0], err)
		}
		for key, id := range ids(t, i) {
			info, err := i.attached[key].prog.Info()
			must(t, err)
			if own, _ := info.ID(); own != id {
				t.Errorf("%v has program %d, not ours, %d", key, id, own)
			}
		}
		l.wantFlow(t)

		t.Log("and is followed in turn")
		must(t, i.Leave())
		wantSame(t, l.look(t), without(l.snapshot, ".lock"))
		l.wantFlow(t)
		i, err = Load(o)
		must(t, err)
		_, err = i.AddBackend(addrPort("10.8.0.7:443"))
		must(t, err)
		must(t, i.Attach())
		l.wantFlow(t)
		must(t, i.Close())
		wantSame(t, snapshot(t, l.ns), l.empty)
	})
}

func without(all []string, ending string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return strings.HasSuffix(s, ending) })
}

func count(t *testing.T, tables *maps.Tables, slot uint32, n uint64) {
	t.Helper()
	cpus, err := ebpf.PossibleCPU()
	must(t, err)
	sets := make([]maps.CounterSet, cpus)
	sets[0].Packets[0] = n
	must(t, tables.Counters.Put(&slot, sets))
}

// Whatever fails, what the dead daemon left is as it was: connections go on.
func TestAdoptFailure(t *testing.T) {
	eachWay(t, func(t *testing.T, o Options) {
		l := leave(t, o)
		rest := without(l.snapshot, ".lock")
		var steps []string
		try := func(failing string) error {
			o.before = func(step string) error {
				steps = append(steps, step)
				if step == failing {
					return errors.New("injected")
				}
				return nil
			}
			i, err := Load(o)
			if err != nil {
				return err
			}
			if _, err = i.AddBackend(addrPort("10.8.0.7:443")); err == nil {
				err = i.Attach()
			}
			if err == nil {
				must(t, i.Leave())
				return nil
			}
			return errors.Join(err, i.Close())
		}
		must(t, try(""))
		seen := slices.Clone(steps)
		if len(seen) < 8+3*3 {
			t.Fatalf("only %d steps: %q", len(seen), seen)
		}
		for _, failing := range seen {
			if err := try(failing); err == nil || err.Error() != "injected" && !strings.Contains(err.Error(), "injected") {
				t.Errorf("step %q: %v", failing, err)
			}
			wantSame(t, l.look(t), rest)
			l.wantFlow(t)
			if t.Failed() {
				t.Fatalf("after a failure of %q", failing)
			}
		}
		must(t, try(""))
		must(t, Detach("test", o.Logger))
		wantSame(t, snapshot(t, l.ns), l.empty)
	})
}

// State of another layout is refused and stays as it is; detach removes it.
func TestAdoptOtherLayout(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, dir string){
		"layout": func(t *testing.T, dir string) {
			tables := pinnedTables(t, dir)
			zero := uint32(0)
			record, err := maps.ReadRecord(tables.Instance)
			must(t, err)
			record.Layout++
			must(t, tables.Instance.Put(&zero, record))
		},
		"no record": func(t *testing.T, dir string) { must(t, os.Remove(filepath.Join(dir, "instance"))) },
		"short record": func(t *testing.T, dir string) {
			replacePin(t, filepath.Join(dir, "instance"), &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 2, MaxEntries: 1})
		},
		"no ring": func(t *testing.T, dir string) { must(t, os.Remove(filepath.Join(dir, ringPins, "quiet1"))) },
		"other flows": func(t *testing.T, dir string) {
			replacePin(t, filepath.Join(dir, "flows6"), &ebpf.MapSpec{Type: ebpf.Hash, KeySize: 40, ValueSize: 88, MaxEntries: 10})
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := testOptions(t, "eth0")
			l := leave(t, o)
			spoil(t, filepath.Join(stateDir, "test"+l.ns.suffix))
			_, err := Load(o)
			if !errors.Is(err, ErrLayout) || !strings.Contains(err.Error(), "snilb detach --all --name test") {
				t.Errorf("load: %v", err)
			}
			wantSame(t, l.look(t), without(l.snapshot, ".lock"))
			must(t, Detach("test", o.Logger))
			wantSame(t, snapshot(t, l.ns), l.empty)
		})
	}
}

func replacePin(t *testing.T, path string, spec *ebpf.MapSpec) {
	t.Helper()
	m, err := ebpf.NewMap(spec)
	must(t, err)
	must(t, os.Remove(path))
	must(t, m.Pin(path))
	must(t, m.Close())
}

// Counters are nobody's connection: those of another version are begun anew.
func TestAdoptOtherCounters(t *testing.T) {
	o := testOptions(t, "eth0")
	l := leave(t, o)
	dir := filepath.Join(stateDir, "test"+l.ns.suffix)
	replacePin(t, filepath.Join(dir, "counters"), &ebpf.MapSpec{Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: 64})
	i, err := Load(o)
	must(t, err)
	must(t, i.Attach())
	l.wantFlow(t)
	count(t, pinnedTables(t, dir), 0, 3) // of the right size again
	if packets, err := i.tables.Packets(0); err != nil || packets.Packets[0] != 3 {
		t.Errorf("the pin is of another map: %d, %v", packets.Packets[0], err)
	}
	must(t, i.Close())
	wantSame(t, snapshot(t, l.ns), l.empty)
}

// What flows were made by stays, whatever the new daemon wants; what they do not depend on is as it wants.
func TestAdoptOptions(t *testing.T) {
	o := testOptions(t, "eth0")
	o.SourcePortFirst, o.SourcePortLast = 20001, 21000
	l := leave(t, o)
	o.Workers, o.FlowEntries, o.RingSize = 3, 5000, os.Getpagesize()*8
	o.SourcePortFirst, o.SourcePortLast = 10000, 20500
	var said strings.Builder
	o.Logger = slog.New(slog.NewTextHandler(&said, nil))
	i := load(t, o)
	must(t, i.Attach())
	if i.opts.Workers != 2 || i.opts.FlowEntries != 1000 || i.opts.RingSize != int(l.record.RingSize) || len(i.TapQueues()) != 2 {
		t.Errorf("options %+v", i.opts)
	}
	if got := i.SourcePorts(); got != [2]uint16{9999, 21000} || i.record.SourcePortFirst != 9999 {
		t.Errorf("source ports %v, recorded %d", got, i.record.SourcePortFirst)
	}
	for _, want := range []string{"number of workers stays", "size of the flow tables stays"} {
		if !strings.Contains(said.String(), want) {
			t.Errorf("not said: %s\n%s", want, &said)
		}
	}
}

func TestMergePorts(t *testing.T) {
	for _, c := range []struct {
		first, last, wantFirst, wantLast uint16 // what the new daemon wants, and gets
		workers                          uint32
		mergedFirst, mergedLast          uint16
	}{
		{10000, 20000, 10000, 20000, 4, 10000, 20000},
		{10000, 20000, 11000, 12000, 4, 10000, 20000},
		{10000, 20000, 9999, 30000, 4, 9996, 30000},
		{10000, 20000, 9996, 30000, 4, 9996, 30000},
		{10, 20, 2, 20, 4, 2, 20},
		{10, 20, 1, 20, 4, 0, 0},
		{10, 20, 1, 20, 1, 1, 20},
	} {
		r := maps.InstanceRecord{SourcePortFirst: c.first, SourcePortLast: c.last, Workers: c.workers}
		first, last, err := mergePorts(&r, c.wantFirst, c.wantLast)
		if (err != nil) != (c.mergedFirst == 0) || err == nil && (first != c.mergedFirst || last != c.mergedLast) {
			t.Errorf("%+v: %d to %d, %v", c, first, last, err)
		}
	}
}

// An interface that no longer faces clients has its client program taken off; a backend's stays, for connections.
func TestAdoptOtherInterfaces(t *testing.T) {
	eachWay(t, func(t *testing.T, o Options) {
		l := leave(t, o)
		addXDPVeth(t, "eth2", "10.7.0.1/24")
		o.Interfaces = named("eth2")
		i := load(t, o)
		must(t, i.Attach())
		wantOn := func(name string, want ...string) {
			t.Helper()
			var got []string
			for _, on := range programsOn(t, device(t, name)) {
				for _, role := range []string{"client", "backend"} {
					if strings.Contains(on, "snilb_"+role) {
						got = append(got, role)
					}
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("on %s: %q, want %q", name, programsOn(t, device(t, name)), want)
			}
		}
		wantOn("eth0", "backend")
		wantOn("eth1", "backend")
		wantOn("eth2", "client", "backend")
		l.wantFlow(t)
	})
}

// An interface that was made again has a dead link under its name, one that was renamed a living one under another.
func TestAdoptMovedInterfaces(t *testing.T) {
	o := testOptions(t, "eth0")
	l := leave(t, o)
	must(t, netlink.LinkDel(device(t, "eth0")))
	addXDPVeth(t, "eth0", "10.9.0.1/24")
	must(t, netlink.LinkSetDown(device(t, "eth1")))
	must(t, netlink.LinkSetName(device(t, "eth1"), "eth9"))
	must(t, netlink.LinkSetUp(device(t, "eth9")))
	i, err := Load(o)
	must(t, err)
	must(t, i.Attach())
	wantSame(t, programsOn(t, device(t, "eth0")), []string{"program snilb_client on eth0", "program snilb_backend on eth0"})
	wantSame(t, programsOn(t, device(t, "eth9")), []string{"program snilb_backend on eth9"})
	must(t, i.Close())
	if got := snapshot(t, l.ns); slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, "snilb") }) {
		t.Errorf("left: %q", got)
	}
}

// Another mode than before: TC goes on behind, XDP is put in front, taken off or attached otherwise.
func TestAdoptOtherMode(t *testing.T) {
	for _, from := range Modes {
		for _, to := range Modes {
			t.Run(string(from)+"-"+string(to), func(t *testing.T) {
				o := testOptions(t, "eth0")
				o.Mode = from
				l := leave(t, o)
				o.Mode = to
				i, err := Load(o)
				must(t, err)
				_, err = i.AddBackend(addrPort("10.8.0.7:443"))
				must(t, err)
				must(t, i.Attach())
				for _, name := range []string{"eth0", "eth1"} {
					want := map[Mode]uint32{ModeXDP: 1, ModeXDPGeneric: 2}[to]
					if got := attachedMode(t, device(t, name)); got != want {
						t.Errorf("%s has XDP mode %d, want %d", name, got, want)
					}
				}
				l.wantFlow(t)
				must(t, i.Close())
				wantSame(t, snapshot(t, l.ns), l.empty)
			})
		}
	}
}

// Paths of backends that are gone would take packets of other connections from the stack.
func TestAdoptOtherBackends(t *testing.T) {
	o := testOptions(t, "eth0")
	l := leave(t, o)
	i := load(t, o)
	_, err := i.AddBackend(addrPort("10.8.0.8:443"))
	must(t, err)
	must(t, i.SetListeners([]ListenerSpec{{ID: 1, Addr: addrPort("10.9.0.1:8443")}}))
	must(t, i.Attach())
	paths, err := i.tables.PathKeys()
	must(t, err)
	if len(paths) != 1 || paths[0].Backend != addrPort("10.8.0.8:443") || paths[0].Source != addr("10.8.0.1") {
		t.Errorf("paths %v", paths)
	}
	var key maps.ListenerKey
	var value maps.Listener
	it := i.tables.Listeners.Iterate()
	if !it.Next(&key, &value) || maps.Port(key.Port) != 8443 || it.Next(&key, &value) {
		t.Errorf("listeners: %v", key)
	}
	l.wantFlow(t)
}

// A next hop's index is in the flows: it keeps its meaning. Those that no flow has are used again.
func TestAdoptHops(t *testing.T) {
	links := map[int]int{2: 1500, 3: 1500}
	gateways := map[netip.Addr]route{
		addr("192.0.2.1"): {ifindex: 2, gateway: addr("10.9.0.254")},
		addr("192.0.2.2"): {ifindex: 3, gateway: addr("10.8.0.254"), mtu: 1400},
		addr("192.0.2.3"): {ifindex: 3, gateway: addr("10.8.0.254"), mtu: 1400},
		addr("192.0.2.4"): {ifindex: 2, gateway: addr("10.9.0.253")},
		addr("10.9.0.7"):  {ifindex: 2, mtu: 1400}, // on the link, with an entry of its own
	}
	written := make(map[uint16]maps.Nexthop)
	table := newHopTable(
		func(index uint32, hop *maps.Nexthop) error { written[uint16(index)] = *hop; return nil },
		func(dst netip.Addr) (route, error) { return gateways[dst], nil },
	)
	link := func(ifindex int) linkInfo { return linkInfo{mtu: links[ifindex]} }
	take := func(dst string) uint16 {
		r := gateways[addr(dst)]
		index, _, _, err := table.index(addr(dst), r, link(r.ifindex))
		must(t, err)
		return index
	}
	one, two := take("192.0.2.1"), take("192.0.2.2")
	limited, _, err := table.within(two, addr("192.0.2.3"), 1300)
	must(t, err)
	unused := take("192.0.2.4")
	table.own.add(addr("10.9.0.7"))
	own := take("10.9.0.7")
	before := map[uint16]maps.Nexthop{one: written[one], two: written[two], limited: written[limited], unused: written[unused], own: written[own]}

	table = newHopTable(table.write, table.find)
	table.adopt(before, map[uint16][]netip.Addr{
		one: {addr("192.0.2.1")}, two: {addr("192.0.2.2")}, limited: {addr("192.0.2.3")}, own: {addr("10.9.0.7")},
	}, link)
	must(t, table.refresh(link))
	for index, want := range before {
		if index != unused && written[index] != want {
			t.Errorf("entry %d is %+v, was %+v", index, written[index], want)
		}
	}
	if take("192.0.2.1") != one || take("192.0.2.2") != two {
		t.Error("another entry for what has one")
	}
	if take("10.9.0.7") != own {
		t.Error("another entry for a destination on the link")
	}
	if again, _, err := table.within(two, addr("192.0.2.3"), 1300); err != nil || again != limited {
		t.Errorf("another entry for the limit: %d, %v", again, err)
	}
	if take("192.0.2.4") != unused {
		t.Error("the entry that no flow has is not used again")
	}
	gateways[addr("192.0.2.1")] = route{ifindex: 3, gateway: addr("10.8.0.254")}
	must(t, table.refresh(link))
	if written[one].Ifindex != 3 {
		t.Errorf("an adopted entry does not follow its route: %+v", written[one])
	}
}

// An entry whose interface was gone when the daemon died is all zero, but flows have its index: nobody else may get it,
// and it is for them again when they have a way.
func TestAdoptHopsWithoutLink(t *testing.T) {
	gateways := map[netip.Addr]route{
		addr("192.0.2.1"): {ifindex: 2, gateway: addr("10.9.0.254")},
		addr("192.0.2.3"): {ifindex: 2, gateway: addr("10.9.0.253")},
	}
	written := make(map[uint16]maps.Nexthop)
	table := newHopTable(
		func(index uint32, hop *maps.Nexthop) error { written[uint16(index)] = *hop; return nil },
		func(dst netip.Addr) (route, error) {
			if r, ok := gateways[dst]; ok {
				return r, nil
			}
			return route{}, ErrUnreachable
		},
	)
	link := func(int) linkInfo { return linkInfo{mtu: 1500} }
	const moved, waiting = 1, 3 // and 2 is free
	table.adopt(map[uint16]maps.Nexthop{}, map[uint16][]netip.Addr{
		moved: {addr("192.0.2.1")}, waiting: {addr("192.0.2.2")},
	}, link)
	must(t, table.refresh(link))
	if written[moved].Gateway != maps.Words(addr("10.9.0.254")) || written[waiting].Ifindex != 0 {
		t.Errorf("written: %+v", written)
	}
	for _, want := range []uint16{2, 4} {
		dst := addr("192.0.2.3")
		gateways[dst] = route{ifindex: 2, gateway: addr("10.9.0." + strconv.Itoa(int(want)))}
		index, _, _, err := table.index(dst, gateways[dst], link(2))
		if must(t, err); index != want {
			t.Errorf("a new destination gets entry %d, not %d", index, want)
		}
	}
	gateways[addr("192.0.2.2")] = route{ifindex: 2, gateway: addr("10.9.0.252")}
	must(t, table.refresh(link))
	if written[waiting].Gateway != maps.Words(addr("10.9.0.252")) {
		t.Errorf("what waited for a way has %+v", written[waiting])
	}
}

// A worker may send by an interface that was made again before its messages are read: the new link stays pinned.
func TestNewLinkStaysPinned(t *testing.T) {
	bothHooks(t, func(t *testing.T, kind string, clsact bool) {
		ns := newNetns(t)
		addVeth(t, "eth0", "10.9.0.1/24")
		addVeth(t, "eth1", "10.8.0.1/24")
		o := testOptions(t, "eth0")
		o.forceClsact = clsact
		i := loadAttached(t, o)
		_, err := i.AddBackend(addrPort("10.8.0.7:443"))
		must(t, err)
		must(t, netlink.LinkDel(device(t, "eth1")))
		addVeth(t, "eth1", "10.8.0.1/24")
		i.cache.flush()
		nextHop(t, i, "10.8.0.7")
		must(t, i.resyncInterfaces())
		if kind == "tcx" {
			h, err := openPinnedLink(linkPin(i.dir, "eth1", RoleBackend), RoleBackend)
			must(t, err)
			if ifindex, err := h.ifindex(); err != nil || ifindex != device(t, "eth1").Attrs().Index {
				t.Errorf("the pin is of interface %d, %v", ifindex, err)
			}
			must(t, h.release())
		}
		if got := programsOn(t, device(t, "eth1")); len(got) != 1 {
			t.Errorf("on eth1: %q", got)
		}
		if len(i.gone) != 0 {
			t.Errorf("%d programs are kept for interfaces that are back", len(i.gone))
		}
		must(t, i.Close())
		if got := snapshot(t, ns); slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, "snilb") || strings.Contains(s, "clsact") }) {
			t.Errorf("left: %q", got)
		}
	})
}
