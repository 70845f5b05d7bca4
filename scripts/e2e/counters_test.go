// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"net/netip"
	"strings"
	"time"

	"snilb/scripts/testbed"
)

// counters is what the tests read of `snilb status -o json`.
type counters struct {
	Version string `json:"version"`
	Engine  struct {
		Flows      int               `json:"flows"`
		HalfOpen   int               `json:"half_open"`
		HelloBytes int64             `json:"hello_bytes"`
		Adopted    int               `json:"adopted"`
		Hellos     map[string]uint64 `json:"hellos"`
		Events     map[string]uint64 `json:"events"`
		Closed     map[string]uint64 `json:"closed"`
		Connects   []struct {
			Backend string `json:"backend"`
			Result  string `json:"result"`
			Count   uint64 `json:"count"`
		} `json:"connects"`
		Decisions []struct {
			Result string `json:"result"`
			Count  uint64 `json:"count"`
		} `json:"decisions"`
	} `json:"engine"`
	Interfaces []struct {
		Role    string            `json:"role"`
		Packets map[string]uint64 `json:"packets"`
	} `json:"interfaces"`
}

func (d *daemon) counters() counters {
	d.t.Helper()
	out, err := d.snilb("status", "--name", d.name, "-o", "json")
	must(d.t, err)
	var c counters
	must(d.t, json.Unmarshal([]byte(out), &c))
	return c
}

// connects is how often attempts at a backend ended that way; no backend means all of them.
func (c *counters) connects(backend, result string) (n uint64) {
	for _, one := range c.Engine.Connects {
		if (backend == "" || one.Backend == backend) && one.Result == result {
			n += one.Count
		}
	}
	return n
}

// packets sums an action/reason over the interfaces.
func (c *counters) packets(name string) (n uint64) {
	for _, i := range c.Interfaces {
		n += i.Packets[name]
	}
	return n
}

// waitCounters waits until the counters satisfy ok.
func (d *daemon) waitCounters(what string, wait time.Duration, ok func(*counters) bool) counters {
	d.t.Helper()
	var c counters
	for deadline := time.Now().Add(wait); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if c = d.counters(); ok(&c) {
			return c
		}
	}
	d.t.Fatalf("status: want %s within %s, have %+v", what, wait, c)
	return c
}

// wantLogged asks for a line, and for no more of them than one a second since began.
func (d *daemon) wantLogged(text string, began time.Time) {
	d.t.Helper()
	n := strings.Count(d.stderr.String(), text)
	if most := int(time.Since(began)/time.Second) + 1; n < 1 || n > most {
		d.t.Errorf("%d log lines say %q in %s, want 1 to %d", n, text, time.Since(began), most)
	}
}

// clientsOf are the client's addresses of a family.
func clientsOf(bed *testbed.Bed, v6 bool) []netip.Addr {
	if v6 {
		return bed.Clients6
	}
	return bed.Clients4
}
