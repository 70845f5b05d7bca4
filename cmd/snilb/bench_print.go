// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"snilb/userspace/bench"
)

// benchProgress is a bar over the run's seconds, on a terminal only. Its zero value shows nothing.
type benchProgress struct {
	bar *progressbar.ProgressBar
}

func newBenchProgress(c *cli.Context, warmup, duration time.Duration) *benchProgress {
	file, ok := c.App.ErrWriter.(*os.File)
	if !ok || c.Bool("no-progress") || !term.IsTerminal(int(file.Fd())) {
		return &benchProgress{}
	}
	b := &benchProgress{bar: progressbar.NewOptions64(max(int64(duration/time.Second), 1),
		progressbar.OptionSetWriter(file), progressbar.OptionSetWidth(30), progressbar.OptionClearOnFinish(),
		progressbar.OptionSetPredictTime(false), progressbar.OptionSetElapsedTime(true),
	)}
	if warmup > 0 {
		b.bar.Describe("warming up")
	}
	_ = b.bar.RenderBlank()
	return b
}

// second moves the bar by what one second brought.
func (b *benchProgress) second(s bench.Second) {
	if b.bar == nil {
		return
	}
	b.bar.Describe(fmt.Sprintf("%.0f/s, %.0f MB/s, %d failed", float64(s.Successes)/s.Seconds, float64(s.Bytes)/s.Seconds/1e6, s.Failures))
	_ = b.bar.Add(1)
}

func (b *benchProgress) end() {
	if b.bar != nil {
		_ = b.bar.Finish()
	}
}

// printBenchTable prints a result for reading.
func printBenchTable(out io.Writer, r *bench.Result) error {
	table := newTable(out)
	line := func(what, format string, values ...any) {
		_, _ = fmt.Fprintf(table, "%s\t%s\n", what, fmt.Sprintf(format, values...))
	}
	line(r.Kind, "to %s, as %s, %.1f s", r.Target, r.Generator, r.Seconds)
	if r.Offered > 0 {
		line("offered", "%.0f/s", r.Offered)
	}
	line("attempts", "%d", r.Attempts)
	line("succeeded", "%d  %.0f/s", r.Successes, r.Rate)
	line("failed", "%d", r.Failed())
	for _, why := range slices.Sorted(maps.Keys(r.Failures)) {
		line("  "+why, "%d", r.Failures[why])
	}
	if r.Seconds > 0 {
		line("received", "%d bytes  %.1f MB/s", r.Bytes, float64(r.Bytes)/r.Seconds/1e6)
	}
	l := r.Latency
	if l != nil {
		line("latency, ms", "min %.3f  mean %.3f  max %.3f", l.Min/1e3, l.Mean/1e3, l.Max/1e3)
	}
	if l != nil && r.Successes >= 10 { // percentiles of a few say nothing
		for _, p := range []struct {
			name   string
			micros float64
		}{{"p50", l.P50}, {"p90", l.P90}, {"p99", l.P99}, {"p99.9", l.P999}, {"p99.99", l.P9}} {
			line("  "+p.name, "%.3f", p.micros/1e3)
		}
	}
	return table.Flush()
}
