// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
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
	Flood      bool       `json:"flood,omitempty"` // a run with -flood
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

// The names of the files of results; extensions make them.
const allFiles, floodFiles = "results", "flood"

// write puts the results, as .json and .md, and the plots into a folder.
func (r *results) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	name, plots := allFiles, r.plots
	if r.Flood {
		name, plots = floodFiles, r.floodPlots
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, name+".json"), append(text, '\n'), 0o644),
		os.WriteFile(filepath.Join(dir, name+".md"), []byte(r.markdown()), 0o644),
		plots(dir))
}

// markdown is the whole report.
func (r *results) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Benchmark\n\n%s\n\n", r.where())
	fmt.Fprintf(&b, "%sCPU is that of the whole machine; \"added\" is what the plainly routed path of the same round did not use.\n\n", r.rounds())
	fmt.Fprintf(&b, "| way | picks by name | version |\n| --- | --- | --- |\n")
	for _, c := range r.Contenders {
		fmt.Fprintf(&b, "| %s | %s | %s |\n", c.Title, map[bool]string{true: "yes", false: "no"}[c.ByName], c.Version)
	}
	section := func(title, text string, metrics []metric) {
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n%s", title, text, r.table(metrics))
	}
	if r.Flood {
		r.floodSections(section)
	} else {
		r.sections(section)
	}
	if len(r.Incomplete) > 0 {
		b.WriteString("\n## What failed\n\n")
		for _, i := range r.Incomplete {
			fmt.Fprintf(&b, "- round %d: %s\n", i.Round, strings.ReplaceAll(i.What, "\n", "; "))
		}
	}
	return b.String()
}

// rounds says of what the figures are made.
func (r *results) rounds() string {
	if r.Settings.Rounds == 1 {
		return "" // of one there is no more to say
	}
	return fmt.Sprintf("Figures are medians of %d rounds, in brackets the lowest and the highest. ", r.Settings.Rounds)
}

// sections are those of all but floods.
func (r *results) sections(section func(title, text string, metrics []metric)) {
	set := r.Settings
	section("New connections", fmt.Sprintf("A hello and one byte of answer. CPU and latency at %.0f a second, which all reach; "+
		"the most with %d at a time.", set.ConnectionRate, set.Concurrency), connectionMetrics)
	section("Bulk download", fmt.Sprintf("%.1f GB over one connection, without a cipher.", float64(set.BulkBytes)/1e9), bulkMetrics)
	section("Requests on open connections", fmt.Sprintf("Answers of %d bytes over %d connections. CPU and latency at %.0f a "+
		"second.", set.RequestBytes, set.Concurrency, set.RequestRate), requestMetrics)
	section("Idle connections", fmt.Sprintf("Memory of %d connections. The kernel's (slabs but for those of processes and files, "+
		"and socket buffers; at the start vmalloc and per-CPU memory too) is beyond that of the plainly routed ones, for clients and "+
		"backends have sockets in every case. Of the processes' shared pages each counts once.", set.IdleConns), memoryMetrics)
}

// floodSections are those of the floods.
func (r *results) floodSections(section func(title, text string, metrics []metric)) {
	set, flood := r.Settings, r.Settings.Flood
	section("Without a flood", fmt.Sprintf("%.0f clients a second: a hello and one byte of answer. Served is who has it within %s.",
		flood.Clients, flood.Patience), calmMetrics)
	i := 0
	for _, kind := range flood.Kinds {
		for _, rate := range flood.Rates {
			f := flooded{Kind: kind, Offered: rate}
			section("Flood: "+f.title(), fmt.Sprintf("%s The same clients, for %s, once it has gone on for %s.", floodTexts[kind], set.Duration,
				flood.Lead+set.Warmup), floodMetrics(i))
			i++
		}
	}
}

// floodTexts say what comes, from addresses and ports that are drawn for each packet.
var floodTexts = map[string]string{
	"syn":   "SYNs that nobody completes.",
	"ack":   "Acknowledgments of SYN-ACKs that never were, as one sends who guesses cookies.",
	"data":  "The same, each with the begin of a hello.",
	"mixed": "SYNs, made-up acknowledgments and data in turn.",
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

// intoReadme rewrites that part with what a folder has of results. links is that folder as seen from the README's.
func intoReadme(file, dir, links string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	with := "\n"
	for _, part := range []struct {
		name string
		text func(r *results, links string) string
	}{{allFiles, (*results).readme}, {floodFiles, (*results).floodReadme}} {
		r, err := readResults(filepath.Join(dir, part.name+".json"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if with != "\n" {
			with += "\n"
		}
		with += part.text(r, links)
	}
	out, err := replaceBetween(text, readmeBegin, readmeEnd, with)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return os.WriteFile(file, out, 0o644)
}

func (r *results) readme(links string) string {
	return fmt.Sprintf("%s%s\n\n%s\n", r.rounds(), r.where(), r.table(keyMetrics)) +
		fmt.Sprintf("![CPU added per connection](%[1]s/%[2]s) ![CPU added per GB](%[1]s/%[3]s)\n", links, connectionPlot, bulkPlot) +
		fmt.Sprintf("\n[All figures and versions](%[1]s/%[3]s.md), [latency by percentile](%[1]s/%[2]s).\n", links, latencyPlot, allFiles)
}

func (r *results) floodReadme(links string) string {
	return fmt.Sprintf("%s\n\n%s%s\n\n%s\n", r.floodText(), r.rounds(), r.where(), r.table(r.keyFloodMetrics())) +
		fmt.Sprintf("![Latency in floods](%[1]s/%[2]s)\n\n[Each flood by itself](%[1]s/%[3]s.md).\n", links, floodPlot, floodFiles)
}

// floodText says what was done.
func (r *results) floodText() string {
	f := r.Settings.Flood
	return fmt.Sprintf("In floods: %.0f real clients a second, served if they have the answer within %s, while one CPU sends packets of no "+
		"connection from made-up addresses: SYNs, acknowledgments with made-up cookies, data without a handshake, and all three mixed. Each "+
		"figure is of the kind that was worst for the contender. The sender is on the same %d CPUs and gets slower where a packet costs its "+
		"receiver more: packets a second are those that arrived.", f.Clients, f.Patience, r.Machine.CPUs)
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
