// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"snilb/userspace/config"
)

// servers returns IPv4 backends of the given weights, called a, b, c and so on.
func servers(weights ...int) []*Backend {
	var backends []*Backend
	for i, w := range weights {
		addr := netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)})
		backends = append(backends, &Backend{ID: uint16(i + 1), Name: string(rune('a' + i)), Addr: netip.AddrPortFrom(addr, 443), Weight: w})
	}
	return backends
}

func only6(n int) []*Backend {
	var backends []*Backend
	for i := range n {
		addr := netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", i+1))
		backends = append(backends, &Backend{ID: uint16(1000 + i), Name: fmt.Sprintf("six%d", i), Addr: netip.AddrPortFrom(addr, 443), Weight: 1})
	}
	return backends
}

// both runs a test for every balancer.
func both(t *testing.T, test func(t *testing.T, make func([]*Backend) Balancer)) {
	t.Helper()
	t.Run("round robin", func(t *testing.T) { test(t, NewRoundRobin) })
	t.Run("maglev", func(t *testing.T) { test(t, NewMaglev) })
}

func TestFailover(t *testing.T) {
	both(t, func(t *testing.T, make func([]*Backend) Balancer) {
		backends := servers(1, 5, 2, 1, 7)
		b := make(append(backends, only6(3)...))
		for hash := range uint64(1000) {
			tried := map[*Backend]bool{}
			for range backends {
				next := b.Next(hash*0x9e3779b97f4a7c15, IPv4, func(b *Backend) bool { return tried[b] })
				if next == nil || tried[next] || FamilyOf(next.Addr.Addr()) != IPv4 {
					t.Fatalf("after %d: %+v", len(tried), next)
				}
				tried[next] = true
			}
			if next := b.Next(hash, IPv4, func(b *Backend) bool { return tried[b] }); next != nil {
				t.Fatalf("all were tried, and then %+v", next)
			}
		}
	})
}

func TestFamilies(t *testing.T) {
	both(t, func(t *testing.T, make func([]*Backend) Balancer) {
		if b := make(servers(1)); b.Next(1, IPv6, nil) != nil || b.Next(1, IPv4, nil) == nil {
			t.Error("an IPv4 pool for an IPv6 client")
		}
		if b := make(only6(1)); b.Next(1, IPv4, nil) != nil || b.Next(1, IPv6, nil) == nil {
			t.Error("an IPv6 pool for an IPv4 client")
		}
		if b := make(nil); b.Next(1, IPv4, nil) != nil || b.Next(1, IPv6, func(*Backend) bool { return true }) != nil {
			t.Error("something out of nothing")
		}
	})
	if FamilyOf(netip.MustParseAddr("::ffff:192.0.2.1")) != IPv4 || FamilyOf(netip.MustParseAddr("2001:db8::1")) != IPv6 {
		t.Error("families")
	}
}

// TestHealthChangesInBetween must not panic or return nil while one is left.
func TestHealthChangesInBetween(t *testing.T) {
	both(t, func(t *testing.T, make func([]*Backend) Balancer) {
		b := make(servers(1, 2, 3, 4))
		calls := 0
		for hash := range uint64(1000) {
			next := b.Next(hash, IPv4, func(b *Backend) bool {
				calls++
				return b.Name != "c" && calls%3 != 0
			})
			if next == nil {
				t.Fatal("nil although c is up")
			}
		}
	})
}

func TestRoundRobinPlan(t *testing.T) {
	tests := []struct {
		weights []int
		want    string
	}{
		{[]int{1}, "a"},
		{[]int{7}, "a"},
		{[]int{1, 1, 1}, "abc"},
		{[]int{4, 4}, "ab"},
		{[]int{2, 1}, "aab"},
		{[]int{5, 1, 1}, "aaabaac"},
		{[]int{3, 2, 1}, "abaabc"},
		{[]int{6, 4, 2}, "abaabc"},
	}
	for _, tt := range tests {
		if n := len(plan(servers(tt.weights...))); n != len(tt.want) {
			t.Errorf("%v: a round has %d turns, want %d", tt.weights, n, len(tt.want))
		}
		b := NewRoundRobin(servers(tt.weights...))
		for range 2 { // The second round is like the first.
			var got strings.Builder
			for range len(tt.want) {
				got.WriteString(b.Next(0, IPv4, nil).Name)
			}
			if got.String() != tt.want {
				t.Errorf("%v: %s, want %s", tt.weights, got.String(), tt.want)
			}
		}
	}
}

