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

// newClient returns a client for the daemon that the flags name.
func newClient(c *cli.Context) (*api.Client, error) {
	return clientOf(c.String("name"), c.String("api"))
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

// noDaemon adds to an error that is api.ErrNoDaemon what a dead daemon has left.
func noDaemon(name string, err error) error {
	if !errors.Is(err, api.ErrNoDaemon) {
		return err
	}
	left, listErr := loader.Instances()
	if listErr != nil || !slices.Contains(left, name) {
		return err
	}
	dir, dirErr := loader.Dir(name)
	if pid, runErr := loader.Running(name); runErr == nil && pid != 0 {
		return fmt.Errorf("%w; process %d has the instance: it is starting or ending, or listens elsewhere: see --api", err, pid)
	}
	if dirErr != nil {
		return err
	}
	return fmt.Errorf("%w; a dead daemon has left its state in %s, and its connections go on: start it again, or remove it by snilb detach --all --name %s", err, dir, name)
}
