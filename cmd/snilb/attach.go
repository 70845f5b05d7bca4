// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"snilb/loader"
	"snilb/maps"
	"snilb/userspace/api"
	"snilb/userspace/config"
)

const (
	// defaultMaxWorkers bounds the workers of a large machine: the kernel moves the
	// packets, and the engine only sees the first ones of a connection.
	defaultMaxWorkers   = 8
	defaultDrainTimeout = 10 * time.Second
)

func attachCommand() *cli.Command {
	return &cli.Command{
		Name:      "attach",
		Usage:     "Balance what comes in by interfaces, in the foreground",
		ArgsUsage: "IFACE[=MODE]...",
		Description: "Prints a line \"ready\" on stderr once it steers. TERM and INT end it, by --on-exit; a second one ends it\n" +
			"at once. HUP has the routes read again, as snilb reload does. Where an earlier daemon of this name has left\n" +
			"its state, by a crash or by --on-exit keep, its connections go on under the new one.",
		Flags:        attachFlags(),
		OnUsageError: usageError,
		Action: func(c *cli.Context) error {
			o, err := readAttachOptions(c)
			if err != nil {
				return cli.Exit(err.Error(), exitUsage)
			}
			file, err := config.Load(o.routes)
			if err != nil {
				return loadError(c.App.ErrWriter, err)
			}
			signals := make(chan os.Signal, 4)
			signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1)
			defer signal.Stop(signals)
			return runDaemon(o, file, signals, c.App.ErrWriter)
		},
	}
}

func attachFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "routes", Usage: "the routes `FILE`; required"},
		&cli.StringFlag{Name: "name", Usage: "the instance's `NAME`", Value: loader.DefaultName},
		&cli.StringFlag{Name: "mode", Usage: "attach by `MODE`: tc, or xdp (in the driver) or xdp-generic in front of it; for interfaces without =MODE and those towards backends", Value: string(loader.ModeTC)},
		&cli.StringFlag{Name: "order", Usage: "the `PLACE` among other programs: first or last", Value: string(loader.OrderFirst)},
		&cli.StringFlag{Name: "api", Usage: "listen for commands at `PATH` instead of /run/snilb/NAME.sock"},
		&cli.StringFlag{Name: "api-owner", Usage: "let `USER[:GROUP]` give commands, instead of only the daemon's user"},
		&cli.DurationFlag{Name: "dead-after", Usage: "take the daemon for dead after `DURATION` without a sign of it", Value: loader.DefaultDeadAfter},
		&cli.StringFlag{Name: "on-exit", Usage: "`WHAT` to do at the end: detach, after the connections or --drain-timeout; or keep all for the next daemon", Value: exitDetach},
		&cli.StringFlag{Name: "on-dead", Usage: "`WHAT` new connections meet then: pass (the stack has them, a proxy on the port or its RST), reset, or hold (they wait)", Value: string(loader.OnDeadPass)},
		&cli.DurationFlag{Name: "drain-timeout", Usage: "how long connections may go on after TERM, as `DURATION`", Value: defaultDrainTimeout},
		&cli.StringFlag{Name: "log-format", Usage: "`FORMAT`: text or json", Value: "text"},
		&cli.IntFlag{Name: "workers", Hidden: true, Value: min(runtime.GOMAXPROCS(0), defaultMaxWorkers)},
		&cli.StringFlag{Name: "source-ports", Hidden: true, Value: fmt.Sprintf("%d-%d", loader.DefaultSourcePortFirst, loader.DefaultSourcePortLast)},
		// Part of the contract, but not built yet.
		&cli.BoolFlag{Name: "watch", Hidden: true},
		&cli.StringFlag{Name: "metrics", Hidden: true},
		&cli.DurationFlag{Name: "drain-delay", Hidden: true},
		&cli.StringFlag{Name: "cookie-key", Hidden: true},
		&cli.StringFlag{Name: "access-log", Hidden: true},
	}
}

// What becomes of programs and connections at the end.
const (
	exitDetach = "detach"
	exitKeep   = "keep"
)

// attachOptions is the command line of attach.
type attachOptions struct {
	interfaces   []loader.Interface
	mode         loader.Mode
	routes       string
	name         string
	socket       string // "": where the name puts it
	socketOwner  *api.Owner
	order        loader.Order
	deadAfter    time.Duration
	onExit       string
	onDead       loader.OnDead
	drainTimeout time.Duration
	jsonLogs     bool
	workers      int
	sourcePorts  [2]uint16 // towards backends, first and last
}

