// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"snilb/userspace/bench"
)

// benchRunner offers a load.
type benchRunner func(context.Context, *cli.Context, bench.Load) (*bench.Result, error)

// bySockets is a runner for what sockets offer, with their flags read.
func bySockets(run func(context.Context, *cli.Context, bench.Load, bench.SocketOptions) (*bench.Result, error)) benchRunner {
	return func(ctx context.Context, c *cli.Context, l bench.Load) (*bench.Result, error) {
		o, err := benchSockets(c)
		if err != nil {
			return nil, err
		}
		return run(ctx, c, l, o)
	}
}

// benchSubcommand is a command that runs a load and prints what it measured.
func benchSubcommand(name, usage string, flags []cli.Flag, run benchRunner) *cli.Command {
	return &cli.Command{
		Name: name, Usage: usage, ArgsUsage: "TARGET",
		Flags:        slices.Concat(helloFlags(), flags, resultFlags()),
		OnUsageError: usageError,
		Action: func(c *cli.Context) error {
			l, err := benchLoad(c)
			if err != nil {
				return err
			}
			return benchRun(c, l.Warmup, l.Duration, func(ctx context.Context, progress func(bench.Second)) (*bench.Result, error) {
				l.Progress = progress
				return run(ctx, c, l)
			})
		},
	}
}

// benchRun shows progress while run measures, and prints and draws the result. It fails if nothing succeeded.
func benchRun(c *cli.Context, warmup, duration time.Duration, run func(context.Context, func(bench.Second)) (*bench.Result, error)) error {
	format, err := outputFormat(c)
	if err != nil {
		return err
	}
	plot := c.String("plot")
	if plot != "" {
		if err := bench.CheckPlotFile(plot); err != nil {
			return cli.Exit("--plot: "+err.Error(), exitUsage)
		}
	}
	ctx, stop := benchContext(c)
	defer stop()
	progress := newBenchProgress(c, warmup, duration)
	res, err := run(ctx, progress.second)
	progress.end()
	if err != nil {
		return cli.Exit(err.Error(), exitUsage)
	}
	if err := printBench(c, format, res); err != nil {
		return err
	}
	if plot != "" {
		if err := res.WritePlot(plot); err != nil {
			return cli.Exit(err.Error(), exitFailed)
		}
	}
	if res.Successes == 0 && res.Kind != "flood" {
		return cli.Exit("nothing succeeded", exitFailed)
	}
	return nil
}

func printBench(c *cli.Context, format string, res *bench.Result) error {
	if format == formatTable {
		return printBenchTable(c.App.Writer, res)
	}
	raw, err := json.Marshal(res)
	if err != nil {
		return err
	}
	return printDocument(c.App.Writer, format, raw)
}

func benchConnectionsCommand() *cli.Command {
	sockets := bySockets(func(ctx context.Context, _ *cli.Context, l bench.Load, o bench.SocketOptions) (*bench.Result, error) {
		return bench.Connections(ctx, l, o)
	})
	return benchSubcommand("connections", "New connections: connect, hello, the first bytes of the answer, close",
		slices.Concat(loadFlags(64), socketFlags(), packetFlags(), []cli.Flag{
			sourcesFlag(),
			&cli.BoolFlag{Name: "packets", Usage: "be a TCP of its own and no sockets: cheaper by far, as root"},
		}),
		func(ctx context.Context, c *cli.Context, l bench.Load) (*bench.Result, error) {
			if !c.Bool("packets") {
				return sockets(ctx, c, l)
			}
			o, err := benchPackets(c)
			if err != nil {
				return nil, err
			}
			return bench.Packets(ctx, l, o)
		})
}

func benchRequestsCommand() *cli.Command {
	return benchSubcommand("requests", "Requests and answers over open connections; needs bench serve",
		slices.Concat(loadFlags(64), socketFlags(), []cli.Flag{
			&cli.IntFlag{Name: "request-bytes", Usage: "`BYTES` of a request", Value: 100},
			&cli.IntFlag{Name: "size", Usage: "`BYTES` of an answer", Value: 1000},
		}),
		bySockets(func(ctx context.Context, c *cli.Context, l bench.Load, o bench.SocketOptions) (*bench.Result, error) {
			return bench.Requests(ctx, l, o, c.Int("request-bytes"), c.Int("size"))
		}))
}

