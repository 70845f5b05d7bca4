// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"snilb/loader"
	"snilb/maps"
	"snilb/userspace/api"
	"snilb/userspace/config"
	"snilb/userspace/engine"
)

// leaveTimeout is how long connections that are being set up may take to the end before a
// daemon leaves that another one follows. Their clients wait for the latter's start as well.
const leaveTimeout = 2 * time.Second

// drainPoll is how often a draining daemon looks whether connections are left.
const drainPoll = 50 * time.Millisecond

// server is a running daemon. All but the atomics is set before it serves.
type server struct {
	o        attachOptions
	log      *slog.Logger
	out      io.Writer // where "ready" goes
	started  time.Time
	instance *loader.Instance
	// What tables and programs are made for.
	flowEntries int
	ports       [2]uint16 // towards backends, first and last
	engine      *engine.Engine
	socket      net.Listener

	// failed holds what ended one of the parts that run; each of the six writes once.
	failed chan error
	asked  chan struct{} // holds the wish of `snilb detach`
	leave  bool          // all stays for the next daemon

	// These are read by the socket's handlers.
	ready, draining, leaving atomic.Bool
	config                   atomic.Pointer[config.Config] // in force
	reloaded                 atomic.Pointer[reloadStatus]  // never nil

	hangups   chan struct{}           // holds the wish of SIGHUP
	reloading sync.Mutex              // held by one reload, which reads and writes the rest
	backends  map[netip.AddrPort]bool // that the loader has; true: without an error
	passing   bool                    // some of them may be in force no more
	over      bool                    // no reload any more
}

// runDaemon attaches, serves until a signal, a command or a failure, and leaves
// nothing behind, or all for the next daemon.
func runDaemon(o attachOptions, c *config.Config, signals <-chan os.Signal, out io.Writer) (err error) {
	s := &server{
		o: o, out: out, log: newLogger(out, o.jsonLogs), started: time.Now(),
		failed: make(chan error, 6), asked: make(chan struct{}, 1), hangups: make(chan struct{}, 1),
		backends: make(map[netip.AddrPort]bool),
		leave:    o.onExit == exitKeep,
	}
	s.config.Store(c)
	s.reloaded.Store(&reloadStatus{OK: true, At: s.started})
	s.logWarnings(c)
	s.flowEntries, s.ports = c.Limits.Flows, sourcePorts(c, o.sourcePorts)
	s.instance, err = loader.Load(loader.Options{
		Name: o.name, Interfaces: o.interfaces, Mode: o.mode, Workers: o.workers, FlowEntries: s.flowEntries,
		SourcePortFirst: s.ports[0], SourcePortLast: s.ports[1],
		DeadAfter: o.deadAfter, OnDead: o.onDead, Order: o.order, Logger: s.log,
	})
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	defer func() {
		end := s.instance.Close
		if s.leave {
			end = s.instance.Leave
		}
		if endErr := end(); endErr != nil {
			err = errors.Join(err, fmt.Errorf("detach: %w", endErr))
		}
	}()
	s.ports = s.instance.SourcePorts() // an earlier daemon's, where they reach further
	if err := s.prepare(); err != nil {
		return s.setupError(err)
	}
	return s.run(signals)
}

// setupError prints what is wrong with the file, line by line.
func (s *server) setupError(err error) error {
	var problems config.Problems
	if errors.As(err, &problems) {
		return loadError(s.out, problems)
	}
	return fmt.Errorf("attach: %w", err)
}

// prepare fills the tables and makes the parts that run; nothing runs yet.
func (s *server) prepare() error {
	c := s.config.Load()
	problems := checkSources(c)
	problems = append(problems, eachBackend(c, s.firstBackend)...)
	if len(problems) > 0 {
		return problems
	}
	plan, err := engine.FirstPlan(c, engine.KnownIDs(s.instance.Journal()))
	if err != nil {
		return err
	}
	if err := s.instance.SetListeners(listenerSpecs(c, plan)); err != nil {
		return err
	}
	path := s.o.socket
	if path == "" {
		path = s.instance.Socket()
	}
	// Before the engine, whose rings only Run closes.
	if s.socket, err = api.Listen(path, s.o.socketOwner); err != nil {
		return err
	}
	if s.engine, err = engine.New(s.engineOptions(), plan); err != nil {
		return errors.Join(err, s.socket.Close())
	}
	return nil
}

