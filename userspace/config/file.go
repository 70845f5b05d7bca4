// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
)

// DefaultTimeouts are what a file without timeouts gets.
var DefaultTimeouts = Timeouts{
	Hello:       5 * time.Second,
	Connect:     5 * time.Second,
	Attempt:     time.Second,
	Unconfirmed: 30 * time.Second,
	Idle:        2*time.Hour + 5*time.Minute,
	Closing:     60 * time.Second,
}

// DefaultLimits are what a file without limits gets.
var DefaultLimits = Limits{Flows: 1_000_000, HelloMemory: 64 << 20, HellosPerSource: 64}

const (
	maxFlows       = 100_000_000
	minHelloMemory = 16 << 10 // The longest hello.
)

// file reads the top level. Settings that others inherit are collected first
// and handed down by the functions in later, when all of the file was read.
func (r *reader) file(root ast.Node) {
	c := r.config
	c.Timeouts, c.Limits = DefaultTimeouts, DefaultLimits

	seen := r.mapping(root, "the file", []field{
		{key: "version", read: r.version},
		{key: "listen", read: r.listen},
		{key: "no_match", read: r.actionInto(&c.NoMatch, "no_match")},
		{key: "not_tls", read: r.actionInto(&c.NotTLS, "not_tls")},
		{key: "no_backend", read: r.actionInto(&c.NoBackend, "no_backend")},
		{key: "unknown_flow", read: r.unknownFlow},
		{key: "timeouts", read: func(n ast.Node) { r.timeouts(n, &c.Timeouts, true) }},
		{key: "limits", read: r.limits},
		{key: "deny", read: func(n ast.Node) { r.emptyList(n, "deny", FeatureDeny) }},
		{key: "allow", read: func(n ast.Node) { r.emptyList(n, "allow", FeatureAllow) }},
		{key: "pools", read: r.readPools},
		{key: "routes", read: r.routes, null: "write [] for none"},
	})
	if seen == nil {
		return
	}
	start := r.at(root)
	if _, ok := seen["version"]; !ok {
		r.refuse(start, "version is missing", "begin with \"version: 1\"")
	}
	if _, ok := seen["listen"]; !ok {
		r.refuse(start, "listen is missing", "write listen: \":443\"")
	}
	for _, resolve := range r.later {
		resolve()
	}
	r.inherit()
}

func (r *reader) version(node ast.Node) {
	s, ok := r.scalar(node, "version")
	if ok && s.text != "1" {
		r.refuse(s.pos, fmt.Sprintf("version %q is not known", s.text), "this snilb reads version 1")
	}
}

// actionInto returns a reader for one of: reset, alert, drop, pool:NAME.
func (r *reader) actionInto(into *Action, what string) func(ast.Node) {
	return func(node ast.Node) {
		if _, mapping := node.(*ast.MappingNode); mapping {
			r.refuse(r.at(node), what+" is a mapping", "write it as one word: \"pool:NAME\"")
			return
		}
		s, ok := r.scalar(node, what)
		if !ok {
			return
		}
		if name, isPool := strings.CutPrefix(s.text, "pool:"); isPool {
			if name != strings.TrimSpace(name) {
				r.refuse(s.pos, fmt.Sprintf("%s %q has a space", what, s.text),
					fmt.Sprintf("quote it: %q", "pool:"+strings.TrimSpace(name)))
				return
			}
			r.later = append(r.later, func() {
				if pool := r.usePool(s.pos, name); pool != nil {
					*into = Action{Kind: ToPool, Pool: pool}
				}
			})
			return
		}
		switch r.choice(node, what, "reset", "alert", "drop", "pool:NAME") {
		case 0:
			*into = Action{Kind: Reset}
		case 1:
			*into = Action{Kind: Alert}
		case 2:
			*into = Action{Kind: Drop}
		case 3:
			r.refuse(s.pos, what+" has the word NAME for a pool", "put the pool's own name there")
		}
	}
}

func (r *reader) unknownFlow(node ast.Node) {
	kinds := [...]ActionKind{Reset, Pass, Drop}
	if i := r.choice(node, "unknown_flow", "reset", "pass", "drop"); i >= 0 {
		r.config.UnknownFlow = kinds[i]
	}
}

// timeouts reads over what is there already, so that what a pool leaves out is
// the file's.
func (r *reader) timeouts(node ast.Node, into *Timeouts, whole bool) {
	time := func(key string, none bool, into *time.Duration) field {
		return field{key: key, read: func(n ast.Node) { r.duration(n, "timeout "+key, none, into) }}
	}
	fields := []field{
		time("connect", false, &into.Connect),
		time("attempt", false, &into.Attempt),
		time("unconfirmed", false, &into.Unconfirmed),
		time("idle", true, &into.Idle),
		time("closing", false, &into.Closing),
	}
	if whole {
		fields = append([]field{time("hello", false, &into.Hello)}, fields...)
	} else {
		fields = append(fields, field{key: "hello", read: func(n ast.Node) {
			r.refuse(r.at(n), "a pool cannot have its own timeout hello: the pool is known only after the hello", "set it for the whole file")
		}})
	}
	r.mapping(node, "timeouts", fields)
}

func (r *reader) limits(node ast.Node) {
	limits := &r.config.Limits
	r.mapping(node, "limits", []field{
		{key: "flows", read: func(n ast.Node) {
			if v, ok := r.count(n, "limit flows", 1, maxFlows); ok {
				limits.Flows = v
			}
		}},
		{key: "hello_memory", read: func(n ast.Node) { r.size(n, "limit hello_memory", minHelloMemory, &limits.HelloMemory) }},
		{key: "hellos_per_source", read: func(n ast.Node) {
			if text, _ := scalarText(n); text == "none" {
				limits.HellosPerSource = 0
				return
			}
			if v, ok := r.count(n, "limit hellos_per_source", 1, maxFlows); ok {
				limits.HellosPerSource = v
			}
		}},
		{key: "flows_per_source", read: func(n ast.Node) { r.onlyWord(n, "limit flows_per_source", "none", FeatureFlowsPerSource) }},
		{key: "syns_per_source", read: func(n ast.Node) { r.onlyWord(n, "limit syns_per_source", "none", FeatureSYNsPerSource) }},
	})
}

// onlyWord accepts the one value of a setting that is built.
func (r *reader) onlyWord(node ast.Node, what, word string, feature Feature) {
	if text, _ := scalarText(node); text != word {
		r.built(feature, r.at(node), fmt.Sprintf("%s other than %s", what, word))
	}
}

func (r *reader) emptyList(node ast.Node, what string, feature Feature) {
	seq, isList := node.(*ast.SequenceNode)
	if !isList || len(seq.Values) > 0 {
		r.built(feature, r.at(node), what)
	}
}