func benchBulkCommand() *cli.Command {
	return benchSubcommand("bulk", "One large transfer over each of some connections; needs bench serve",
		slices.Concat([]cli.Flag{
			&cli.IntFlag{Name: "concurrency", Usage: "`COUNT` of connections", Value: 1},
			&cli.Int64Flag{Name: "size", Usage: "`BYTES` of one transfer", Value: 1 << 30},
			&cli.BoolFlag{Name: "upload", Usage: "send and not receive"},
			&cli.DurationFlag{Name: "duration", Usage: "`DUR` that all may take together", Value: 10 * time.Minute},
			&cli.DurationFlag{Name: "timeout", Usage: "`DUR` that opening may take", Value: 10 * time.Second},
			&cli.IntFlag{Name: "reply", Usage: "`BYTES` that the server answers a hello with", Value: 1},
		}, socketFlags()),
		bySockets(func(ctx context.Context, c *cli.Context, l bench.Load, o bench.SocketOptions) (*bench.Result, error) {
			return bench.Bulk(ctx, l, o, c.Int64("size"), c.Bool("upload"))
		}))
}

func benchIdleCommand() *cli.Command {
	return benchSubcommand("idle", "Many connections that stand idle, and then must still answer; needs bench serve",
		slices.Concat([]cli.Flag{
			&cli.IntFlag{Name: "concurrency", Usage: "`COUNT` of connections", Value: 10_000},
			&cli.IntFlag{Name: "opening", Usage: "open at most so `MANY` at once", Value: 64},
			&cli.DurationFlag{Name: "hold", Aliases: []string{"duration"}, Usage: "`DUR` that they stand", Value: 10 * time.Second},
			&cli.DurationFlag{Name: "timeout", Usage: "`DUR` that opening, or the last answer, may take", Value: 10 * time.Second},
			&cli.IntFlag{Name: "reply", Usage: "`BYTES` that the server answers a hello with", Value: 1},
		}, socketFlags()),
		bySockets(func(ctx context.Context, c *cli.Context, l bench.Load, o bench.SocketOptions) (*bench.Result, error) {
			return bench.Idle(ctx, l, o, c.Int("opening"), func(stand int) {
				_, _ = fmt.Fprintln(c.App.ErrWriter, "holding", stand)
			})
		}))
}

func benchFloodCommand() *cli.Command {
	return &cli.Command{
		Name: "flood", Usage: "Packets of no connection, to see what they do to real ones; as root", ArgsUsage: "TARGET",
		Flags: slices.Concat(packetFlags(), []cli.Flag{
			sourcesFlag(),
			&cli.StringFlag{Name: "kind", Usage: "what they are, `KIND`: " + strings.Join(bench.FloodKinds, ", "), Value: "syn"},
			&cli.Float64Flag{Name: "rate", Usage: "so many `PACKETS` a second; 0: as fast as it goes"},
			&cli.DurationFlag{Name: "duration", Usage: "for `DUR`", Value: 10 * time.Second},
		}, resultFlags()),
		OnUsageError: usageError,
		Action: func(c *cli.Context) error {
			target, err := benchTarget(c)
			if err != nil {
				return err
			}
			p, err := benchPackets(c)
			if err != nil {
				return err
			}
			o := bench.FloodOptions{
				Target: target, Interface: p.Interface, Sources: p.Sources, XDP: p.XDP,
				Kind: c.String("kind"), Rate: c.Float64("rate"), Duration: c.Duration("duration"),
			}
			return benchRun(c, 0, o.Duration, func(ctx context.Context, progress func(bench.Second)) (*bench.Result, error) {
				o.Progress = progress
				return bench.Flood(ctx, o)
			})
		},
	}
}