// firstBackend has the loader know a backend at the start. Where an earlier daemon left its state the start bears what a
// running daemon does: one that is away just now must not keep all others from being served.
func (s *server) firstBackend(addr netip.AddrPort, sources []netip.Addr) error {
	_, err := s.instance.AddBackend(addr, sources...)
	s.backends[addr] = true
	if errors.Is(err, loader.ErrUnreachable) && s.instance.Adopted() {
		s.log.Warn("a backend waits for a route to it", "backend", addr, "error", err, "remedy", backendRemedy(err))
		return nil
	}
	return err
}

func (s *server) engineOptions() engine.Options {
	o := engine.Options{
		Tables: s.instance.Tables(),
		NextHop: func(addr netip.Addr) (engine.Hop, error) {
			hop, err := s.instance.NextHop(addr)
			return engineHop(hop), err
		},
		NextHopWithin: func(addr netip.Addr, mtu int) (engine.Hop, error) {
			hop, err := s.instance.NextHopWithin(addr, mtu)
			return engineHop(hop), err
		},
		MSS:             s.instance.MTU,
		HasSockets:      s.instance.HasSockets,
		Secret:          s.instance.Secret(),
		Adopted:         s.instance.Adopted(),
		Journal:         s.instance.Journal(),
		SourcePortFirst: s.ports[0],
		SourcePortLast:  s.ports[1],
		SourcePortsOwn:  s.o.sourcePorts,
		Log:             s.log,
	}
	for i, queue := range s.instance.TapQueues() {
		o.Rings = append(o.Rings, s.instance.Ring(i))
		o.QuietRings = append(o.QuietRings, s.instance.QuietRing(i))
		o.Jobs = append(o.Jobs, s.instance.Jobs(i))
		o.Queues = append(o.Queues, queue)
	}
	return o
}

func engineHop(h loader.NextHop) engine.Hop {
	return engine.Hop{Index: h.Index, MTU: h.MTU, Source: h.Source}
}

func listenerSpecs(c *config.Config, plan *engine.Plan) []loader.ListenerSpec {
	unknown := map[config.ActionKind]uint8{
		config.Reset: maps.UnknownFlowReset, config.Pass: maps.UnknownFlowPass, config.Drop: maps.UnknownFlowDrop,
	}[c.UnknownFlow]
	var specs []loader.ListenerSpec
	for _, l := range c.Listeners {
		specs = append(specs, loader.ListenerSpec{ID: plan.ListenerID(l), Addr: l.Addr, UnknownFlow: unknown})
	}
	return specs
}

// run starts the parts, attaches and waits. The parts have ended when it returns.
func (s *server) run(signals <-chan os.Signal) error {
	ctx, stop := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	defer parts.Wait()
	defer s.endReloads()
	defer stop()
	start := func(part func(context.Context) error) {
		parts.Go(func() { s.failed <- part(ctx) })
	}
	// All before Attach: no packet may meet a daemon that is not there.
	start(s.engine.Run)
	start(s.instance.Run)
	start(s.watchPressure)
	start(s.watchdog)
	start(s.followReloads)
	start(func(ctx context.Context) error { return api.Serve(ctx, s.socket, s.handlers(), s.log) })
	if err := s.instance.Attach(); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	if err := s.engine.Ready(); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	s.dropPrivileges()
	s.announce()
	return s.wait(signals)
}

// dropPrivileges keeps what the rest of the daemon's life needs. Root is refused then what
// belongs to others.
func (s *server) dropPrivileges() {
	for _, p := range loader.DropPrivileges() {
		s.log.Warn(p.What, "remedy", p.Remedy)
	}
	dir := filepath.Dir(s.socket.Addr().String())
	if err := unix.Faccessat(unix.AT_FDCWD, dir, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		s.log.Warn("the socket will not be removed at the end, as its directory is another user's", "directory", dir, "error", err,
			"remedy", "choose a directory of root's by --api")
	}
}

// announce says that the daemon steers.
func (s *server) announce() {
	s.ready.Store(true)
	if s.o.jsonLogs {
		s.log.Info("ready")
	} else {
		_, _ = io.WriteString(s.out, "ready\n")
	}
	s.notify(daemon.SdNotifyReady)
}

func (s *server) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.log.Warn("tell the service manager", "error", err)
	}
}

// wait returns when the daemon shall end.
func (s *server) wait(signals <-chan os.Signal) error {
	for {
		select {
		case err := <-s.failed:
			return partError(err)
		case <-s.asked:
			s.log.Info("asked to detach")
			s.leave = false
			return s.drain(signals)
		case sig := <-signals:
			if s.minor(sig) {
				continue
			}
			s.log.Info("ending", "signal", sig.String(), "on_exit", s.o.onExit)
			if s.leave {
				return s.quiesce(signals)
			}
			return s.drain(signals)
		}
	}
}

