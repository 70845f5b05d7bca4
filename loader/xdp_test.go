// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"snilb/maps"
)

// eachXDP runs a test in both modes of XDP.
func eachXDP(t *testing.T, test func(t *testing.T, mode Mode)) {
	for _, mode := range []Mode{ModeXDP, ModeXDPGeneric} {
		t.Run(string(mode), func(t *testing.T) { test(t, mode) })
	}
}

// setGRO turns GRO on or off, like ethtool -K.
func setGRO(t *testing.T, iface string, on bool) {
	t.Helper()
	value := uint32(0)
	if on {
		value = 1
	}
	_, err := ethtool(iface, unix.ETHTOOL_SGRO, value)
	must(t, err)
}

// addXDPVeth is addVeth for an interface that XDP in the driver can send by.
func addXDPVeth(t *testing.T, name string, prefixes ...string) netlink.Link {
	t.Helper()
	d := addVeth(t, name, prefixes...)
	setGRO(t, name+"-far", true)
	return d
}

func passXDP(t *testing.T) *ebpf.Program {
	t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "bystander",
		Type:         ebpf.XDP,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
		License:      "GPL",
	})
	must(t, err)
	t.Cleanup(func() { must(t, prog.Close()) })
	return prog
}

func attachedMode(t *testing.T, d netlink.Link) uint32 {
	t.Helper()
	return device(t, d.Attrs().Name).Attrs().Xdp.AttachMode
}

func statusOf(i *Instance) []string {
	var all []string
	for _, s := range i.Interfaces() {
		if s.Role != RoleTap {
			all = append(all, strings.Join([]string{s.Name, string(s.Role), string(s.Mode), s.Hook}, " "))
		}
	}
	return all
}

// Each interface gets the mode it was named with, or the common one; TC stays complete
// behind, and nothing is left.
func TestXDPAttachesAndDetaches(t *testing.T) {
	ns := newNetns(t)
	eth0 := addXDPVeth(t, "eth0", "10.9.0.1/24")
	eth1 := addXDPVeth(t, "eth1", "10.8.0.1/24")
	addXDPVeth(t, "eth2", "10.7.0.1/24")
	eth3 := addXDPVeth(t, "eth3", "10.6.0.1/24")
	before := snapshot(t, ns)

	o := testOptions(t)
	o.Interfaces = []Interface{{"eth0", ModeXDP}, {"eth1", ""}, {"eth2", ModeTC}}
	o.Mode = ModeXDPGeneric
	i := load(t, o)
	_, err := i.AddBackend(addrPort("10.6.0.2:443"))
	must(t, err)
	_, err = i.AddBackend(addrPort("10.9.0.2:443")) // by an interface that faces clients too
	must(t, err)
	wantSame(t, statusOf(i), []string{"eth0 backend tc tcx", "eth3 xdp xdp-generic xdp", "eth3 backend tc tcx"})
	must(t, i.Attach())
	wantSame(t, statusOf(i), []string{
		"eth0 xdp xdp xdp", "eth0 client tc tcx", "eth0 backend tc tcx",
		"eth1 xdp xdp-generic xdp", "eth1 client tc tcx", "eth1 backend tc tcx",
		"eth2 client tc tcx", "eth2 backend tc tcx",
		"eth3 xdp xdp-generic xdp", "eth3 backend tc tcx",
	})
	for d, want := range map[netlink.Link]uint32{eth0: 1, eth1: 2, eth3: 2} {
		if got := attachedMode(t, d); got != want {
			t.Errorf("%s: attached in mode %d, want %d", d.Attrs().Name, got, want)
		}
	}
	slots := make(map[uint32]bool)
	for _, s := range i.Interfaces() {
		if slots[s.Slot] {
			t.Errorf("slot %d is used twice", s.Slot)
		}
		slots[s.Slot] = true
	}
	pinned, err := link.LoadPinnedLink(linkPin(i.Directory(), "eth0", RoleXDP), nil)
	must(t, err)
	must(t, pinned.Close())
	must(t, i.Close())
	wantSame(t, snapshot(t, ns), before)
}

// What XDP passes on TC sees as it came in, and each program counts it for itself.
func TestXDPPasses(t *testing.T) {
	eachXDP(t, func(t *testing.T, mode Mode) {
		newNetns(t)
		eth0 := addXDPVeth(t, "eth0", "10.9.0.1/24")
		o := testOptions(t, "eth0")
		o.Mode = mode
		i := loadAttached(t, o)
		before := packets(t, i)
		notTCP := reason(t, i, RoleClient, "not_tcp")
		const sent = 50 // more than the stack's own
		for range sent {
			sendFrame(t, "eth0-far", udpFrame(eth0.Attrs().HardwareAddr))
		}
		eventually(t, "counted by XDP", func() bool { return packets(t, i)[RoleXDP] >= before[RoleXDP]+sent })
		eventually(t, "read by TC", func() bool { return reason(t, i, RoleClient, "not_tcp") >= notTCP+sent })
	})
}

