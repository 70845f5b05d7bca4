// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What a program run cannot show: packets in a real device, with a partial checksum,
// in fragments, as super-packets, with the tag beside the frame, and where they
// leave. Both ends of the wire are TAP devices, for they take and give a packet's
// checksum and segmentation state.

// vnetHeader is the kernel's struct virtio_net_hdr.
type vnetHeader struct {
	Flags, GSOType                         uint8
	HdrLen, GSOSize, CsumStart, CsumOffset uint16
}

const vnetHeaderSize = 10

type tap struct {
	fd, index int
	mac       mac
}

// newTap makes a device that is up. raw: it hands out partial checksums and
// super-packets as they are, instead of letting the kernel finish them.
func (r *rig) newTap(name string, raw bool) *tap {
	r.Helper()
	t := new(tap)
	r.ns.try(r, func() (err error) {
		if t.fd, err = openTap(name, raw); err != nil {
			return err
		}
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		t.index, t.mac = l.Attrs().Index, mac(l.Attrs().HardwareAddr)
		return netlink.LinkSetUp(l)
	})
	r.Cleanup(func() { must(r, unix.Close(t.fd)) })
	return t
}

func openTap(name string, raw bool) (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return 0, err
	}
	offload := 0
	if raw {
		offload = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
	}
	return fd, unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offload)
}

// attach puts a program on what the device receives.
func (r *rig) attach(t *tap, program string) {
	r.Helper()
	r.ns.try(r, func() error {
		attrs := netlink.QdiscAttrs{LinkIndex: t.index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}
		if err := netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: attrs}); err != nil {
			return err
		}
		return netlink.FilterAdd(&netlink.BpfFilter{
			FilterAttrs:  netlink.FilterAttrs{LinkIndex: t.index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL},
			Fd:           r.coll.Programs[program].FD(),
			Name:         program,
			DirectAction: true,
		})
	})
}

// send gives the device a frame to receive, and waits until the program has counted
// it for this reason.
func (r *rig) send(t *tap, h vnetHeader, frame []byte, reason Reason) {
	r.Helper()
	before := r.counters()
	b, err := binary.Append(nil, binary.NativeEndian, h)
	must(r, err)
	_, err = unix.Write(t.fd, append(b, frame...))
	must(r, err)
	*r.total++
	expected := before
	expected.Packets[reason]++
	deadline := time.Now().Add(2 * time.Second)
	for r.counters() == before && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	if got := r.counters(); got != expected {
		for i := range got.Packets {
			got.Packets[i] -= before.Packets[i]
		}
		r.Errorf("counted %s, want %s", counted(got), Reasons[reason].Name)
	}
}

var errNothing = errors.New("no TCP frame leaves the device")

// receive takes the next TCP frame that the device sends.
func (t *tap) receive(patience time.Duration) (vnetHeader, []byte, error) {
	var h vnetHeader
	buf := make([]byte, vnetHeaderSize+1<<17)
	deadline := time.Now().Add(patience)
	for {
		n, err := unix.Read(t.fd, buf)
		if errors.Is(err, unix.EAGAIN) {
			if time.Now().After(deadline) {
				return h, nil, errNothing
			}
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			return h, nil, err
		}
		if decoded(buf[vnetHeaderSize:n]).Layer(layers.LayerTypeTCP) == nil {
			continue // the kernel speaks IPv6 on its own
		}
		_, err = binary.Decode(buf, binary.NativeEndian, &h)
		return h, slices.Clone(buf[vnetHeaderSize:n]), err
	}
}

func (r *rig) receive(t *tap) (vnetHeader, []byte) {
	r.Helper()
	h, frame, err := t.receive(2 * time.Second)
	must(r, err)
	return h, frame
}

func (r *rig) receiveNothing(t *tap) {
	r.Helper()
	if _, frame, err := t.receive(20 * time.Millisecond); !errors.Is(err, errNothing) {
		r.Errorf("received %x, %v", frame, err)
	}
}

// partial is the frame as its sender leaves it to the hardware: the checksum field
// holds the pseudo header's sum.
func (s segment) partial() (vnetHeader, []byte) {
	frame := s.frame()
	tcp := frame[s.l4() : len(frame)-len(s.padding)]
	binary.BigEndian.PutUint16(tcp[16:], s.pseudoSum(len(tcp)))
	return vnetHeader{
		Flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, HdrLen: uint16(s.l4() + 20 + len(s.options)),
		CsumStart: uint16(s.l4()), CsumOffset: 16,
	}, frame
}

func (s segment) pseudoSum(length int) uint16 {
	pseudo := slices.Concat(s.src.Addr().AsSlice(), s.dst.Addr().AsSlice())
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(length))
	return uint16(sum16(0, append(pseudo, 0, 0, 0, 6)))
}

