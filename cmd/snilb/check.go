// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"snilb/userspace/config"
)

// hostCheck returns what in a file this machine cannot do. nil means that this
// build cannot look at the machine.
var hostCheck func(*config.Config) []config.Problem

// The exit codes of every command; 0 is success.
const (
	exitFailed = 1
	exitUsage  = 2
)

func checkCommand() *cli.Command {
	return &cli.Command{
		Name:      "check",
		Usage:     "Say what is wrong with a routes file, where, and how to mend it",
		ArgsUsage: "FILE",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "host", Usage: "also look at this machine's routes and addresses"},
			&cli.BoolFlag{Name: "strict", Usage: "fail on warnings too"},
		},
		OnUsageError: usageError,
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return cli.Exit("check takes one FILE: snilb check routes.yaml", exitUsage)
			}
			return check(c.App.Writer, c.App.ErrWriter, c.Args().First(), c.Bool("host"), c.Bool("strict"))
		},
	}
}

func check(out, errOut io.Writer, path string, host, strict bool) error {
	if host && hostCheck == nil {
		return cli.Exit("--host is not supported by this build", exitFailed)
	}
	c, err := config.Load(path)
	if err != nil {
		return loadError(errOut, err)
	}
	var problems config.Problems
	if host {
		problems = hostCheck(c)
	}
	for _, p := range c.Warnings {
		if strict {
			problems = append(problems, p)
			continue
		}
		p.What = "warning: " + p.What
		_, _ = fmt.Fprintln(errOut, p)
	}
	if len(problems) > 0 {
		return loadError(errOut, problems)
	}
	for _, p := range c.Notes {
		p.What = "note: " + p.What
		_, _ = fmt.Fprintln(errOut, p)
	}
	_, err = fmt.Fprintf(out, "ok: %s, %s, %s, %s\n", plural(len(c.Listeners), "listener"),
		plural(len(c.Pools), "pool"), plural(c.Backends(), "backend"), plural(len(c.Routes), "route"))
	return err
}

// loadError prints what is wrong with a file and returns the error that ends
// the command.
func loadError(errOut io.Writer, err error) error {
	var problems config.Problems
	if !errors.As(err, &problems) {
		return cli.Exit(err.Error(), exitFailed)
	}
	_, _ = fmt.Fprintln(errOut, problems.Error())
	return cli.Exit("", exitFailed)
}

// usageError gives a wrong flag the exit code of wrong usage.
func usageError(_ *cli.Context, err error, _ bool) error {
	return cli.Exit(err.Error(), exitUsage)
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
