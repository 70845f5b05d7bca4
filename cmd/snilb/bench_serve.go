// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"

	"github.com/urfave/cli/v2"

	"snilb/userspace/bench"
)

func benchServeCommand() *cli.Command {
	return &cli.Command{
		Name: "serve", Usage: "The server's part: answer hellos and requests",
		ArgsUsage: "ADDR:PORT...",
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "reply", Usage: "`BYTES` of answer to a hello", Value: 1},
		},
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
