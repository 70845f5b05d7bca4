// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"slices"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"snilb/loader"
	"snilb/userspace/api"
)

const (
	// gonePoll is how often detach looks whether the daemon has ended.
	gonePoll = 50 * time.Millisecond
	// forceAnswer is how long --force waits for an answer, and forceEnd for the end: somewhat longer than the default
	// drain timeout.
	forceAnswer = 5 * time.Second
	forceEnd    = defaultDrainTimeout + 5*time.Second
)

func detachCommand() *cli.Command {
	return &cli.Command{
		Name:      "detach",
		Usage:     "Take snilb off interfaces",
		ArgsUsage: "IFACE... | --all",
		Description: "Asks the daemon to end, and waits until it has. Where the daemon is dead, what it left is removed,\n" +
			"and its connections with it. A daemon that does not let go in time, or does not answer at all, is killed\n" +
			"with --force, and then is dead.",
		Flags: clientFlags(
			&cli.BoolFlag{Name: "all", Usage: "every instance here, or all of --name"},
			&cli.BoolFlag{Name: "force", Usage: "kill a daemon that does not let go within 15 s"},
		),
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
		socket: c.String("api"), force: c.Bool("force"), out: c.App.Writer,
		log: newLogger(c.App.ErrWriter, false),
	}
	if all {
		return d.all(c.Context, only)
	}
	return d.interfaces(c.Context, ifaces, only)
}

type detacher struct {
	socket string // "": where the instance's name puts it
	force  bool
	out    io.Writer
	log    *slog.Logger
}

// all detaches every instance, or only the one.
func (d *detacher) all(ctx context.Context, only string) error {
	names := []string{only}
	if only == "" {
		var err error
		if names, err = loader.Remains(); err != nil {
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
		if err := wholly(name, ifaces); err != nil {
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
func wholly(name string, named []string) error {
	_, has, err := loader.Held(name) // none by a dead one: what it left is of no use in part
	if err != nil {
		return err
	}
	for _, iface := range has {
		if !slices.Contains(named, iface) {
			return fmt.Errorf("instance %s also has %s, and can only be detached as a whole: name all of its interfaces, or use --all --name %s", name, iface, name)
		}
	}
	return nil
}

// instance detaches one. Returns an error that is loader.ErrNothing if there is
// nothing of it.
func (d *detacher) instance(ctx context.Context, name string) error {
	pid, err := loader.Running(name)
	if errors.Is(err, fs.ErrPermission) {
		return d.unseen(ctx, name, err)
	}
	if err != nil {
		return err
	}
	if pid != 0 {
		err := d.ask(ctx, name, pid)
		if err == nil {
			_, _ = fmt.Fprintf(d.out, "detached instance %s\n", name)
			return nil
		}
		if ctx.Err() != nil {
			return err
		}
		if !d.force {
			return fmt.Errorf("%w; process %d has the instance: --force kills it, and removes what it leaves, with its connections", err, pid)
		}
		d.log.Warn("the daemon does not let go: killing it", "instance", name, "pid", pid, "error", err)
		ctx, cancel := context.WithTimeout(ctx, forceEnd)
		defer cancel()
		if now, err := loader.Running(name); err != nil || now != 0 {
			err = errors.Join(err, loader.Kill(ctx, name))
			if err != nil {
				return err
			}
		}
	}
	if err := loader.Detach(name, d.log); err != nil {
		return err
	}
	_, _ = fmt.Fprintf(d.out, "removed what instance %s had left\n", name)
	return nil
}

// unseen is instance for who may not see whether a daemon runs, but perhaps may ask it: --api-owner.
func (d *detacher) unseen(ctx context.Context, name string, hidden error) error {
	socket := d.socket
	if socket == "" {
		var err error
		if socket, err = loader.SocketPath(name); err != nil {
			return err
		}
	}
	if err := api.NewClient(name, socket).Detach(ctx); err != nil {
		return errors.Join(err, hidden)
	}
	if err := waitUnseen(ctx, name, socket); err != nil {
		return err
	}
	_, _ = fmt.Fprintf(d.out, "detached instance %s\n", name)
	return nil
}

// ask has a daemon let go and waits until it has; with --force not for long.
func (d *detacher) ask(ctx context.Context, name string, pid int) error {
	client, err := clientOf(name, d.socket)
	if err != nil {
		return err
	}
	answer, end := ctx, ctx
	if d.force {
		var cancel context.CancelFunc
		answer, cancel = context.WithTimeout(ctx, forceAnswer)
		defer cancel()
		end, cancel = context.WithTimeout(ctx, forceEnd)
		defer cancel()
	}
	if err := client.Detach(answer); err != nil {
		return noDaemon(name, err)
	}
	return waitGone(end, name, pid)
}

// waitUnseen is waitGone for who may not see the daemon, but sees its lock, which goes with it, and its socket, which
// nobody serves any more after a death.
func waitUnseen(ctx context.Context, name, socket string) error {
	for {
		if _, err := loader.Running(name); !errors.Is(err, fs.ErrPermission) {
			return err
		}
		conn, err := net.Dial("unix", socket)
		if err == nil {
			_ = conn.Close() // nothing was written
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("daemon %s died on its way; run this as the daemon's user, or as root, to remove what it left", name)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(gonePoll):
		}
	}
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
