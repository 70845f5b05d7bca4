// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"snilb/maps"
)

func TestPressure(t *testing.T) {
	var out bytes.Buffer
	p := pressure{log: slog.New(slog.NewTextHandler(&out, nil))}
	counters := maps.CounterSet{}
	counters.Packets[len(counters.Packets)-1] = 5 // of no reason that we know
	count := func(reason string, n uint64) {
		for i, r := range maps.Reasons {
			if r.Name == reason {
				counters.Packets[i] += n
			}
		}
	}
	count("ring_busy", 9)
	first := counters
	if p.look(&first); out.Len() > 0 {
		t.Errorf("what an earlier daemon met: %s", &out)
	}
	for _, step := range []struct {
		name, reason string
		n            uint64
		want         []string // parts of the one line, none: silence
	}{
		{"nothing", "hello", 0, nil},
		{"the usual", "hello", 50, nil},
		{"busy", "ring_busy", 3, []string{"reason=ring_busy", "packets=3", "--workers", "level=WARN"}},
		{"no more of it", "syn", 10, nil},
		{"more of it", "ring_busy", 2, []string{"reason=ring_busy", "packets=2"}},
		{"lost", "event_lost", 7, []string{"reason=event_lost", "packets=7", "--workers"}},
	} {
		out.Reset()
		count(step.reason, step.n)
		now := counters
		p.look(&now)
		if lines := strings.Count(out.String(), "\n"); lines != min(len(step.want), 1) {
			t.Errorf("%s: %d lines:\n%s", step.name, lines, out.String())
		}
		for _, part := range step.want {
			if !strings.Contains(out.String(), part) {
				t.Errorf("%s: no %s in %s", step.name, part, out.String())
			}
		}
	}
	for name := range pressures {
		out.Reset()
		before := counters
		p.last = &before
		count(name, 1)
		if p.look(&counters); out.Len() == 0 {
			t.Errorf("there is no reason %s", name)
		}
	}
}
