// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"snilb/maps"
	"snilb/userspace/packet"
	"snilb/userspace/pool"
)

// journalRoutes have all that a flow may have: a PROXY header that tells the client, source: client, IPv6.
const journalRoutes = `
listen: {address: ":443", accept_proxy: ["203.0.113.99/32", "2001:db8:7::99/128"]}
pools:
  own: {backends: ["192.0.2.11:443", "[2001:db8::11]:443"]}
  clients: {backends: ["192.0.2.12:443", "[2001:db8::12]:443"], source: client}
routes:
  - {name: first, sni: a.example.com, pool: own}
  - {name: second, sni: "*.example.org", pool: clients}
`

// binds has a client's connection come and its backend answer, until the flow is bound.
func (d *daemon) binds(client string, site string, header string) *flow {
	d.t.Helper()
	return d.bindsWith(packet.Options{MSS: 1400}, client, site, header)
}

// bindsWith is binds where the backend's SYN-ACK has these options.
func (d *daemon) bindsWith(said packet.Options, client string, site string, header string) *flow {
	d.t.Helper()
	w := d.workers[0]
	c := connection{client: netip.MustParseAddrPort(client), listener: netip.MustParseAddrPort("192.0.2.1:443")}
	if c.client.Addr().Is6() {
		c.listener = netip.MustParseAddrPort("[2001:db8::1]:443")
	}
	w.now = d.clock.now()
	d.hears(&packet.Segment{
		Src: c.client, Dst: c.listener, Seq: 1001, Ack: 0x70000001, Flags: packet.ACK | packet.PSH, Window: 1000,
		Payload: append([]byte(header), helloOf(site)...),
	})
	h := w.handshakes[c]
	if h == nil || h.phase != connecting {
		d.t.Fatalf("no SYN to a backend: %s", d.log.String())
	}
	w.backendSegment(&packet.Segment{
		Src: h.attempt.backend.Addr, Dst: h.attempt.local.AddrPort, Seq: 9000, Ack: h.attempt.isn + 1,
		Flags: packet.SYN | packet.ACK, Window: 1000, Options: said,
	})
	f := w.flows.byClient(c)
	if f == nil {
		d.t.Fatalf("not bound: %s", d.log.String())
	}
	return f
}

// life is all that is told of a flow.
type life struct {
	flow  Flow
	known flow
	way   told
}

// lives are those of all flows, by client; ages as seen at once.
func (d *daemon) lives() map[netip.AddrPort]life {
	d.t.Helper()
	all := make(map[netip.AddrPort]life)
	for _, w := range d.workers {
		for _, n := range w.flows.order {
			f := w.flows.at(n)
			v := w.flows.wayOf(f)
			known := flow{bound: f.bound, cookie: f.cookie, mss: f.mss, generation: f.generation, outlived: f.outlived}
			backend := *v.backend
			shown := w.flows.listed(f)
			all[f.client.addrPort()] = life{*shown.status(f.bound), known, told{&backend, v.route}}
		}
	}
	return all
}

func same(t *testing.T, got, want map[netip.AddrPort]life) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%d flows, want %d", len(got), len(want))
	}
	for c, w := range want {
		g := got[c]
		if g.flow != w.flow || g.known != w.known || g.way.route != w.way.route || g.way.backend == nil || *g.way.backend != *w.way.backend {
			t.Errorf("flow of %v:\n got %+v %+v\nwant %+v %+v", c, g, g.way.backend, w, w.way.backend)
		}
	}
}

// journaled makes daemons that keep a journal, which is never written but by step.
func (k *kernel) journaled(path, routes string) *daemon {
	k.t.Helper()
	return k.start(firstPlan(k.t, routes, KnownIDs(path)), func(o *Options) { o.Journal = path })
}

