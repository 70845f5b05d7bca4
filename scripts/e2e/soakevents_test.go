// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"

	"snilb/scripts/testbed"
)

// soakEvent is something that happens to the daemon or around it.
type soakEvent struct {
	name     string
	weight   int
	replaces bool // the daemon, by another one
	do       func(*soak)
}

// What may happen. How long each takes is bounded, so that no client comes to the end of its own patience.
var soakEvents = []soakEvent{
	{"kill", 8, true, (*soak).kill},
	{"upgrade", 8, true, (*soak).upgrade},
	{"reload", 6, false, (*soak).reload},
	{"reload refused", 2, false, (*soak).reloadRefused},
	{"stopped", 2, false, (*soak).stopped},
	{"backend refuses", 2, false, (*soak).backendRefuses},
	{"backend silent", 2, false, (*soak).backendSilent},
	{"client link", 2, false, func(s *soak) { s.flap("eth0") }},
	{"backend link", 2, false, func(s *soak) { s.flap("eth1") }},
	{"second uplink", 1, false, func(s *soak) { s.flap("eth2") }},
	{"uplink changed", 2, false, (*soak).changeUplink},
	{"uplink unplugged", 1, false, (*soak).unplug},
	{"MTU", 2, false, (*soak).changeMTU},
	{"route moved", 1, false, (*soak).moveRoute},
	{"route flushed", 1, false, (*soak).flushRoute},
	{"address", 2, false, (*soak).changeAddress},
}

// random waits, and lets one of these happen.
func (s *soak) random(from []soakEvent) {
	time.Sleep(s.rand(50*time.Millisecond, 600*time.Millisecond))
	sum := 0
	for _, e := range from {
		sum += e.weight
	}
	n := s.rng.IntN(sum)
	for _, e := range from {
		if n -= e.weight; n < 0 {
			s.happen(&e)
			return
		}
	}
}

func (s *soak) happen(e *soakEvent) {
	s.look()
	s.counts[e.name]++
	done := s.begin(e.name)
	e.do(s)
	done()
	s.look()
}

// rand is a time from one to another.
func (s *soak) rand(from, to time.Duration) time.Duration {
	return from + time.Duration(s.rng.Int64N(int64(to-from)))
}

// kill is kill -9, and another daemon within some seconds.
func (s *soak) kill() {
	s.d.kill()
	away := s.rand(0, time.Second)
	if s.rng.IntN(4) == 0 {
		away *= 4
	}
	time.Sleep(away)
	s.start()
}

func (s *soak) upgrade() {
	s.d.keep()
	s.start()
}

// reload puts one of the routes files in force, by the command or the signal.
func (s *soak) reload() {
	files := soakRoutes(s.bed)
	file := files[s.rng.IntN(len(files))]
	if s.rng.IntN(2) == 0 {
		must(s.t, s.d.reload(file))
		return
	}
	if r := s.d.hangUp(file); !r.OK {
		s.t.Errorf("reload by SIGHUP: %+v", r)
	}
}

// reloadRefused offers a file that is wrong, and takes it away again, as the next daemon would not start with it.
func (s *soak) reloadRefused() {
	good, err := os.ReadFile(s.file)
	must(s.t, err)
	bad := []string{
		"version: 1\nlisten: [\":443\"\n",
		strings.Replace(string(good), "listen:", "lissten:", 1),
		strings.Replace(string(good), at(s.bed, 1, false, 443).String(), "203.0.114.9:443", 1),
	}
	text := bad[s.rng.IntN(len(bad))]
	if s.rng.IntN(2) == 0 {
		if err := s.d.reload(text); err == nil {
			s.t.Errorf("this was taken:\n%s", text)
		}
	} else if r := s.d.hangUp(text); r.OK {
		s.t.Errorf("this was taken:\n%s", text)
	}
	must(s.t, os.WriteFile(s.file, good, 0o644))
}

// stopped stops the daemon for less than others take it for dead.
func (s *soak) stopped() {
	must(s.t, s.d.cmd.Process.Signal(syscall.SIGSTOP))
	time.Sleep(s.rand(100*time.Millisecond, 3*time.Second))
	must(s.t, s.d.cmd.Process.Signal(syscall.SIGCONT))
}

// backendRules matches packets to one of the backends.
func (s *soak) backendRules(match string) []string {
	i := 1 + s.rng.IntN(3)
	return []string{
		fmt.Sprintf("ip daddr %s tcp dport 443 %s", s.bed.Backends4[i-1], match),
		fmt.Sprintf("ip6 daddr %s tcp dport 443 %s", s.bed.Backends6[i-1], match),
	}
}

