// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"snilb/loader"
	"snilb/userspace/api"
)

// gonePoll is how often detach looks whether the daemon has ended.
const gonePoll = 50 * time.Millisecond

func detachCommand() *cli.Command {
	return &cli.Command{
		Name:      "detach",
		Usage:     "Take snilb off interfaces",
		ArgsUsage: "IFACE... | --all",
		Description: "Asks the daemon to end, and waits until it has. Where the daemon is dead, what it left is removed,\n" +
			"and its connections with it.",
		Flags:        clientFlags(&cli.BoolFlag{Name: "all", Usage: "every instance here, or all of --name"}),
		OnUsageError: usageError,
		Action:       detachAction,
	}
}

func detachAction(c *cli.Context) error {
	ifaces, all := c.Args().Slice(), c.Bool("all")
	if all == (len(ifaces) > 0) {
		return cli.Exit("detach takes either interfaces or --all", exitUsage)
	}
	only := ""
	if c.IsSet("name") {
		only = c.String("name")
		if _, err := loader.SocketPath(only); err != nil {
			return cli.Exit("--name: "+err.Error(), exitUsage)
		}
	}
	d := &detacher{
		socket: c.String("api"), out: c.App.Writer,
		log: newLogger(c.App.ErrWriter, false),
	}
	if all {
		return d.all(c.Context, only)
	}
	return d.interfaces(c.Context, ifaces, only)
}

type detacher struct {
	socket string // "": where the instance's name puts it
	out    io.Writer
	log    *slog.Logger
}

// all detaches every instance, or only the one.
func (d *detacher) all(ctx context.Context, only string) error {
	names := []string{only}
	if only == "" {
		var err error
		if names, err = loader.Instances(); err != nil {
			return err
		}
	}
	var errs []error
	done := false
	for _, name := range names {
		err := d.instance(ctx, name)
		if errors.Is(err, loader.ErrNothing) {
			continue
		}
		done = true
		errs = append(errs, err)
	}
	if !done {
		_, _ = fmt.Fprintln(d.out, "nothing to detach")
	}
	return errors.Join(errs...)
}

// interfaces detaches the instances that have these interfaces.
func (d *detacher) interfaces(ctx context.Context, ifaces []string, only string) error {
	var names []string
	for _, iface := range ifaces {
		name, err := loader.Holder(iface)
		switch {
		case err != nil:
			return err
		case name == "" || only != "" && name != only:
			return fmt.Errorf("nothing of %s on %s: see snilb detach --all for what is left elsewhere", orWords(only, "snilb"), iface)
		case !slices.Contains(names, name):
			names = append(names, name)
		}
	}
	for _, name := range names {
		if err := d.wholly(ctx, name, ifaces); err != nil {
			return err
		}
	}
	var errs []error
	for _, name := range names {
		errs = append(errs, d.instance(ctx, name))
	}
	return errors.Join(errs...)
}

// wholly returns an error if a living instance has interfaces that were not named:
// it can only go as a whole.
func (d *detacher) wholly(ctx context.Context, name string, named []string) error {
	client, err := clientOf(name, d.socket)
	if err != nil {
		return err
	}
	raw, err := client.Status(ctx)
	if errors.Is(err, api.ErrNoDaemon) {
		return nil // what a dead one left is of no use in part
	}
	if err != nil {
		return err
	}
	var s statusDocument
	if err := json.Unmarshal(raw, &s); err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	for _, i := range s.Interfaces {
		if i.Role == string(loader.RoleClient) && !slices.Contains(named, i.Name) {
			return fmt.Errorf("instance %s also has %s, and can only be detached as a whole: name all of its interfaces, or use --all --name %s", name, i.Name, name)
		}
	}
	return nil
}

// instance detaches one. Returns an error that is loader.ErrNothing if there is
// nothing of it.
func (d *detacher) instance(ctx context.Context, name string) error {
	pid, err := loader.Running(name)
	if err != nil {
		return err
	}
	if pid == 0 {
		if err := loader.Detach(name, d.log); err != nil {
			return err
		}
		_, _ = fmt.Fprintf(d.out, "removed what instance %s had left\n", name)
		return nil
	}
	client, err := clientOf(name, d.socket)
	if err != nil {
		return err
	}
	if err := client.Detach(ctx); err != nil {
		return noDaemon(name, err)
	}
	if err := waitGone(ctx, name, pid); err != nil {
		return err
	}
	_, _ = fmt.Fprintf(d.out, "detached instance %s\n", name)
	return nil
}

// waitGone waits for the daemon's end, as long as its drain timeout makes it.
func waitGone(ctx context.Context, name string, pid int) error {
	for {
		now, err := loader.Running(name)
		if err != nil || now != pid {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(gonePoll):
		}
	}
}
