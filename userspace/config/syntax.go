// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// maxNesting is far beyond what the format needs. The YAML parser recurses for
// every level, and a stack that overflows cannot be recovered in Go.
const maxNesting = 32

// syntax turns text into a tree. Duplicate keys are left for the reader, which
// reports all of them.
func (r *reader) syntax(data []byte) *ast.File {
	tokens := lexer.Tokenize(string(data))
	if !r.nesting(tokens) {
		return nil
	}
	tokens = joinColons(tokens)
	before := len(r.problems)
	r.unquoted(tokens)

	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err == nil {
		return file
	}
	if len(r.problems) > before {
		// What was found above is the cause, in words that help more.
		return nil
	}
	r.syntaxError(err)
	return nil
}

// nesting refuses what would exhaust the parser's stack. Blocks that are
// indented line by line need no bound of their own: a depth of n takes at least
// n*n/maxNesting bytes.
func (r *reader) nesting(tokens token.Tokens) bool {
	flow, entries, line := 0, 0, 0
	for _, tk := range tokens {
		if tk.Position.Line != line {
			line, entries = tk.Position.Line, 0
		}
		switch tk.Type {
		case token.MappingStartType, token.SequenceStartType:
			flow++
		case token.MappingEndType, token.SequenceEndType:
			flow--
		case token.SequenceEntryType, token.MappingKeyType:
			entries++
		}
		if flow > maxNesting || entries > maxNesting {
			r.refuse(r.atToken(tk), "brackets or lists are nested too deeply", "nothing in this file needs so many levels")
			return false
		}
	}
	return true
}

// joinColons undoes a mistake of the lexer (goccy/go-yaml 1.19.2): in a list in
// braces, such as {backends: [192.0.2.1:443]}, it takes every colon for that of
// a mapping. In YAML a colon is that only before a space or the end of the
// item; elsewhere it is part of the value.
func joinColons(tokens token.Tokens) token.Tokens {
	var joined token.Tokens
	var open []token.Type
	for i := 0; i < len(tokens); i++ {
		tk := tokens[i]
		switch tk.Type {
		case token.MappingStartType, token.SequenceStartType:
			open = append(open, tk.Type)
		case token.MappingEndType, token.SequenceEndType:
			open = open[:max(len(open)-1, 0)]
		}
		inList := len(open) > 0 && open[len(open)-1] == token.SequenceStartType
		last := i
		if inList {
			last = valueEnd(tokens, i)
		}
		if last > i {
			var text, origin strings.Builder
			for _, part := range tokens[i : last+1] {
				text.WriteString(part.Value)
				origin.WriteString(part.Origin)
			}
			tk, i = token.String(text.String(), origin.String(), tk.Position), last
		}
		joined.Add(tk)
	}
	return joined
}

// plain says that a token is an unquoted single value.
func plain(tk *token.Token) bool {
	return tk.CharacterType == token.CharacterTypeMiscellaneous && tk.Indicator == token.NotIndicator &&
		tk.Type != token.CommentType && tk.Type != token.InvalidType
}

// valueEnd returns the last token of the unquoted value that begins at i: all
// that follows without a space, up to the last that is no colon.
func valueEnd(tokens token.Tokens, i int) int {
	end := i
	if !plain(tokens[i]) {
		return end
	}
	for j := i + 1; j < len(tokens) && touches(tokens[j-1], tokens[j]); j++ {
		if plain(tokens[j]) {
			end = j
		} else if tokens[j].Type != token.MappingValueType {
			break
		}
	}
	return end
}