func TestRoundRobinExact(t *testing.T) {
	weights := []int{1, 256, 17, 3, 3, 100}
	sum := 0
	for _, w := range weights {
		sum += w
	}
	b := NewRoundRobin(servers(weights...))
	counts := map[string]int{}
	var lock sync.Mutex
	var done sync.WaitGroup
	for range 5 { // Together they make 25 whole rounds.
		done.Go(func() {
			mine := map[string]int{}
			for range 5 * sum {
				mine[b.Next(0, IPv4, nil).Name]++
			}
			lock.Lock()
			defer lock.Unlock()
			for name, n := range mine {
				counts[name] += n
			}
		})
	}
	done.Wait()
	want := map[string]int{}
	for i, w := range weights {
		want[string(rune('a'+i))] = 25 * w
	}
	if d := cmp.Diff(want, counts); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// TestRoundRobinEven bounds how far any prefix of a round is from its share.
func TestRoundRobinEven(t *testing.T) {
	weights := []int{1, 2, 3, 5, 50}
	b := NewRoundRobin(servers(weights...))
	counts := make([]float64, len(weights))
	for n := 1.0; n <= 61; n++ {
		counts[b.Next(0, IPv4, nil).ID-1]++
		for i, w := range weights {
			if off := counts[i] - n*float64(w)/61; off > 2 || off < -2 {
				t.Errorf("after %v picks backend %d is %.2f off its share", n, i, off)
			}
		}
	}
}

// TestRoundRobinDown shows that the turns of a backend that is down are shared
// out by weight, not given to its neighbour.
func TestRoundRobinDown(t *testing.T) {
	b := NewRoundRobin(servers(1, 1, 1, 1))
	counts := map[string]int{}
	for range 1200 {
		counts[b.Next(0, IPv4, func(b *Backend) bool { return b.Name == "b" }).Name]++
	}
	if d := cmp.Diff(map[string]int{"a": 400, "c": 400, "d": 400}, counts); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

const file = `version: 1
listen: ":443"
pools:
  a: {backends: [192.0.2.1:443, 192.0.2.2:443]}
  b: {balance: maglev, hash: sni, backends: [192.0.2.1:443, {address: "192.0.2.3:443", name: x, weight: 5}]}
`

func build(t *testing.T, text string, known map[Identity]uint16) *Set {
	t.Helper()
	c, err := config.Parse("f", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	s, err := Build(c, known)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range s.Pools {
		if s.Of(c.Pools[i]) != p {
			t.Errorf("pool %d is not where its index says", i)
		}
	}
	return s
}

func ids(s *Set) string {
	var all []string
	for _, p := range s.Pools {
		for _, b := range p.Backends {
			if s.Backend(b.ID) != b {
				return "an id leads elsewhere"
			}
			all = append(all, fmt.Sprintf("%s/%s=%d", b.Pool, b.Name, b.ID))
		}
	}
	return strings.Join(all, " ")
}

func TestBuild(t *testing.T) {
	s := build(t, file, nil)
	if want := "a/192.0.2.1:443=1 a/192.0.2.2:443=2 b/192.0.2.1:443=3 b/x=4"; ids(s) != want {
		t.Errorf("%s, want %s", ids(s), want)
	}
	if s.Backend(0) != nil || s.Backend(5) != nil {
		t.Error("ids out of nowhere")
	}
	if _, ok := s.Pools[1].Balancer.(*maglev); !ok || s.Pools[1].Backends[1].Weight != 5 {
		t.Errorf("pool b: %+v", s.Pools[1])
	}

	// One goes, one comes, one is renamed: ids stay, and the one that went is
	// not given away while its flows may live.
	after := strings.NewReplacer("192.0.2.2:443", "192.0.2.9:443", "name: x", "name: y").Replace(file)
	s2 := build(t, after, s.Identities())
	if want := "a/192.0.2.1:443=1 a/192.0.2.9:443=5 b/192.0.2.1:443=3 b/y=4"; ids(s2) != want {
		t.Errorf("%s, want %s", ids(s2), want)
	}
}

func TestBuildFull(t *testing.T) {
	known := map[Identity]uint16{}
	for id := 1; id <= config.MaxBackends; id++ {
		known[Identity{Pool: "old", Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(id >> 8), byte(id)}), 443)}] = uint16(id)
	}
	c, err := config.Parse("f", []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Build(c, known); !errors.Is(err, ErrNoIDs) {
		t.Errorf("%v, want ErrNoIDs: there is no id left", err)
	}
}

func BenchmarkNext(b *testing.B) {
	backends := append(servers(1, 2, 3, 4, 5, 6, 7, 8), only6(4)...)
	down := func(b *Backend) bool { return b.Name == "h" }
	for _, bb := range []struct {
		name  string
		b     Balancer
		tried func(*Backend) bool
	}{
		{"round robin", NewRoundRobin(backends), nil},
		{"round robin, one down", NewRoundRobin(backends), down},
		{"maglev", NewMaglev(backends), nil},
		{"maglev, one down", NewMaglev(backends), down},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			hash := uint64(0)
			for b.Loop() {
				hash += 0x9e3779b97f4a7c15
				bb.b.Next(hash, IPv4, bb.tried)
			}
		})
	}
}
