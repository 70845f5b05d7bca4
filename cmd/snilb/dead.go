// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"snilb/loader"
	"snilb/maps"
)

// deadDocument is the status of an instance whose daemon is dead: what its pins tell, under the names of statusDocument.
type deadDocument struct {
	Name   string `json:"name"`
	Ready  bool   `json:"ready"`
	Daemon string `json:"daemon"` // dead
	// Silent is the time without a sign of it.
	Silent     *float64          `json:"silent_seconds,omitempty"`
	Directory  string            `json:"directory"`
	Layout     uint32            `json:"layout"`
	Interfaces []interfaceStatus `json:"interfaces"`
	// What follows is not known of another layout.
	Workers     int       `json:"workers,omitempty"`
	SourcePorts []uint16  `json:"source_ports,omitempty"` // first and last
	Engine      *deadFlow `json:"engine,omitempty"`
	Remedy      string    `json:"remedy"`
}

type deadFlow struct {
	Flows int `json:"flows"` // these go on
}

// statusOfDead prints what a dead daemon has left. noDaemon, the error of who asked it, is returned if that is nothing.
func statusOfDead(out io.Writer, format, name string, noDaemon error) error {
	state, err := loader.Inspect(name)
	if errors.Is(err, loader.ErrNothing) || err == nil && state.PID != 0 {
		return noDaemon
	}
	if err != nil {
		return err
	}
	return printDead(out, format, describeDead(&state))
}

func describeDead(s *loader.State) *deadDocument {
	d := &deadDocument{
		Name: s.Name, Daemon: "dead", Directory: s.Directory, Layout: s.Layout, Interfaces: []interfaceStatus{}, Remedy: wayOut(s.Name),
	}
	for _, i := range s.Interfaces {
		status := interfaceStatus{Name: i.Name, Role: string(i.Role), Mode: string(i.Mode), Hook: i.Hook, Gone: i.Gone}
		if i.Packets != nil {
			status.Packets = namePackets(*i.Packets)
		}
		d.Interfaces = append(d.Interfaces, status)
	}
	if !s.Known() {
		d.Remedy = otherLayout(s)
		return d
	}
	d.Workers, d.SourcePorts, d.Engine = s.Workers, []uint16{s.SourcePortFirst, s.SourcePortLast}, &deadFlow{s.Flows}
	if s.Silent >= 0 {
		silent := s.Silent.Round(time.Millisecond).Seconds()
		d.Silent = &silent
	}
	return d
}

func otherLayout(s *loader.State) string {
	tables := fmt.Sprintf("are of layout %d", s.Layout)
	if s.Layout == 0 {
		tables = "do not tell their layout"
	}
	return fmt.Sprintf("its tables %s, this version reads %d: use the version that made them, or remove it: snilb detach --all --name %s",
		tables, maps.LayoutVersion, s.Name)
}

// wayOut says what to do about an instance whose daemon is dead.
func wayOut(name string) string {
	return fmt.Sprintf("start it again by snilb attach --name %s, or remove it: snilb detach --all --name %s", name, name)
}

// printDead prints the document; its error says that the daemon does not steer.
func printDead(out io.Writer, format string, d *deadDocument) error {
	if format == formatTable {
		if err := printDeadTable(out, d); err != nil {
			return err
		}
	} else if err := printJSON(out, format, d); err != nil {
		return err
	}
	return cli.Exit(fmt.Sprintf("daemon %s does not steer: it is dead", d.Name), exitFailed)
}

func printDeadTable(out io.Writer, d *deadDocument) error {
	w := newTable(out)
	_, _ = fmt.Fprintf(w, "instance\t%s\n", d.Name)
	state := "dead"
	if d.Silent != nil {
		state += ", the daemon is silent for " + time.Duration(*d.Silent*float64(time.Second)).Round(100*time.Millisecond).String()
	}
	_, _ = fmt.Fprintf(w, "state\t%s\n", state)
	_, _ = fmt.Fprintf(w, "pins\t%s\n", d.Directory)
	if len(d.SourcePorts) == 2 {
		_, _ = fmt.Fprintf(w, "workers\t%d, source ports %d-%d\n", d.Workers, d.SourcePorts[0], d.SourcePorts[1])
	}
	printInterfaces(w, d.Interfaces)
	if d.Engine != nil {
		_, _ = fmt.Fprintf(w, "flows\t%d, which go on\n", d.Engine.Flows)
	}
	_, _ = fmt.Fprintf(w, "way out\t%s\n", d.Remedy)
	return w.Flush()
}

// otherInstances says which instances there are instead of one; "" if there are none.
func otherInstances(than string) string {
	names, err := loader.Instances()
	if err != nil {
		return ""
	}
	var words []string
	for _, name := range slices.DeleteFunc(names, func(n string) bool { return n == than }) {
		word := name + " (dead)"
		if pid, err := loader.Running(name); err == nil && pid != 0 {
			word = fmt.Sprintf("%s (pid %d)", name, pid)
		}
		words = append(words, word)
	}
	if words == nil {
		return ""
	}
	return "there is " + strings.Join(words, ", ") + ": name it by --name"
}
