// SPDX-License-Identifier: Apache-2.0

package route

import (
	"fmt"
	"strings"

	"snilb/userspace/config"
)

// Step is one candidate of a search: a pattern that matches the name.
type Step struct {
	Route   *config.Route
	Pattern *config.Pattern
	Reason  Reason // The rule by which the pattern matches.

	Won bool   // At most one step has it.
	Why string // Why it lost, or won, in words.
}

// Explain lists every pattern that matches the name, in order of precedence,
// and says why each lost. The step that won is what Match decides by; when none
// did, no_match does.
func (t *Table) Explain(q Query) []Step {
	q.Client = q.Client.Unmap()
	var steps []Step
	var winner *config.Pattern
	s := search{table: t, name: q.ServerName}
	for c, ok := s.next(); ok; c, ok = s.next() {
		step := Step{Route: c.route, Pattern: c.pattern, Reason: reasonOf[c.pattern.Kind]}
		condition := holds(c.route, &q)
		switch {
		case condition != "":
			step.Why = t.unmet(condition, c.route, &q)
		case winner == nil:
			winner = c.pattern
			step.Won, step.Why = true, wonBy(step.Reason)
		case winner.Kind == c.pattern.Kind && winner.Text == c.pattern.Text:
			step.Why = "line " + lineOf(winner) + " has the same pattern and stands first"
		case winner.Kind == c.pattern.Kind && c.pattern.Kind == config.Regex:
			step.Why = "the regular expression on line " + lineOf(winner) + " stands first"
		case winner.Kind == c.pattern.Kind:
			step.Why = fmt.Sprintf("%q is longer", winner.Text)
		default:
			step.Why = fmt.Sprintf("%s goes before %s", reasonOf[winner.Kind], step.Reason)
		}
		steps = append(steps, step)
	}
	return steps
}

func lineOf(p *config.Pattern) string {
	return fmt.Sprint(p.Pos.Line)
}

func wonBy(reason Reason) string {
	switch reason {
	case Exact:
		return "the exact name"
	case OneLabel:
		return "one label in front"
	case AnyLabels:
		return "one or more labels in front"
	case Regex:
		return "the regular expression matches the whole name"
	case AnyName:
		return "any name"
	default:
		return "the hello carries no name"
	}
}

// unmet says what a condition wants and what it got.
func (t *Table) unmet(condition string, route *config.Route, q *Query) string {
	switch condition {
	case "listen":
		names := make([]string, len(route.Listeners))
		for i, l := range route.Listeners {
			names[i] = l.Name
		}
		came := "another"
		if q.Listener >= 0 && q.Listener < len(t.listeners) {
			came = t.listeners[q.Listener].Name
		}
		return fmt.Sprintf("listen: it came in by %s, not by %s", came, strings.Join(names, " or "))
	case "clients":
		prefixes := make([]string, len(route.Clients))
		for i, p := range route.Clients {
			prefixes[i] = p.String()
		}
		if !q.Client.IsValid() {
			return "clients: no client address is given, it must be in " + strings.Join(prefixes, " or ")
		}
		return fmt.Sprintf("clients: %s is not in %s", q.Client, strings.Join(prefixes, " or "))
	default:
		offers := "nothing"
		if len(q.ALPN) > 0 {
			offers = strings.Join(q.ALPN, ", ")
		}
		return fmt.Sprintf("alpn: the client offers %s, not %s", offers, strings.Join(route.ALPN, " or "))
	}
}
