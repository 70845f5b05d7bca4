// SPDX-License-Identifier: Apache-2.0

package config

import (
	"net/netip"
	"regexp"
	"time"
)

// Config is a valid routes.yaml, resolved. It is immutable after Parse.
type Config struct {
	File      string
	Listeners []*Listener // At least one, in file order.

	NoMatch     Action // The default; each Listener carries its own.
	NotTLS      Action
	NoBackend   Action // The default; each Pool carries its own.
	UnknownFlow ActionKind

	Timeouts Timeouts // The defaults; each Pool carries its own.
	Limits   Limits

	Pools  []*Pool  // In file order.
	Routes []*Route // In file order.

	// Warnings are for people: the file is valid and does what it says.
	Warnings Problems
	// Notes say what the file needs around it.
	Notes Problems
}

// Backends returns how many backends all pools have together.
func (c *Config) Backends() int {
	n := 0
	for _, pool := range c.Pools {
		n += len(pool.Backends)
	}
	return n
}

// Pool returns the pool of that name, or nil.
func (c *Config) Pool(name string) *Pool {
	for _, pool := range c.Pools {
		if pool.Name == name {
			return pool
		}
	}
	return nil
}

// Listener is an address on which hellos are taken.
type Listener struct {
	Pos   Position
	Index int    // Place in Config.Listeners.
	Name  string // Default: the address as written.

	// Addr has a port from 1 to 65535. Its address is the zero netip.Addr when
	// the listener takes every address of both families.
	Addr    netip.AddrPort
	NoMatch Action // Resolved: its own, or the file's.

	// AcceptProxy are the networks of proxies: whatever comes from there must
	// begin with a PROXY header.
	AcceptProxy []netip.Prefix
}

// TakesProxy says whether connections from addr begin with a PROXY header.
func (l *Listener) TakesProxy(addr netip.Addr) bool {
	for _, prefix := range l.AcceptProxy {
		if prefix.Contains(addr) {
			return true
		}
	}
	return false
}

// Takes says whether connections to an address and port are the listener's.
func (l *Listener) Takes(to netip.AddrPort) bool {
	return l.Addr.Port() == to.Port() && (l.EveryAddress() || l.Addr.Addr().IsUnspecified() || l.Addr.Addr().Unmap().WithZone("") == to.Addr())
}

// EveryAddress says that the listener takes every address of both families.
func (l *Listener) EveryAddress() bool {
	return !l.Addr.Addr().IsValid()
}

// ActionKind is what happens to a connection or a packet.
type ActionKind uint8

// The zero value resets, which is also the file's default everywhere.
const (
	Reset  ActionKind = iota // Answer with RST.
	Alert                    // Answer with a TLS alert, then close.
	Drop                     // Say nothing.
	Pass                     // Leave it to the network stack; only for UnknownFlow.
	ToPool                   // Take a backend of a pool.
)

var actionWords = [...]string{Reset: "reset", Alert: "alert", Drop: "drop", Pass: "pass", ToPool: "pool"}

// String returns the word that stands in the file.
func (k ActionKind) String() string {
	if int(k) < len(actionWords) {
		return actionWords[k]
	}
	return "unknown"
}

// Action is an ActionKind together with its pool.
type Action struct {
	Kind ActionKind

	// Pool is set when Kind is ToPool. The one exception is the Action of a
	// Route that spreads over several pools: see Route.Pools.
	Pool *Pool
}

// String returns what stands in the file: "reset", "pool:blog".
func (a Action) String() string {
	if a.Kind == ToPool && a.Pool != nil {
		return "pool:" + a.Pool.Name
	}
	return a.Kind.String()
}

// Timeouts are all above zero, but for Idle.
type Timeouts struct {
	Hello       time.Duration // From the first hello byte to the whole hello. Per file only.
	Connect     time.Duration // From the whole hello to a backend, over all attempts.
	Attempt     time.Duration // One backend's answer to a SYN.
	Unconfirmed time.Duration // A bound flow that the client has not ACKed yet.
	Idle        time.Duration // 0 means none: an idle flow is never removed.
	Closing     time.Duration // A flow that has seen a FIN or a RST.
}

// Limits bound what strangers can make us hold.
type Limits struct {
	Flows int // Size of the flow table, in connections.
	// HelloMemory is the bytes that connections without a backend may hold together,
	// 2 KiB for each beside its hello. A hello more a worker may be on top.
	HelloMemory     int64
	HellosPerSource int // Incomplete hellos of one address. 0 means no limit.
}

// Balance is the way a pool picks a backend.
type Balance uint8

// The zero value is the default.
const (
	RoundRobin Balance = iota
	Maglev
)

var balanceWords = [...]string{RoundRobin: "round_robin", Maglev: "maglev"}

// String returns the word that stands in the file.
func (b Balance) String() string {
	if int(b) < len(balanceWords) {
		return balanceWords[b]
	}
	return "unknown"
}

// HashKey is what a Maglev pool hashes.
type HashKey uint8

// The zero value is the default.
const (
	HashClient HashKey = iota // The client's address.
	HashFlow                  // The client's address and port, and the listener.
	HashSNI                   // The name in the hello.
)