func (d *daemon) bindsSome() {
	d.t.Helper()
	d.binds("203.0.113.7:1001", "a.example.com", "")
	d.binds("[2001:db8:7::7]:1002", "a.example.com", "")
	d.binds("203.0.113.7:1003", "b.example.org", "")
	d.binds("[2001:db8:7::7]:1004", "c.example.org", "")
	d.binds("203.0.113.99:1005", "a.example.com", "PROXY TCP4 198.51.100.77 192.0.2.1 777 443\r\n")
	d.binds("[2001:db8:7::99]:1006", "d.example.org", "PROXY TCP6 2001:db8::77 2001:db8::1 778 443\r\n")
}

// TestJournal has three daemons one after the other, each with the last one's journal: nothing is forgotten of a flow.
func TestJournal(t *testing.T) {
	k, path := newKernel(t, 1, 100), filepath.Join(t.TempDir(), "flows")
	d := k.journaled(path, journalRoutes)
	d.bindsSome()
	f := d.workers[0].flows.at(1)
	f.outlived[maps.LegBackend] = true
	d.workers[0].note(f)
	before := d.lives()
	d.journal.step()
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v, want mode 0600", info, err)
	}
	for range 2 {
		d = k.journaled(path, journalRoutes)
		if d.Status().Adopted != 6 {
			t.Errorf("%d are adopted, want 6", d.Status().Adopted)
		}
		same(t, d.lives(), before)
		if log := d.log.String(); strings.Contains(log, "WARN") {
			t.Error(log)
		}
		for c, one := range before {
			if one.known.cookie != 0x70000000 || one.flow.SNI == "" || one.flow.Pool == "" || one.flow.Route == "" {
				t.Errorf("%v: the test has nothing to lose: %+v", c, one)
			}
		}
		// A pool whose source is the client's has no port of ours, be it by a PROXY header.
		w := d.workers[0]
		for _, n := range w.flows.order {
			if v := w.flows.wayOf(w.flows.at(n)); (v.ports == nil) != (v.backend.Pool == "clients") {
				t.Errorf("ports %v of a flow of %s", v.ports, v.backend.Pool)
			}
		}
	}
}

// TestJournalCookie has the hello of a new connection not be taken for one of a flow that is still there, once its cookie is known.
func TestJournalCookie(t *testing.T) {
	k, path := newKernel(t, 1, 100), filepath.Join(t.TempDir(), "flows")
	d := k.journaled(path, journalRoutes)
	f := d.binds("203.0.113.7:1001", "a.example.com", "")
	c := f.clientTuple()
	d.journal.step()
	d = k.journaled(path, journalRoutes)
	w := d.workers[0]
	for cookie, handshakes := range map[uint32]int{0x70000000: 0, 0x60000000: 1} {
		d.hears(&packet.Segment{Src: c.Src, Dst: c.Dst, Seq: 1001, Ack: cookie + 1, Flags: packet.ACK, Payload: clientHello(t)})
		if len(w.handshakes) != handshakes {
			t.Errorf("cookie %#x: %d handshakes, want %d", cookie, len(w.handshakes), handshakes)
		}
		clear(w.handshakes)
	}
}

