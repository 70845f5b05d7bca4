// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"snilb/userspace/bench"
)

// sampleFloods are two contenders in two kinds of flood at two rates. X serves fewer the more come, and none of the last.
func sampleFloods() *results {
	r := &results{Command: "go run ./scripts/bench -flood", Flood: true, Settings: full,
		Contenders: []entrant{{Name: floor, Title: "plainly routed"}, {Name: "x", Title: "X", ByName: true, Version: "X 1"}}}
	r.Settings.Rounds = 1
	r.Settings.Flood.Kinds, r.Settings.Flood.Rates = []string{"syn", "data"}, []float64{1000, 0}
	clients := func(served uint64) *phase {
		p := &phase{Busy: 3, Result: &bench.Result{
			Seconds: 2, Attempts: 1000, Successes: served, Failures: map[string]uint64{"timeout": 1000 - served},
		}}
		if served > 0 {
			p.Latency = &bench.Latency{P50: 200, P99: 2000 - float64(served) + 900 - 1000}
		}
		return p
	}
	for _, c := range r.Contenders {
		rec := record{Round: 1, Contender: c.Name, Calm: clients(1000)}
		for i, served := range []uint64{1000, 800, 900, 0} {
			if c.Name == floor {
				served = 1000
			}
			rec.Floods = append(rec.Floods, flooded{
				Kind: r.Settings.Flood.Kinds[i/2], Offered: r.Settings.Flood.Rates[i%2], Clients: clients(served), Flood: clients(0),
				Arrived: float64(1000 * (i + 1)), Most: int64(i+1) << 20, Conntrack: 10 * i, HalfOpen: 7,
			})
		}
		r.Records = append(r.Records, rec)
	}
	return r
}

// TestFloodFigures looks that of each rate the worst kind stands for all, and that who served nobody has no latency.
func TestFloodFigures(t *testing.T) {
	r := sampleFloods()
	for _, want := range []string{
		"| plainly routed | 0.90 | 1000 | 100.0 | 0.90 | 3.1 | 2000 | 100.0 | 0.90 | 4.2 |\n",
		"| X | 0.90 | 1000 | 90.0 | 1.00 | 3.1 | 2000 | 0.0 | – | 4.2 |\n",
	} {
		if table := r.table(r.keyFloodMetrics()); !strings.Contains(table, want) {
			t.Errorf("not in the table: %s\n%s", want, table)
		}
	}
	text := r.markdown()
	for _, want := range []string{
		"## Flood: syn, 1000 a second\n", "## Flood: data, as fast as it goes\n",
		"| X | 4000 | 0.0 | – | – | 1.50 | 4.2 | 0.0 | 30 | 7 | – | – |\n",
	} {
		if strings.Count(text, want) != 1 {
			t.Errorf("not once in the report: %s\n%s", want, text)
		}
	}
}

// TestFloodStood looks at what must hold, and for whom.
func TestFloodStood(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*flooded)
		all    bool
		want   string
	}{
		"nothing":                {func(*flooded) {}, true, ""},
		"a flow":                 {func(f *flooded) { f.Snilb.Flows = 1 }, false, "data, as fast as it goes flood: 1 flows"},
		"a guess":                {func(f *flooded) { f.Snilb.Guessed = 1 }, true, ""},
		"many guesses":           {func(f *flooded) { f.Snilb.Guessed = 100 }, false, "100 hellos"},
		"memory":                 {func(f *flooded) { f.Left = floodMemory + 1 }, false, "bytes more"},
		"another's memory":       {func(f *flooded) { f.Left, f.Snilb = floodMemory+1, nil }, true, ""},
		"memory that came back":  {func(f *flooded) { f.Most = 100 * floodMemory }, true, ""},
		"a client":               {func(f *flooded) { f.Clients.Failures = map[string]uint64{"timeout": 1} }, true, "1 of 1000 failed"},
		"a client, who may fail": {func(f *flooded) { f.Clients.Failures = map[string]uint64{"timeout": 1} }, false, ""},
	} {
		r := sampleFloods().Records[0]
		last := &r.Floods[len(r.Floods)-1]
		last.Snilb = &floodState{}
		c.change(last)
		err := r.stood(c.all)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func TestSynReceived(t *testing.T) {
	const tcp = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 016433C6:01BB 00000000:0000 0A 00000000:00000003 00:00000000 00000000     0        0 6105 1 0000000000000000 100 0 0 10 0
   1: 016433C6:01BB 0A6433C6:8AC4 03 00000000:00000000 01:00000064 00000000     0        0 0 1 0000000000000000
   2: 016433C6:01BB 0B6433C6:0303 01 00000000:00000000 00:00000000 00000000     0        0 6106 1 0000000000000000 20 4 1 10 -1
`
	if n := synReceived(tcp); n != 1 {
		t.Errorf("%d sockets, want 1", n)
	}
}

func TestFloodState(t *testing.T) {
	const flows = `{"client":"198.51.100.10:4000","state":"open"}
{"client":"198.19.3.4:5000","state":"hello"}
{"client":"198.19.3.4:5001","state":"hello"}
{"client":"198.19.3.5:5000","state":"connecting"}
`
	var f floodState
	if err := f.count([]byte(flows), floodSources); err != nil || f != (floodState{Flows: 1, Guessed: 2}) {
		t.Errorf("%+v, %v", f, err)
	}
	if err := f.count([]byte(`{"client":3}`), floodSources); err == nil {
		t.Error("a number is a client")
	}
}
