// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
)

// maxServerName is the longest name that a hello is allowed to carry.
const maxServerName = 255

// The reasons why CanonicalName refuses a name.
var (
	errNoName     = errors.New("is empty")
	errEmptyLabel = errors.New("has an empty label")
	errLongName   = fmt.Errorf("is longer than %d bytes", maxServerName)
	errAddress    = errors.New("is an IP address, which clients never send as a name")
	errNameChars  = errors.New("has a character that no host name holds")
)

// CanonicalName returns a host name as a hello's name is compared: lower case,
// A-labels, without the trailing dot.
func CanonicalName(name string) (string, error) {
	name = strings.TrimSuffix(name, ".")
	if _, err := netip.ParseAddr(strings.Trim(name, "[]")); err == nil {
		return "", errAddress
	}
	ascii := strings.IndexFunc(name, func(c rune) bool { return c >= 0x80 }) < 0
	if !ascii {
		mapped, err := international(name)
		if err != nil {
			return "", fmt.Errorf("is not all ASCII: %w", err)
		}
		name = mapped
	}
	name = strings.ToLower(name)
	switch {
	case name == "":
		return "", errNoName
	case len(name) > maxServerName:
		return "", errLongName
	case strings.HasPrefix(name, ".") || strings.HasSuffix(name, ".") || strings.Contains(name, ".."):
		return "", errEmptyLabel
	}
	for _, c := range []byte(name) {
		if !nameByte(c) {
			return "", errNameChars
		}
	}
	return name, nil
}

func nameByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.'
}

// pattern reads one item of a route's sni.
func (r *reader) pattern(s scalar) (Pattern, bool) {
	p := Pattern{Pos: s.pos}
	refuse := func(what, remedy string) (Pattern, bool) {
		r.refuse(s.pos, what, remedy)
		return Pattern{}, false
	}
	rest := s.text
	switch {
	case s.text == "":
		p.Kind = Nameless
		return p, true
	case s.text == "**":
		p.Kind, p.Text = AnyName, s.text
		return p, true
	case s.text == "*":
		return refuse("a bare * is not a pattern", `write "**" for any name, "*.example.com" for one label`)
	case strings.HasPrefix(s.text, "~"):
		return r.regex(s)
	case strings.HasPrefix(s.text, "**."):
		p.Kind, rest = AnyLabels, s.text[len("**."):]
	case strings.HasPrefix(s.text, "*."):
		p.Kind, rest = OneLabel, s.text[len("*."):]
	}
	if strings.Contains(rest, "*") {
		return refuse(fmt.Sprintf("pattern %q has a * that is not a whole first label", s.text),
			`use "*." or "**." in front, or a regular expression: "~..."`)
	}
	name, err := CanonicalName(rest)
	if err != nil {
		remedy := "write a host name such as www.example.com"
		switch {
		case errors.Is(err, errAddress):
			remedy = `use sni: "" for hellos without a name`
		case strings.Contains(rest, ":"):
			remedy = "leave out scheme and port"
		}
		return refuse(fmt.Sprintf("pattern %q %s", s.text, err), remedy)
	}
	p.Name, p.Text = name, s.text[:len(s.text)-len(rest)]+name
	return p, true
}

// regex compiles a pattern so that it must hold for the whole name. Names are
// lower case, so letters in the pattern match in either case: one in upper case
// would otherwise never match, in silence.
func (r *reader) regex(s scalar) (Pattern, bool) {
	source := s.text[1:]
	if source == "" {
		r.refuse(s.pos, "the regular expression is empty", `write "**" for any name`)
		return Pattern{}, false
	}
	// Compiled alone first: "a)|(b" is only valid inside the anchors' brackets.
	_, err := regexp.Compile(source)
	if err == nil {
		var anchored *regexp.Regexp
		if anchored, err = regexp.Compile(`\A(?i:` + source + `)\z`); err == nil {
			return Pattern{Pos: s.pos, Kind: Regex, Text: s.text, Regexp: anchored}, true
		}
	}
	reason := strings.TrimPrefix(err.Error(), "error parsing regexp: ")
	r.refuse(s.pos, fmt.Sprintf("regular expression %q is not valid: %s", source, reason), "write it in RE2 syntax")
	return Pattern{}, false
}
