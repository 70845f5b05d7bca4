// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"snilb/userspace/config"
)

// TestMaglevShares bounds how far a share is from its weight. A backend gets
// its slots in turns, so the error is about one turn of all.
func TestMaglevShares(t *testing.T) {
	for _, weights := range [][]int{{1}, {1, 1, 1}, {1, 2, 3, 4}, {256, 1}, {10, 10, 10, 1, 250}} {
		sum := 0
		for _, w := range weights {
			sum += w
		}
		l := newLookup(servers(weights...), tableSize)
		counts := make([]int, len(weights))
		for _, i := range l.table {
			counts[i]++
		}
		for i, w := range weights {
			want := float64(tableSize) * float64(w) / float64(sum)
			if math.Abs(float64(counts[i])-want) > float64(len(weights)) {
				t.Errorf("%v: backend %d has %d slots, want %.0f", weights, i, counts[i], want)
			}
		}
	}
}

// TestMaglevDisruption removes one of n backends. Its own slots must move, 1/n
// of the table; what moves beside them is the price of Maglev.
func TestMaglevDisruption(t *testing.T) {
	for _, n := range []int{3, 10, 100} {
		weights := make([]int, n)
		for i := range weights {
			weights[i] = 1
		}
		backends := servers(weights...)
		before := newLookup(backends, tableSize)
		gone := backends[n/2]
		after := newLookup(slices.DeleteFunc(slices.Clone(backends), func(b *Backend) bool { return b == gone }), tableSize)
		moved := 0
		for i := range before.table {
			from, to := before.backends[before.table[i]], after.backends[after.table[i]]
			if from != gone && from != to {
				moved++
			}
		}
		share := float64(moved) / tableSize
		t.Logf("%d backends, one gone: %.2f %% of all clients moved without need", n, 100*share)
		if share > 0.04 {
			t.Errorf("%d backends: %.2f %% moved", n, 100*share)
		}
	}
}

// TestMaglevDown marks one as tried instead: then nothing else moves at all,
// and its clients spread by weight.
func TestMaglevDown(t *testing.T) {
	b := NewMaglev(servers(1, 1, 2, 4))
	rnd := rand.New(rand.NewPCG(3, 4))
	counts, n := map[string]int{}, 0
	for range 200_000 {
		hash := rnd.Uint64()
		first := b.Next(hash, IPv4, nil)
		next := b.Next(hash, IPv4, func(b *Backend) bool { return b.Name == "d" })
		if first.Name != "d" {
			if next != first {
				t.Fatal("a client of a healthy backend moved")
			}
			continue
		}
		counts[next.Name]++
		n++
	}
	for name, share := range map[string]float64{"a": 0.25, "b": 0.25, "c": 0.5} {
		if got := float64(counts[name]) / float64(n); math.Abs(got-share) > 0.01 {
			t.Errorf("%s took %.3f of d's clients, want %.2f", name, got, share)
		}
	}
}

// TestMaglevStable pins the table: it must be the same on every node and in
// every version, or a rolling upgrade moves all clients.
func TestMaglevStable(t *testing.T) {
	backends := servers(1, 2, 3)
	sum := func(l *lookup) uint64 {
		h := newSip(Key{})
		for _, i := range l.table {
			h.text(l.backends[i].Addr.String())
		}
		return h.sum()
	}
	got := sum(newLookup(backends, tableSize))
	slices.Reverse(backends)
	if reversed := sum(newLookup(backends, tableSize)); reversed != got {
		t.Error("the order in the file matters")
	}
	backends[0].Name, backends[0].ID = "other", 77
	if renamed := sum(newLookup(backends, tableSize)); renamed != got {
		t.Error("the name matters")
	}
	const want = 0xa6536f7ce544650c
	if got != want {
		t.Errorf("the table's hash is %#x, want %#x", got, uint64(want))
	}
}

// TestSip has the vectors of the SipHash paper's reference implementation: key
// and input count up from 0.
func TestSip(t *testing.T) {
	var key Key
	for i := range key {
		key[i] = byte(i)
	}
	for length, want := range map[int]uint64{0: 0x726fdb47dd0e0e31, 15: 0xa129ca6149be45e5} {
		h := newSip(key)
		for i := range length {
			h.byte(byte(i))
		}
		if got := h.sum(); got != want {
			t.Errorf("%d bytes: %#x, want %#x", length, got, want)
		}
	}
}

func TestHash(t *testing.T) {
	client := netip.MustParseAddrPort("192.0.2.1:1000")
	mapped := netip.MustParseAddrPort("[::ffff:192.0.2.1]:1000")
	port := netip.MustParseAddrPort("192.0.2.1:1001")
	other := netip.MustParseAddrPort("192.0.2.2:1000")
	in := netip.MustParseAddrPort("198.51.100.1:443")
	in2 := netip.MustParseAddrPort("198.51.100.1:444")
	tests := []struct {
		what             string
		kind             config.HashKey
		client, listener netip.AddrPort
		sni              string
		key              Key
		same             bool
	}{
		{"client: port", config.HashClient, port, in2, "b", Key{}, true},
		{"client: mapped", config.HashClient, mapped, in, "a", Key{}, true},
		{"client: address", config.HashClient, other, in, "a", Key{}, false},
		{"client: key", config.HashClient, client, in, "a", Key{1}, false},
		{"flow: name", config.HashFlow, client, in, "b", Key{}, true},
		{"flow: port", config.HashFlow, port, in, "a", Key{}, false},
		{"flow: listener", config.HashFlow, client, in2, "a", Key{}, false},
		{"sni: client", config.HashSNI, other, in2, "a", Key{}, true},
		{"sni: name", config.HashSNI, client, in, "b", Key{}, false},
	}
	for _, tt := range tests {
		base := Hash(tt.kind, client, in, "a", Key{})
		if got := Hash(tt.kind, tt.client, tt.listener, tt.sni, tt.key); (got == base) != tt.same {
			t.Errorf("%s: same is %v", tt.what, got == base)
		}
	}
	if n := testing.AllocsPerRun(100, func() { Hash(config.HashFlow, client, in, "a", Key{}) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkMaglevTable(b *testing.B) {
	weights := make([]int, 100)
	for i := range weights {
		weights[i] = 1 + i%10
	}
	backends := servers(weights...)
	for b.Loop() {
		newLookup(backends, tableSize)
	}
}

func BenchmarkHash(b *testing.B) {
	client, in := netip.MustParseAddrPort("192.0.2.1:1000"), netip.MustParseAddrPort("198.51.100.1:443")
	for b.Loop() {
		Hash(config.HashFlow, client, in, "www.example.com", Key{})
	}
}
