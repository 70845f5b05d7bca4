// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// docsCommand prints what a package installs beside the binary. All of it is made from the commands as they are, so that
// none can be forgotten.
func docsCommand() *cli.Command {
	kinds := map[string]func(io.Writer, []docCommand) error{
		"man": writeMan, "bash": writeBash, "fish": writeFish,
	}
	usage := "docs takes one of " + strings.Join(slices.Sorted(maps.Keys(kinds)), ", ")
	return &cli.Command{
		Name:         "docs",
		Usage:        "Print the man page, or the completion for a shell",
		ArgsUsage:    "man|bash|fish",
		Hidden:       true, // of use to packages
		OnUsageError: usageError,
		Action: func(c *cli.Context) error {
			write := kinds[c.Args().First()]
			if write == nil || c.NArg() != 1 {
				return cli.Exit(usage, exitUsage)
			}
			return write(c.App.Writer, documented(newApp()))
		},
	}
}

// docCommand is a command as its users see it.
type docCommand struct {
	path        []string // "bench", "bulk"
	usage       string   // a sentence without a period
	args        string
	description string
	flags       []docFlag
	subcommands []string
}

type docFlag struct {
	names       []string // as they are written: "--output", "-o"
	value       string   // what stands for it: "FILE"; "" for a flag without one
	usage       string
	defaultText string   // ""
	choices     []string // all the values there are, or nil
}

func (c *docCommand) name() string { return strings.Join(c.path, " ") }

// documented is every command that is not hidden, a command before those below it.
func documented(app *cli.App) []docCommand { return documentedIn(nil, app.Commands) }

func documentedIn(path []string, commands []*cli.Command) (all []docCommand) {
	for _, c := range commands {
		if c.Hidden {
			continue
		}
		d := docCommand{
			path: append(slices.Clone(path), c.Name), usage: c.Usage, args: c.ArgsUsage, description: c.Description,
			flags: documentedFlags(c.Flags),
		}
		below := documentedIn(d.path, c.Subcommands)
		for _, b := range below {
			if len(b.path) == len(d.path)+1 {
				d.subcommands = append(d.subcommands, b.path[len(d.path)])
			}
		}
		all = append(append(all, d), below...)
	}
	return all
}

func documentedFlags(flags []cli.Flag) (all []docFlag) {
	for _, f := range flags {
		visible, ok := f.(cli.VisibleFlag)
		if ok && !visible.IsVisible() {
			continue
		}
		doc, ok := f.(cli.DocGenerationFlag)
		if !ok {
			continue
		}
		d := docFlag{usage: strings.ReplaceAll(doc.GetUsage(), "`", ""), choices: choices(doc.GetUsage())}
		for _, name := range f.Names() {
			dashes := "--"
			if len(name) == 1 {
				dashes = "-"
			}
			d.names = append(d.names, dashes+name)
		}
		if doc.TakesValue() {
			d.value = placeholder(doc.GetUsage())
			d.defaultText = strings.Trim(doc.GetDefaultText(), `"`)
		}
		all = append(all, d)
	}
	return all
}

// placeholder is the word in backquotes, as urfave/cli has it.
func placeholder(usage string) string {
	if parts := strings.Split(usage, "`"); len(parts) == 3 {
		return parts[1]
	}
	return "VALUE"
}

var (
	choiceList = regexp.MustCompile(`: ([a-z0-9-]+(?:, [a-z0-9-]+)*(?: or [a-z0-9-]+)?)$`)
	choiceEnd  = regexp.MustCompile(`, | or `)
)

// choices reads the end of "`FORMAT`: table, json or jsonl".
func choices(usage string) []string {
	m := choiceList.FindStringSubmatch(usage)
	if m == nil {
		return nil
	}
	return choiceEnd.Split(m[1], -1)
}

// lines writes lines, and keeps the first error.
type lines struct {
	out io.Writer
	err error
}

func (l *lines) add(format string, args ...any) {
	if l.err == nil {
		_, l.err = fmt.Fprintf(l.out, format+"\n", args...)
	}
}
