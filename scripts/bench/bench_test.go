// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"snilb/userspace/bench"
)

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   string
	}{
		{nil, "–"},
		{[]float64{1.23}, "1.2"},
		{[]float64{3, 1, 2}, "2.0 (1.0 to 3.0)"},
		{[]float64{4, 1, 2, 3}, "2.5 (1.0 to 4.0)"},
		{[]float64{-0.01, -0.02, 0.01}, "0.0 (0.0 to 0.0)"},
	} {
		if got := newSpread(c.values).text("%.1f"); got != c.want {
			t.Errorf("%v: %q, want %q", c.values, got, c.want)
		}
	}
}

// TestBetween looks that the CPU of a part is told from that of the whole.
func TestBetween(t *testing.T) {
	zero := time.Now()
	at := func(ms int) time.Time { return zero.Add(time.Duration(ms) * time.Millisecond) }
	s := sampler{samples: []sample{{at(0), 5}, {at(100), 5}, {at(200), 7}, {at(300), 7}}}
	for _, c := range []struct {
		from, to int
		want     float64
	}{{0, 300, 2}, {100, 200, 2}, {150, 200, 1}, {175, 225, 0.5}, {200, 300, 0}, {-50, 400, 2}} {
		if got := s.between(at(c.from), at(c.to)); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("from %d to %d ms: %g, want %g", c.from, c.to, got, c.want)
		}
	}
}

// TestSampler lets one CPU work.
func TestSampler(t *testing.T) {
	s := startSampler()
	begin := time.Now()
	for time.Since(begin) < 300*time.Millisecond {
	}
	end := time.Now()
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	if got := s.between(begin, end); got < 0.2 {
		t.Errorf("one CPU worked for 0.3 s, and all together for %.2f", got)
	}
}

func TestProcFiles(t *testing.T) {
	got, err := parseMeminfo("MemTotal:       24684888 kB\nFoo: 1 kB\nSlab:  100 kB\nPercpu:  8 kB\n")
	if want := map[string]int64{"MemTotal": 24684888 << 10, "Slab": 100 << 10, "Percpu": 8 << 10}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("meminfo: %v, %v", got, err)
	}
	const sockstat = "sockets: used 15\nUDP: inuse 0 mem 9\nTCP: inuse 1 orphan 0 tw 0 alloc 7 mem 62\n"
	if n := sockstatPages(sockstat); n != 62 {
		t.Errorf("sockstat: %d pages", n)
	}
	const slabs = `slabinfo - version: 2.1
# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : tunables <limit> <batchcount> <sharedfactor> : slabdata <active_slabs> <num_slabs> <sharedavail>
TCP                  117    117   2368   13    8 : tunables    0    0    0 : slabdata      9      9      0
filp                   1     21    192   21    1 : tunables    0    0    0 : slabdata      1      3      0
`
	page := int64(os.Getpagesize())
	before := parseSlabinfo(slabs)
	if want := map[string]int64{"TCP": 72 * page, "filp": page / 21}; !reflect.DeepEqual(before, want) {
		t.Errorf("slabinfo: %v", before)
	}
	after := map[string]int64{"TCP": 80 * page, "filp": 1, "new": 3 * page}
	if g := grown(before, after, 1); !reflect.DeepEqual(g, map[string]int64{"TCP": 8 * page}) {
		t.Errorf("grown most: %v", g)
	}
	if g := grown(before, after, 9); !reflect.DeepEqual(g, map[string]int64{"TCP": 8 * page, "new": 3 * page}) {
		t.Errorf("grown: %v", g)
	}
}

// TestMemory looks that what this machine says can be read, and that what is left out is part of the slabs.
func TestMemory(t *testing.T) {
	m, err := readMemory()
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range meminfoFields {
		if _, ok := m.Fields[field]; !ok {
			t.Errorf("no %s in /proc/meminfo", field)
		}
	}
	if m.kernel() < m.Slabs || m.kernel() > m.Fields["MemTotal"] {
		t.Errorf("%d bytes are the kernel's, of %d", m.kernel(), m.Fields["MemTotal"])
	}
	if m.Slabs == 0 || m.Slabs > m.Fields["Slab"] {
		t.Errorf("%d bytes of slabs, of %d in all", m.Slabs, m.Fields["Slab"])
	}
}

func TestTaken(t *testing.T) {
	before := memory{TCP: 10, Slabs: 500, Caches: map[string]int64{"TCP": 100, "dentry": 300, "pid": 1}}
	after := memory{TCP: 15, Slabs: 540, Caches: map[string]int64{"TCP": 140, "dentry": 200, "pid": 90, "filp": 2}}
	if n := after.taken(before); n != 5+40+2 {
		t.Errorf("%d bytes: what was freed, or is of processes, counts", n)
	}
	before.Caches, after.Caches = nil, nil
	if n := after.taken(before); n != 5+40 {
		t.Errorf("%d bytes, without slabinfo", n)
	}
}