// TestJournalOfOthers is not believed: of another boot or version, of a flow that was there before, or that leads elsewhere.
func TestJournalOfOthers(t *testing.T) {
	for name, change := range map[string]func(text []byte, k *kernel, d *daemon) []byte{
		"another boot": func(text []byte, _ *kernel, d *daemon) []byte {
			return bytes.Replace(text, []byte(d.journal.boot), []byte(strings.Repeat("x", len(d.journal.boot))), 1)
		},
		"another version": func(text []byte, _ *kernel, _ *daemon) []byte {
			return bytes.Replace(text, []byte("journal 1"), []byte("journal 2"), 1)
		},
		"no journal": func([]byte, *kernel, *daemon) []byte { return []byte("x") },
		"empty":      func([]byte, *kernel, *daemon) []byte { return nil },
		"earlier flow": func(text []byte, k *kernel, d *daemon) []byte {
			d.again(k, func(p *maps.Pair) { p.Up.Flow.Generation, p.Down.Flow.Generation = 99, 99 })
			return text
		},
		"other backend": func(text []byte, k *kernel, d *daemon) []byte {
			d.again(k, func(p *maps.Pair) {
				p.Up.To.Dst = netip.AddrPortFrom(p.Up.To.Dst.Addr(), 444)
				p.Backend = p.Up.To.Reverse()
			})
			return text
		},
	} {
		t.Run(name, func(t *testing.T) {
			k, path := newKernel(t, 1, 100), filepath.Join(t.TempDir(), "flows")
			d := k.journaled(path, journalRoutes)
			d.binds("203.0.113.7:1001", "a.example.com", "")
			d.journal.step()
			text, err := os.ReadFile(path)
			must(t, err)
			must(t, os.WriteFile(path, change(text, k, d), 0o600))
			d = k.journaled(path, journalRoutes)
			for c, one := range d.lives() {
				if one.flow.SNI != "" || one.known.cookie != unknownCookie {
					t.Errorf("%v: believed: %+v", c, one)
				}
			}
			if d.Bound() != 1 {
				t.Errorf("%d flows, want 1", d.Bound())
			}
			if other := name != "earlier flow" && name != "other backend"; other != strings.Contains(d.log.String(), "journal not read") {
				t.Errorf("the log says: %s", d.log.String())
			}
		})
	}
}

// again binds the daemon's only flow anew, with something changed.
func (d *daemon) again(k *kernel, change func(*maps.Pair)) {
	d.t.Helper()
	w := d.workers[0]
	f := w.flows.at(w.flows.order[0])
	p := &maps.Pair{Client: f.clientTuple(), Backend: w.flows.backendTuple(f)}
	up, err := k.tables.LookupFlow(maps.LegClient, p.Client)
	must(d.t, err)
	down, err := k.tables.LookupFlow(maps.LegBackend, p.Backend)
	must(d.t, err)
	must(d.t, k.tables.DeleteFlow(maps.LegClient, p.Client))
	must(d.t, k.tables.DeleteFlow(maps.LegBackend, p.Backend))
	p.Up, p.Down = &up, &down
	change(p)
	k.bind(p)
}

// readAll reads the flows' records of a file.
func readAll(t *testing.T, path string) (all []record, torn bool) {
	t.Helper()
	boot, err := bootID()
	must(t, err)
	r, err := openJournal(path, boot)
	if err != nil {
		return nil, true
	}
	var one record
	for r.next(&one) {
		all = append(all, one)
	}
	must(t, r.Close())
	return all, r.torn
}

// TestJournalTorn cuts a journal at every byte, and damages every byte: what is before that is read, and no more.
func TestJournalTorn(t *testing.T) {
	k, path := newKernel(t, 1, 100), filepath.Join(t.TempDir(), "flows")
	d := k.journaled(path, journalRoutes)
	d.bindsSome()
	d.journal.step()
	text, err := os.ReadFile(path)
	must(t, err)
	whole, torn := readAll(t, path)
	if torn || len(whole) < 12 {
		t.Fatalf("%d records, torn %v", len(whole), torn)
	}
	// ends are where each record ends.
	ends := []int{len(journalStart(d.journal.boot))}
	for _, one := range whole {
		ends = append(ends, ends[len(ends)-1]+len(one.append(nil)))
	}
	if ends[len(whole)] != len(text) {
		t.Fatalf("records of %d bytes in a file of %d", ends[len(whole)], len(text))
	}
	cut := filepath.Join(t.TempDir(), "cut")
	for at := range text {
		n := 0
		for n < len(whole) && ends[n+1] <= at {
			n++
		}
		damaged := bytes.Clone(text)
		damaged[at] ^= 0x55
		for what, b := range map[string][]byte{"cut": text[:at], "damaged": damaged} {
			must(t, os.WriteFile(cut, b, 0o600))
			all, torn := readAll(t, cut)
			if len(all) != n || torn == (what == "cut" && at >= ends[0] && at == ends[n]) {
				t.Fatalf("%s at %d: %d records, want %d; torn %v", what, at, len(all), n, torn)
			}
			for i, one := range all {
				if one != whole[i] {
					t.Fatalf("%s at %d: record %d is %+v, want %+v", what, at, i, one, whole[i])
				}
			}
		}
		if at%151 != 0 {
			continue
		}
		// All flows are taken over whatever is missing.
		d := k.journaled(cut, journalRoutes)
		if d.Bound() != 6 {
			t.Fatalf("damaged at %d: %d flows, want 6", at, d.Bound())
		}
		if !strings.Contains(d.log.String(), "level=WARN msg=\"journal") {
			t.Errorf("damaged at %d: nothing is said: %s", at, d.log.String())
		}
	}
}

