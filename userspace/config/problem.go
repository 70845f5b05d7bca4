// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"strings"
)

// Position is a place in a file. Line and Column count from 1; a Line of 0
// means the file as a whole.
type Position struct {
	File   string
	Line   int
	Column int
}

// String prints file:line:column, or the file alone when there is no line.
func (p Position) String() string {
	if p.Line == 0 {
		return p.File
	}
	return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column)
}

// Problem is one thing wrong with a file and what to do about it.
type Problem struct {
	Position
	What   string
	Remedy string // Optional.
}

// String prints "file:line:column: what; remedy" on one line.
func (p Problem) String() string {
	if p.Remedy == "" {
		return fmt.Sprintf("%s: %s", p.Position, p.What)
	}
	return fmt.Sprintf("%s: %s; %s", p.Position, p.What, p.Remedy)
}

// Problems is the error of a file that cannot be used, in file order.
type Problems []Problem

// Error prints one problem a line.
func (p Problems) Error() string {
	lines := make([]string, len(p))
	for i, problem := range p {
		lines[i] = problem.String()
	}
	return strings.Join(lines, "\n")
}