func TestResident(t *testing.T) {
	p, err := startProcess("sleep", exec.CommandContext(t.Context(), "sh", "-c", "sleep 60 & echo up; wait"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.waitLine("up", 10*time.Second); err != nil {
		t.Fatal(err)
	}
	group := p.cmd.Process.Pid
	// Until the shell's child is a sleep it shares the shell's pages.
	fits := func(n, shell int64) bool { return shell >= 50<<10 && n >= shell+(50<<10) && n <= 100<<20 }
	n, shell := resident(group), residentOne(group)
	for deadline := time.Now().Add(10 * time.Second); !fits(n, shell); n, shell = resident(group), residentOne(group) {
		if time.Now().After(deadline) {
			t.Fatalf("a shell has %d bytes, with its sleep %d", shell, n)
		}
		time.Sleep(time.Millisecond)
	}
	if err := p.stop(); err != nil {
		t.Error(err)
	}
	for deadline := time.Now().Add(10 * time.Second); resident(group) != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a child outlived its group") // the first of which alone is ours to wait for
		}
	}
}

func TestProcessEnds(t *testing.T) {
	p, err := startProcess("liar", exec.CommandContext(t.Context(), "sh", "-c", "echo not yet >&2; exit 3"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.waitLine("ready", 10*time.Second)
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "not yet") {
		t.Errorf("waiting for a line that never came: %v", err)
	}
	if err := p.stop(); err == nil {
		t.Error("that it had ended by itself is no error")
	}
}

func TestReplaceBetween(t *testing.T) {
	got, err := replaceBetween([]byte("a [ old ] b"), "[", "]", "new")
	if err != nil || string(got) != "a [new] b" {
		t.Errorf("%q, %v", got, err)
	}
	for _, bad := range []string{"", "[ only", "only ]", "] wrong [", "[ [ twice ]", "[ twice ] ]"} {
		if _, err := replaceBetween([]byte(bad), "[", "]", "new"); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

// sampleResults are two contenders in two rounds.
func sampleResults() *results {
	r := &results{Command: "go run ./scripts/bench", Settings: full,
		Contenders: []entrant{{Name: floor, Title: "plainly routed"}, {Name: "x", Title: "X", ByName: true, Version: "X 1"}}}
	p := func(busy float64) *phase {
		return &phase{Busy: busy, Result: &bench.Result{
			Seconds: 2, Attempts: 1000, Successes: 1000, Bytes: 4e9, Rate: 500, Latency: &bench.Latency{P50: 200, P99: 900},
			Curve: []bench.Point{{Percentile: 0, Micros: 100}, {Percentile: 50, Micros: 200}, {Percentile: 99, Micros: 900}, {Percentile: 100, Micros: 2000}},
		}}
	}
	add := func(round int, name string, busy float64, slab, daemon int64) {
		held := memory{Daemon: daemon}
		r.Records = append(r.Records, record{Round: round, Contender: name, Bulk: p(busy), Requests: p(busy), RequestsAt: p(busy),
			Connections: p(busy), ConnectionsAt: p(busy), Idle: idle{Connections: 10, Kernel: slab, Holding: held}})
	}
	add(1, floor, 1, 1000, 0)
	add(1, "x", 1.5, 4000, 500)
	add(2, "x", 2.75, 4000, 500)
	add(2, floor, 2, 1000, 0) // a slower machine, but for both
	return r
}

func TestFigures(t *testing.T) {
	r := sampleResults()
	table := r.table(keyMetrics)
	for _, want := range []string{
		"| plainly routed | – | – | – | 0.90 (0.90 to 0.90) | 2.00 (2.00 to 2.00) | – |\n",
		// 500 and 750 us, 0.125 and 0.1875 s/GB; 300 bytes of the kernel and 50 of the process
		"| X | 625 (500 to 750) | 0.16 (0.12 to 0.19) | 625.0 (500.0 to 750.0) | 0.90 (0.90 to 0.90) | 2.00 (2.00 to 2.00) | 350 (350 to 350) |\n",
	} {
		if !strings.Contains(table, want) {
			t.Errorf("not in the table: %s\n%s", want, table)
		}
	}
}

// TestFiguresOfNothing looks that a contender through which nothing came has no cost, and a round without a floor no figures.
func TestFiguresOfNothing(t *testing.T) {
	r := sampleResults()
	for i := range r.Records {
		if rec := &r.Records[i]; rec.Contender == "x" {
			rec.ConnectionsAt.Result = &bench.Result{Attempts: 10}
		}
	}
	if v := r.values(keyMetrics[0], "x"); len(v) != 0 {
		t.Errorf("the CPU of no connections is %v", v)
	}
	r.Records = r.Records[1:]
	if v := r.values(bulkMetrics[0], "x"); len(v) != 1 {
		t.Errorf("figures of the rounds %v: the first has no floor", v)
	}
}

func TestReport(t *testing.T) {
	r, dir := sampleResults(), t.TempDir()
	r.Incomplete = []incident{{2, "X: 1 of 1000 failed"}}
	if err := r.write(dir); err != nil {
		t.Fatal(err)
	}
	again, err := readResults(filepath.Join(dir, "results.json"))
	if err != nil || again.markdown() != r.markdown() {
		t.Errorf("results.json reports something else: %v\n%s", err, again.markdown())
	}
	if md, err := os.ReadFile(filepath.Join(dir, "results.md")); err != nil || !bytes.Contains(md, []byte("round 2: X: 1 of 1000 failed")) {
		t.Errorf("results.md: %v\n%s", err, md)
	}
	for _, name := range []string{connectionPlot, bulkPlot, latencyPlot} {
		svg, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !bytes.Contains(svg, []byte("<svg")) || !bytes.Contains(svg, []byte(">X</text>")) {
			t.Errorf("%s: %v, %d bytes", name, err, len(svg))
		}
	}
	readme := filepath.Join(dir, "README.md")
	if err := os.WriteFile(readme, []byte("before\n"+readmeBegin+"\nold\n"+readmeEnd+"\nafter\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, floods := range []int{0, 1} { // the second time it replaces its own
		if floods == 1 {
			if err := sampleFloods().write(dir); err != nil {
				t.Fatal(err)
			}
		}
		if err := intoReadme(readme, dir, "results"); err != nil {
			t.Fatal(err)
		}
		text, _ := os.ReadFile(readme)
		s := string(text)
		if strings.Contains(s, "old") || !strings.HasPrefix(s, "before\n") || !strings.HasSuffix(s, "\nafter\n") {
			t.Errorf("README:\n%s", s)
		}
		for part, want := range map[string]int{
			"| X | 625": 1, "(results/" + connectionPlot + ")": 1, "(results/" + bulkPlot + ")": 1, "(results/results.md)": 1,
			"| X | 0.90": floods, "(results/" + floodPlot + ")": floods, "(results/flood.md)": floods,
		} {
			if n := strings.Count(s, part); n != want {
				t.Errorf("README has %d times %q, want %d:\n%s", n, part, want, s)
			}
		}
	}
}

// TestReadmeMarks looks that the real README has the marks.
func TestReadmeMarks(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := replaceBetween(text, readmeBegin, readmeEnd, ""); err != nil {
		t.Error(err)
	}
}

// TestChosen looks at what the flags choose; no tool need be installed.
func TestChosen(t *testing.T) {
	list, err := contenders("snilb", []string{"tc", "xdp", "xdp-generic"})
	if err != nil || list[0].Name != floor || len(list) != 9 {
		t.Fatalf("%d contenders, %v", len(list), err)
	}
	if _, err := contenders("snilb", []string{"tcx"}); err == nil {
		t.Error("the mode tcx was accepted")
	}
	if _, err := (options{modes: "tc", only: "floppy"}).chosen("snilb"); err == nil {
		t.Error("the contender floppy was accepted")
	}
	for _, o := range []options{{generator: "carrier pigeons"}, {generator: sockets, floodRates: "0 many"}, {generator: sockets, floodRates: "-1"}} {
		if _, err := o.settings(); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
	set, err := options{generator: sockets, flood: true, floodRates: "1e5, 0"}.settings()
	if err != nil || !reflect.DeepEqual(set.Flood.Rates, []float64{1e5, 0}) || set.Rounds != 1 {
		t.Errorf("%+v, %v", set, err)
	}
}

func TestCommand(t *testing.T) {
	if got, want := command([]string{"-modes", "tc xdp", "-readme"}), "go run ./scripts/bench -modes 'tc xdp' -readme"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestComplete(t *testing.T) {
	for _, c := range []struct {
		r    bench.Result
		good bool
	}{
		{bench.Result{Attempts: 10, Successes: 10}, true},
		{bench.Result{Attempts: 10, Successes: 9}, true}, // one was cut short by the end
		{bench.Result{Attempts: 10, Successes: 9, Failures: map[string]uint64{"reset": 1}}, false},
		{bench.Result{}, false},
	} {
		if err := complete(&c.r); (err == nil) != c.good {
			t.Errorf("%+v: %v", c.r, err)
		}
	}
}

// TestNoise lets all CPUs work.
func TestNoise(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	for range runtime.NumCPU() {
		go func() {
			for ctx.Err() == nil {
			}
		}()
	}
	busy, err := noise(ctx, 300*time.Millisecond)
	cancel()
	if err != nil || busy < 0.7 || busy > 1.1 {
		t.Errorf("%.2f of the machine is busy, %v", busy, err)
	}
	began := time.Now()
	if _, err := noise(ctx, 20*time.Second); err == nil || time.Since(began) > 10*time.Second {
		t.Errorf("it waited for %s after its end, %v", time.Since(began), err)
	}
}