// TestJournalIsBounded has many connections come and go, and some stay: the file is never much larger than what it must hold.
func TestJournalIsBounded(t *testing.T) {
	d := newDesk(t, "limits: {flows: 100000}\n")
	path := filepath.Join(t.TempDir(), "flows")
	j, err := newJournal(d.e, path)
	must(t, err)
	d.e.journal = j
	d.e.o.SourcePortFirst, d.e.o.SourcePortLast, d.e.o.SourcePortsOwn = 1024, 65535, [2]uint16{1024, 65535}
	j.step()
	defer func() { must(t, j.Close()) }()
	hello, largest, stays := clientHello(t), int64(0), make(map[netip.AddrPort]bool)
	for n := range 80_000 {
		c := client{netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 40000), 1000}
		d.sends(c, 1, hello, packet.PSH)
		f := d.handshake(c).settle(d.worker)
		d.out = nil
		if n%100 == 0 {
			stays[c.addr] = true
		} else {
			f.forget(d.worker, "test")
		}
		if n%500 == 0 {
			j.step()
			info, err := os.Stat(path)
			must(t, err)
			largest = max(largest, info.Size())
		}
	}
	j.step()
	if most := int64(journalSmall + (500+800)*100); largest > most || largest < journalSmall/2 {
		t.Errorf("the journal came to %d bytes, want %d to %d", largest, journalSmall/2, most)
	}
	if left, err := filepath.Glob(path + "?*"); err != nil || len(left) != 0 {
		t.Errorf("left beside it: %v, %v", left, err)
	}
	all, torn := readAll(t, path)
	for _, one := range all {
		delete(stays, one.client)
	}
	if torn || len(stays) != 0 {
		t.Errorf("%d flows are not in it, torn %v", len(stays), torn)
	}
}

// TestJournalFails loses nothing but what the journal is for, says so once, and goes on when it can.
func TestJournalFails(t *testing.T) {
	k, dir := newKernel(t, 1, 100), t.TempDir()
	path := filepath.Join(dir, "not yet", "flows")
	d := k.journaled(path, journalRoutes)
	d.binds("203.0.113.7:1001", "a.example.com", "")
	later := func() {
		d.journal.retryAt = 0
		d.journal.step()
	}
	later()
	if log := d.log.String(); strings.Count(log, "journal not written") != 1 {
		t.Errorf("want one warning: %s", log)
	}
	must(t, os.Mkdir(filepath.Dir(path), 0o700))
	d.journal.step()
	if _, err := os.Stat(path); err == nil {
		t.Error("tried again at once")
	}
	later()
	if !strings.Contains(d.log.String(), "written again") {
		t.Errorf("it is not said that it goes on: %s", d.log.String())
	}
	// As when the disk is full, in the middle of it.
	readOnly, err := os.Open(path)
	must(t, err)
	must(t, d.journal.Close())
	d.journal.file = readOnly
	d.binds("203.0.113.7:1002", "a.example.com", "")
	d.journal.step()
	d.binds("203.0.113.7:1003", "a.example.com", "")
	later()
	if all, torn := readAll(t, path); torn || len(all) < 3 {
		t.Errorf("%d records, torn %v", len(all), torn)
	}
	want := d.lives()
	same(t, k.journaled(path, journalRoutes).lives(), want)
}