// minor handles the signals that do not end the daemon.
func (s *server) minor(sig os.Signal) bool {
	switch sig {
	case syscall.SIGHUP:
		select {
		case s.hangups <- struct{}{}:
		default: // one that has not begun will do
		}
	case syscall.SIGUSR1:
		s.log.Info("no log file to open again")
	default:
		return false
	}
	return true
}

// partError is the error of a part that ended by itself.
func partError(err error) error {
	if err == nil {
		err = errors.New("a part of the daemon has ended by itself")
	}
	return fmt.Errorf("running: %w", err)
}

// drain leaves new connections to the stack and waits for the others, but not
// beyond the timeout or another signal.
func (s *server) drain(signals <-chan os.Signal) error {
	s.draining.Store(true)
	s.ready.Store(false)
	s.notify(daemon.SdNotifyStopping)
	if err := s.engine.StopListening(); err != nil {
		return fmt.Errorf("stop listening: %w", err)
	}
	timeout := time.After(s.o.drainTimeout)
	poll := time.NewTicker(drainPoll)
	defer poll.Stop()
	for s.engine.Live() > 0 {
		select {
		case err := <-s.failed:
			return partError(err)
		case <-timeout:
			s.log.Warn("the drain timeout ends connections", "connections", s.engine.Live())
			return nil
		case sig := <-signals:
			if !s.minor(sig) {
				s.log.Warn("ending at once", "signal", sig.String(), "connections", s.engine.Live())
				return nil
			}
		case <-poll.C:
		}
	}
	return nil
}

// quiesce takes what is being set up to its end, as far as another daemon could not.
func (s *server) quiesce(signals <-chan os.Signal) error {
	s.leaving.Store(true)
	s.ready.Store(false)
	s.notify(daemon.SdNotifyStopping)
	ctx, cancel := context.WithTimeout(context.Background(), leaveTimeout)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.engine.Quiesce(ctx) }()
	for {
		select {
		case err := <-s.failed:
			return partError(err)
		case err := <-done:
			if err != nil {
				s.log.Warn("connections that were being set up are left behind", "error", err)
			}
			return nil
		case sig := <-signals:
			if !s.minor(sig) {
				return nil
			}
		}
	}
}

func (s *server) handlers() api.Handlers {
	return api.Handlers{
		Status: func() (any, error) { return s.status() },
		Config: func() (any, error) { return summarize(s.config.Load()), nil },
		Flows: func() iter.Seq[any] {
			return func(yield func(any) bool) {
				for f := range s.engine.Flows() {
					if !yield(f) {
						return
					}
				}
			}
		},
		Reload: s.reload,
		Detach: func() {
			select {
			case s.asked <- struct{}{}:
			default: // somebody has asked already
			}
		},
	}
}

func (s *server) status() (statusDocument, error) {
	c := s.config.Load()
	d := statusDocument{
		Name: s.o.name, PID: os.Getpid(), Version: version(), Uptime: time.Since(s.started).Round(time.Millisecond).Seconds(),
		Ready: s.ready.Load(), Draining: s.draining.Load(), Leaving: s.leaving.Load(), Goroutines: runtime.NumGoroutine(), Routes: c.File, Reload: s.reloaded.Load(), Listeners: summarizeListeners(c),
		Interfaces: []interfaceStatus{}, Pools: summarizePools(c), Engine: s.engine.Status(),
	}
	for _, i := range s.instance.Interfaces() {
		packets, err := s.instance.Tables().Packets(i.Slot)
		if err != nil {
			return d, fmt.Errorf("read the counters of %s: %w", i.Name, err)
		}
		d.Interfaces = append(d.Interfaces, interfaceStatus{
			Name: i.Name, Role: string(i.Role), Mode: string(i.Mode), Hook: i.Hook, Packets: namePackets(packets),
		})
	}
	return d, nil
}

// namePackets leaves out what never happened.
func namePackets(c maps.CounterSet) map[string]uint64 {
	named := make(map[string]uint64)
	for i, n := range c.Packets {
		switch {
		case n == 0:
		case i < len(maps.Reasons):
			named[string(maps.Reasons[i].Action)+"/"+maps.Reasons[i].Name] += n
		default: // of a newer version, that counted here before
			named["newer/"+strconv.Itoa(i)] += n
		}
	}
	return named
}