// superPacket is a partial frame that is to leave in segments of size bytes.
func (s segment) superPacket(size uint16) (vnetHeader, []byte) {
	h, frame := s.partial()
	h.GSOSize, h.GSOType = size, unix.VIRTIO_NET_HDR_GSO_TCPV6
	if s.src.Addr().Is4() {
		h.GSOType = unix.VIRTIO_NET_HDR_GSO_TCPV4
	}
	return h, frame
}

// segments is what the kernel makes of a super-packet.
func (s segment) segments(size int) []segment {
	var all []segment
	for at := 0; at < len(s.payload); at += size {
		part := s
		part.payload = s.payload[at:min(at+size, len(s.payload))]
		part.seq += uint32(at)
		part.id += uint16(len(all))
		if at+size < len(s.payload) {
			part.flags &^= psh | fin
		}
		if at > 0 {
			part.flags &^= cwr
		}
		all = append(all, part)
	}
	return all
}

// wires are a client's and a backend's device, with the backend in reach.
type wires struct{ client, backend *tap }

func (r *rig) newWires(rawClient, rawBackend bool) wires {
	r.Helper()
	w := wires{r.newTap("eth0", rawClient), r.newTap("eth1", rawBackend)}
	r.attach(w.client, ProgramClient)
	r.attach(w.backend, ProgramBackend)
	must(r, r.tables.Nexthops.Put(uint32(nexthopIndex), &Nexthop{Ifindex: uint32(w.backend.index), Mtu: nexthopMTU}))
	for _, f := range families {
		r.neighbour(w.backend, f.backend.Addr().AsSlice(), backendMAC)
	}
	return w
}

var (
	backendMAC = mac{0x02, 0, 0, 0, 0, 0xbe}
	gatewayMAC = mac{0x02, 0, 0, 0, 0, 0x99}
)

func (r *rig) neighbour(t *tap, addr []byte, hw mac) {
	r.Helper()
	r.ns.try(r, func() error {
		return netlink.NeighSet(&netlink.Neigh{LinkIndex: t.index, IP: addr, HardwareAddr: hw[:], State: netlink.NUD_PERMANENT})
	})
}

// onWire is the rewritten packet as it leaves for the backend.
func (w wires) onWire(s segment, e Entry) segment {
	s = forwarded(s, e)
	s.srcMAC, s.dstMAC = w.backend.mac, backendMAC
	return s
}

// A bound flow's packets in every state a device can hand them over: what leaves is
// right, whether the kernel or the hardware finishes it.
func TestDeviceFlow(t *testing.T) {
	for _, raw := range []bool{false, true} {
		for _, noCsumIPv6 := range []bool{false, true} {
			r := newFlowRig(t, settings{noCsumIPv6: noCsumIPv6})
			w := r.newWires(raw, raw)
			bothFamilies(t, func(t *testing.T, f family) {
				for _, size := range []int{0, 1, 1000, 1400, 1401, 4344, 40000, 60001} {
					for _, options := range [][]byte{nil, timestamps(0), timestamps(3)} {
						t.Run(fmt.Sprintf("raw %v, noCsumIPv6 %v, %d behind %d", raw, noCsumIPv6, size, len(options)), func(t *testing.T) {
							s := f.clientSegment(ack | psh | cwr)
							s.options, s.payload = options, bytes.Repeat([]byte{0xfe, 1, 2, 3, 5}, size/5+1)[:size]
							r.with(t).throughDevice(w, f, s, raw)
						})
					}
				}
			})
		}
	}
}

func (r *rig) throughDevice(w wires, f family, s segment, raw bool) {
	r.Helper()
	const mss = 1000
	e := r.bind(f, LegClient, nil)
	h, frame := s.partial()
	packets := 1
	if len(s.payload) > 1400 {
		h, frame = s.superPacket(mss)
		packets = (len(s.payload) + mss - 1) / mss
	}
	r.send(w.client, h, frame, bpfReasonREASON_FORWARDED)
	r.sameEntry(r.entry(f, LegClient), accounted(e, nil, s, packets))

	if raw || packets == 1 {
		got, out := r.receive(w.backend)
		wantHeader, wantFrame := w.onWire(s, e).partial()
		if !raw {
			wantHeader, wantFrame = vnetHeader{}, w.onWire(s, e).frame()
		}
		sameFrame(r, out, wantFrame)
		if got.Flags != wantHeader.Flags || got.CsumStart != wantHeader.CsumStart || got.CsumOffset != wantHeader.CsumOffset || got.GSOSize != h.GSOSize {
			r.Errorf("header %+v, want %+v", got, wantHeader)
		}
		return
	}
	for _, part := range s.segments(mss) {
		_, out := r.receive(w.backend)
		sameFrame(r, out, w.onWire(part, e).frame())
	}
}