// TestJournalOverrun: what waits to be written is bounded, and what was lost by that is told anew.
func TestJournalOverrun(t *testing.T) {
	k, path := newKernel(t, 1, 100), filepath.Join(t.TempDir(), "flows")
	d := k.journaled(path, journalRoutes)
	d.bindsSome()
	w := d.workers[0]
	for range journalMost / 40 {
		w.note(w.flows.at(1))
	}
	if n := len(w.diary.records); n > journalMost {
		t.Errorf("%d bytes wait", n)
	}
	d.binds("203.0.113.7:2000", "a.example.com", "")
	d.journal.step()
	want := d.lives()
	same(t, k.journaled(path, journalRoutes).lives(), want)
}

// TestJournalConcurrently binds while the journal is written anew all the time.
func TestJournalConcurrently(t *testing.T) {
	k, path := newKernel(t, 1, 2000), filepath.Join(t.TempDir(), "flows")
	d := k.start(firstPlan(t, journalRoutes, Known{}), func(o *Options) {
		o.Journal, o.SourcePortFirst, o.SourcePortLast, o.SourcePortsOwn = path, 1024, 65535, [2]uint16{1024, 65535}
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 50 {
			d.journal.plan = nil
			d.journal.step()
		}
	}()
	for n := range 1000 {
		d.workers[0].mu.Lock()
		f := d.binds(fmt.Sprintf("203.0.113.7:%d", 1000+n), "a.example.com", "")
		if n%3 == 0 {
			f.remove(d.workers[0], "test")
		}
		d.workers[0].mu.Unlock()
	}
	<-done
	d.journal.step()
	want := d.lives()
	same(t, k.journaled(path, journalRoutes).lives(), want)
}

// TestKnownIDs follows backends through changes of the configuration: no id comes to mean another one as long as a flow has it.
func TestKnownIDs(t *testing.T) {
	k, path := newKernel(t, 1, 100), filepath.Join(t.TempDir(), "flows")
	files := 0
	routes := func(backends string) string { // of which each has another route in the same place
		files++
		return fmt.Sprintf("listen: \":443\"\npools: {p: {backends: [%s]}}\nroutes: [{name: r%d, sni: a.example.com, pool: p}]\n", backends, files)
	}
	id := func(d *daemon, addr string) uint16 {
		return d.plan.Load().pools.Identities()[pool.Identity{Pool: "p", Addr: netip.MustParseAddrPort(addr)}]
	}
	const one, two, three, four = "192.0.2.1:1", "192.0.2.1:2", "192.0.2.1:3", "192.0.2.1:4"
	d := k.journaled(path, routes(`"`+one+`"`))
	f := d.binds("203.0.113.7:1001", "a.example.com", "")
	d.journal.step()

	d = k.journaled(path, routes(`"`+two+`", "`+one+`"`))
	if id(d, one) != 1 || id(d, two) != 2 {
		t.Errorf("ids %d and %d, want 1 and 2", id(d, one), id(d, two))
	}
	// Twice gone, with a flow.
	for _, backends := range []string{`"` + three + `", "` + two + `"`, `"` + four + `", "` + two + `", "` + three + `"`} {
		d = k.journaled(path, routes(backends))
		if id(d, two) != 2 || id(d, three) != 3 || id(d, four) == 1 {
			t.Errorf("ids %d, %d and %d, want 2, 3 and not 1", id(d, two), id(d, three), id(d, four))
		}
		w := d.workers[0]
		f = w.flows.at(1)
		if v := w.flows.wayOf(f); v.backend.ID != 1 || v.backend.Pool != "p" || v.backend.Name != one || v.route != "r1" {
			t.Errorf("the flow's way is %+v, backend %+v", v, v.backend)
		}
	}
	// Without one its id is free.
	f.remove(d.workers[0], "test")
	d.journal.plan = nil
	d.journal.step()
	if known := KnownIDs(path).backends; len(known) != 3 {
		t.Errorf("known: %v, want three", known)
	}
	if known := KnownIDs(path + " not there"); known.backends != nil || known.listeners != nil {
		t.Errorf("known by nothing: %v", known)
	}
}

// TestAdoptByIDs has a flow whose record was not written: what its ids mean is in the journal, be the backend's address in two pools.
func TestAdoptByIDs(t *testing.T) {
	routes := func(first string) string {
		return `
listen: ":443"
pools:
  p: {backends: ["192.0.2.11:443"]}
  q: {backends: ["192.0.2.11:443"]}
routes:` + first + `
  - {name: second, sni: b.example.org, pool: q}
`
	}
	k, path := newKernel(t, 1, 100), filepath.Join(t.TempDir(), "flows")
	d := k.journaled(path, routes(""))
	d.binds("203.0.113.7:1001", "b.example.org", "") // never written
	d = k.journaled(path, routes("\n  - {name: first, sni: a.example.org, pool: p}"))
	for _, one := range d.lives() {
		if one.flow.Route != "second" || one.flow.Pool != "q" || one.flow.SNI != "" || one.way.backend.ID != 2 {
			t.Errorf("%+v, backend %+v", one, one.way.backend)
		}
	}
	if d.Bound() != 1 {
		t.Errorf("%d flows", d.Bound())
	}
}

// FuzzJournal reads anything as a journal's records: nothing breaks, and what is read is what would be written.
func FuzzJournal(f *testing.F) {
	addr := netip.MustParseAddrPort("192.0.2.1:443")
	var seed []byte
	for _, r := range []record{
		{kind: recordBackend, number: 1, pool: "p", name: "n", backend: addr},
		{kind: recordRoute, number: 1, route: "r"},
		{kind: recordWay, number: 64, id: 1, pool: "p", name: "n", backend: addr, route: "r"},
		{kind: recordFlow, number: 64, connection: connection{addr, addr}, generation: 1, cookie: 2, bound: 3, sni: "a.example.com"},
		{kind: recordListener, number: 7, backend: addr},
		{kind: recordPeer, backend: addr, peer: peer{mss: 1400, noTimestamps: true}},
		{kind: recordFlow, number: 64, connection: connection{addr, addr}, origin: netip.MustParseAddrPort("[2001:db8::1]:443")},
	} {
		f.Add(r.append(nil)[recordHeader:])
		seed = r.append(seed)
	}
	f.Add(seed)
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(dir, fmt.Sprint(os.Getpid()))
		must(t, os.WriteFile(path, append([]byte(journalStart("boot")), b...), 0o600))
		r, err := openJournal(path, "boot")
		must(t, err)
		var one, again record
		for n := 0; r.next(&one); n++ {
			if n > len(b)/recordHeader {
				t.Fatal("more records than there can be")
			}
		}
		must(t, r.Close())
		if one.parse(b) {
			body := one.append(nil)[recordHeader:]
			if !again.parse(body) || again != one {
				t.Errorf("read %+v, written and read again %+v", one, again)
			}
		}
	})
}

