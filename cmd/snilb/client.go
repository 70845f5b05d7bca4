// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/urfave/cli/v2"

	"snilb/loader"
	"snilb/userspace/api"
)

// clientFlags are the flags of what talks to a daemon.
func clientFlags(more ...cli.Flag) []cli.Flag {
	return append([]cli.Flag{
		&cli.StringFlag{Name: "name", Usage: "the instance's `NAME`", Value: loader.DefaultName},
		&cli.StringFlag{Name: "api", Usage: "the daemon's socket is at `PATH`"},
	}, more...)
}

// reader is a command that prints what a daemon says, in the format asked for.
func reader(name, usage, format string, print func(*cli.Context, string, *api.Client) error) *cli.Command {
	return &cli.Command{
		Name:         name,
		Usage:        usage,
		Flags:        clientFlags(outputFlag(format)),
		OnUsageError: usageError,
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return cli.Exit(name+" takes no arguments", exitUsage)
			}
			format, err := outputFormat(c)
			if err != nil {
				return err
			}
			client, err := clientOf(c.String("name"), c.String("api"))
			if err != nil {
				return cli.Exit(err.Error(), exitUsage)
			}
			return noAnswer(c, print(c, format, client))
		},
	}
}

func clientOf(name, socket string) (*api.Client, error) {
	if socket == "" {
		path, err := loader.SocketPath(name)
		if err != nil {
			return nil, err
		}
		socket = path
	}
	return api.NewClient(name, socket), nil
}

// noAnswer is noDaemon where it was the instance that was asked, and not whoever listens at --api.
func noAnswer(c *cli.Context, err error) error {
	if c.String("api") != "" {
		return err
	}
	return noDaemon(c.String("name"), err)
}

// noDaemon adds to an error that is api.ErrNoDaemon what a dead daemon has left, or which
// other instances there are.
func noDaemon(name string, err error) error {
	if !errors.Is(err, api.ErrNoDaemon) {
		return err
	}
	left, listErr := loader.Instances()
	if listErr != nil {
		return err
	}
	if !slices.Contains(left, name) {
		if others := otherInstances(name); others != "" {
			return fmt.Errorf("%w; %s", err, others)
		}
		return err
	}
	dir, dirErr := loader.Dir(name)
	if pid, runErr := loader.Running(name); runErr == nil && pid != 0 {
		return fmt.Errorf("%w; process %d has the instance: it is starting or ending, or listens elsewhere: see --api", err, pid)
	}
	if dirErr != nil {
		return err
	}
	return fmt.Errorf("%w; a dead daemon has left its state in %s, and its connections go on: see snilb status; %s", err, dir, wayOut(name))
}