func readAttachOptions(c *cli.Context) (attachOptions, error) {
	o := attachOptions{
		mode:         loader.Mode(c.String("mode")),
		routes:       c.String("routes"),
		name:         c.String("name"),
		socket:       c.String("api"),
		order:        loader.Order(c.String("order")),
		deadAfter:    c.Duration("dead-after"),
		onExit:       c.String("on-exit"),
		onDead:       loader.OnDead(c.String("on-dead")),
		drainTimeout: c.Duration("drain-timeout"),
		jsonLogs:     c.String("log-format") == "json",
		workers:      c.Int("workers"),
	}
	if err := refuseUnsupported(c); err != nil {
		return o, err
	}
	if err := checkMode("--mode "+string(o.mode), o.mode); err != nil {
		return o, err
	}
	var err error
	if o.interfaces, err = readInterfaces(c.Args().Slice()); err != nil {
		return o, err
	}
	if _, err := loader.SocketPath(o.name); err != nil {
		return o, fmt.Errorf("--name: %w", err)
	}
	if o.sourcePorts, err = readPortRange(c.String("source-ports")); err != nil {
		return o, err
	}
	if o.socketOwner, err = readOwner(c.String("api-owner")); err != nil {
		return o, err
	}
	switch {
	case o.routes == "":
		return o, fmt.Errorf("attach needs --routes FILE")
	case o.order != loader.OrderFirst && o.order != loader.OrderLast:
		return o, fmt.Errorf("--order %q: use first or last", o.order)
	case o.deadAfter < 2*time.Second:
		return o, fmt.Errorf("--dead-after %s: use 2s or more, as the daemon gives a sign of life once a second", o.deadAfter)
	case o.onExit != exitDetach && o.onExit != exitKeep:
		return o, fmt.Errorf("--on-exit %q: use detach or keep", o.onExit)
	case !slices.Contains(loader.OnDeads, o.onDead):
		return o, fmt.Errorf("--on-dead %q: use pass, reset or hold", o.onDead)
	case o.drainTimeout < 0:
		return o, fmt.Errorf("--drain-timeout %s: use 0s or more", o.drainTimeout)
	case !slices.Contains([]string{"text", "json"}, c.String("log-format")):
		return o, fmt.Errorf("--log-format %q: use text or json", c.String("log-format"))
	case o.workers < 1 || o.workers > maps.MaxWorkers:
		return o, fmt.Errorf("--workers %d: use 1 to %d", o.workers, maps.MaxWorkers)
	}
	return o, nil
}

// readPortRange reads FIRST-LAST. Whether there are enough for the workers is the
// loader's to say.
func readPortRange(word string) (ports [2]uint16, err error) {
	ends := strings.Split(word, "-")
	if len(ends) == len(ports) {
		for i, text := range ends {
			port, err := strconv.ParseUint(text, 10, 16)
			if err != nil {
				return ports, badPortRange(word)
			}
			ports[i] = uint16(port)
		}
	}
	if ports[0] == 0 || ports[1] < ports[0] {
		return ports, badPortRange(word)
	}
	return ports, nil
}

func badPortRange(word string) error {
	return fmt.Errorf("--source-ports %q: use FIRST-LAST, from 1 to 65535 and FIRST not above LAST", word)
}

// refuseUnsupported refuses what the contract has and this build does not.
func refuseUnsupported(c *cli.Context) error {
	for flag, used := range map[string]bool{
		"watch":       c.Bool("watch"),
		"metrics":     c.String("metrics") != "",
		"drain-delay": c.Duration("drain-delay") != 0,
		"cookie-key":  c.String("cookie-key") != "",
		"access-log":  c.String("access-log") != "",
	} {
		if used {
			return fmt.Errorf("--%s is not supported yet: leave it out", flag)
		}
	}
	return nil
}

func checkMode(written string, mode loader.Mode) error {
	if slices.Contains(loader.Modes, mode) {
		return nil
	}
	return fmt.Errorf("%s: no mode %q: use tc, xdp or xdp-generic", written, mode)
}

// readInterfaces reads IFACE or IFACE=MODE.
func readInterfaces(words []string) ([]loader.Interface, error) {
	if len(words) == 0 {
		return nil, fmt.Errorf("attach needs at least one interface that faces clients: snilb attach eth0 --routes routes.yaml")
	}
	var all []loader.Interface
	for _, word := range words {
		name, mode, given := strings.Cut(word, "=")
		if name == "" {
			return nil, fmt.Errorf("%q names no interface", word)
		}
		if given {
			if err := checkMode(word, loader.Mode(mode)); err != nil {
				return nil, err
			}
		}
		if slices.ContainsFunc(all, func(i loader.Interface) bool { return i.Name == name }) {
			return nil, fmt.Errorf("interface %s is named twice: name it once", name)
		}
		all = append(all, loader.Interface{Name: name, Mode: loader.Mode(mode)})
	}
	return all, nil
}

func newLogger(out io.Writer, asJSON bool) *slog.Logger {
	if asJSON {
		return slog.New(slog.NewJSONHandler(out, nil))
	}
	return slog.New(slog.NewTextHandler(out, nil))
}