// reason is how many packets the programs of a role counted under that name.
func reason(t *testing.T, i *Instance, role Role, name string) (n uint64) {
	t.Helper()
	for _, s := range i.Interfaces() {
		if s.Role != role {
			continue
		}
		set, err := i.Tables().Packets(s.Slot)
		must(t, err)
		for r, count := range set.Packets {
			if r < len(maps.Reasons) && maps.Reasons[r].Name == name { // a set has room for more
				n += count
			}
		}
	}
	return n
}

// Of one interface the program is told that clients come in by it, of the other one not.
func TestXDPConstants(t *testing.T) {
	newNetns(t)
	addXDPVeth(t, "eth0", "10.9.0.1/24")
	i := load(t, testOptions(t, "eth0"))
	for _, faces := range []bool{false, true} {
		spec, err := i.spec(place{role: RoleXDP, slot: 7, facesClients: faces, redirectBack: faces})
		must(t, err)
		var got, back bool
		var slot uint32
		must(t, spec.Variables[maps.VarFacesClients].Get(&got))
		must(t, spec.Variables[maps.VarRedirectBack].Get(&back))
		must(t, spec.Variables[maps.VarCounterSlot].Get(&slot))
		if got != faces || back != faces || slot != 7 {
			t.Errorf("faces clients %v in slot %d, want %v in 7", got, slot, faces)
		}
	}
}

// Every step of both modes is made to fail in turn.
func TestXDPFailureRollsBack(t *testing.T) {
	o := testOptions(t)
	o.Interfaces = []Interface{{"eth0", ModeXDP}, {"eth1", ModeXDPGeneric}}
	failEachStep(t, o, 5+3*(1+2*3))
}

// recordedHook notes when it is taken off.
type recordedHook struct {
	hook
	detached func()
}

func (h *recordedHook) detach() error {
	h.detached()
	return h.hook.detach()
}

// XDP comes when all behind it stands, and goes before any of that does.
func TestXDPOrder(t *testing.T) {
	newNetns(t)
	addXDPVeth(t, "eth0", "10.9.0.1/24")
	addXDPVeth(t, "eth1", "10.8.0.1/24")
	var steps, detached []string
	o := testOptions(t, "eth0")
	o.Mode = ModeXDP
	o.before = func(step string) error { steps = append(steps, step); return nil }
	i := loadAttached(t, o)
	_, err := i.AddBackend(addrPort("10.8.0.2:443"))
	must(t, err)
	for _, c := range [][2]string{
		{"pin backend eth0", "hook xdp eth0"}, {"pin client eth0", "hook xdp eth0"}, {"pin backend eth1", "hook xdp eth1"},
	} {
		before, after := slices.Index(steps, c[0]), slices.Index(steps, c[1])
		if before < 0 || after < before {
			t.Errorf("%q is not before %q in %q", c[0], c[1], steps)
		}
	}
	for key, a := range i.attached {
		a.hook = &recordedHook{a.hook, func() { detached = append(detached, string(key.role)) }}
	}
	must(t, i.Close())
	wantSame(t, detached, []string{"xdp", "xdp", "client", "backend", "backend", "tap"})
}

// A dead daemon's XDP is found and removed, by the next one and by detach.
func TestXDPLeftoversAreRemoved(t *testing.T) {
	eachXDP(t, func(t *testing.T, mode Mode) {
		ns := newNetns(t)
		d := addXDPVeth(t, "eth0", "10.9.0.1/24")
		before := snapshot(t, ns)
		o := testOptions(t, "eth0")
		o.Mode = mode
		attachAndDie(t, o, d, 3)
		i, err := Load(o)
		must(t, err)
		must(t, i.Attach())
		must(t, i.Close())
		wantSame(t, snapshot(t, ns), before)
		attachAndDie(t, o, d, 3)
		must(t, Detach("test", o.Logger))
		wantSame(t, snapshot(t, ns), before)
	})
}

func TestXDPInterfaceComesBack(t *testing.T) {
	eachXDP(t, func(t *testing.T, mode Mode) {
		newNetns(t)
		addXDPVeth(t, "eth0", "10.9.0.1/24")
		o := testOptions(t, "eth0")
		o.Mode = mode
		i := loadAttached(t, o)
		slots := slotsOf(i)
		run(t, i)
		must(t, netlink.LinkDel(device(t, "eth0")))
		eventually(t, "forgotten", func() bool { return len(i.Interfaces()) == 1 })
		d := addXDPVeth(t, "eth0", "10.9.0.1/24")
		eventually(t, "attached again", func() bool { return len(programsOn(t, d)) == 3 })
		wantSame(t, programsOn(t, d), []string{"program snilb_client on eth0", "program snilb_backend on eth0", "XDP snilb_xdp on eth0"})
		if got := slotsOf(i); len(got) != len(slots) {
			t.Errorf("slots were %v and are %v", slots, got)
		}
	})
}

