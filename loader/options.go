// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"time"

	"snilb/maps"
)

// Order is an instance's place among the other programs of a hook.
type Order string

// The places.
const (
	OrderFirst Order = "first"
	OrderLast  Order = "last"
)

// Defaults of the zero values in Options.
const (
	DefaultName            = "default"
	DefaultRingSize        = 8 << 20
	DefaultFlowEntries     = 1_000_000
	DefaultSourcePortFirst = 10000
	DefaultSourcePortLast  = 29999
	DefaultDeadAfter       = 10 * time.Second
)

// Options says what to load and where to attach it.
type Options struct {
	// Name of the instance: 1 to 32 of a-z, 0-9, _ and -. Optional, "default" by default.
	Name string
	// Interfaces that face clients. Required by Load; Ethernet only.
	Interfaces []string
	// Workers is the number of rings and TAP queues, 1 to maps.MaxWorkers. Required.
	Workers int
	// RingSize is the bytes of one ring: a power of two of at least a page. Optional, 8 MiB by default.
	RingSize int
	// FlowEntries is the most connections at once. Optional, a million by default.
	FlowEntries int
	// SourcePortFirst and SourcePortLast are the ports used towards backends, both included. Optional, 10000 to 29999
	// by default.
	SourcePortFirst, SourcePortLast uint16
	// DeadAfter is the silence after which the kernel programs take the daemon for dead. Optional, 10 s by default.
	DeadAfter time.Duration
	// Order is the place among the other programs of the interfaces. Optional, OrderFirst by default.
	Order Order
	// Logger is optional, slog.Default() by default.
	Logger *slog.Logger

	// forceClsact attaches as on a kernel without tcx.
	forceClsact bool
	// before is called before each step that can be undone; an error of it fails the step. Optional.
	before func(step string) error
}

var validName = regexp.MustCompile(`^[a-z0-9_-]{1,32}$`)

func checkName(name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("instance name %q: use 1 to 32 of a-z, 0-9, _ and -", name)
	}
	return nil
}

func (o Options) withDefaults() Options {
	if o.Name == "" {
		o.Name = DefaultName
	}
	if o.RingSize == 0 {
		o.RingSize = DefaultRingSize
	}
	if o.FlowEntries == 0 {
		o.FlowEntries = DefaultFlowEntries
	}
	if o.SourcePortFirst == 0 && o.SourcePortLast == 0 {
		o.SourcePortFirst, o.SourcePortLast = DefaultSourcePortFirst, DefaultSourcePortLast
	}
	if o.DeadAfter == 0 {
		o.DeadAfter = DefaultDeadAfter
	}
	if o.Order == "" {
		o.Order = OrderFirst
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.before == nil {
		o.before = func(string) error { return nil }
	}
	return o
}

// validate looks at the options alone, not at the machine.
func (o *Options) validate() error {
	var errs []error
	complain := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if err := checkName(o.Name); err != nil {
		errs = append(errs, err)
	}
	if len(o.Interfaces) == 0 {
		complain("no interface: name at least one that faces clients")
	}
	for n, name := range o.Interfaces {
		if slices.Contains(o.Interfaces[:n], name) {
			complain("interface %s is named twice: name it once", name)
		}
	}
	if o.Workers < 1 || o.Workers > maps.MaxWorkers {
		complain("%d workers: use 1 to %d", o.Workers, maps.MaxWorkers)
	}
	if o.RingSize < os.Getpagesize() || o.RingSize > 1<<30 || o.RingSize&(o.RingSize-1) != 0 {
		complain("ring size %d: use a power of two from %d to %d", o.RingSize, os.Getpagesize(), 1<<30)
	}
	if o.FlowEntries < 1 || o.FlowEntries > 1<<30 {
		complain("%d flow entries: use 1 to %d", o.FlowEntries, 1<<30)
	}
	if o.SourcePortFirst == 0 || o.SourcePortLast < o.SourcePortFirst {
		complain("source ports %d-%d: use FIRST-LAST with FIRST above 0 and not above LAST", o.SourcePortFirst, o.SourcePortLast)
	} else if ports := int(o.SourcePortLast) - int(o.SourcePortFirst) + 1; ports < o.Workers {
		complain("%d source ports for %d workers: each worker needs one of its own", ports, o.Workers)
	}
	if o.DeadAfter < 0 {
		complain("dead-after %v: use a duration above zero", o.DeadAfter)
	}
	if o.Order != OrderFirst && o.Order != OrderLast {
		complain("order %q: use %q or %q", o.Order, OrderFirst, OrderLast)
	}
	return errors.Join(errs...)
}
