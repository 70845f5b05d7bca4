// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"snilb/scripts/testbed"
)

// echoes are established connections that must outlive what a test does.
type echoes []*tls.Conn

func openEchoes(t *testing.T, bed *testbed.Bed, v6 bool, n int) echoes {
	t.Helper()
	var all echoes
	for range n {
		all = append(all, dialTLS(t, bed, vip(bed, v6), "a.example.com"))
	}
	all.live(t)
	return all
}

func (e echoes) live(t *testing.T) {
	t.Helper()
	for i, c := range e {
		if err := ping(c, fmt.Sprint("echo ", i)); err != nil {
			t.Errorf("established connection %d of %d: %v", i, len(e), err)
		}
	}
}

func (e echoes) close() {
	for _, c := range e {
		_ = c.Close()
	}
}

// wantRefused makes n new connections, which are reset once the hello is there.
func wantRefused(t *testing.T, bed *testbed.Bed, v6 bool, n int) {
	t.Helper()
	for range n {
		wantEnding(t, bed, vip(bed, v6), hello(t, classic("a.example.com")), endings["reset"])
	}
}

// TestFlowTableFull reaches limits.flows: new connections are reset, the others go on, and what closes makes room.
func TestFlowTableFull(t *testing.T) {
	bed := echoBed(t, testbed.Options{}, nil)
	d := attach(t, bed, siteRoutes(bed, "limits: {flows: 20}"), "--workers", "1")
	began := time.Now()
	families(t, func(t *testing.T, v6 bool) {
		before := d.counters()
		old := openEchoes(t, bed, v6, 20)
		wantRefused(t, bed, v6, 5)
		old.live(t)
		after := d.counters()
		if n := after.connects("", "flow_table_full") - before.connects("", "flow_table_full"); n != 5 || after.Engine.Flows != 20 {
			t.Errorf("%d connections counted as refused, %d flows", n, after.Engine.Flows)
		}
		d.wantLogged("flow table is full", began)
		old[15:].close()
		d.waitCounters("room for five", 10*time.Second, func(c *counters) bool { return c.Engine.Flows == 15 })
		young := openEchoes(t, bed, v6, 5)
		old[:15].live(t)
		young.close()
		old.close()
		d.noFlows(10 * time.Second)
	})
}

// TestFlowMapFull fills the kernel's table itself by entries of nobody, down to none and to one that is left: of the two
// that a connection needs.
func TestFlowMapFull(t *testing.T) {
	bed := echoBed(t, testbed.Options{}, nil)
	d := attach(t, bed, siteRoutes(bed, "limits: {flows: 20}"), "--workers", "1")
	families(t, func(t *testing.T, v6 bool) {
		old := openEchoes(t, bed, v6, 3)
		table := flowMap(t, d, v6)
		defer func() { _ = table.Close() }()
		junk := fill(t, table)
		for _, room := range []int{0, 1} {
			for ; room > 0; room-- {
				must(t, table.Delete(junk[0]))
				junk = junk[1:]
			}
			before, entries := d.counters(), count(table)
			wantRefused(t, bed, v6, 2)
			after := d.counters()
			if n := after.connects("", "flow_table_full") - before.connects("", "flow_table_full"); n != 2 || after.Engine.Flows != 3 {
				t.Errorf("%d connections counted as refused, %d flows", n, after.Engine.Flows)
			}
			if n := count(table); n != entries {
				t.Errorf("%d entries, %d before: half a connection was left behind", n, entries)
			}
			old.live(t)
		}
		for _, key := range junk {
			must(t, table.Delete(key))
		}
		openEchoes(t, bed, v6, 1).close()
		old.live(t)
		old.close()
		d.noFlows(10 * time.Second)
	})
}

// flowMap opens the pinned table of a family.
func flowMap(t *testing.T, d *daemon, v6 bool) *ebpf.Map {
	t.Helper()
	name := "flows4"
	if v6 {
		name = "flows6"
	}
	return openPins(t, d.name, name)
}

// fill inserts entries of no leg until there is no room.
func fill(t *testing.T, m *ebpf.Map) (keys [][]byte) {
	t.Helper()
	for range 1000 {
		key := make([]byte, m.KeySize())
		for i := range len(key) - 4 {
			key[i] = byte(rand.IntN(256))
		}
		key[len(key)-4] = 9
		err := m.Update(key, make([]byte, m.ValueSize()), ebpf.UpdateNoExist)
		if errors.Is(err, syscall.E2BIG) {
			return keys
		}
		must(t, err)
		keys = append(keys, key)
	}
	t.Fatal("the table never got full")
	return nil
}

