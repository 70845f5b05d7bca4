// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgsvg"
)

// The size of a picture.
const plotWidth, plotHeight = 8 * vg.Inch, 7 * vg.Inch

// CheckPlotFile says whether [Result.WritePlot] can write a file of that name.
func CheckPlotFile(file string) error {
	switch strings.ToLower(filepath.Ext(file)) {
	case ".svg", ".png":
		return nil
	}
	return fmt.Errorf("plot %s: its name must end in .svg or .png", file)
}

// WritePlot draws the run, over its seconds and by percentile of latency, as SVG or PNG by the file's name.
func (r *Result) WritePlot(file string) (err error) {
	if err := CheckPlotFile(file); err != nil {
		return err
	}
	rate, err := r.ratePlot()
	if err != nil {
		return err
	}
	plots := [][]*plot.Plot{{rate}}
	if len(r.Curve) > 0 {
		latency, err := LatencyPlot(map[string][]Point{r.Kind: r.Curve})
		if err != nil {
			return err
		}
		plots = append(plots, []*plot.Plot{latency})
	}
	canvas, write := newCanvas(file)
	tiles := draw.Tiles{Rows: len(plots), Cols: 1, PadY: vg.Millimeter * 6}
	for i, c := range plot.Align(plots, tiles, draw.New(canvas)) {
		plots[i][0].Draw(c[0])
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := bufio.NewWriter(f)
	if _, err := write.WriteTo(w); err != nil {
		return fmt.Errorf("plot %s: %w", file, err)
	}
	return w.Flush()
}

func newCanvas(file string) (vg.CanvasSizer, io.WriterTo) {
	if strings.EqualFold(filepath.Ext(file), ".png") {
		c := vgimg.PngCanvas{Canvas: vgimg.New(plotWidth, plotHeight)}
		return c, c
	}
	c := vgsvg.New(plotWidth, plotHeight)
	return c, c
}

// ratePlot shows each second's successes, or its bytes where they are what counts.
func (r *Result) ratePlot() (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text = fmt.Sprintf("%s to %s, as %s", r.Kind, r.Target, r.Generator)
	p.X.Label.Text = "seconds"
	p.Y.Label.Text = "successes a second"
	value := func(s Second) float64 { return float64(s.Successes) / s.Seconds }
	switch r.Kind {
	case "bulk":
		p.Y.Label.Text = "MB a second"
		value = func(s Second) float64 { return float64(s.Bytes) / s.Seconds / 1e6 }
	case "flood":
		p.Y.Label.Text = "packets a second"
		value = func(s Second) float64 { return float64(s.Attempts) / s.Seconds }
	}
	var points plotter.XYs
	for _, s := range r.Every {
		// What is left behind the last whole second is too short to be a rate.
		if s.Seconds > 0.5 || len(r.Every) == 1 && s.Seconds > 0 {
			points = append(points, plotter.XY{X: s.At, Y: value(s)})
		}
	}
	p.Y.Min = 0
	p.Add(plotter.NewGrid())
	if len(points) == 0 {
		return p, nil
	}
	line, dots, err := plotter.NewLinePoints(points)
	if err != nil {
		return nil, err
	}
	dots.Shape = draw.CircleGlyph{}
	p.Add(line, dots)
	return p, nil
}

// LatencyPlot draws latency curves by percentile, on axes that show the tail: each step to the right is a tenth of the
// attempts.
func LatencyPlot(curves map[string][]Point) (*plot.Plot, error) {
	p := plot.New()
	p.X.Label.Text, p.Y.Label.Text = "percentile", "latency, ms"
	p.X.Tick.Marker = plot.ConstantTicks{
		{Value: 0, Label: "0"}, {Value: 1, Label: "90"}, {Value: 2, Label: "99"}, {Value: 3, Label: "99.9"},
		{Value: 4, Label: "99.99"}, {Value: 5, Label: "99.999"},
	}
	p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	p.Legend.Top, p.Legend.Left = true, true
	p.Add(plotter.NewGrid())
	for i, name := range slices.Sorted(maps.Keys(curves)) {
		line, err := plotter.NewLine(tailAxis(curves[name]))
		if err != nil {
			return nil, fmt.Errorf("curve %s: %w", name, err)
		}
		line.Color, line.Dashes = plotutil.Color(i), plotutil.Dashes(i/len(plotutil.DefaultColors))
		line.Width = vg.Points(1.5)
		p.Add(line)
		if len(curves) > 1 {
			p.Legend.Add(name, line)
		}
	}
	return p, nil
}

// tailAxis turns percentiles into the number of nines. The last point, at 100, stays where the one before it was.
func tailAxis(curve []Point) plotter.XYs {
	points := make(plotter.XYs, 0, len(curve))
	x := 0.0
	for _, c := range curve {
		if c.Percentile < 100 {
			x = -math.Log10(1 - c.Percentile/100)
		}
		points = append(points, plotter.XY{X: x, Y: max(c.Micros, 1) / 1e3})
	}
	return points
}
