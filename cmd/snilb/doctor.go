// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"github.com/urfave/cli/v2"

	"snilb/loader"
)

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:      "doctor",
		Usage:     "Say what this machine can do and what is in the way; changes nothing",
		ArgsUsage: "[IFACE...]",
		Description: "Looks at the machine, at what instances have left, and at the interfaces: the named ones, or all Ethernet\n" +
			"ones that are up. Exit code 1 if attach would fail.",
		Flags:        []cli.Flag{outputFlag(formatTable)},
		OnUsageError: usageError,
		Action: func(c *cli.Context) error {
			format, err := outputFormat(c)
			if err != nil {
				return err
			}
			return printFindings(c.App.Writer, format, loader.Doctor(c.Args().Slice()))
		},
	}
}

// printFindings prints what the doctor found; its error says that attach would fail.
func printFindings(out io.Writer, format string, found []loader.Finding) error {
	bad := slices.ContainsFunc(found, func(f loader.Finding) bool { return f.Level == loader.LevelFail })
	if err := writeFindings(out, format, found, !bad); err != nil {
		return err
	}
	if bad {
		return cli.Exit("attach would fail: see what fails above", exitFailed)
	}
	return nil
}

func writeFindings(out io.Writer, format string, found []loader.Finding, ok bool) error {
	switch format {
	case formatJSON:
		return printJSON(out, format, struct {
			OK     bool             `json:"ok"`
			Checks []loader.Finding `json:"checks"`
		}{ok, found})
	case formatLines:
		for i := range found {
			if err := printJSON(out, format, &found[i]); err != nil {
				return err
			}
		}
		return nil
	}
	w := newTable(out)
	for _, f := range found {
		what := f.What
		if f.Remedy != "" {
			what += "; " + f.Remedy
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\n", f.Level, f.Subject, what)
	}
	return w.Flush()
}

// printJSON prints a value of our own.
func printJSON(out io.Writer, format string, value any) error {
	raw, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return printDocument(out, format, raw)
}