func count(m *ebpf.Map) (n int) {
	key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	for it := m.Iterate(); it.Next(&key, &value); {
		n++
	}
	return n
}

// TestSourcePortsUsedUp has four source ports, and so four connections to a backend.
func TestSourcePortsUsedUp(t *testing.T) {
	bed := echoBed(t, testbed.Options{}, nil)
	d := attach(t, bed, siteRoutes(bed), "--workers", "1", "--source-ports", "20000-20003")
	began := time.Now()
	families(t, func(t *testing.T, v6 bool) {
		before := d.counters()
		old := openEchoes(t, bed, v6, 4)
		wantRefused(t, bed, v6, 3)
		old.live(t)
		after := d.counters()
		if n := after.connects("", "no_port") - before.connects("", "no_port"); n != 3 {
			t.Errorf("%d connections counted as no_port, want 3", n)
		}
		d.wantLogged("source ports are used up", began)
		must(t, old[3].Close())
		d.waitFlows("three", 10*time.Second, func(f []flow) bool {
			mine := 0
			for _, one := range f {
				if netip.MustParseAddrPort(one.Client).Addr().Is6() == v6 {
					mine++
				}
			}
			return mine == 3
		})
		must(t, ping(dialTLS(t, bed, vip(bed, v6), "a.example.com"), "in its place"))
		old[:3].live(t)
	})
}

// TestRingFull stops the daemon and fills its ring. New connections have to wait, as it may soon be back, established ones
// go on; afterwards all is as it was, and a connection that ended while nobody could hear of it is found.
func TestRingFull(t *testing.T) {
	bed := echoBed(t, testbed.Options{}, nil)
	d := attach(t, bed, siteRoutes(bed, "timeouts: {closing: 2s}"), "--workers", "1", "--dead-after", "60s")
	families(t, func(t *testing.T, v6 bool) {
		before, said := d.counters(), len(d.stderr.String())
		old := openEchoes(t, bed, v6, 3)
		ended := openEchoes(t, bed, v6, 1)
		must(t, d.cmd.Process.Signal(syscall.SIGSTOP))
		defer func() { _ = d.cmd.Process.Signal(syscall.SIGCONT) }()
		time.Sleep(1600 * time.Millisecond) // by now its beat is overdue
		flood(t, bed, v6, 8<<20)
		dialed := make(chan error, 3)
		for range cap(dialed) {
			go func() {
				_, err := dialTCP(t, bed, vip(bed, v6))
				dialed <- err
			}()
		}
		old.live(t)
		ended.close()
		time.Sleep(500 * time.Millisecond) // its FINs pass
		old.live(t)
		if len(dialed) > 0 {
			t.Errorf("a new connection is not held: %v", <-dialed)
		}
		must(t, d.cmd.Process.Signal(syscall.SIGCONT))
		for range cap(dialed) {
			if err := <-dialed; err != nil {
				t.Errorf("a new connection that had to wait: %v", err)
			}
		}
		openEchoes(t, bed, v6, 1).close()
		old.live(t)
		after := d.counters()
		for _, name := range []string{"drop/late_hold", "drop/event_lost"} {
			if after.packets(name) <= before.packets(name) {
				t.Errorf("%s did not count", name)
			}
		}
		waitFor(t, "warning", func() bool {
			lines := d.stderr.String()[said:]
			return strings.Contains(lines, "reason=late_hold") && strings.Contains(lines, "reason=event_lost")
		})
		d.waitFlows("those still open", 20*time.Second, func(f []flow) bool { return len(f) == len(old) })
		old.live(t)
		old.close()
		d.noFlows(10 * time.Second)
	})
}

// flood sends data of one connection that has no hello in it, more than fits.
func flood(t *testing.T, bed *testbed.Bed, v6 bool, size int) {
	t.Helper()
	r, err := bed.Raw(vip(bed, v6))
	must(t, err)
	defer func() { _ = r.Close() }()
	_, err = r.Open(testbed.LinuxSYN(r.TSVal), 3*time.Second)
	must(t, err)
	data := make([]byte, 1400)
	for sent := 0; sent < size+size/8; sent += len(data) {
		must(t, r.Send(r.At(sent, data)))
	}
	for i := range 100 { // what is too small for those, as a FIN's record is not
		must(t, r.Send(r.At(i, data[:1])))
	}
}