func wantProblem(t *testing.T, err error, what, remedy string) {
	t.Helper()
	var p Problem
	if !errors.As(err, &p) || !strings.Contains(p.What, what) || !strings.Contains(p.Remedy, remedy) {
		t.Errorf("got %v\nwant a problem like %q with a remedy like %q", err, what, remedy)
	}
}

func TestXDPSlotTaken(t *testing.T) {
	for _, theirs := range []link.XDPAttachFlags{link.XDPDriverMode, link.XDPGenericMode} {
		eachXDP(t, func(t *testing.T, mode Mode) {
			newNetns(t)
			d := addXDPVeth(t, "eth0", "10.9.0.1/24")
			prog := passXDP(t)
			take := func() link.Link {
				l, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: d.Attrs().Index, Flags: theirs})
				must(t, err)
				return l
			}
			o := testOptions(t, "eth0")
			o.Mode = mode
			first := take()
			_, err := Load(o)
			wantProblem(t, err, "XDP on interface eth0 is taken by program bystander (id ", "ip link set dev eth0 xdp off")
			must(t, first.Detach())
			must(t, first.Close())

			t.Log("taken at the last moment")
			o.before = func(step string) error {
				if step == "hook xdp eth0" {
					l := take()
					t.Cleanup(func() { must(t, l.Close()) })
				}
				return nil
			}
			i := load(t, o)
			wantProblem(t, i.Attach(), "XDP on interface eth0 is taken by program bystander (id ", "ip link set dev eth0 xdp off")
			wantSame(t, programsOn(t, d), []string{"XDP bystander on eth0"})
		})
	}
}

// The slot that another instance took towards its backends.
func TestXDPSlotTakenByInstance(t *testing.T) {
	ns := newNetns(t)
	addXDPVeth(t, "eth0", "10.9.0.1/24")
	addXDPVeth(t, "eth1", "10.8.0.1/24")
	other := testOptions(t, "eth1")
	other.Name, other.Mode = "other", ModeXDP
	i := loadAttached(t, other)
	_, err := i.AddBackend(addrPort("10.9.0.2:443"))
	must(t, err)
	o := testOptions(t, "eth0")
	o.Mode = ModeXDP
	before := snapshot(t, ns)
	_, err = Load(o)
	wantProblem(t, err, "XDP on interface eth0 is taken by snilb instance other", "snilb detach --all --name other")
	wantSame(t, snapshot(t, ns), before)
}

// What XDP sends by a veth is lost in silence unless its peer takes it.
func TestXDPVethPeer(t *testing.T) {
	newNetns(t)
	eth0 := addVeth(t, "eth0", "10.9.0.1/24")
	addXDPVeth(t, "eth1", "10.8.0.1/24")
	setGRO(t, "eth0-far", false)
	const what, remedy = "the other end of veth eth0 cannot receive what XDP sends", "on its peer: ethtool -K eth0-far gro on"
	o := testOptions(t, "eth0")
	o.Mode = ModeXDP
	_, err := Load(o)
	wantProblem(t, err, what, remedy)

	t.Log("towards backends")
	i := load(t, Options{Name: "test", Interfaces: named("eth1"), Mode: ModeXDP, Workers: 1, Logger: o.Logger})
	must(t, i.Attach())
	_, err = i.AddBackend(addrPort("10.9.0.2:443"))
	wantProblem(t, err, what, remedy)
	must(t, i.Close())

	t.Log("generic XDP sends as the stack does")
	o.Mode = ModeXDPGeneric
	i = loadAttached(t, o)
	must(t, i.Close())

	o.Mode = ModeXDP
	setGRO(t, "eth0-far", true)
	loadAttached(t, o)
	wantSame(t, programsOn(t, eth0), []string{"program snilb_client on eth0", "program snilb_backend on eth0", "XDP snilb_xdp on eth0"})
}