// TestJournalOutlived has a flow live on after a forged RST, whose mark stays in its entry: the next daemon must not take it for an end.
func TestJournalOutlived(t *testing.T) {
	k, path := newKernel(t, 1, 100), filepath.Join(t.TempDir(), "flows")
	d := k.journaled(path, journalRoutes)
	f, w := d.binds("203.0.113.7:1001", "a.example.com", ""), d.workers[0]
	d.journal.step()
	c := f.clientTuple()
	w.closingSegment(maps.LegClient, &packet.Segment{Src: c.Src, Dst: c.Dst, Seq: 5, Flags: packet.RST})
	d.again(k, func(p *maps.Pair) {
		p.Up.Flow.Control |= maps.FlowRST
		p.Up.Flow.LastSeen = uint32((w.now + int64(4*time.Second)) >> 20)
	})
	w.now += int64(5 * time.Second)
	w.review([]*flow{f})
	if f.closing.ended() || !f.outlived[maps.LegClient] {
		t.Fatalf("not outlived: %+v", f)
	}
	d.journal.step()
	d = k.journaled(path, journalRoutes)
	if f := d.workers[0].flows.at(1); f.closing.ended() || !f.outlived[maps.LegClient] {
		t.Errorf("the mark counts again: %+v", f)
	}
}