// backendRefuses has a backend take no new connections.
func (s *soak) backendRefuses() {
	remove := filter(s.t, s.bed.Backend, "input", s.backendRules(matchSYN+" reject with tcp reset")...)
	time.Sleep(s.rand(500*time.Millisecond, 2*time.Second))
	remove()
}

// backendSilent has one hear nothing for a while: its connections stall.
func (s *soak) backendSilent() {
	remove := filter(s.t, s.bed.Backend, "input", s.backendRules("drop")...)
	time.Sleep(s.rand(time.Second, 2*time.Second))
	remove()
}

// keepAddresses has a device keep its IPv6 addresses when it is down.
func (s *soak) keepAddresses(dev string) {
	must(s.t, s.bed.LB.Sysctl("ipv6/conf/"+dev+"/keep_addr_on_down", "1"))
}

func (s *soak) flap(dev string) {
	must(s.t, s.bed.LB.SetLink(dev, false))
	time.Sleep(s.rand(50*time.Millisecond, 300*time.Millisecond))
	must(s.t, s.bed.LB.SetLink(dev, true))
}

// changeUplink has what is for the extra addresses come by the other interface.
func (s *soak) changeUplink() {
	s.uplink = 1 - s.uplink
	must(s.t, s.bed.UseUplink(s.uplink))
}

// unplug deletes the second uplink and makes it anew.
func (s *soak) unplug() {
	s.uplink = 0
	must(s.t, s.bed.UseUplink(0))
	programs := s.programsOn("eth2")
	must(s.t, s.bed.Unplug("eth2"))
	time.Sleep(s.rand(50*time.Millisecond, 300*time.Millisecond))
	must(s.t, s.bed.Plug("eth2"))
	s.replugged++
	s.keepAddresses("eth2")
	for deadline := time.Now().Add(readyTimeout); s.programsOn("eth2") < programs; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("of %d programs on eth2 %d are back", programs, s.programsOn("eth2"))
		}
	}
}

// programsOn counts what the kernel has on an interface, as status still tells of one that has just been deleted.
func (s *soak) programsOn(dev string) int {
	r := make(resources)
	ids := map[string]bool{}
	must(s.t, s.bed.LB.Do(func() error {
		l, err := netlink.LinkByName(dev)
		if err == nil {
			programsOf(l, ids, r)
		}
		return err
	}))
	return int(r["tcx programs"] + r["XDP programs"])
}

// changeMTU makes a leg narrower for a while, at both its ends.
func (s *soak) changeMTU() {
	dev, far := "eth0", s.bed.Client
	if s.rng.IntN(2) == 0 {
		dev, far = "eth1", s.bed.Backend
	}
	for _, mtu := range []int{1400, 1500} {
		must(s.t, s.bed.LB.SetMTU(dev, mtu))
		must(s.t, far.SetMTU("eth0", mtu))
		if mtu != 1500 {
			time.Sleep(s.rand(100*time.Millisecond, 2*time.Second))
		}
	}
}

// moveRoute has the way to a backend, and back from it, lead by the second path for a while.
func (s *soak) moveRoute() {
	i := 1 + s.rng.IntN(3)
	ways := [][4]string{
		{s.bed.Backends4[i-1].String(), "192.0.2.1", s.second[2], s.second[0]},
		{s.bed.Backends6[i-1].String(), "2001:db8:2::1", s.second[3], s.second[1]},
	}
	for _, w := range ways {
		ip(s.t, s.bed.LB, "route", "add", w[0], "via", w[2], "dev", "eth3")
		s.d.waitRoles("eth3", 1) // answers are expected there
		ip(s.t, s.bed.Backend, "route", "add", w[1], "via", w[3], "dev", "eth1")
	}
	time.Sleep(s.rand(100*time.Millisecond, time.Second))
	for _, w := range ways {
		ip(s.t, s.bed.LB, "route", "del", w[0], "via", w[2], "dev", "eth3")
		time.Sleep(s.rand(100*time.Millisecond, 500*time.Millisecond))
		ip(s.t, s.bed.Backend, "route", "del", w[1], "via", w[3], "dev", "eth1")
	}
}

