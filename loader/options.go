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

// Mode is by what an interface's packets are met.
type Mode string

// The modes. TC is complete and on every interface; XDP is in front of it, in the driver
// or, generic, just behind it.
const (
	ModeTC         Mode = "tc"
	ModeXDP        Mode = "xdp"
	ModeXDPGeneric Mode = "xdp-generic"
)

// Modes lists them.
var Modes = []Mode{ModeTC, ModeXDP, ModeXDPGeneric}

// OnDead is what new connections meet when the daemon is dead.
type OnDead string

// The policies. The stack's may be a proxy on the same port, or else a RST; one that is held
// waits for the daemon as long as its client repeats its SYN.
const (
	OnDeadPass  OnDead = "pass"
	OnDeadReset OnDead = "reset"
	OnDeadHold  OnDead = "hold"
)

// OnDeads lists them.
var OnDeads = []OnDead{OnDeadPass, OnDeadReset, OnDeadHold}

// Interface is one that faces clients.
type Interface struct {
	Name string
	// Mode is optional, Options.Mode by default.
	Mode Mode
}

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
	Interfaces []Interface
	// Mode of interfaces that are named without one, and of those that turn out to face
	// backends. Optional, ModeTC by default.
	Mode Mode
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
	// OnDead is what new connections meet then. Optional, OnDeadPass by default.
	OnDead OnDead
	// Order is the place among the other programs of the interfaces. Optional, OrderFirst by default.
	Order Order
	// Logger is optional, slog.Default() by default.
	Logger *slog.Logger

	// forceClsact attaches as on a kernel without tcx.
	forceClsact bool
	// hideDrivers is not to know what drivers can do, as before Linux 6.3.
	hideDrivers bool
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
	if o.OnDead == "" {
		o.OnDead = OnDeadPass
	}
	if o.Order == "" {
		o.Order = OrderFirst
	}
	if o.Mode == "" {
		o.Mode = ModeTC
	}
	o.Interfaces = slices.Clone(o.Interfaces)
	for n := range o.Interfaces {
		if o.Interfaces[n].Mode == "" {
			o.Interfaces[n].Mode = o.Mode
		}
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
	for n, name := range o.names() {
		if slices.Contains(o.names()[:n], name) {
			complain("interface %s is named twice: name it once", name)
		}
	}
	for _, mode := range o.modes() {
		if !slices.Contains(Modes, mode) {
			complain("mode %q: use one of %q", mode, Modes)
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
	if !slices.Contains(OnDeads, o.OnDead) {
		complain("on-dead %q: use one of %q", o.OnDead, OnDeads)
	}
	if o.Order != OrderFirst && o.Order != OrderLast {
		complain("order %q: use %q or %q", o.Order, OrderFirst, OrderLast)
	}
	return errors.Join(errs...)
}

// overlaps reports whether a range of source ports has some of ours.
func (o *Options) overlaps(ports [2]uint16) bool {
	return ports[0] <= o.SourcePortLast && o.SourcePortFirst <= ports[1]
}

// names lists the interfaces that face clients.
func (o *Options) names() []string {
	var names []string
	for _, i := range o.Interfaces {
		names = append(names, i.Name)
	}
	return names
}

// mode returns an interface's, and whether clients come in by it.
func (o *Options) mode(iface string) (mode Mode, facesClients bool) {
	for _, i := range o.Interfaces {
		if i.Name == iface {
			return i.Mode, true
		}
	}
	return o.Mode, false
}

// modes lists those that some interface has or may come to have.
func (o *Options) modes() []Mode {
	all := []Mode{o.Mode}
	for _, i := range o.Interfaces {
		all = append(all, i.Mode)
	}
	return all
}

// usesXDP reports whether an interface has XDP or may come to have it.
func (o *Options) usesXDP() bool {
	return slices.ContainsFunc(o.modes(), func(m Mode) bool { return m != ModeTC })
}

// usesNative reports the same for XDP in the driver.
func (o *Options) usesNative() bool {
	return slices.Contains(o.modes(), ModeXDP)
}

// soleXDP returns the one interface with XDP, if no other ever gets it: what XDP meets
// there and sends there again needs no redirect.
func (o *Options) soleXDP() string {
	sole := ""
	for _, i := range o.Interfaces {
		if i.Mode == ModeTC {
			continue
		}
		if sole != "" {
			return ""
		}
		sole = i.Name
	}
	if o.Mode != ModeTC {
		return ""
	}
	return sole
}
