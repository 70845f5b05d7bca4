// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"embed"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"text/template"
	"time"

	"snilb/scripts/testbed"
)

//go:embed peers
var peers embed.FS

// contender is one way from the client to the backend.
type contender struct {
	// Name is for flags and keys, Title for readers.
	Name, Title string
	// ByName says that it picks the backend by the server name.
	ByName bool
	// direct says that clients address the backend itself.
	direct bool
	// bed are options of its own for the namespaces.
	bed testbed.Options
	// tools must be installed.
	tools []string
	// start makes it work in the site.
	start func(context.Context, *site) error
	// version is a command that says the version in its first line. Optional: else it is the kernel's.
	version []string
}

// floor is the contender whose cost is subtracted from that of the others.
const floor = "plain"

// contenders are all there are, snilb once a mode, the floor first.
func contenders(snilb string, modes []string) ([]contender, error) {
	nft := []string{"nft", "--version"}
	list := []contender{
		{Name: floor, Title: "plainly routed", direct: true, start: func(context.Context, *site) error { return nil }},
		{Name: "dnat", Title: "nftables DNAT", tools: []string{"nft"}, version: nft,
			start: func(ctx context.Context, s *site) error { return s.nft(ctx, "dnat.nft") }},
		{Name: "synproxy", Title: "nftables SYNPROXY", direct: true, tools: []string{"nft", "ss"}, version: nft, start: startSynproxy},
		{Name: "haproxy", Title: "HAProxy, TCP mode", ByName: true, tools: []string{"haproxy"}, version: []string{"haproxy", "-v"}, start: startHAProxy},
		{Name: "nginx", Title: "nginx stream", ByName: true, tools: []string{"nginx"}, version: []string{"nginx", "-v"}, start: startNginx},
		{Name: "sniproxy", Title: "sniproxy", ByName: true, tools: []string{"sniproxy"}, version: []string{"sniproxy", "-V"}, start: startSniproxy},
	}
	for _, mode := range modes {
		c := contender{Name: "snilb-" + mode, Title: "snilb, " + mode, ByName: true, version: []string{snilb, "version"},
			start: func(_ context.Context, s *site) error { return startSnilb(s, mode) }}
		switch mode {
		case "tc":
		case "xdp":
			c.bed.XDP = true // a veth takes redirected frames only when its far end is prepared
		case "xdp-generic":
			c.bed.NoOffload = true // it runs behind GRO and would see merged packets with partial checksums
		default:
			return nil, fmt.Errorf("no mode %q: tc, xdp, xdp-generic", mode)
		}
		list = append(list, c)
	}
	return list, nil
}

// installed says which tool is missing.
func (c contender) installed() error {
	for _, tool := range c.tools {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s needs %s; scripts/install-test-tools.sh installs it: %w", c.Name, tool, err)
		}
	}
	return nil
}

