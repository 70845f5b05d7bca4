// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	stdmaps "maps"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"snilb/maps"
	"snilb/userspace/api"
)

// statusCommand ends with code 1 if the daemon does not steer.
func statusCommand() *cli.Command {
	return reader("status", "Say whether the daemon steers, where, and what it has done", formatTable,
		func(c *cli.Context, format string, client *api.Client) error {
			raw, err := client.Status(c.Context)
			if errors.Is(err, api.ErrNoDaemon) && c.String("api") == "" {
				return statusOfDead(c.App.Writer, format, c.String("name"), err)
			}
			if err != nil {
				return err
			}
			return printStatus(c.App.Writer, format, raw)
		})
}

// statusDocument is what the daemon says of itself.
type statusDocument struct {
	Name       string            `json:"name"`
	PID        int               `json:"pid"`
	Version    string            `json:"version"`
	Uptime     float64           `json:"uptime_seconds"`
	Ready      bool              `json:"ready"`
	Draining   bool              `json:"draining"`
	Leaving    bool              `json:"leaving"`    // all to the next daemon
	Goroutines int               `json:"goroutines"` // which stay as many, but for those that serve the socket
	Routes     string            `json:"routes"`     // the file
	Reload     *reloadStatus     `json:"reload"`     // when it was read last
	Listeners  []listenerSummary `json:"listeners"`
	Interfaces []interfaceStatus `json:"interfaces"`
	Pools      []poolSummary     `json:"pools"`
	// Engine is engine.Status, which the table prints without knowing it.
	Engine any `json:"engine"`
}

// reloadStatus is how it went to read the file; the start counts as the first time.
type reloadStatus struct {
	OK    bool      `json:"ok"`
	At    time.Time `json:"at"`
	Error string    `json:"error,omitempty"` // a line a problem
}

// String is one line.
func (r *reloadStatus) String() string {
	at := r.At.Local().Format(time.DateTime)
	if r.OK {
		return "read at " + at
	}
	first, rest, _ := strings.Cut(r.Error, "\n")
	if rest != "" {
		first += " (and more)"
	}
	return fmt.Sprintf("reload failed at %s, the earlier ones are in force: %s", at, first)
}

type interfaceStatus struct {
	Name    string            `json:"name"`
	Role    string            `json:"role"` // client, backend, tap or xdp
	Mode    string            `json:"mode"`
	Hook    string            `json:"hook"`    // tcx, clsact or xdp
	Packets map[string]uint64 `json:"packets"` // by action/reason
	Gone    bool              `json:"gone,omitempty"`
}

// taken sums what a program finished itself, and what it left to the next one.
func (i *interfaceStatus) taken() (finished, passed uint64) {
	for reason, n := range i.Packets {
		if strings.HasPrefix(reason, string(maps.ActionPass)+"/") {
			passed += n
		} else {
			finished += n
		}
	}
	return finished, passed
}

// printStatus prints a status; its error says that the daemon does not steer.
func printStatus(out io.Writer, format string, raw json.RawMessage) error {
	var s statusDocument
	if err := json.Unmarshal(raw, &s); err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	var err error
	if format == formatTable {
		err = printStatusTable(out, raw, &s)
	} else {
		err = printDocument(out, format, raw)
	}
	if err == nil && !s.Ready {
		return cli.Exit(fmt.Sprintf("daemon %s does not steer: %s", s.Name, s.state()), exitFailed)
	}
	return err
}

func (s *statusDocument) state() string {
	switch {
	case s.Draining:
		return "draining"
	case s.Leaving:
		return "leaving"
	case s.Ready:
		return "ready"
	}
	return "starting"
}

func printStatusTable(out io.Writer, raw json.RawMessage, s *statusDocument) error {
	tree, err := decodeTree(raw)
	if err != nil {
		return err
	}
	w := newTable(out)
	_, _ = fmt.Fprintf(w, "instance\t%s (pid %d, version %s)\n", s.Name, s.PID, s.Version)
	_, _ = fmt.Fprintf(w, "state\t%s for %s, %d goroutines\n", s.state(), time.Duration(s.Uptime*float64(time.Second)).Round(time.Second), s.Goroutines)
	_, _ = fmt.Fprintf(w, "routes\t%s\n", s.Routes)
	if s.Reload != nil {
		_, _ = fmt.Fprintf(w, "\t%s\n", s.Reload)
	}
	for _, l := range s.Listeners {
		_, _ = fmt.Fprintf(w, "listener\t%s\n", l.Name)
	}
	printInterfaces(w, s.Interfaces)
	for _, p := range s.Pools {
		_, _ = fmt.Fprintf(w, "pool\t%s, %s\n", p.Name, p.Balance)
		for _, b := range p.Backends {
			_, _ = fmt.Fprintf(w, "\t%s name %s weight %d\n", b.Address, b.Name, b.Weight)
		}
	}
	if object, ok := tree.(map[string]any); ok {
		writeTree(w, "", object["engine"])
	}
	return w.Flush()
}

func printInterfaces(w io.Writer, all []interfaceStatus) {
	for _, i := range all {
		what := fmt.Sprintf("%s %s, %s by %s", i.Name, i.Role, i.Mode, i.Hook)
		if i.Gone {
			what += ", gone"
		}
		if i.Packets != nil {
			finished, passed := i.taken()
			what += fmt.Sprintf(": took %d packets, passed %d", finished, passed)
		}
		_, _ = fmt.Fprintf(w, "interface\t%s\n", what)
		for _, reason := range slices.Sorted(stdmaps.Keys(i.Packets)) {
			_, _ = fmt.Fprintf(w, "\t%s %d\n", reason, i.Packets[reason])
		}
	}
}
