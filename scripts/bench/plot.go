// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"image/color"
	"path/filepath"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"

	"snilb/userspace/bench"
)

// The plots' names in the folder of the results.
const (
	connectionPlot = "connection-cpu.svg"
	bulkPlot       = "bulk-cpu.svg"
	latencyPlot    = "latency.svg"
	floodPlot      = "flood.svg"
)

const plotWidth, plotHeight = 17 * vg.Centimeter, 10 * vg.Centimeter

func (r *results) plots(dir string) error {
	return errors.Join(
		r.bars(filepath.Join(dir, connectionPlot), "CPU added per connection, µs", connectionMetrics[0]),
		r.bars(filepath.Join(dir, bulkPlot), "CPU added per GB of a download, s", bulkMetrics[1]),
		r.curves(filepath.Join(dir, latencyPlot)))
}

// floodPlots is one, of the last rate.
func (r *results) floodPlots(dir string) error {
	rates := r.Settings.Flood.Rates
	last := rates[len(rates)-1]
	return r.bars(filepath.Join(dir, floodPlot), "p99 of clients in the worst flood ("+rateTitle(last)+"), ms",
		metric{of: whole(func(r *record) float64 { return worst(r, last, (*flooded).p99) })})
}

// bars draws a metric's medians, one bar a contender, and the spread as whiskers.
func (r *results) bars(file, title string, m metric) error {
	p := plot.New()
	p.Title.Text = title
	var names []string
	var medians plotter.Values
	var points errorPoints
	for _, c := range slices.Backward(r.Contenders) { // the first stands highest
		values := r.values(m, c.Name)
		if len(values) == 0 {
			continue
		}
		s := newSpread(values)
		points.XYs = append(points.XYs, plotter.XY{X: s.median, Y: float64(len(names))})
		points.XErrors = append(points.XErrors, struct{ Low, High float64 }{s.min - s.median, s.max - s.median})
		names, medians = append(names, c.Title), append(medians, s.median)
	}
	if len(names) == 0 {
		return nil
	}
	bars, err := plotter.NewBarChart(medians, 14)
	if err != nil {
		return err
	}
	bars.Horizontal, bars.Color, bars.LineStyle.Width = true, color.RGBA{R: 0x4c, G: 0x78, B: 0xa8, A: 0xff}, 0
	whiskers, err := plotter.NewXErrorBars(points)
	if err != nil {
		return err
	}
	p.Add(plotter.NewGrid(), bars, whiskers)
	p.NominalY(names...)
	p.Y.Min, p.Y.Max = -0.6, float64(len(names))-0.4
	p.X.Max *= 1.05
	return save(p, file)
}

// errorPoints are points with a spread.
type errorPoints struct {
	plotter.XYs
	plotter.XErrors
}

// curves draws each contender's latency of new connections at the fixed rate, of the round whose p99 is the median one.
func (r *results) curves(file string) error {
	curves := map[string][]bench.Point{}
	for _, c := range r.Contenders {
		var rounds []*phase
		for i := range r.Records {
			if p := r.Records[i].ConnectionsAt; r.Records[i].Contender == c.Name && p.Latency != nil {
				rounds = append(rounds, p)
			}
		}
		if len(rounds) == 0 {
			continue
		}
		slices.SortFunc(rounds, func(a, b *phase) int { return cmp.Compare(a.Latency.P99, b.Latency.P99) })
		curves[c.Title] = rounds[len(rounds)/2].Curve
	}
	p, err := bench.LatencyPlot(curves)
	if err != nil {
		return err
	}
	p.Title.Text = fmt.Sprintf("new connections, %.0f a second", r.Settings.ConnectionRate)
	return save(p, file)
}

// save writes a plot on white, so that it can be read on a dark page too.
func save(p *plot.Plot, file string) error {
	p.BackgroundColor = color.White
	p.Title.Padding = 3 * vg.Millimeter
	p.Y.Tick.Label.Font.Size, p.Legend.TextStyle.Font.Size = 9, 9
	if err := p.Save(plotWidth, plotHeight, file); err != nil {
		return fmt.Errorf("plot %s: %w", file, err)
	}
	return nil
}
