// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/urfave/cli/v2"

	"snilb/userspace/bench"
)

func benchServeCommand() *cli.Command {
	return &cli.Command{
		Name: "serve", Usage: "The server's part: answer hellos and requests",
		ArgsUsage: "ADDR:PORT...",
		Flags: append([]cli.Flag{
			&cli.IntFlag{Name: "reply", Usage: "`BYTES` of answer to a hello", Value: 1},
			&cli.BoolFlag{Name: "packets", Usage: "be a TCP of its own and no sockets: cheaper by far, as root; answers hellos only"},
		}, packetFlags()...),
		OnUsageError: usageError,
		Action:       benchServeAction,
	}
}

// benchServeAction says "ready" on stderr once it listens.
func benchServeAction(c *cli.Context) error {
	if c.NArg() == 0 {
		return cli.Exit("bench serve needs an ADDR:PORT to listen on", exitUsage)
	}
	ctx, stop := benchContext(c)
	defer stop()
	if c.Bool("packets") {
		return benchServePackets(ctx, c)
	}
	var listeners []net.Listener
	var errs []error
	for _, addr := range c.Args().Slice() {
		l, err := (&net.ListenConfig{KeepAlive: -1}).Listen(ctx, "tcp", addr)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		listeners = append(listeners, l)
	}
	if err := errors.Join(errs...); err != nil {
		for _, l := range listeners {
			_ = l.Close()
		}
		return cli.Exit(err.Error(), exitFailed)
	}
	_, _ = fmt.Fprintln(c.App.ErrWriter, "ready")
	if err := bench.Serve(ctx, c.Int("reply"), listeners...); err != nil {
		return cli.Exit("bench serve: "+err.Error(), exitFailed)
	}
	return nil
}

func benchServePackets(ctx context.Context, c *cli.Context) error {
	s := bench.PacketServer{Interface: c.String("interface"), Reply: c.Int("reply"), XDP: c.Bool("xdp")}
	if s.Interface == "" {
		return cli.Exit("packets need --interface IFACE", exitUsage)
	}
	for _, text := range c.Args().Slice() {
		addr, err := netip.ParseAddrPort(text)
		if err != nil {
			return cli.Exit(fmt.Sprintf("%q is no ADDR:PORT", text), exitUsage)
		}
		s.Listen = append(s.Listen, addr)
	}
	s.Ready = func() { _, _ = fmt.Fprintln(c.App.ErrWriter, "ready") }
	if err := bench.ServePackets(ctx, s); err != nil {
		return cli.Exit("bench serve: "+err.Error(), exitFailed)
	}
	return nil
}
