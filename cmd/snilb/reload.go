// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"

	"snilb/loader"
	"snilb/userspace/config"
	"snilb/userspace/engine"
)

// settlePoll is how often the daemon looks whether connections go by earlier routes.
const settlePoll = 100 * time.Millisecond

func reloadCommand() *cli.Command {
	return &cli.Command{
		Name:  "reload",
		Usage: "Have the daemon read its routes file again",
		Description: "Bound connections are not touched. A file that is wrong changes nothing: what is wrong is said, and the\n" +
			"exit code is 1. SIGHUP does the same, and logs it.",
		Flags:        clientFlags(),
		OnUsageError: usageError,
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return cli.Exit("reload takes no arguments", exitUsage)
			}
			client, err := clientOf(c.String("name"), c.String("api"))
			if err != nil {
				return cli.Exit(err.Error(), exitUsage)
			}
			if err := client.Reload(c.Context); err != nil {
				return noAnswer(c, err)
			}
			_, err = fmt.Fprintln(c.App.Writer, "reloaded")
			return err
		},
	}
}

// logWarnings logs what a file's reader should know.
func (s *server) logWarnings(c *config.Config) {
	for _, w := range c.Warnings {
		s.log.Warn(w.What, "at", w.Position.String(), "remedy", w.Remedy)
	}
	for _, n := range c.Notes {
		s.log.Info(n.What, "at", n.Position.String(), "remedy", n.Remedy)
	}
}

// followReloads does what SIGHUP asks for, and forgets what no connection goes by any
// more, until ctx ends.
func (s *server) followReloads(ctx context.Context) error {
	poll := time.NewTicker(settlePoll)
	defer poll.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.hangups:
			_ = s.reload() // it is logged
		case <-poll.C:
			s.forgetBackends()
		}
	}
}

// endReloads waits for the one that runs, and refuses later ones.
func (s *server) endReloads() {
	s.reloading.Lock()
	defer s.reloading.Unlock()
	s.over = true
}

var errEnding = errors.New("the daemon is ending: its routes stay as they are")

// reload reads the file again and puts it in force, or changes nothing.
func (s *server) reload() error {
	s.reloading.Lock()
	defer s.reloading.Unlock()
	if s.ready.Load() {
		s.notify(daemon.SdNotifyReloading + "\n" + daemon.SdNotifyMonotonicUsec())
		defer s.notify(daemon.SdNotifyReady)
	}
	c, err := s.readAgain()
	status := &reloadStatus{OK: err == nil, At: time.Now()}
	if err != nil {
		status.Error = err.Error()
		s.logRefusal(err)
	} else {
		s.logWarnings(c)
		s.log.Info("reloaded", "routes", c.File)
	}
	s.reloaded.Store(status)
	return err
}

func (s *server) readAgain() (*config.Config, error) {
	if s.over || s.draining.Load() || s.leaving.Load() {
		return nil, errEnding
	}
	c, err := config.Load(s.o.routes)
	if err != nil {
		return nil, err
	}
	return c, s.replace(c)
}

func (s *server) logRefusal(err error) {
	var problems config.Problems
	if !errors.As(err, &problems) {
		s.log.Error("not reloaded: the earlier routes stay in force", "error", err)
		return
	}
	for _, p := range problems {
		s.log.Error("not reloaded: "+p.What, "at", p.Position.String(), "remedy", p.Remedy)
	}
}

// replace puts a configuration in force, in an order by which every packet meets all of
// the old or all of the new one: a backend's answers find their way before anybody is
// sent there, and a listener is known to the engine before it is to the kernel. What
// goes is forgotten when no connection can use it any more.
func (s *server) replace(c *config.Config) error {
	if problems := s.unable(c); len(problems) > 0 {
		return problems
	}
	before, old := s.config.Load(), s.engine.Plan()
	plan, err := engine.NewPlan(c, old)
	if err != nil {
		return err
	}
	s.passing = true
	if err := s.addBackends(c); err != nil {
		return err
	}
	if err := s.engine.Reload(plan); err != nil {
		return err
	}
	if err := s.instance.SetListeners(listenerSpecs(c, plan)); err != nil {
		return errors.Join(err, s.engine.Reload(old), s.instance.SetListeners(listenerSpecs(before, old)))
	}
	s.config.Store(c)
	return nil
}

// unable says what of a configuration cannot be put in force, without touching anything.
func (s *server) unable(c *config.Config) config.Problems {
	problems := s.fixed(c)
	problems = append(problems, checkSources(c)...)
	return append(problems, eachBackend(c, func(addr netip.AddrPort, _ []netip.Addr) error {
		if s.backends[addr] {
			return nil // it is followed: that it is away just now is no reason to keep old routes
		}
		return loader.CheckBackend(addr)
	})...)
}

// fixed says what differs from what the tables and programs were made for.
func (s *server) fixed(c *config.Config) config.Problems {
	var problems config.Problems
	if c.Limits.Flows > s.flowEntries {
		problems = append(problems, config.Problem{
			Position: config.Position{File: c.File}, Remedy: "stay at or below it; larger tables take snilb detach, which ends the connections, and a new start",
			What: fmt.Sprintf("limits.flows is %d, and the tables were made for %d", c.Limits.Flows, s.flowEntries),
		})
	}
	for _, p := range c.Pools {
		first, last := p.Source.PortFirst, p.Source.PortLast
		if first == 0 {
			first, last = s.o.sourcePorts[0], s.o.sourcePorts[1]
		}
		if first < s.ports[0] || last > s.ports[1] {
			problems = append(problems, config.Problem{
				Position: p.Pos, Remedy: "stay in that range, or start snilb again (with --on-exit keep connections go on)",
				What: fmt.Sprintf("the source ports of pool %s are %d-%d, and the programs were loaded for %d-%d", p.Name, first, last, s.ports[0], s.ports[1]),
			})
		}
	}
	return problems
}

// addBackends has the loader know all backends. One that it knew, and that is away just
// now, is no error.
func (s *server) addBackends(c *config.Config) error {
	problems := eachBackend(c, func(addr netip.AddrPort, sources []netip.Addr) error {
		known := s.backends[addr]
		_, err := s.instance.AddBackend(addr, sources...)
		s.backends[addr] = known || err == nil
		if known && err != nil {
			s.log.Warn("backend out of reach", "backend", addr, "error", err)
			return nil
		}
		return err
	})
	if len(problems) > 0 {
		return problems
	}
	return nil
}

// forgetBackends has the loader forget backends that are in force no more, once no
// connection can be on its way to one. Bound flows do without.
func (s *server) forgetBackends() {
	s.reloading.Lock()
	defer s.reloading.Unlock()
	if s.over || !s.passing || s.engine.Unsettled() > 0 {
		return
	}
	s.passing = false
	kept := make(map[netip.AddrPort]bool)
	for _, addr := range s.engine.Plan().Backends() {
		kept[addr] = true
	}
	for addr := range s.backends {
		if kept[addr] {
			continue
		}
		if err := s.instance.RemoveBackend(addr); err != nil {
			s.log.Warn("backend not forgotten", "backend", addr, "error", err)
		}
		delete(s.backends, addr)
	}
}
