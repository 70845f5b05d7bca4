// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// flagsAnywhere moves the flags of a command in front of its arguments, so that
// "check FILE --strict" works: urfave/cli stops at the first argument. Give it
// os.Args. What stands behind "--" is left alone.
func flagsAnywhere(app *cli.App, args []string) []string {
	at := 1
	for at < len(args) && strings.HasPrefix(args[at], "-") {
		at += flagWidth(app.Flags, args, at)
	}
	if at >= len(args) {
		return args
	}
	command := app.Command(args[at])
	at++
	// The arguments belong to the innermost command.
	for command != nil && len(command.Subcommands) > 0 && at < len(args) {
		command = subcommand(command, args[at])
		at++
	}
	if command == nil || len(command.Subcommands) > 0 {
		return args
	}
	var flags, rest []string
	for i := at; i < len(args); {
		if args[i] == "--" {
			rest = append(rest, args[i:]...)
			break
		}
		width := flagWidth(command.Flags, args, i)
		if width == 0 {
			rest = append(rest, args[i])
			i++
			continue
		}
		flags = append(flags, args[i:i+width]...)
		i += width
	}
	return slices.Concat(args[:at], flags, rest)
}

// subcommand is the command of that name below another, or nil.
func subcommand(of *cli.Command, name string) *cli.Command {
	i := slices.IndexFunc(of.Subcommands, func(c *cli.Command) bool { return c.HasName(name) })
	if i < 0 {
		return nil
	}
	return of.Subcommands[i]
}

// flagWidth returns how many words the flag at i takes: 2 when its value is a
// word of its own, 0 when there is no flag. A lone "-" is an argument.
func flagWidth(flags []cli.Flag, args []string, i int) int {
	word := args[i]
	if !strings.HasPrefix(word, "-") || word == "-" {
		return 0
	}
	name := strings.TrimLeft(word, "-")
	if strings.Contains(name, "=") || i+1 >= len(args) {
		return 1
	}
	for _, flag := range flags {
		value, documented := flag.(cli.DocGenerationFlag)
		if slices.Contains(flag.Names(), name) && documented && value.TakesValue() {
			return 2
		}
	}
	return 1
}
