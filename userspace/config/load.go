// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"
	"unicode/utf8"

	"github.com/goccy/go-yaml/ast"
)

// MaxFileSize is the largest file that is read. A route takes about 60 bytes.
const MaxFileSize = 16 << 20

// Load reads and validates a file. It returns Problems when the file's content
// is at fault, and another error when it cannot be read.
func Load(path string) (*Config, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read routes: %w", err)
	}
	defer func() { _ = file.Close() }()

	info, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("read routes: %w", err)
	}
	if info.IsDir() {
		return nil, Problems{{
			Position: Position{File: path},
			What:     "a directory of routes is not supported yet",
			Remedy:   "name one file",
		}}
	}
	// One byte more than allowed, so that Parse sees that it is too much.
	data, err := io.ReadAll(io.LimitReader(file, MaxFileSize+1))
	if err != nil {
		return nil, fmt.Errorf("read routes: %w", err)
	}
	return Parse(path, data)
}

// Parse validates the content of a file; name is only for positions. It returns
// Problems when anything is wrong.
func Parse(name string, data []byte) (*Config, error) {
	r := newReader(name)
	root := r.document(data)
	if root != nil {
		r.file(root)
	}
	if len(r.problems) > 0 {
		return nil, sorted(r.problems)
	}
	r.config.Warnings = sorted(warnings(r.config))
	r.config.Notes = sorted(notes(r.config))
	return r.config, nil
}

// reader collects what it understands and what is wrong with it. It never stops
// at the first problem, so every part must cope with what another refused.
type reader struct {
	name     string
	config   *Config
	problems Problems

	// Names may be used before they are defined, so uses are resolved last.
	later []func()

	pools     map[string]*Pool
	listeners map[string]*Listener
	// refused are the names of pools and listeners that were refused: using
	// one is no second problem.
	refusedPools     map[string]bool
	refusedListeners map[string]bool
}

func newReader(name string) *reader {
	return &reader{
		name:             name,
		config:           &Config{File: name},
		pools:            map[string]*Pool{},
		listeners:        map[string]*Listener{},
		refusedPools:     map[string]bool{},
		refusedListeners: map[string]bool{},
	}
}

// document returns the root of the one YAML document in data, or nil when that
// is impossible, which is then a problem already.
func (r *reader) document(data []byte) ast.Node {
	whole := Position{File: r.name}
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	switch {
	case len(data) > MaxFileSize:
		r.refuse(whole, "the file is larger than 16 MiB", "split the sites over several nodes, or use wildcards")
		return nil
	case !utf8.Valid(data) || bytes.IndexByte(data, 0) >= 0:
		r.refuse(r.firstBadByte(data), "the file is not UTF-8 text", "save it as UTF-8")
		return nil
	}
	file := r.syntax(data)
	if file == nil {
		return nil
	}
	var bodies []ast.Node
	for _, doc := range file.Docs {
		if doc.Body != nil && doc.Body.Type() != ast.CommentType {
			bodies = append(bodies, doc.Body)
		}
	}
	switch {
	case len(bodies) == 0:
		r.refuse(whole, "the file is empty", "begin with \"version: 1\"")
		return nil
	case bodies[0].Type() != ast.MappingType && bodies[0].Type() != ast.MappingValueType && !isAlias(bodies[0]):
		r.refuse(r.at(bodies[0]), "the file must be a mapping, this is "+kindOf(bodies[0]), "begin with \"version: 1\"")
		return nil
	case len(bodies) > 1:
		r.refuse(r.at(bodies[1]), "a second YAML document begins here", "keep everything in one document")
		return nil
	}
	return bodies[0]
}

func (r *reader) firstBadByte(data []byte) Position {
	line, column := 1, 1
	for len(data) > 0 {
		c, size := utf8.DecodeRune(data)
		if c == 0 || c == utf8.RuneError && size == 1 {
			break
		}
		column++
		if c == '\n' {
			line, column = line+1, 1
		}
		data = data[size:]
	}
	return Position{File: r.name, Line: line, Column: column}
}

func (r *reader) refuse(pos Position, what, remedy string) {
	r.problems = append(r.problems, Problem{Position: pos, What: what, Remedy: remedy})
}

// sorted puts problems in file order: they were found in the order of our
// reading, and people mend files from top to bottom.
func sorted(problems Problems) Problems {
	slices.SortStableFunc(problems, func(a, b Problem) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	return problems
}
