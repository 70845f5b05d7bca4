// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"testing"
	"unsafe"

	"snilb/userspace/pool"
)

// fake is a flow as the test remembers it.
type fake struct {
	connection
	local, origin netip.AddrPort
	way           way
	name          string
}

// fakes makes flows of both families, whose addresses have the same bytes, of few ways and names, each with ends of its own.
func fakes(count int) []fake {
	var ways []way
	for n := range 5 {
		ways = append(ways,
			way{backend: &pool.Backend{Addr: netip.MustParseAddrPort(fmt.Sprintf("192.0.2.%d:443", n))}, route: "r"},
			way{backend: &pool.Backend{Addr: netip.MustParseAddrPort(fmt.Sprintf("[::ffff:192.0.2.%d]:443", n))}})
	}
	vip := [2]netip.AddrPort{netip.MustParseAddrPort("203.0.113.1:443"), netip.MustParseAddrPort("[::ffff:203.0.113.1]:443")}
	addr := [2]netip.Addr{netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("::ffff:198.51.100.7")}
	all := make([]fake, count)
	for n := range all {
		family, port := n%2, uint16(1000+n/2)
		client := netip.AddrPortFrom(addr[family], port)
		all[n] = fake{connection{client, vip[family]}, client, client, ways[n%10], fmt.Sprint("name", n%7)}
		if n%3 == 0 {
			all[n].origin = netip.MustParseAddrPort("[2001:db8::99]:999")
		}
	}
	return all
}

func (f *fake) addTo(table *table) *flow {
	return table.add(f.connection, f.local, f.way, f.name, f.origin)
}

func (f *fake) findIn(t *testing.T, table *table, want *flow) {
	t.Helper()
	client, backend := table.byClient(f.connection), table.byBackend(f.way.backend.Addr, f.local)
	if client != want || backend != want {
		t.Fatalf("found %p by the client's packets, %p by the backend's, want %p", client, backend, want)
	}
}

func (f *fake) compare(t *testing.T, table *table, got *flow) {
	t.Helper()
	client, backend := got.clientTuple(), table.backendTuple(got)
	if client.Src != f.client || client.Dst != f.listener || backend.Src != f.way.backend.Addr || backend.Dst != f.local {
		t.Errorf("tuples %v and %v, want those of %+v", client, backend, f)
	}
	if table.wayOf(got) != f.way || table.nameOf(got) != f.name {
		t.Errorf("way %+v, name %q, want %+v, %q", table.wayOf(got), table.nameOf(got), f.way, f.name)
	}
	if origin := table.originOf(got); origin.IsValid() != (f.origin != f.client) || origin.IsValid() && origin != f.origin {
		t.Errorf("origin %v, want %v", origin, f.origin)
	}
}

// TestTable has flows come and go at random and compares with a plain list: each is found by both legs, is where it was, and
// is in the order once.
func TestTable(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	table := newTable()
	all := fakes(3000)
	where := make([]*flow, len(all)) // nil: not there
	most := 0
	for step := range 30_000 {
		i := random.IntN(len(all))
		all[i].findIn(t, &table, where[i])
		switch {
		case where[i] == nil:
			where[i] = all[i].addTo(&table)
			where[i].cookie = uint32(i)
		case random.IntN(2) == 0 || step > 25_000:
			table.remove(where[i])
			where[i] = nil
		}
		most = max(most, table.len())
	}
	there := 0
	for i, f := range where {
		all[i].findIn(t, &table, f)
		if f == nil {
			continue
		}
		there++
		all[i].compare(t, &table, f)
		if f.cookie != uint32(i) || table.at(table.order[f.place]) != f {
			t.Errorf("flow %d has the fields of %d, and place %d", i, f.cookie, f.place)
		}
	}
	if table.len() != there || int(table.used) != most {
		t.Errorf("%d flows, and memory of %d, want %d and %d", table.len(), table.used, there, most)
	}
	for _, f := range where {
		if f != nil {
			table.remove(f)
		}
	}
	if left := len(table.order) + len(table.origins) + len(table.ways.numbers) + len(table.names.numbers); left != 0 {
		t.Errorf("%d things are left of nothing", left)
	}
}

// TestTableChains looks that chains grow in number and not in length.
func TestTableChains(t *testing.T) {
	table := newTable()
	all := fakes(20_000)
	for i := range all {
		all[i].addTo(&table)
	}
	longest := 0
	for _, heads := range table.heads {
		for leg, n := range heads {
			length := 0
			for ; n != 0; n = table.at(n).next[leg] {
				length++
			}
			longest = max(longest, length)
		}
	}
	if longest > 20 { // a Poisson distribution of mean 1 or 2 has so many once in 10^13
		t.Errorf("a chain has %d of %d flows", longest, len(all))
	}
}

// TestTableAllocatesNothing looks a flow up as every event does.
func TestTableAllocatesNothing(t *testing.T) {
	table := newTable()
	f := fakes(1)[0]
	f.addTo(&table)
	if n := testing.AllocsPerRun(100, func() {
		if table.byClient(f.connection) == nil || table.byBackend(f.way.backend.Addr, f.local) == nil {
			t.Error("the flow is not found")
		}
	}); n != 0 {
		t.Errorf("%v allocations to find a flow", n)
	}
}

func BenchmarkTable(b *testing.B) {
	table := newTable()
	all := fakes(100_000)
	for i := range all {
		all[i].addTo(&table)
	}
	b.Run("find", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			table.byClient(all[i*7919%len(all)].connection)
		}
	})
	b.Run("remove and add", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			f := &all[i*7919%len(all)]
			table.remove(table.byClient(f.connection))
			f.addTo(&table)
		}
	})
}

// TestFlowSize holds a flow to two cache lines, and to nothing that the garbage collector follows.
func TestFlowSize(t *testing.T) {
	if size := unsafe.Sizeof(flow{}); size != 128 {
		t.Errorf("a flow has %d bytes, want 128", size)
	}
	var walk func(reflect.Type)
	walk = func(typ reflect.Type) {
		switch typ.Kind() {
		case reflect.Struct:
			for i := range typ.NumField() {
				walk(typ.Field(i).Type)
			}
		case reflect.Array:
			walk(typ.Elem())
		default:
			if typ.Kind() > reflect.Float64 {
				t.Errorf("a flow has a %v, which is or has a pointer", typ)
			}
		}
	}
	walk(reflect.TypeFor[flow]())
}

// TestShared has holders of two values come and go: a number is used again when nobody holds it, and not before.
func TestShared(t *testing.T) {
	s := newShared[string]()
	a, b := s.hold("a"), s.hold("b")
	if again := s.hold("a"); again != a || a == b {
		t.Fatalf("a is %d and %d, b is %d", a, again, b)
	}
	s.release(a)
	if c := s.hold("c"); c == a || c == b || s.value(a) != "a" || s.value(b) != "b" || s.value(c) != "c" {
		t.Errorf("%d, %d and %d are %q, %q and %q", a, b, c, s.value(a), s.value(b), s.value(c))
	}
	s.release(a)
	if d := s.hold("d"); d != a || s.value(d) != "d" {
		t.Errorf("d is %d, %q, want %d", d, s.value(d), a)
	}
	if again := s.hold("a"); s.value(again) != "a" || len(s.all) != 4 {
		t.Errorf("a is %q in the end, of %d", s.value(again), len(s.all))
	}
}
