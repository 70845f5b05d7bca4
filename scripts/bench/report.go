// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// results are all that a run has found, as results.json holds it.
type results struct {
	Command    string     `json:"command"`
	Machine    machine    `json:"machine"`
	Settings   settings   `json:"settings"`
	Contenders []entrant  `json:"contenders"`
	Records    []record   `json:"records"`
	Took       float64    `json:"took_seconds"`
	Incomplete []incident `json:"incomplete,omitempty"`
}

// entrant is a contender as readers know it.
type entrant struct {
	Name    string `json:"name"`
	Title   string `json:"title"`
	ByName  bool   `json:"by_name"`
	Version string `json:"version,omitempty"`
}

// incident is something that failed where nothing should.
type incident struct {
	Round int    `json:"round"`
	What  string `json:"what"`
}

func readResults(file string) (*results, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r := &results{}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return r, nil
}

// write puts results.json, results.md and the plots into a folder.
func (r *results) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "results.json"), append(text, '\n'), 0o644),
		os.WriteFile(filepath.Join(dir, "results.md"), []byte(r.markdown()), 0o644),
		r.plots(dir))
}

// markdown is the whole report.
func (r *results) markdown() string {
	var b strings.Builder
	set := r.Settings
	fmt.Fprintf(&b, "# Benchmark\n\n%s\n\n", r.where())
	fmt.Fprintf(&b, "Figures are medians of %d rounds, in brackets the lowest and the highest. CPU is that of the whole machine; "+
		"\"added\" is what the plainly routed path of the same round did not use.\n\n", set.Rounds)
	fmt.Fprintf(&b, "| way | picks by name | version |\n| --- | --- | --- |\n")
	for _, c := range r.Contenders {
		fmt.Fprintf(&b, "| %s | %s | %s |\n", c.Title, map[bool]string{true: "yes", false: "no"}[c.ByName], c.Version)
	}
	section := func(title, text string, metrics []metric) {
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n%s", title, text, r.table(metrics))
	}
	section("New connections", fmt.Sprintf("A hello and one byte of answer. CPU and latency at %.0f a second, which all reach; "+
		"the most with %d at a time.", set.ConnectionRate, set.Concurrency), connectionMetrics)
	section("Bulk download", fmt.Sprintf("%.1f GB over one connection, without a cipher.", float64(set.BulkBytes)/1e9), bulkMetrics)
	section("Requests on open connections", fmt.Sprintf("Answers of %d bytes over %d connections. CPU and latency at %.0f a "+
		"second.", set.RequestBytes, set.Concurrency, set.RequestRate), requestMetrics)
	section("Idle connections", fmt.Sprintf("Memory of %d connections. The kernel's (slabs but for those of processes and files, "+
		"and socket buffers; at the start vmalloc and per-CPU memory too) is beyond that of the plainly routed ones, for clients and "+
		"backends have sockets in every case. Of the processes' shared pages each counts once.", set.IdleConns), memoryMetrics)
	section("SYN flood", fmt.Sprintf("%.0f clients a second, without and with %.0f SYNs a second from made-up addresses that "+
		"began %s before. Served is who has the answer within %s.", set.CalmRate, set.FloodRate, set.FloodLead, set.FloodPatience), floodMetrics)
	if len(r.Incomplete) > 0 {
		b.WriteString("\n## What failed\n\n")
		for _, i := range r.Incomplete {
			fmt.Fprintf(&b, "- round %d: %s\n", i.Round, strings.ReplaceAll(i.What, "\n", "; "))
		}
	}
	return b.String()
}

// where says what was run, when and on what.
func (r *results) where() string {
	m := r.Machine
	kind := ""
	if m.Virtual {
		kind = ", virtual"
	}
	text := fmt.Sprintf("`%s` on %s: %d CPUs (%s%s), %.0f GiB, Linux %s, %.0f s in all. Before, %.1f %% of the CPUs were busy.",
		r.Command, m.Date.Format(time.DateOnly), m.CPUs, m.CPU, kind, float64(m.MemoryBytes)/(1<<30), m.Kernel, r.Took, 100*m.IdleBusy)
	if m.ConntrackMax > 0 {
		text += fmt.Sprintf(" nf_conntrack_max is %d.", m.ConntrackMax)
	}
	return text + fmt.Sprintf(" Load: %s.", r.Settings.Generator)
}

// table has a line a contender.
func (r *results) table(metrics []metric) string {
	var b strings.Builder
	b.WriteString("| way |")
	for _, m := range metrics {
		fmt.Fprintf(&b, " %s |", m.title)
	}
	b.WriteString("\n|" + strings.Repeat(" --- |", len(metrics)+1) + "\n")
	for _, c := range r.Contenders {
		fmt.Fprintf(&b, "| %s |", c.Title)
		for _, m := range metrics {
			fmt.Fprintf(&b, " %s |", newSpread(r.values(m, c.Name)).text(m.format))
		}
		b.WriteString("\n")
	}
	return b.String()
}

// The README's part that belongs to the benchmark.
const readmeBegin, readmeEnd = "<!-- bench:begin -->", "<!-- bench:end -->"

// intoReadme rewrites that part. dir is where the plots are, as seen from the README's folder.
func (r *results) intoReadme(file, dir string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "\n%s Medians of %d rounds, in brackets the lowest and the highest.\n\n%s", r.where(), r.Settings.Rounds, r.table(keyMetrics))
	fmt.Fprintf(&b, "\n![CPU added per connection](%[1]s/%[2]s) ![CPU added per GB](%[1]s/%[3]s)\n", dir, connectionPlot, bulkPlot)
	fmt.Fprintf(&b, "\n[All figures and versions](%[1]s/results.md), [latency by percentile](%[1]s/%[2]s).\n", dir, latencyPlot)
	out, err := replaceBetween(text, readmeBegin, readmeEnd, b.String())
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return os.WriteFile(file, out, 0o644)
}

// replaceBetween replaces what stands between two marks, each of which must be there once and in this order.
func replaceBetween(text []byte, begin, end, with string) ([]byte, error) {
	if bytes.Count(text, []byte(begin)) != 1 || bytes.Count(text, []byte(end)) != 1 {
		return nil, fmt.Errorf("%s and %s must each be there once", begin, end)
	}
	before, rest, _ := bytes.Cut(text, []byte(begin))
	_, after, found := bytes.Cut(rest, []byte(end))
	if !found {
		return nil, fmt.Errorf("%s stands before %s", end, begin)
	}
	return bytes.Join([][]byte{before, []byte(begin + with + end), after}, nil), nil
}
