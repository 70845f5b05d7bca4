// SPDX-License-Identifier: Apache-2.0

package main

import (
	_ "embed" // man.roff
	"io"
	"strings"
)

// What of the man page is no list of commands.
//
//go:embed man.roff
var manText string

// manCommands stands in man.roff where the commands go.
const manCommands = ".\\\" commands\n"

// writeMan writes snilb(8). Its date is left out: the same sources make the same page.
func writeMan(out io.Writer, commands []docCommand) error {
	before, after, _ := strings.Cut(manText, manCommands)
	l := &lines{out: out}
	l.add(`.TH SNILB 8 "" "snilb %s" "System Administration"`, roff(version()))
	l.add("%s.SH COMMANDS", before)
	for i := range commands {
		manCommand(l, &commands[i])
	}
	l.add("%s", strings.TrimSuffix(after, "\n"))
	return l.err
}

func manCommand(l *lines, c *docCommand) {
	args := c.args
	if len(c.subcommands) > 0 {
		args = "COMMAND"
	}
	l.add(".SS snilb %s %s", roff(c.name()), roff(args))
	l.add("%s.", roff(c.usage))
	if c.description != "" {
		l.add(".PP")
		for line := range strings.SplitSeq(c.description, "\n") {
			l.add("%s", roff(line))
		}
	}
	for _, f := range c.flags {
		l.add(".TP")
		names := `\fB` + roff(strings.Join(f.names, ", ")) + `\fR`
		if f.value != "" {
			names += ` \fI` + roff(f.value) + `\fR`
		}
		l.add("%s", names)
		text := f.usage
		if f.defaultText != "" {
			text += " (default: " + f.defaultText + ")"
		}
		l.add("%s", roff(text))
	}
}

var roffSpecial = strings.NewReplacer(`\`, `\(rs`, "-", `\-`, "'", `\(aq`, "`", `\(ga`, "^", `\(ha`, "~", `\(ti`, `"`, `\(dq`)

// roff writes plain text so that troff prints it as it is.
func roff(text string) string {
	text = roffSpecial.Replace(strings.TrimSpace(text))
	if strings.HasPrefix(text, ".") {
		text = `\&` + text
	}
	return text
}