// The way back, from the backend's device to the client's.
func TestDeviceFlowBackend(t *testing.T) {
	r := newFlowRig(t, settings{})
	w := r.newWires(false, false)
	must(t, r.tables.Nexthops.Put(uint32(nexthopIndex), &Nexthop{Ifindex: uint32(w.client.index), Mtu: nexthopMTU}))
	bothFamilies(t, func(t *testing.T, f family) {
		r := r.with(t)
		r.neighbour(w.client, f.client.Addr().AsSlice(), clientMAC)
		e := r.bind(f, LegBackend, nil)
		s := f.backendSegment(ack | psh)
		s.options, s.payload = timestamps(0), bytes.Repeat([]byte("odd"), 5001)
		h, frame := s.superPacket(1300)
		r.send(w.backend, h, frame, bpfReasonREASON_FORWARDED)
		for _, part := range s.segments(1300) {
			want := forwarded(part, e)
			want.srcMAC, want.dstMAC = w.client.mac, clientMAC
			_, out := r.receive(w.client)
			sameFrame(t, out, want.frame())
		}
	})
}

// Packets whose headers lie in fragments, the IP header included.
func TestDeviceFragmentedHeaders(t *testing.T) {
	r := newFlowRig(t, settings{})
	w := r.newWires(false, false)
	must(t, r.tables.Nexthops.Put(uint32(nexthopIndex), &Nexthop{Ifindex: uint32(w.backend.index), Mtu: 9000}))
	bothFamilies(t, func(t *testing.T, f family) {
		for linear := uint16(14); linear < 130; linear += 4 {
			r := r.with(t)
			s := f.clientSegment(ack)
			s.options, s.payload = timestamps(3), bytes.Repeat([]byte("x1"), 4000)
			e := r.bind(f, LegClient, nil)
			r.send(w.client, vnetHeader{HdrLen: linear}, s.frame(), bpfReasonREASON_FORWARDED)
			_, out := r.receive(w.backend)
			sameFrame(t, out, w.onWire(s, e).frame())
			must(t, r.tables.DeleteFlow(LegClient, f.tuple(LegClient)))

			h := r.hello(f)
			h.payload = s.payload
			r.send(w.client, vnetHeader{HdrLen: linear}, h.frame(), bpfReasonREASON_HELLO)
			r.sameEvents(w.client, eventOf(h, EventHello, EventData))
		}
	})
}

func (r *rig) sameEvents(t *tap, want event) {
	r.Helper()
	want.Ifindex = uint32(t.index)
	if got := r.events(0); len(got) != 1 || fmt.Sprint(got[0]) != fmt.Sprint(want) {
		r.Errorf("events are %.300v, want %.300v", got, want)
	}
}

// A merged hello is captured up to EventData bytes of its packet.
func TestDeviceHelloSizes(t *testing.T) {
	r := newFlowRig(t, settings{})
	w := r.newWires(false, false)
	bothFamilies(t, func(t *testing.T, f family) {
		for _, length := range []int{1500, 9000, 16384, EventData - 1, EventData, EventData + 1, 20000, 65535} {
			t.Run(fmt.Sprint(length), func(t *testing.T) {
				r := r.with(t)
				s := r.hello(f)
				s.payload = nil
				s.payload = bytes.Repeat([]byte("hello"), length/5+1)[:length-len(s.packet())]
				r.send(w.client, vnetHeader{}, s.frame(), bpfReasonREASON_HELLO)
				r.sameEvents(w.client, eventOf(s, EventHello, EventData))
			})
		}
	})
}

// A SYN with a partial checksum (a client on this machine or in a virtual one) is
// answered with one: the device or the kernel finishes it.
func TestDeviceSyn(t *testing.T) {
	for _, raw := range []bool{false, true} {
		r := newFlowRig(t, settings{})
		w := r.newWires(raw, raw)
		bothFamilies(t, func(t *testing.T, f family) {
			for _, size := range []int{0, 1, 2, 3, 1000, 1500} {
				for _, tags := range [][]vlan{nil, {{0x8100, 20}}, {{0x88a8, 20}}} {
					t.Run(fmt.Sprintf("raw %v, %d, %v", raw, size, tags), func(t *testing.T) {
						s := f.clientSegment(syn | ece | cwr)
						s.tags, s.options, s.payload = tags, []byte{2, 4, 5, 180, 4, 2, 1, 3}, bytes.Repeat([]byte("%"), size)
						r.with(t).synThroughDevice(w, s, raw)
					})
				}
			}
		})
	}
}

