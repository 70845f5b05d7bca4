// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// needRoot skips where the kernel cannot be asked; where tests must run it fails.
func needRoot(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() == 0 {
		return
	}
	missing(tb, "root: network namespaces and BPF")
}

// missing skips a test for what this machine lacks; where nothing may be skipped it fails.
func missing(tb testing.TB, what string) {
	tb.Helper()
	if os.Getenv("CI") == "true" || os.Getenv("SNILB_REQUIRE") == "1" {
		tb.Fatal("this test must run here, and needs " + what)
	}
	tb.Skip("needs " + what)
}

// newNetns moves the test to a fresh network namespace with lo up.
func newNetns(tb testing.TB) *namespace {
	tb.Helper()
	needRoot(tb)
	runtime.LockOSThread()
	before, err := netns.Get()
	must(tb, err)
	fresh, err := netns.New()
	must(tb, err)
	ns, err := currentNamespace()
	must(tb, err)
	must(tb, fresh.Close())
	tb.Cleanup(func() {
		must(tb, ns.close())
		must(tb, netns.Set(before))
		must(tb, before.Close())
		runtime.UnlockOSThread()
	})
	setUp(tb, "lo")
	return ns
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func setUp(tb testing.TB, name string) {
	tb.Helper()
	must(tb, netlink.LinkSetUp(device(tb, name)))
}

func device(tb testing.TB, name string) netlink.Link {
	tb.Helper()
	d, err := netlink.LinkByName(name)
	must(tb, err)
	return d
}

// addVeth adds an interface with these addresses, and its far end, NAME-far, in the
// same namespace.
func addVeth(tb testing.TB, name string, prefixes ...string) netlink.Link {
	tb.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	must(tb, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name + "-far"}))
	setUp(tb, name+"-far")
	d := device(tb, name)
	for _, p := range prefixes {
		addAddress(tb, name, p)
	}
	setUp(tb, name)
	return d
}

func addAddress(tb testing.TB, name, prefix string) {
	tb.Helper()
	a, err := netlink.ParseAddr(prefix)
	must(tb, err)
	a.Flags = unix.IFA_F_NODAD
	must(tb, netlink.AddrAdd(device(tb, name), a))
}

func routeVia(tb testing.TB, prefix, gateway string) *netlink.Route {
	tb.Helper()
	dst, err := netlink.ParseIPNet(prefix)
	must(tb, err)
	r := &netlink.Route{Dst: dst, Gw: netip.MustParseAddr(gateway).AsSlice()}
	must(tb, netlink.RouteReplace(r))
	return r
}

func testOptions(tb testing.TB, interfaces ...string) Options {
	return Options{
		Name:        "test",
		Interfaces:  named(interfaces...),
		Workers:     2,
		RingSize:    os.Getpagesize() * 4,
		FlowEntries: 1000,
		Logger:      slog.New(slog.NewTextHandler(tb.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

func named(names ...string) []Interface {
	var all []Interface
	for _, name := range names {
		all = append(all, Interface{Name: name})
	}
	return all
}

// load loads an instance that is closed at the end of the test.
func load(tb testing.TB, o Options) *Instance {
	tb.Helper()
	i, err := Load(o)
	must(tb, err)
	tb.Cleanup(func() { must(tb, i.Close()) })
	return i
}

func loadAttached(tb testing.TB, o Options) *Instance {
	tb.Helper()
	i := load(tb, o)
	must(tb, i.Attach())
	return i
}

// snapshot lists all that an instance could leave in the namespace ns.
func snapshot(tb testing.TB, ns *namespace) []string {
	tb.Helper()
	var all []string
	links, err := ns.links()
	must(tb, err)
	for _, d := range links {
		all = append(all, "device "+d.Attrs().Name)
		all = append(all, programsOn(tb, d)...)
		qdiscs, err := netlink.QdiscList(d)
		must(tb, err)
		for _, q := range qdiscs {
			all = append(all, fmt.Sprintf("qdisc %s on %s", q.Type(), d.Attrs().Name))
		}
		neighbours, err := netlink.NeighList(d.Attrs().Index, 0)
		must(tb, err)
		for _, n := range neighbours {
			if n.FlagsExt&netlink.NTF_EXT_MANAGED != 0 {
				all = append(all, fmt.Sprintf("managed neighbour %s on %s", n.IP, d.Attrs().Name))
			}
		}
	}
	for _, dir := range []string{stateDir, runDir} {
		found, err := filepath.Glob(filepath.Join(dir, "*"+ns.suffix+"*"))
		must(tb, err)
		all = append(all, found...)
	}
	return all
}

// programsOn lists what is on an interface's ingress, in the order it runs.
func programsOn(tb testing.TB, d netlink.Link) []string {
	tb.Helper()
	var all []string
	result, err := link.QueryPrograms(link.QueryOptions{Target: d.Attrs().Index, Attach: ebpf.AttachTCXIngress})
	if !errors.Is(err, unix.EINVAL) { // what a kernel without tcx says
		must(tb, err)
		for _, p := range result.Programs {
			all = append(all, "program "+programName(tb, p.ID)+" on "+d.Attrs().Name)
		}
	}
	if now, err := netlink.LinkByIndex(d.Attrs().Index); err == nil && now.Attrs().Xdp.Attached {
		all = append(all, "XDP "+programName(tb, ebpf.ProgramID(now.Attrs().Xdp.ProgId))+" on "+d.Attrs().Name)
	}
	filters, err := netlink.FilterList(d, ingress)
	if err == nil {
		slices.SortStableFunc(filters, func(a, b netlink.Filter) int {
			return int(a.Attrs().Priority) - int(b.Attrs().Priority)
		})
		for _, f := range filters {
			if b, ok := f.(*netlink.BpfFilter); ok {
				all = append(all, "filter "+b.Name+" on "+d.Attrs().Name)
			}
		}
	}
	return all
}

func programName(tb testing.TB, id ebpf.ProgramID) string {
	tb.Helper()
	prog, err := ebpf.NewProgramFromID(id)
	must(tb, err)
	defer prog.Close() //nolint:errcheck // only read
	info, err := prog.Info()
	must(tb, err)
	return info.Name
}

func wantSame(tb testing.TB, got, want []string) {
	tb.Helper()
	if !slices.Equal(got, want) {
		tb.Errorf("got\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}
