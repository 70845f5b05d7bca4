// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"snilb/userspace/bench"
)

func benchCommand() *cli.Command {
	return &cli.Command{
		Name:  "bench",
		Usage: "Measure a balancer that routes TLS by the server name, of any make",
		Description: "TARGET is the balancer's ADDR:PORT. The client's part opens connections, writes a ClientHello and waits for\n" +
			"the first bytes of the answer; it completes no TLS handshake. Any TLS server behind the balancer answers\n" +
			"\"bench connections\"; the others need \"bench serve\" there.",
		Subcommands: []*cli.Command{
			benchConnectionsCommand(), benchRequestsCommand(), benchBulkCommand(), benchIdleCommand(), benchFloodCommand(),
			benchServeCommand(),
		},
		OnUsageError: usageError,
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return cli.Exit(fmt.Sprintf("no command %q: see snilb bench --help", c.Args().First()), exitUsage)
			}
			return cli.ShowSubcommandHelp(c)
		},
	}
}

// helloFlags say what the hellos look like.
func helloFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{Name: "sni", Usage: "the `NAME`s in the hellos, with commas or repeated; # stands for a number (see --names)"},
		&cli.IntFlag{Name: "names", Usage: "`COUNT` of names made from the one of --sni, numbered from 0", Value: 1},
		&cli.Float64Flag{Name: "zipf", Usage: "`EXPONENT` of a Zipf distribution over the names, above 1; 0 draws them alike"},
		&cli.Float64Flag{Name: "no-sni", Usage: "`SHARE` of the hellos that carry no name, 0 to 1"},
		&cli.StringFlag{Name: "layout", Usage: "whose hello it is, `CLIENT`: " + strings.Join(bench.Layouts(), ", "), Value: "go"},
		&cli.StringFlag{Name: "alpn", Usage: "the protocols to offer, as `LIST` with commas; the layout's own if empty"},
		&cli.IntFlag{Name: "record-bytes", Usage: "split the hello into TLS records of at most so many `BYTES`"},
		&cli.IntFlag{Name: "segment-bytes", Usage: "split the hello into segments of at most so many `BYTES`"},
	}
}

// loadFlags say what is offered, and where the results go.
func loadFlags(concurrency int) []cli.Flag {
	return []cli.Flag{
		&cli.Float64Flag{Name: "rate", Usage: "begin so many `ATTEMPTS` a second, whatever became of the earlier ones; 0: begin one when another ends"},
		&cli.IntFlag{Name: "concurrency", Usage: "at most so many `ATTEMPTS` at once", Value: concurrency},
		&cli.DurationFlag{Name: "warmup", Usage: "`DUR` before what is measured", Value: time.Second},
		&cli.DurationFlag{Name: "duration", Usage: "`DUR` that is measured", Value: 10 * time.Second},
		&cli.DurationFlag{Name: "timeout", Usage: "`DUR` that one attempt may take", Value: 10 * time.Second},
		&cli.IntFlag{Name: "reply", Usage: "`BYTES` of answer to a hello to wait for; must not be more than the server sends", Value: 1},
	}
}

func socketFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{Name: "from", Usage: "local `ADDR`esses to connect from, in turn"},
		&cli.StringFlag{Name: "close", Usage: "end connections by `fin|rst`", Value: "fin"},
	}
}

// packetFlags are those of packets that are no sockets'.
func packetFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "interface", Usage: "where packets leave and come: an Ethernet interface, `IFACE`"},
		&cli.BoolFlag{Name: "xdp", Usage: "send and receive by XDP: for an interface that has it, with an MTU up to 2026"},
	}
}

// sourcesFlag is where such packets come from.
func sourcesFlag() cli.Flag {
	return &cli.StringFlag{Name: "sources", Usage: "clients' addresses, `CIDR`: not this host's own, and routed to it"}
}

