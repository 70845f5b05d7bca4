// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"
)

func (r *reader) atToken(tk *token.Token) Position {
	if tk == nil || tk.Position == nil {
		return Position{File: r.name}
	}
	return Position{File: r.name, Line: tk.Position.Line, Column: tk.Position.Column}
}

// at returns where a node begins. A block mapping's own token is the colon of
// its first key, so the key is asked instead.
func (r *reader) at(node ast.Node) Position {
	switch n := node.(type) {
	case nil:
		return Position{File: r.name}
	case *ast.MappingNode:
		if !n.IsFlowStyle && len(n.Values) > 0 {
			return r.at(n.Values[0].Key)
		}
	case *ast.MappingValueNode:
		return r.at(n.Key)
	}
	return r.atToken(node.GetToken())
}

// field is a key that a mapping may have.
type field struct {
	key  string
	read func(ast.Node)
	// null is the remedy when the key has no value. Optional.
	null string
}

// entry is one key of a mapping with its value.
type entry struct {
	key   string
	pos   Position // Of the key.
	value ast.Node
}

// mapping reads the keys of a mapping by its fields. It returns the positions
// of the keys that are there, and nil when node is no mapping.
func (r *reader) mapping(node ast.Node, what string, fields []field) map[string]Position {
	entries, ok := r.entries(node, what)
	if !ok {
		return nil
	}
	seen := make(map[string]Position, len(entries))
	for _, e := range entries {
		f, known := fieldOf(fields, e.key)
		if !known {
			r.unknownKey(e, what, fields)
			continue
		}
		seen[e.key] = e.pos
		if isNull(e.value) {
			remedy := f.null
			if remedy == "" {
				remedy = "write one, or remove the key"
			}
			r.refuse(e.pos, fmt.Sprintf("%q has no value", e.key), remedy)
			continue
		}
		f.read(e.value)
	}
	return seen
}

func fieldOf(fields []field, key string) (field, bool) {
	for _, f := range fields {
		if f.key == key {
			return f, true
		}
	}
	return field{}, false
}

func (r *reader) unknownKey(e entry, what string, fields []field) {
	keys := make([]string, len(fields))
	for i, f := range fields {
		keys[i] = f.key
	}
	remedy := "known here: " + strings.Join(keys, ", ")
	if near := nearest(e.key, keys); near != "" {
		remedy = fmt.Sprintf("did you mean %q?", near)
	}
	r.refuse(e.pos, fmt.Sprintf("unknown key %q in %s", e.key, what), remedy)
}

// entries returns the keys of a mapping in file order, each once.
func (r *reader) entries(node ast.Node, what string) ([]entry, bool) {
	var values []*ast.MappingValueNode
	switch n := node.(type) {
	case *ast.MappingNode:
		values = n.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{n}
	default:
		if isAlias(node) {
			return nil, false // Refused where the tokens were looked at.
		}
		r.refuse(r.at(node), fmt.Sprintf("%s must be a mapping, this is %s", what, kindOf(node)), "write it as {key: value}")
		return nil, false
	}
	first := make(map[string]Position, len(values))
	entries := make([]entry, 0, len(values))
	for _, value := range values {
		key, ok := r.key(value.Key)
		if !ok {
			continue
		}
		pos := r.at(value.Key)
		if at, twice := first[key]; twice {
			r.refuse(pos, fmt.Sprintf("key %q stands twice in %s", key, what),
				fmt.Sprintf("remove one; the first is on line %d", at.Line))
			continue
		}
		first[key] = pos
		entries = append(entries, entry{key: key, pos: pos, value: value.Value})
	}
	return entries, true
}

func (r *reader) key(node ast.Node) (string, bool) {
	text, ok := scalarText(node)
	if !ok {
		r.refuse(r.at(node), "a key must be a plain word", "write it as key: value")
	}
	return text, ok
}

// items returns the items of a list; a single item may stand alone.
func (r *reader) items(node ast.Node) []ast.Node {
	seq, ok := node.(*ast.SequenceNode)
	if !ok {
		return []ast.Node{node}
	}
	items := make([]ast.Node, 0, len(seq.Values))
	for i, item := range seq.Values {
		if isNull(item) {
			pos := r.at(item)
			if i < len(seq.Entries) && seq.Entries[i] != nil {
				pos = r.atToken(seq.Entries[i].Start)
			}
			r.refuse(pos, "an item of the list is empty", "fill it in, or remove it")
			continue
		}
		items = append(items, item)
	}
	return items
}

// scalar is a single value as it is written, whatever type YAML sees in it.
type scalar struct {
	pos  Position
	text string
}

// scalar returns the value of a node that must be a single value.
func (r *reader) scalar(node ast.Node, what string) (scalar, bool) {
	text, ok := scalarText(node)
	if !ok {
		if isAlias(node) {
			return scalar{}, false // Refused where the tokens were looked at.
		}
		remedy := "write one value"
		if _, mapping := node.(*ast.MappingNode); mapping {
			remedy = "quote a value that has a colon in it"
		}
		r.refuse(r.at(node), fmt.Sprintf("%s must be a single value, this is %s", what, kindOf(node)), remedy)
		return scalar{}, false
	}
	return scalar{pos: r.at(node), text: text}, true
}

func scalarText(node ast.Node) (string, bool) {
	switch n := node.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode, *ast.MergeKeyNode:
		return n.GetToken().Value, true
	}
	return "", false
}

func isNull(node ast.Node) bool {
	if node == nil {
		return true
	}
	_, null := node.(*ast.NullNode)
	return null
}

func isAlias(node ast.Node) bool {
	switch node.(type) {
	case *ast.AliasNode, *ast.AnchorNode, *ast.TagNode:
		return true
	}
	return false
}

func kindOf(node ast.Node) string {
	switch node.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a mapping"
	case *ast.SequenceNode:
		return "a list"
	case *ast.LiteralNode:
		return "a block of text"
	}
	if isNull(node) {
		return "empty"
	}
	return "a single value"
}

// nearest returns the word that is a typing error away, or "".
func nearest(word string, words []string) string {
	best, distance := "", len(word)/3+2
	for _, w := range words {
		if d := editDistance(strings.ToLower(word), w); d < distance {
			best, distance = w, d
		}
	}
	return best
}

// editDistance counts insertions, deletions and replacements (Levenshtein).
func editDistance(a, b string) int {
	// A key may be as long as the file; past this length none is near.
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := diagonal
			if a[i-1] != b[j-1] {
				cost++
			}
			diagonal = row[j]
			row[j] = min(cost, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}
