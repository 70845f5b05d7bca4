// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
)

// maxNameLength keeps metric labels short.
const maxNameLength = 64

var nameChars = regexp.MustCompile(`^[A-Za-z0-9_.-]+$`)

// label reads a name that becomes a metric label and part of POOL/BACKEND on
// the command line.
func (r *reader) label(node ast.Node, what string) string {
	s, ok := r.scalar(node, what)
	if !ok || !r.checkLabel(s.pos, s.text, what) {
		return ""
	}
	return s.text
}

func (r *reader) checkLabel(pos Position, text, what string) bool {
	switch {
	case text == "":
		r.refuse(pos, what+" is empty", "write a name of letters, digits, _ . -")
	case !nameChars.MatchString(text):
		r.refuse(pos, fmt.Sprintf("%s %q has a character that a metric label should not have", what, text), "use letters, digits, _ . -")
	case len(text) > maxNameLength:
		r.refuse(pos, fmt.Sprintf("%s is longer than %d characters", what, maxNameLength), "shorten it")
	default:
		return true
	}
	return false
}

// choice reads one of a few words and returns its place among them, or -1.
func (r *reader) choice(node ast.Node, what string, words ...string) int {
	s, ok := r.scalar(node, what)
	if !ok {
		return -1
	}
	for i, word := range words {
		if s.text == word {
			return i
		}
	}
	remedy := "use " + either(words)
	if near := nearest(s.text, words); near != "" {
		remedy = fmt.Sprintf("did you mean %q?", near)
	}
	r.refuse(s.pos, fmt.Sprintf("%s cannot be %q", what, s.text), remedy)
	return -1
}

// either joins words as in "a, b or c".
func either(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// count reads a whole number between low and high.
func (r *reader) count(node ast.Node, what string, low, high int) (int, bool) {
	s, ok := r.scalar(node, what)
	if !ok {
		return 0, false
	}
	n, err := decimal(s.text)
	if err != nil || n < int64(low) || n > int64(high) {
		r.refuse(s.pos, fmt.Sprintf("%s cannot be %q", what, s.text), fmt.Sprintf("use a whole number from %d to %d", low, high))
		return 0, false
	}
	return int(n), true
}

var errNotDecimal = errors.New("not a decimal number")

// decimal refuses what strconv takes but people may read otherwise: signs,
// leading zeros (octal in old YAML), underscores.
func decimal(text string) (int64, error) {
	if text == "" || strings.Trim(text, "0123456789") != "" || (text[0] == '0' && len(text) > 1) {
		return 0, errNotDecimal
	}
	return strconv.ParseInt(text, 10, 64)
}

// network reads a CIDR.
func (r *reader) network(s scalar, what string) (netip.Prefix, bool) {
	prefix, err := netip.ParsePrefix(s.text)
	if err != nil {
		remedy := "write it as 192.0.2.0/24 or 2001:db8::/32"
		if addr, err := netip.ParseAddr(s.text); err == nil && addr.Zone() == "" {
			remedy = fmt.Sprintf("write %s/%d for this one address", addr, addr.BitLen())
		}
		r.refuse(s.pos, fmt.Sprintf("%s %q is not a CIDR", what, s.text), remedy)
		return netip.Prefix{}, false
	}
	switch {
	case !r.plainAddr(s, prefix.Addr()):
	case prefix != prefix.Masked():
		r.refuse(s.pos, fmt.Sprintf("%s %q has bits set behind the prefix", what, s.text), fmt.Sprintf("write %s, or a longer prefix", prefix.Masked()))
	default:
		return prefix, true
	}
	return netip.Prefix{}, false
}

// maxDuration keeps sums with the clock's nanoseconds far from their end.
const maxDuration = 8760 * time.Hour

// duration reads a time above zero. With none allowed, the word returns 0.
func (r *reader) duration(node ast.Node, what string, none bool, into *time.Duration) {
	s, ok := r.scalar(node, what)
	if !ok {
		return
	}
	if s.text == "none" {
		if none {
			*into = 0
			return
		}
		r.refuse(s.pos, what+" cannot be none", "without it a silent peer holds memory for ever; write a time such as 30s")
		return
	}
	d, err := time.ParseDuration(s.text)
	switch {
	case err != nil && strings.Trim(s.text, "0123456789.") == "":
		r.refuse(s.pos, fmt.Sprintf("%s %q has no unit", what, s.text), fmt.Sprintf("write %ss, %sms or %sm", s.text, s.text, s.text))
	case err != nil:
		r.refuse(s.pos, fmt.Sprintf("%s cannot be %q", what, s.text), "write a time such as 500ms, 5s or 2h5m")
	case d <= 0:
		remedy := "write a time such as 30s"
		if none {
			remedy = "write a time, or none to switch it off"
		}
		r.refuse(s.pos, fmt.Sprintf("%s must be above zero", what), remedy)
	case d > maxDuration:
		r.refuse(s.pos, fmt.Sprintf("%s is more than a year", what), "write a time up to 8760h")
	default:
		*into = d
	}
}

var sizeUnits = map[string]int64{
	"B": 1, "KB": 1000, "kB": 1000, "MB": 1000 * 1000, "GB": 1000 * 1000 * 1000,
	"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30,
}

// size reads a number of bytes with its unit.
func (r *reader) size(node ast.Node, what string, low int64, into *int64) {
	s, ok := r.scalar(node, what)
	if !ok {
		return
	}
	digits := len(s.text) - len(strings.TrimLeft(s.text, "0123456789"))
	number, err := decimal(s.text[:digits])
	unit, known := sizeUnits[strings.TrimPrefix(s.text[digits:], " ")]
	switch {
	case err == nil && digits == len(s.text):
		r.refuse(s.pos, fmt.Sprintf("%s %q has no unit", what, s.text), fmt.Sprintf("write %sMiB, %sKiB or %sB", s.text, s.text, s.text))
	case err != nil || !known || number > math.MaxInt64/unit:
		r.refuse(s.pos, fmt.Sprintf("%s cannot be %q", what, s.text), "write a size such as 64MiB, 512KiB or 1GB")
	case number*unit < low:
		r.refuse(s.pos, fmt.Sprintf("%s must be at least %d bytes", what, low), "one hello may be that long")
	default:
		*into = number * unit
	}
}