// benchPackets reads packetFlags and sourcesFlag.
func benchPackets(c *cli.Context) (o bench.PacketOptions, err error) {
	if c.String("interface") == "" || c.String("sources") == "" {
		return o, cli.Exit("packets need --interface IFACE and --sources CIDR", exitUsage)
	}
	if o.Sources, err = netip.ParsePrefix(c.String("sources")); err != nil {
		return o, cli.Exit("--sources: "+err.Error(), exitUsage)
	}
	o.Interface, o.XDP = c.String("interface"), c.Bool("xdp")
	return o, nil
}

func resultFlags() []cli.Flag {
	return []cli.Flag{
		outputFlag(formatTable),
		&cli.StringFlag{Name: "plot", Usage: "draw the results into `FILE`, .svg or .png"},
		&cli.BoolFlag{Name: "no-progress", Usage: "show no progress bar"},
	}
}

// benchTarget reads the one argument.
func benchTarget(c *cli.Context) (netip.AddrPort, error) {
	if c.NArg() != 1 {
		return netip.AddrPort{}, cli.Exit(c.Command.Name+" takes one ADDR:PORT, of the balancer", exitUsage)
	}
	text := c.Args().First()
	if target, err := netip.ParseAddrPort(text); err == nil {
		return target, nil
	}
	resolved, err := net.ResolveTCPAddr("tcp", text)
	if err != nil {
		return netip.AddrPort{}, cli.Exit(fmt.Sprintf("target %q: %v", text, err), exitUsage)
	}
	target := resolved.AddrPort()
	return netip.AddrPortFrom(target.Addr().Unmap(), target.Port()), nil
}

// benchHellos reads the flags of helloFlags.
func benchHellos(c *cli.Context) (*bench.Hellos, error) {
	names := bench.Names{Skew: c.Float64("zipf"), Without: c.Float64("no-sni")}
	given := c.StringSlice("sni")
	switch count := c.Int("names"); {
	case count == 1:
		names.List = given
	case len(given) != 1:
		return nil, cli.Exit("--names makes its names from one --sni, such as site-#.example.com", exitUsage)
	default:
		list, err := bench.Numbered(given[0], count)
		if err != nil {
			return nil, cli.Exit("--names: "+err.Error(), exitUsage)
		}
		names.List = list
	}
	if len(names.List) == 0 && names.Without < 1 {
		return nil, cli.Exit("which names? Give --sni NAME, or --no-sni 1 for hellos without one", exitUsage)
	}
	opts := bench.HelloOptions{
		Layout: c.String("layout"), Names: names,
		RecordBytes: c.Int("record-bytes"), SegmentBytes: c.Int("segment-bytes"),
	}
	for _, protocol := range strings.Split(c.String("alpn"), ",") {
		if protocol = strings.TrimSpace(protocol); protocol != "" {
			opts.ALPN = append(opts.ALPN, protocol)
		}
	}
	hellos, err := bench.NewHellos(opts)
	if err != nil {
		return nil, cli.Exit(err.Error(), exitUsage)
	}
	return hellos, nil
}

// benchLoad reads the flags of helloFlags and loadFlags, those that the command has.
func benchLoad(c *cli.Context) (l bench.Load, err error) {
	if l.Target, err = benchTarget(c); err != nil {
		return l, err
	}
	if l.Hellos, err = benchHellos(c); err != nil {
		return l, err
	}
	l.Rate, l.Concurrency, l.Reply = c.Float64("rate"), c.Int("concurrency"), c.Int("reply")
	l.Warmup, l.Duration, l.Timeout = c.Duration("warmup"), c.Duration("duration"), c.Duration("timeout")
	return l, nil
}

func benchSockets(c *cli.Context) (o bench.SocketOptions, err error) {
	for _, text := range c.StringSlice("from") {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return o, cli.Exit(fmt.Sprintf("--from %q is no address", text), exitUsage)
		}
		o.From = append(o.From, addr)
	}
	switch c.String("close") {
	case "fin":
	case "rst":
		o.ResetClose = true
	default:
		return o, cli.Exit(fmt.Sprintf("--close cannot be %q: use fin or rst", c.String("close")), exitUsage)
	}
	return o, nil
}

// benchContext ends at the signals that end a command: what was measured until then is printed.
func benchContext(c *cli.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
}
