// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"

	"snilb/scripts/testbed"
	"snilb/userspace/bench"
)

const readyLimit = 20 * time.Second

// benchNet is the network of RFC 2544, for benchmarks: the first half for clients that are packets, the second is what a flood
// pretends to come from.
var (
	benchNet      = netip.MustParsePrefix("198.18.0.0/15")
	packetSources = netip.MustParsePrefix("198.18.0.0/16")
	floodSources  = netip.MustParsePrefix("198.19.0.0/16")
)

// clientAddresses is how many addresses the clients have, that is how many times 64,000 ports. With one alone a port would be
// used again within seconds, which no balancer on the Internet sees, and of which SYNPROXY makes stalled connections.
const clientAddresses = 60

// site is one contender at work: namespaces of its own, the server of the load tool in the backends', the contender in the
// load balancer's. Each measurement of a contender gets a new site. So nobody pays for what another has left, be it sockets
// in TIME_WAIT, entries and hooks of conntrack or an idle daemon, and all is gone when the namespaces are.
type site struct {
	set     *settings
	c       contender
	snilb   string
	name    string // of snilb's instance
	dir     string
	bed     *testbed.Bed
	server  *process
	daemons []*process
	cleanup []func() error
	// before is the memory right before the contender was started.
	before memory
}

// newSite builds it. On an error nothing is left.
func newSite(ctx context.Context, set *settings, snilb string, c contender) (_ *site, err error) {
	s := &site{set: set, c: c, snilb: snilb, name: fmt.Sprintf("bench-%d", os.Getpid())}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s: %w", c.Name, err), s.close())
		}
	}()
	if s.dir, err = os.MkdirTemp("", "snilb-bench-"); err != nil {
		return nil, err
	}
	opts := c.bed
	opts.Forward, opts.Clients = true, clientAddresses
	if s.bed, err = testbed.New(opts); err != nil {
		return nil, err
	}
	if err := s.tune(); err != nil {
		return nil, err
	}
	if err := s.serve(); err != nil {
		return nil, err
	}
	if s.before, err = readMemory(); err != nil {
		return nil, err
	}
	return s, c.start(ctx, s)
}

// serve starts the load tool's server at the backends' addresses, in the place of the one that runs.
func (s *site) serve(args ...string) (err error) {
	if s.server != nil {
		if err := s.server.stop(); err != nil {
			return err
		}
	}
	args = append([]string{"bench", "serve", s.backend(0).String(), s.backend(1).String(), "--reply", "1"}, args...)
	if s.server, err = startProcess("snilb bench serve", s.bed.Backend.Command(context.Background(), s.snilb, args...)); err != nil {
		return err
	}
	_, err = s.server.waitLine("ready", readyLimit)
	return err
}

// tune sets what is the same for all contenders.
func (s *site) tune() error {
	for _, ns := range []*testbed.NS{s.bed.Client, s.bed.LB, s.bed.Backend} {
		// A proxy's one address has few ports for thousands of connections a second that each block one for a minute.
		if err := ns.Sysctl("ipv4/tcp_tw_reuse", "1"); err != nil {
			return err
		}
	}
	for ns, ports := range map[*testbed.NS]string{s.bed.Client: "1024 65535", s.bed.LB: "30000 65535"} { // snilb's are below
		if err := ns.Sysctl("ipv4/ip_local_port_range", ports); err != nil {
			return err
		}
	}
	// What is answered to packets must have a way: with a flood it would be cheaper here than anywhere without one. The
	// client's kernel drops it.
	h, err := s.bed.LB.Netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	index, err := s.bed.LB.Index("eth0")
	if err != nil {
		return err
	}
	return h.RouteAdd(&netlink.Route{LinkIndex: index, Gw: s.bed.Clients4[0].AsSlice(),
		Dst: &net.IPNet{IP: benchNet.Addr().AsSlice(), Mask: net.CIDRMask(benchNet.Bits(), 32)}})
}

func (s *site) vip() netip.AddrPort { return netip.AddrPortFrom(s.bed.VIP4, 443) }

func (s *site) backend(i int) netip.AddrPort { return netip.AddrPortFrom(s.bed.Backends4[i], 443) }

// target is where clients go.
func (s *site) target() netip.AddrPort {
	if s.c.direct {
		return s.backend(0)
	}
	return s.vip()
}

// close ends and removes everything.
func (s *site) close() error {
	var errs []error
	for _, p := range s.daemons {
		errs = append(errs, p.stop())
	}
	if s.server != nil {
		errs = append(errs, s.server.stop())
	}
	for _, f := range s.cleanup {
		errs = append(errs, f())
	}
	if s.bed != nil {
		errs = append(errs, s.bed.Close())
	}
	if s.dir != "" {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}

// memory reads what the kernel and the contender hold now.
func (s *site) memory() (memory, error) {
	var daemon int64
	for _, p := range s.daemons {
		daemon += resident(p.cmd.Process.Pid)
	}
	m, err := readMemory() // behind what fills the kernel's caches with the entries of /proc
	m.Daemon = daemon
	return m, err
}

// phase is a run of the load tool, and the CPU that the whole machine used meanwhile.
type phase struct {
	*bench.Result
	Busy float64 `json:"cpu_seconds"`
}

// load runs the load tool in the client's namespace.
func (s *site) load(ctx context.Context, kind string, args ...string) (*phase, error) {
	cmd := s.tool(ctx, kind, args...)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	cpu := startSampler()
	err := cmd.Run()
	if e := cpu.stop(); e != nil {
		return nil, e
	}
	p, err := readPhase(kind, out.Bytes(), said.String(), err)
	if err != nil {
		return nil, err
	}
	p.Busy = cpu.between(p.Started, p.Started.Add(time.Duration(p.Seconds*float64(time.Second))))
	return p, nil
}

// tool is the load tool's command, against the contender.
func (s *site) tool(ctx context.Context, kind string, args ...string) *exec.Cmd {
	argv := append([]string{"bench", kind, s.target().String()}, args...)
	cmd := s.bed.Client.Command(ctx, s.snilb, append(argv, "-o", "json", "--no-progress")...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us
	return cmd
}

// readPhase reads what the tool printed. Failed connections are its result and no error here, whatever its exit code.
func readPhase(kind string, out []byte, said string, err error) (*phase, error) {
	p := &phase{Result: &bench.Result{}}
	if e := json.Unmarshal(out, p.Result); e != nil {
		return nil, errors.Join(fmt.Errorf("snilb bench %s: %w: %s", kind, e, strings.TrimSpace(said)), err)
	}
	return p, nil
}