var hashWords = [...]string{HashClient: "client", HashFlow: "flow", HashSNI: "sni"}

// String returns the word that stands in the file.
func (h HashKey) String() string {
	if int(h) < len(hashWords) {
		return hashWords[h]
	}
	return "unknown"
}

// ProxyProtocol is the version of the PROXY header that backends get.
type ProxyProtocol uint8

// The zero value is the default. The others are the versions themselves.
const (
	NoProxy ProxyProtocol = iota
	ProxyV1
	ProxyV2
)

var proxyWords = [...]string{NoProxy: "none", ProxyV1: "v1", ProxyV2: "v2"}

// String returns the word that stands in the file.
func (p ProxyProtocol) String() string {
	if int(p) < len(proxyWords) {
		return proxyWords[p]
	}
	return "unknown"
}

// Pool is a group of backends that serve the same sites.
type Pool struct {
	Pos       Position
	Index     int // Place in Config.Pools.
	Name      string
	Balance   Balance
	Hash      HashKey // Only with Maglev.
	Source    Source
	NoBackend Action     // Resolved. Following Pool from pool to pool always ends.
	Timeouts  Timeouts   // Resolved. Hello is the file's.
	Backends  []*Backend // At least one, in file order, no address twice.

	// ProxyProtocol is the header that backends get before the client's bytes.
	ProxyProtocol ProxyProtocol
}

// Source is the address and port that backends see. The zero value is "nat": the
// address this node has towards the backend.
type Source struct {
	Client    bool         // The client's own. The others are then unset.
	Addresses []netip.Addr // Of this node; a backend gets those of its family.
	// PortFirst and PortLast, both included, are 0 for the instance's own range.
	PortFirst, PortLast uint16
}

// Of returns the addresses of one family.
func (s *Source) Of(v4 bool) []netip.Addr {
	var some []netip.Addr
	for _, addr := range s.Addresses {
		if addr.Is4() == v4 {
			some = append(some, addr)
		}
	}
	return some
}

// Backend is one server. A client is only ever sent to a backend of its own
// address family, so a pool may hold both.
type Backend struct {
	Pos    Position
	Index  int // Place in Pool.Backends.
	Pool   *Pool
	Name   string         // Unique in the pool. Default: address:port.
	Addr   netip.AddrPort // No zone, never IPv4 in IPv6.
	Weight int            // 1 to MaxWeight.
}

// MaxWeight is the largest weight of a backend: enough to tell servers of very
// different size apart, and small enough that a round robin plan stays short.
const MaxWeight = 256

// MaxBackends is how many backends all pools may have together: the data path
// knows a backend by 16 bits, of which 0 means none.
const MaxBackends = 65535

// Route sends the hellos that it matches to a pool, or to an end.
type Route struct {
	Pos   Position
	Index int // Place in Config.Routes.

	// Name is the route's metric label. Default: its first pattern, or NoName
	// for the route of hellos without a name. A name that the file gives is
	// unique; two routes that go by the same pattern share its label.
	Name     string
	Patterns []Pattern // At least one.

	// A condition that is empty always holds.
	ALPN      []string       // The client offers one of these.
	Clients   []netip.Prefix // The client's address is in one of these.
	Listeners []*Listener    // The hello came in by one of these.

	// Action is ToPool for a route with pools. With one pool it is also
	// Action.Pool; with several Action.Pool is nil and Pools has the weights.
	Action Action
	Pools  []WeightedPool // Empty unless Action.Kind is ToPool. Some weight is above zero.
}

// NoName is the default name of a route whose first pattern is "".
const NoName = "no_name"

// WeightedPool is one share of a route.
type WeightedPool struct {
	Pool   *Pool
	Weight int // 0 to MaxShare; 0 gets nothing.
}

// MaxShare is the largest weight of a pool in a route.
const MaxShare = 1_000_000

// PatternKind says how a Pattern compares with a name.
type PatternKind uint8

// The kinds in the order in which they are tried.
const (
	Exact     PatternKind = iota // www.example.com
	OneLabel                     // *.example.com
	AnyLabels                    // **.example.com
	Regex                        // ~cdn[0-9]+\.example\.com
	AnyName                      // **
	Nameless                     // "", a hello that carries no name
)

var kindWords = [...]string{
	Exact: "exact", OneLabel: "one_label", AnyLabels: "any_labels",
	Regex: "regex", AnyName: "any_name", Nameless: "no_name",
}

// String returns a word for people and for JSON.
func (k PatternKind) String() string {
	if int(k) < len(kindWords) {
		return kindWords[k]
	}
	return "unknown"
}

// Pattern is one item of a route's sni.
type Pattern struct {
	Pos  Position
	Kind PatternKind
	Text string // The whole pattern, canonical: lower case, A-labels.

	// Name is what to compare with: the name of an Exact pattern, or what
	// follows the first dot of a OneLabel or AnyLabels pattern. Else empty.
	Name   string
	Regexp *regexp.Regexp // Anchored at both ends. Only with Regex.
}