// TestNoConntrack makes many connections with the kernel's connection tracking on: none of snilb's packets gets an entry. The
// stack would reset what it gets of them, with which its entry goes, and is kept from that.
func TestNoConntrack(t *testing.T) {
	needTool(t, "nft")
	bed := newBed(t, testbed.Options{})
	for _, v6 := range []bool{false, true} {
		serve(t, bed.Backend, at(bed, 1, v6, 443), oneByte)
		serve(t, bed.LB, netip.AddrPortFrom(vip(bed, v6).Addr(), 8080), oneByte)
	}
	must(t, bed.Client.Sysctl("ipv4/tcp_tw_reuse", "1"))
	must(t, bed.Client.Sysctl("ipv4/ip_local_port_range", "1024 65535"))
	nft(t, bed.LB, `table inet t {
	chain in { type filter hook prerouting priority 0; ct state new counter; }
	chain out { type filter hook output priority 0; ct state new counter; }
	chain mute { type filter hook output priority raw; tcp sport 443 tcp flags rst drop; tcp dport 443 tcp flags rst drop; }
}`)
	d := attach(t, bed, siteRoutes(bed))
	first := hello(t, classic("a.example.com"))
	families(t, func(t *testing.T, v6 bool) {
		before := tracked(t, bed)
		var left atomic.Int64
		left.Store(5000)
		errs := make([]error, 4)
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() { errs[i] = hurry(bed, vip(bed, v6), first, &left) })
		}
		wg.Wait()
		must(t, errors.Join(errs...))
		if n := tracked(t, bed) - before; n > 20 {
			t.Errorf("5000 connections have made %d conntrack entries", n)
		}
		before = tracked(t, bed)
		for range 30 {
			one := &atomic.Int64{}
			one.Store(1)
			must(t, hurry(bed, netip.AddrPortFrom(vip(bed, v6).Addr(), 8080), first, one))
		}
		if n := tracked(t, bed) - before; n < 30 {
			t.Errorf("30 connections to a server of the node itself made %d entries: conntrack is off", n)
		}
	})
	d.noFlows(30 * time.Second)
}

func tracked(t *testing.T, bed *testbed.Bed) (n int) {
	t.Helper()
	must(t, bed.LB.Do(func() error {
		text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		if err != nil {
			return err
		}
		n, err = strconv.Atoi(strings.TrimSpace(string(text)))
		return err
	}))
	return n
}

// TestUnconfirmed has a client whose hello gets it a backend, and that never acknowledges anything: whoever guesses a cookie
// does as much. It is forgotten and the backend told, while a client that only is silent stays.
func TestUnconfirmed(t *testing.T) {
	ends := make(chan error, 100)
	bed := echoBed(t, testbed.Options{}, ends)
	d := attach(t, bed, siteRoutes(bed, "timeouts: {unconfirmed: 4s}"))
	families(t, func(t *testing.T, v6 bool) {
		silent := openEchoes(t, bed, v6, 1)
		for len(ends) > 0 {
			<-ends
		}
		before := d.counters()
		r, err := bed.Raw(vip(bed, v6))
		must(t, err)
		defer func() { _ = r.Close() }()
		_, err = r.Open(testbed.LinuxSYN(r.TSVal), 3*time.Second)
		must(t, err)
		bound := time.Now()
		must(t, r.Send(r.At(0, hello(t, classic("a.example.com")))))
		d.waitFlows("two", 2*time.Second, func(f []flow) bool { return len(f) == 2 })
		wantReset(t, ends)
		if took := time.Since(bound); took < 3900*time.Millisecond {
			t.Errorf("the backend was told after %s, before the timeout of 4s", took)
		}
		d.waitFlows("one", 2*time.Second, func(f []flow) bool { return len(f) == 1 })
		after := d.counters()
		if n := after.Engine.Closed["unconfirmed"] - before.Engine.Closed["unconfirmed"]; n != 1 {
			t.Errorf("%d flows counted as unconfirmed", n)
		}
		silent.live(t)
		silent.close()
		d.noFlows(10 * time.Second)
	})
}