// flushRoute takes the routes to the backends away, and sets them again.
func (s *soak) flushRoute() {
	routes := [][]string{
		{"192.0.2.0/24", "dev", "eth1", "proto", "kernel", "scope", "link", "src", "192.0.2.1"},
		{"2001:db8:2::/64", "dev", "eth1", "proto", "kernel", "metric", "256"},
	}
	for _, r := range routes {
		ip(s.t, s.bed.LB, append([]string{"route", "del"}, r...)...)
	}
	time.Sleep(s.rand(50*time.Millisecond, 300*time.Millisecond))
	for _, r := range routes {
		ip(s.t, s.bed.LB, append([]string{"route", "add"}, r...)...)
	}
}

// changeAddress gives both sides another address for a while.
func (s *soak) changeAddress() {
	more := [][2]string{
		{"192.0.2.77/24", "eth1"}, {"2001:db8:2::77/64", "eth1"}, {"198.51.100.77/25", "eth0"}, {"2001:db8:1::77/64", "eth0"},
	}
	for _, a := range more {
		flags := []string{"addr", "add", a[0], "dev", a[1]}
		if netip.MustParsePrefix(a[0]).Addr().Is6() {
			flags = append(flags, "nodad", "preferred_lft", "0") // no new source address
		}
		ip(s.t, s.bed.LB, flags...)
	}
	time.Sleep(s.rand(100*time.Millisecond, time.Second))
	for _, a := range more {
		ip(s.t, s.bed.LB, "addr", "del", a[0], "dev", a[1])
	}
}

// soakRoutes are the files that come into force. All serve the same names, from pools that can do without any one backend, and
// refuse the same one. The first is that of the beginning and the end.
func soakRoutes(bed *testbed.Bed) []string {
	// A daemon may be away or stopped in the middle of any step.
	const head = "version: 1\ntimeouts: {hello: 30s, connect: 20s}\n"
	const routes = "routes:\n  - {sni: b.example.com, pool: two}\n  - {sni: [a.example.com, \"*.w.example.com\"], pool: one}\n"
	weighted := fmt.Sprintf("  one:\n    backends:\n      - {address: %q, weight: 3}\n      - {address: %q, weight: 1}\n      - {address: %q, weight: 1}\n      - {address: %q, weight: 3}\n",
		at(bed, 1, false, 443), at(bed, 2, false, 443), at(bed, 1, true, 443), at(bed, 2, true, 443))
	return []string{
		head + "listen: [\":443\"]\npools:\n" + pool(bed, "one", "", 1, 2) + pool(bed, "two", "", 2, 3) + routes,
		head + "listen: [\":8443\", {name: main, address: \":443\"}]\npools:\n" + pool(bed, "two", "balance: maglev, hash: client", 3, 1, 2) + weighted + routes,
		head + "listen: [{name: main, address: \":443\"}, \":9443\"]\npools:\n" + pool(bed, "one", "proxy_protocol: none", 3, 2) + pool(bed, "two", "", 1, 3) +
			"routes:\n  - {sni: [a.example.com, \"*.w.example.com\"], listen: main, pool: one}\n  - {sni: b.example.com, pools: {one: 50, two: 50}}\n",
		head + "listen: [\":443\"]\npools:\n" + pool(bed, "one", "source: client", 1, 3) + pool(bed, "two", "balance: maglev", 1, 2, 3) + routes,
	}
}

// diary tells when what happened. Its methods are for any goroutine.
type diary struct {
	mu     sync.Mutex // guards all
	events []happening
}

type happening struct {
	name  string
	began time.Time
	ended time.Time // zero: it goes on
}

// begin notes that something begins, and returns what notes its end.
func (d *diary) begin(name string) (end func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	i := len(d.events)
	d.events = append(d.events, happening{name: name, began: time.Now()})
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.events[i].ended = time.Now()
	}
}

// during says whether something of these names went on at some time since then.
func (d *diary) during(since time.Time, names ...string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := len(d.events) - 1; i >= 0; i-- {
		e := d.events[i]
		if !e.ended.IsZero() && e.ended.Before(since) {
			return false
		}
		for _, name := range names {
			if e.name == name {
				return true
			}
		}
	}
	return false
}

// before tells the last events up to now, with their age.
func (d *diary) before() string {
	const shown = 15
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []string
	for _, e := range d.events[max(0, len(d.events)-shown):] {
		ended := "goes on"
		if !e.ended.IsZero() {
			ended = "to -" + time.Since(e.ended).Round(10*time.Millisecond).String()
		}
		all = append(all, fmt.Sprintf("%s -%s %s", e.name, time.Since(e.began).Round(10*time.Millisecond), ended))
	}
	return strings.Join(all, "; ")
}