// A driver's own words are in the error.
func TestXDPDriverRefuses(t *testing.T) {
	newNetns(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.NumRxQueues, attrs.NumTxQueues = "eth0", 1, 1
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0-far", PeerNumTxQueues: 2, PeerNumRxQueues: 2}))
	setUp(t, "eth0-far")
	setUp(t, "eth0")
	o := testOptions(t, "eth0")
	o.Mode = ModeXDP
	i := load(t, o)
	err := i.Attach()
	wantProblem(t, err, "interface eth0 refuses mode xdp: ", "ethtool -L eth0")
	wantProblem(t, err, "rx queues", "use xdp-generic or tc")
	if got := programsOn(t, device(t, "eth0")); len(got) != 0 {
		t.Errorf("left after the refusal: %q", got)
	}
}

// A device without XDP of its own: the TAP driver has it, a bridge has not.
func TestXDPWithoutDriver(t *testing.T) {
	newNetns(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "br0"
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		missing(t, "bridges: "+err.Error())
	}
	setUp(t, "br0")
	o := testOptions(t, "br0")
	o.Mode = ModeXDP
	_, err := Load(o)
	wantProblem(t, err, "the driver of interface br0 has no XDP of its own", "use xdp-generic or tc")
	o.Mode = ModeXDPGeneric
	loadAttached(t, o)
}

// A kernel that does not tell what drivers can do: said once, and only what needs no
// other interface is sent by XDP; on a veth not even that is known to arrive.
func TestXDPOldKernel(t *testing.T) {
	newNetns(t)
	eth0 := addVeth(t, "eth0", "10.9.0.1/24")
	setNeighbour(t, "eth0", "10.9.0.2", testMAC(2), netlink.NUD_PERMANENT)
	var said bytes.Buffer
	o := testOptions(t, "eth0")
	o.Mode, o.hideDrivers = ModeXDP, true
	o.Logger = slog.New(slog.NewTextHandler(&said, nil))
	i := loadAttached(t, o)
	if got := entry(t, i, nextHop(t, i, "10.9.0.2").Index); got.XdpIfindex != 0 {
		t.Errorf("sent by XDP: %+v", got)
	}
	if n := strings.Count(said.String(), "does not tell by which interfaces XDP can send"); n != 1 {
		t.Errorf("said %d times: %s", n, said.String())
	}
	if got := programsOn(t, eth0); len(got) != 3 {
		t.Errorf("attached: %q", got)
	}
}

func TestSoleXDP(t *testing.T) {
	for _, c := range []struct {
		common     Mode
		interfaces []Interface
		want       string
	}{
		{ModeTC, []Interface{{"eth0", ModeXDP}, {"eth1", ""}}, "eth0"},
		{ModeTC, []Interface{{"eth0", ModeXDP}, {"eth1", ModeXDPGeneric}}, ""},
		{ModeXDP, []Interface{{"eth0", ""}}, ""}, // backends may turn out to be by another one
		{ModeTC, []Interface{{"eth0", ""}}, ""},
	} {
		o := Options{Interfaces: c.interfaces, Mode: c.common}.withDefaults()
		if got := o.soleXDP(); got != c.want {
			t.Errorf("%v and %s: %q, want %q", c.interfaces, c.common, got, c.want)
		}
	}
}

func TestRemedyFor(t *testing.T) {
	for said, want := range map[string]string{
		"operation not supported: Can't set XDP while LRO is on, disable LRO first": "ethtool -K eth0 lro off; or use xdp-generic or tc",
		"invalid argument: MTU too large for linear XDP buffers":                    "mtu 1500",
		"operation not supported: Underlying driver does not support XDP":           "use xdp-generic or tc for it",
		"cannot allocate memory: not enough free queues":                            "ethtool -L eth0",
		"operation not supported: disable GRO_HW/CSUM first":                        "rx-gro-hw off",
	} {
		if got := remedyFor("eth0", ModeXDP, errors.New(said)); !strings.Contains(got, want) {
			t.Errorf("%s: %s", said, got)
		}
	}
	if got := remedyFor("eth0", ModeXDPGeneric, unix.EINVAL); got != "use tc for it" {
		t.Errorf("generic: %s", got)
	}
}

// A device that takes tags off is refused where there are VLANs on it.
func TestHidesTags(t *testing.T) {
	nic := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "eth0", Index: 5}}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", Index: 5}}
	vlanOn := func(parent int) netlink.Link {
		return &netlink.Vlan{LinkAttrs: netlink.LinkAttrs{Name: "vlan", Index: 6, ParentIndex: parent}}
	}
	for name, c := range map[string]struct {
		device netlink.Link
		links  []netlink.Link
		flags  uint32
		want   bool
	}{
		"a VLAN":            {nic, []netlink.Link{nic, vlanOn(5)}, ethFlagRXVLAN, true},
		"tags stay":         {nic, []netlink.Link{nic, vlanOn(5)}, ethFlagLRO, false},
		"no VLAN":           {nic, []netlink.Link{nic}, ethFlagRXVLAN, false},
		"another's VLAN":    {nic, []netlink.Link{nic, vlanOn(4)}, ethFlagRXVLAN, false},
		"no VLAN, but veth": {nic, []netlink.Link{&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Index: 7, ParentIndex: 5}}}, ethFlagRXVLAN, false},
		"a veth":            {veth, []netlink.Link{veth, vlanOn(5)}, ethFlagRXVLAN, false},
	} {
		if got := hidesTags(c.device, c.links, c.flags); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