// says is the first line of what a contender's program says about its version.
func (c contender) says() string {
	if c.version == nil {
		return ""
	}
	out, err := exec.Command(c.version[0], c.version[1:]...).CombinedOutput()
	if err != nil {
		return err.Error()
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}

// values are what the templates in peers/ may use.
type values struct {
	VIP, BackendA, BackendB netip.AddrPort
	Threads                 int
	MaxConn, MaxFiles       int
	Dir                     string
	MSS, WScale             int
}

// values fits the machine and the settings: limits have room for the idle connections, and some of the proxies take memory
// for as many as they are told.
func (s *site) values() values {
	v := values{VIP: s.vip(), BackendA: s.backend(0), BackendB: s.backend(1), Threads: runtime.NumCPU(), Dir: s.dir}
	v.MaxConn = min(s.set.IdleConns+5000, (s.set.files-1000)/2)
	v.MaxFiles = 2*v.MaxConn + 1000
	return v
}

// configure fills a template of peers/ and returns the file.
func (s *site) configure(name string, v values) (string, error) {
	t, err := template.ParseFS(peers, "peers/"+name)
	if err != nil {
		return "", err
	}
	path := filepath.Join(s.dir, name)
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	if err := t.Execute(f, v); err != nil {
		_ = f.Close()
		return "", err
	}
	return path, f.Close()
}

// nft loads a rule set. It goes with the namespace.
func (s *site) nft(ctx context.Context, name string) error { return s.nftWith(ctx, name, s.values()) }

func (s *site) nftWith(ctx context.Context, name string, v values) error {
	file, err := s.configure(name, v)
	if err != nil {
		return err
	}
	if out, err := s.bed.LB.Command(ctx, "nft", "-f", file).CombinedOutput(); err != nil {
		return fmt.Errorf("nft -f %s: %w\n%s", name, err, out)
	}
	return nil
}

// startSynproxy asks the backend first for what SYNPROXY has to announce in its place.
func startSynproxy(ctx context.Context, s *site) error {
	v := s.values()
	c, err := s.bed.Client.DialContext(ctx, "tcp", v.BackendA.String())
	if err != nil {
		return err
	}
	out, err := s.bed.Client.Command(ctx, "ss", "-Htin", "dst", v.BackendA.String()).Output()
	_ = c.Close()
	if err != nil {
		return fmt.Errorf("ss: %w", err)
	}
	scale := regexp.MustCompile(`wscale:(\d+),`).FindSubmatch(out) // of the peer, then ours
	mtu := regexp.MustCompile(`pmtu:(\d+)`).FindSubmatch(out)
	if scale == nil || mtu == nil {
		return fmt.Errorf("no wscale and pmtu in what ss says:\n%s", out)
	}
	_, _ = fmt.Sscan(string(scale[1]), &v.WScale)
	_, _ = fmt.Sscan(string(mtu[1]), &v.MSS)
	v.MSS -= 40 // the headers of IPv4 and TCP
	if err := s.bed.LB.Sysctl("netfilter/nf_conntrack_tcp_loose", "0"); err != nil {
		return err
	}
	return s.nftWith(ctx, "synproxy.nft", v)
}

func startHAProxy(ctx context.Context, s *site) error {
	file, err := s.configure("haproxy.cfg", s.values())
	if err != nil {
		return err
	}
	return s.proxy(ctx, 1, "haproxy", "-db", "-f", file)
}

func startNginx(ctx context.Context, s *site) error {
	file, err := s.configure("nginx.conf", s.values())
	if err != nil {
		return err
	}
	return s.proxy(ctx, 1, "nginx", "-p", s.dir, "-c", file, "-e", "stderr")
}

func startSniproxy(ctx context.Context, s *site) error {
	v := s.values()
	file, err := s.configure("sniproxy.conf", v)
	if err != nil {
		return err
	}
	return s.proxy(ctx, v.Threads, "sniproxy", "-f", "-n", fmt.Sprint(v.MaxFiles), "-c", file)
}

// proxy starts so many processes of a proxy and waits until it accepts.
func (s *site) proxy(ctx context.Context, count int, name string, args ...string) error {
	for range count {
		p, err := startProcess(name, s.bed.LB.Command(context.Background(), name, args...)) // site.close ends it
		if err != nil {
			return err
		}
		s.daemons = append(s.daemons, p)
	}
	for deadline := time.Now().Add(readyLimit); ; time.Sleep(10 * time.Millisecond) {
		c, err := s.bed.LB.DialWith(ctx, &net.Dialer{Timeout: time.Second}, "tcp", s.vip().String())
		if err == nil {
			return c.Close()
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			return s.daemons[0].failure("does not accept: " + err.Error())
		}
	}
}

func startSnilb(s *site, mode string) error {
	file, err := s.configure("snilb.yaml", s.values())
	if err != nil {
		return err
	}
	p, err := startProcess("snilb", s.bed.LB.Command(context.Background(), s.snilb, "attach", "eth0", "--routes", file, "--mode", mode,
		"--name", s.name, "--drain-timeout", "0s"))
	if err != nil {
		return err
	}
	s.daemons = append(s.daemons, p)
	// What a killed daemon leaves in /sys/fs/bpf outlives the namespaces. After an orderly end there is nothing to do.
	s.cleanup = append(s.cleanup, func() error {
		out, err := s.bed.LB.Command(context.Background(), s.snilb, "detach", "--all", "--name", s.name).CombinedOutput()
		if err != nil {
			return fmt.Errorf("snilb detach: %w\n%s", err, out)
		}
		return nil
	})
	_, err = p.waitLine("ready", readyLimit)
	return err
}
