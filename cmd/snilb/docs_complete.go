// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// writeBash writes a completion that knows all commands by itself: it never runs snilb.
func writeBash(out io.Writer, commands []docCommand) error {
	l := &lines{out: out}
	l.add("# bash completion for snilb, made by `snilb docs bash`\n")
	l.add("_snilb() {")
	l.add("\tlocal cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} path='' words='' i")
	l.add("\tfor ((i = 1; i < COMP_CWORD; i++)); do")
	l.add("\t\tcase \"$path ${COMP_WORDS[i]}\" in")
	for i := range commands {
		name := commands[i].name()
		above, last := strings.Join(commands[i].path[:len(commands[i].path)-1], " "), commands[i].path[len(commands[i].path)-1]
		l.add("\t\t%q) path=%q ;;", above+" "+last, name)
	}
	l.add("\t\tesac\n\tdone")
	l.add("\tcase \"$path $prev\" in")
	for i := range commands {
		for _, f := range commands[i].flags {
			bashValue(l, commands[i].name(), &f)
		}
	}
	l.add("\tesac")
	l.add("\tcase \"$path\" in")
	l.add("\t'') words=%q ;;", strings.Join(append(topLevel(commands), "--help"), " "))
	for i := range commands {
		l.add("\t%q) words=%q%s ;;", commands[i].name(), strings.Join(bashWords(&commands[i]), " "), bashArguments(commands[i].args))
	}
	l.add("\tesac")
	l.add("\tmapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$cur\")\n}")
	l.add("complete -F _snilb snilb")
	return l.err
}

// bashValue completes the word behind a flag that takes one.
func bashValue(l *lines, command string, f *docFlag) {
	if f.value == "" {
		return
	}
	var patterns []string
	for _, name := range f.names {
		patterns = append(patterns, fmt.Sprintf("%q", command+" "+name))
	}
	reply := "COMPREPLY=()"
	switch {
	case f.choices != nil:
		reply = fmt.Sprintf("mapfile -t COMPREPLY < <(compgen -W %q -- \"$cur\")", strings.Join(f.choices, " "))
	case isFile(f.value):
		reply = bashFiles
	case isInterface(f.value):
		reply = bashInterfaces
	}
	l.add("\t%s) %s; return ;;", strings.Join(patterns, " | "), reply)
}

const (
	bashFiles      = `compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$cur")`
	bashInterfaces = `mapfile -t COMPREPLY < <(compgen -W "$(command ls /sys/class/net)" -- "$cur")`
)

func bashWords(c *docCommand) []string {
	words := slices.Clone(c.subcommands)
	for _, f := range c.flags {
		words = append(words, f.names...)
	}
	return append(words, "--help")
}

// bashArguments completes a word that is no flag.
func bashArguments(args string) string {
	reply := ""
	switch {
	case isFile(args):
		reply = bashFiles
	case isInterface(args):
		reply = bashInterfaces
	default:
		return ""
	}
	return "; [[ $cur == -* ]] || { " + reply + "; return; }"
}

// writeFish is writeBash for fish.
func writeFish(out io.Writer, commands []docCommand) error {
	l := &lines{out: out}
	l.add("# fish completion for snilb, made by `snilb docs fish`\n")
	l.add("complete -c snilb -f")
	l.add("complete -c snilb -l help -d 'Say how it is used'")
	for i := range commands {
		c := &commands[i]
		above, last := c.path[:len(c.path)-1], c.path[len(c.path)-1]
		condition := "__fish_use_subcommand"
		if len(above) > 0 {
			condition = fishSeen(above) + "; and not __fish_seen_subcommand_from " + strings.Join(siblings(commands, above), " ")
		}
		l.add("complete -c snilb -n %s -a %s -d %s", fishQuote(condition), last, fishQuote(c.usage))
		switch {
		case isFile(c.args):
			l.add("complete -c snilb -n %s -F", fishQuote(fishSeen(c.path)))
		case isInterface(c.args):
			l.add("complete -c snilb -n %s -a '(command ls /sys/class/net)'", fishQuote(fishSeen(c.path)))
		}
		for _, f := range c.flags {
			l.add("complete -c snilb -n %s %s -d %s", fishQuote(fishSeen(c.path)), fishFlag(&f), fishQuote(f.usage))
		}
	}
	return l.err
}

func fishSeen(path []string) string {
	words := make([]string, len(path))
	for i, word := range path {
		words[i] = "__fish_seen_subcommand_from " + word
	}
	return strings.Join(words, "; and ")
}

func fishFlag(f *docFlag) string {
	var words []string
	for _, name := range f.names {
		if long, ok := strings.CutPrefix(name, "--"); ok {
			words = append(words, "-l", long)
		} else {
			words = append(words, "-s", name[1:])
		}
	}
	switch {
	case f.value == "":
	case f.choices != nil:
		words = append(words, "-x -a", fishQuote(strings.Join(f.choices, " ")))
	case isFile(f.value):
		words = append(words, "-r -F")
	case isInterface(f.value):
		words = append(words, "-x -a '(command ls /sys/class/net)'")
	default:
		words = append(words, "-x")
	}
	return strings.Join(words, " ")
}

var fishSpecial = strings.NewReplacer(`\`, `\\`, "'", `\'`)

func fishQuote(text string) string { return "'" + fishSpecial.Replace(text) + "'" }

func topLevel(commands []docCommand) []string { return siblings(commands, nil) }

// siblings are the commands right below a path.
func siblings(commands []docCommand, above []string) (names []string) {
	for _, c := range commands {
		if n := len(c.path) - 1; slices.Equal(c.path[:n], above) {
			names = append(names, c.path[n])
		}
	}
	return names
}

func isFile(value string) bool {
	return strings.HasPrefix(value, "FILE") || strings.HasPrefix(value, "PATH")
}

func isInterface(value string) bool { return strings.HasPrefix(value, "IFACE") }
