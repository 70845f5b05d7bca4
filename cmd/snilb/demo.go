// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"snilb/scripts/testbed"
)

func init() { extraCommands = append(extraCommands, demoCommand()) }

func demoCommand() *cli.Command {
	return &cli.Command{
		Name:  "demo",
		Usage: "Show a balancer at work, in network namespaces of its own",
		Description: "Needs root, but no network card and no configuration: it builds a client, a balancer and three\n" +
			"TLS backends in network namespaces, sends requests through them, and removes everything.\n" +
			"Ends with code 0 if every request was answered by the backend that the routes name.",
		Flags:        []cli.Flag{&cli.IntFlag{Name: "size", Usage: "`MIB` to download", Value: 512}},
		OnUsageError: usageError,
		Action:       demoAction,
	}
}

func demoAction(c *cli.Context) error {
	if c.NArg() > 0 {
		return cli.Exit("demo takes no arguments", exitUsage)
	}
	size := c.Int("size")
	if size < 1 || size > 1<<20 {
		return cli.Exit(fmt.Sprintf("--size %d is not between 1 and %d MiB", size, 1<<20), exitUsage)
	}
	if os.Geteuid() != 0 {
		return cli.Exit("the demo makes network namespaces and loads eBPF programs: run it with sudo", exitFailed)
	}
	// Also what `snilb demo | head` and a closed terminal cause: the namespaces must go.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()

	d := &demo{
		out:  demoPrinter{w: c.App.Writer, colour: demoColour(c.App.Writer)},
		name: fmt.Sprintf("demo-%d", os.Getpid()),
		size: int64(size) << 20,
	}
	err := d.run(ctx)
	if ctx.Err() != nil {
		err = errors.New("interrupted")
		d.out.note("\nInterrupted: removing everything.")
	}
	err = errors.Join(err, d.close())
	if err != nil {
		return cli.Exit("demo: "+err.Error(), exitFailed)
	}
	d.out.end()
	return nil
}

// demo is one run. close undoes what run has got to.
type demo struct {
	out  demoPrinter
	name string // of the instance
	size int64  // bytes to download

	dir      string // of the routes file
	bed      *testbed.Bed
	servers  []demoServer
	backends []*testbed.Backend
	trusted  *demoTrust
	daemon   *demoDaemon

	connections int     // that a hello was sent on
	failures    []error // expectations that did not hold
}

// demoServer is one of the backends: it listens on an address of each family and
// has a certificate of its own.
type demoServer struct {
	name        string
	addr4       netip.Addr
	addr6       netip.Addr
	fingerprint string
}

var demoServerNames = []string{"A", "B", "C"}

func (d *demo) run(ctx context.Context) error {
	began := time.Now()
	if err := d.build(); err != nil {
		return err
	}
	d.out.title("Three network namespaces, joined by two cables (veth)")
	d.out.topology(d.bed.Clients4[0], d.bed.Clients6[0], d.bed.VIP4, d.bed.VIP6, d.servers)

	d.out.title("The routes")
	routes := demoRoutes(d.servers)
	d.out.routes(routes)
	if err := d.attach(ctx, routes); err != nil {
		return err
	}

	d.out.title("Requests")
	d.requests(ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	d.out.title("A download")
	if err := d.download(ctx); err != nil {
		return err
	}
	d.out.title("What the programs in the kernel have counted")
	if err := d.counters(ctx); err != nil {
		return err
	}
	d.out.summary(d.connections, d.failures, time.Since(began))
	if len(d.failures) > 0 {
		return fmt.Errorf("%w\nsnilb attach said:\n%s", errors.Join(d.failures...), d.daemon.said())
	}
	return nil
}

// build makes the namespaces and starts the backends.
func (d *demo) build() (err error) {
	if d.dir, err = os.MkdirTemp("", "snilb-demo-"); err != nil {
		return err
	}
	d.bed, err = testbed.New(testbed.Options{Backends: len(demoServerNames)})
	if err != nil {
		return fmt.Errorf("build the network: %w", err)
	}
	d.trusted = newDemoTrust()
	for i, name := range demoServerNames {
		cert, err := testbed.NewCert(demoHosts...)
		if err != nil {
			return fmt.Errorf("certificate of backend %s: %w", name, err)
		}
		s := demoServer{name: name, addr4: d.bed.Backends4[i], addr6: d.bed.Backends6[i]}
		if s.fingerprint, err = d.trusted.add(name, cert); err != nil {
			return err
		}
		for _, addr := range []netip.Addr{s.addr4, s.addr6} {
			b, err := testbed.StartBackend(d.bed.Backend, name, netip.AddrPortFrom(addr, 443), cert)
			if err != nil {
				return err
			}
			d.backends = append(d.backends, b)
		}
		d.servers = append(d.servers, s)
	}
	return nil
}

// attach starts snilb in the balancer's namespace and waits until it steers.
func (d *demo) attach(ctx context.Context, routes string) (err error) {
	path := filepath.Join(d.dir, "routes.yaml")
	if err := os.WriteFile(path, []byte(routes), 0o600); err != nil {
		return err
	}
	d.out.command("snilb attach eth0 --routes routes.yaml")
	began := time.Now()
	d.daemon, err = startDemoDaemon(d.bed.LB, "attach", "eth0", "--routes", path, "--name", d.name,
		"--drain-timeout", "0s") // at the end nobody waits for a connection
	if err != nil {
		return err
	}
	if err := d.daemon.waitReady(ctx); err != nil {
		return err
	}
	d.out.note("ready after %s: eBPF programs are on eth0 and eth1", demoDuration(time.Since(began)))
	return nil
}

// close removes everything, whatever run has made of it. The daemon goes first: it
// takes its programs and pins along.
func (d *demo) close() error {
	var errs []error
	for _, b := range d.backends {
		errs = append(errs, b.Close())
	}
	if d.daemon != nil {
		if err := d.daemon.stop(); err != nil {
			errs = append(errs, err, d.removeLeft())
		}
	}
	if d.bed != nil {
		errs = append(errs, d.bed.Close())
	}
	if d.dir != "" {
		errs = append(errs, os.RemoveAll(d.dir))
	}
	return errors.Join(errs...)
}

// removeLeft removes what a daemon that did not end well has left.
func (d *demo) removeLeft() error {
	ctx, cancel := context.WithTimeout(context.Background(), demoCommandTimeout)
	defer cancel()
	_, err := demoOutput(ctx, d.bed.LB, "detach", "--all", "--name", d.name)
	return err
}

// fail notes an expectation that did not hold; the run goes on.
func (d *demo) fail(format string, args ...any) {
	d.failures = append(d.failures, fmt.Errorf(format, args...))
}

// demoHosts are the names in every backend's certificate: who answers must be told
// by the certificate itself, not by an error.
var demoHosts = []string{"a.example.com", "b.example.com", "*.shop.example.com", "api.example.com"}

func demoRoutes(servers []demoServer) string {
	text := "version: 1\nlisten: [\":443\"]\nno_match: reset\npools:\n"
	for _, s := range servers {
		text += fmt.Sprintf("  %s: {backends: [\"%s\", \"%s\"]}\n", s.name,
			netip.AddrPortFrom(s.addr4, 443), netip.AddrPortFrom(s.addr6, 443))
	}
	return text + `routes:
  - {sni: a.example.com, pool: A}
  - {sni: b.example.com, pool: B}
  - {sni: "*.shop.example.com", pool: C}
  - {sni: api.example.com, alpn: h2, pool: B}
  - {sni: api.example.com, pool: A}
`
}

// demoColour says whether colour helps whoever reads w.
func demoColour(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && demoTerminal(f) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}