// unquoted finds the YAML features that are refused, which are mostly host name
// patterns and addresses that someone forgot to quote. Refusing aliases also
// bounds the tree: it is never larger than the text.
func (r *reader) unquoted(tokens token.Tokens) {
	for i := 0; i < len(tokens); i++ {
		tk := tokens[i]
		switch tk.Type {
		case token.AliasType:
			text, last := adjacent(tokens, i)
			if strings.Contains(text, ".") || strings.Trim(text, "*") == "" {
				r.refuse(r.atToken(tk), "an unquoted * begins a YAML alias", fmt.Sprintf("quote it: %q", text))
			} else {
				r.refuse(r.atToken(tk), fmt.Sprintf("YAML aliases (%s) are not supported", text), "write the value out")
			}
			i = last
		case token.AnchorType:
			r.refuse(r.atToken(tk), "YAML anchors are not supported", "write the value out, or quote it if it begins with &")
		case token.TagType:
			r.refuse(r.atToken(tk), fmt.Sprintf("YAML tags (%s) are not supported", tk.Value), "leave it out, or quote a value that begins with !")
		case token.SequenceEndType:
			if i+1 < len(tokens) && touches(tk, tokens[i+1]) && strings.HasPrefix(tokens[i+1].Value, ":") {
				start, text := bracketed(tokens, i)
				r.refuse(r.atToken(start), "an unquoted [ begins a YAML list", fmt.Sprintf("quote it: %q", text))
			}
		}
	}
}

// touches says that two tokens stand side by side, with no space between.
func touches(a, b *token.Token) bool {
	return a.Position.Line == b.Position.Line && a.Position.Column+utf8.RuneCountInString(a.Value) == b.Position.Column
}

// adjacent joins the token at i and those that follow it without a space. It
// returns the text and the index of the last token used.
func adjacent(tokens token.Tokens, i int) (string, int) {
	var text strings.Builder
	text.WriteString(tokens[i].Value)
	for i+1 < len(tokens) && touches(tokens[i], tokens[i+1]) &&
		(tokens[i+1].Type == token.AliasType || tokens[i+1].Type == token.StringType) {
		i++
		text.WriteString(tokens[i].Value)
	}
	return text.String(), i
}

// bracketed returns the [ that belongs to the ] at end, and the text from there
// to the end of the port behind it.
func bracketed(tokens token.Tokens, end int) (*token.Token, string) {
	start, depth := end, 0
	for ; start >= 0; start-- {
		if tokens[start].Type == token.SequenceEndType {
			depth++
		}
		if tokens[start].Type == token.SequenceStartType {
			depth--
		}
		if depth == 0 {
			break
		}
	}
	start = max(start, 0)
	text := ""
	for _, tk := range tokens[start : end+2] {
		text += tk.Value
	}
	if tokens[end+1].Type == token.MappingValueType && end+2 < len(tokens) && touches(tokens[end+1], tokens[end+2]) {
		text += tokens[end+2].Value
	}
	return tokens[start], text
}

// syntaxError reports what the parser stumbled over. Its own words describe
// YAML's grammar; where the usual cause is known the remedy is ours.
func (r *reader) syntaxError(err error) {
	// The library's error type is internal; these two methods are how its
	// documentation reads the place and the bare message.
	var located interface {
		error
		GetToken() *token.Token
		GetMessage() string
	}
	if !errors.As(err, &located) || located.GetToken() == nil {
		r.refuse(Position{File: r.name}, "not valid YAML: "+firstLine(err.Error()), "")
		return
	}
	tk := located.GetToken()
	what := "not valid YAML: " + located.GetMessage()
	remedy := "check indentation, brackets and quotes on this line and the one above"
	switch {
	case tk.Type == token.InvalidType && strings.Contains(located.GetMessage(), "reserved character"):
		remedy = "quote the value"
	case valueWithColon(tk):
		text := tk.Value + ": " + tk.Next.Next.Value
		if tk.Value == "pool" {
			text = "pool:" + tk.Next.Next.Value
		}
		what = fmt.Sprintf("a value that has \": \" in it looks like a mapping (%s: %s)", tk.Value, tk.Next.Next.Value)
		remedy = fmt.Sprintf("quote it: %q", text)
	}
	r.refuse(r.atToken(tk), what, remedy)
}

// valueWithColon recognises the second "key:" of a line such as
// "no_match: pool: blog".
func valueWithColon(tk *token.Token) bool {
	colon := func(t *token.Token) bool {
		return t != nil && t.Type == token.MappingValueType && t.Position.Line == tk.Position.Line
	}
	return colon(tk.Prev) && colon(tk.Next) && tk.Next.Next != nil && tk.Next.Next.Position.Line == tk.Position.Line
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