func (r *rig) synThroughDevice(w wires, s segment, raw bool) {
	r.Helper()
	for _, partial := range []bool{false, true} {
		r.setClock()
		h, frame := vnetHeader{}, s.frame()
		a := r.answer(s, 0)
		want := a.frame()
		if partial {
			h, frame = s.partial()
			if raw {
				_, want = a.partial()
			}
		}
		r.send(w.client, h, frame, bpfReasonREASON_SYN_ANSWERED)
		got, out := r.receive(w.client)
		sameFrame(r, out, want)
		if needs := got.Flags&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0; needs != (partial && raw) {
			r.Errorf("checksum is partial: %v", needs)
		}
	}
	r.receiveNothing(w.backend)
}

// A tag that the device has taken off belongs to the link: it does not go on to the
// backend. Two tags are not ours to read.
func TestDeviceVLAN(t *testing.T) {
	r := newFlowRig(t, settings{})
	w := r.newWires(false, false)
	bothFamilies(t, func(t *testing.T, f family) {
		r := r.with(t)
		e := r.bind(f, LegClient, nil)
		for _, tpid := range []uint16{0x8100, 0x88a8} {
			s := f.clientSegment(ack)
			s.tags, s.payload = []vlan{{tpid, 20}}, []byte("data")
			r.send(w.client, vnetHeader{}, s.frame(), bpfReasonREASON_FORWARDED)
			_, out := r.receive(w.backend)
			sameFrame(t, out, w.onWire(s, e).frame())
			for _, flags := range []uint16{ack, syn} {
				s.flags, s.tags = flags, []vlan{{tpid, 20}, {0x8100, 21}}
				r.send(w.client, vnetHeader{}, s.frame(), bpfReasonREASON_VLAN_STACKED)
				s.tags = []vlan{{tpid, 20}, {0x8100, 21}, {0x8100, 22}}
				r.send(w.client, vnetHeader{}, s.frame(), bpfReasonREASON_VLAN_STACKED)
			}
			r.receiveNothing(w.backend)
		}
	})
}

// Frames too short for a program run.
func TestDeviceTruncated(t *testing.T) {
	r := newFlowRig(t, settings{})
	w := r.newWires(false, false)
	bothFamilies(t, func(t *testing.T, f family) {
		r := r.with(t)
		s := f.clientSegment(ack)
		for n := 14; n < s.l4()+20; n++ {
			r.send(w.client, vnetHeader{}, s.frame()[:n], bpfReasonREASON_MALFORMED)
		}
	})
}

// Which neighbour a packet is sent to: the destination on the link, or a gateway,
// of either family.
func TestDeviceNexthop(t *testing.T) {
	r := newFlowRig(t, settings{})
	w := r.newWires(false, false)
	bothFamilies(t, func(t *testing.T, f family) {
		for _, g := range families {
			t.Run("gateway "+g.name, func(t *testing.T) {
				r := r.with(t)
				gateway := g.backend.Addr().Next()
				r.neighbour(w.backend, gateway.AsSlice(), gatewayMAC)
				hop := Nexthop{Ifindex: uint32(w.backend.index), Mtu: nexthopMTU, Family: unix.AF_INET6, Gateway: Words(gateway)}
				if gateway.Is4() {
					hop.Family = unix.AF_INET
				}
				must(t, r.tables.Nexthops.Put(uint32(nexthopIndex), &hop))
				if g.is4() && !f.is4() {
					return // the kernel has no IPv4 gateway for IPv6
				}
				e := r.bind(f, LegClient, nil)
				s := f.clientSegment(ack)
				r.send(w.client, vnetHeader{}, s.frame(), bpfReasonREASON_FORWARDED)
				want := w.onWire(s, e)
				want.dstMAC = gatewayMAC
				_, out := r.receive(w.backend)
				sameFrame(t, out, want.frame())
			})
		}
	})
}

// A frame of the engine's goes out as it was written, but for its link addresses.
func TestDeviceTapOutput(t *testing.T) {
	r := newFlowRig(t, settings{})
	engine := r.newTap("snilb0", false)
	r.attach(engine, ProgramTap)
	w := r.newWires(false, false)
	bothFamilies(t, func(t *testing.T, f family) {
		r := r.with(t)
		s := f.clientSegment(syn)
		s.src, s.dst, s.options = f.source, f.backend, []byte{2, 4, 5, 180}
		r.send(engine, vnetHeader{}, tapFrame(s, TapOutput, nexthopIndex), bpfReasonREASON_ENGINE_OUTPUT)
		s.srcMAC, s.dstMAC = w.backend.mac, backendMAC
		_, out := r.receive(w.backend)
		sameFrame(t, out, s.frame())

		e := r.bind(f, LegClient, nil)
		s = f.clientSegment(ack | psh)
		s.payload = []byte("hello")
		r.send(engine, vnetHeader{}, tapFrame(s, TapReplayClient, 0), bpfReasonREASON_FORWARDED)
		_, out = r.receive(w.backend)
		sameFrame(t, out, w.onWire(s, e).frame())
	})
}
