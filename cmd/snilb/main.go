// SPDX-License-Identifier: Apache-2.0

// Command snilb balances TLS connections by the server name in their hello. Its
// files only join the packages that do the work: one file a command.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/urfave/cli/v2"
)

// extraCommands is what init functions of other files add.
var extraCommands []*cli.Command

func main() {
	hostCheck = checkHost
	app := newApp()
	os.Exit(exitCode(app, app.Run(flagsAnywhere(app, os.Args))))
}

func newApp() *cli.App {
	commands := []*cli.Command{
		attachCommand(), detachCommand(), doctorCommand(), checkCommand(), explainCommand(),
		reloadCommand(), statusCommand(), flowsCommand(), configCommand(), benchCommand(), versionCommand(), docsCommand(),
	}
	return &cli.App{
		Name:            "snilb",
		Usage:           "a load balancer that picks backends by the TLS server name",
		HideHelpCommand: true, // --help does it, and "help" would hide a wrong command's exit code
		HideVersion:     true, // there is a command
		Commands:        append(commands, extraCommands...),
		Writer:          os.Stdout,
		ErrWriter:       os.Stderr,
		OnUsageError:    usageError,
		ExitErrHandler:  func(*cli.Context, error) {}, // main does it
		Action:          noCommand,
	}
}

// noCommand runs when the first word is no command.
func noCommand(c *cli.Context) error {
	switch word := c.Args().First(); word {
	case "", "help":
		return cli.ShowAppHelp(c)
	default:
		return cli.Exit(fmt.Sprintf("no command %q: see snilb --help", word), exitUsage)
	}
}

// exitCode prints an error and returns the code that stands for it.
func exitCode(app *cli.App, err error) int {
	if err == nil {
		return 0
	}
	if text := err.Error(); text != "" {
		_, _ = fmt.Fprintln(app.ErrWriter, text)
	}
	var exit cli.ExitCoder
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return exitFailed
}
