// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"snilb/maps"
	"snilb/userspace/config"
	"snilb/userspace/packet"
	"snilb/userspace/pool"
	"snilb/userspace/ringbuf"
	"snilb/userspace/ringbuf/ringbuftest"
)

// TestEndsAreHeardFirst has the RST of a connection wait in the quiet ring when the hello of a new one from the same port
// is dealt with: it is the old one's.
func TestEndsAreHeardFirst(t *testing.T) {
	d := newDesk(t, "")
	p := ringbuftest.New(t, 0)
	quiet, err := ringbuf.NewReader(p.Ring)
	if err != nil {
		t.Fatal(err)
	}
	d.quiet = quiet
	defer func() {
		if err := quiet.Close(); err != nil {
			t.Error(err)
		}
	}()
	c := newClient(1)
	vip := netip.MustParseAddrPort("203.0.113.1:443")
	v := way{backend: &pool.Backend{Addr: netip.MustParseAddrPort("192.0.2.11:443")}, timeouts: &config.Timeouts{Closing: time.Minute}}
	old := d.flows.add(connection{c.addr, vip}, c.addr, v, "a.example.com", c.addr)
	old.cookie = 1
	rst := packet.Segment{Src: c.addr, Dst: vip, Seq: 5, Flags: packet.RST}
	frame := rst.Append(nil)
	var header bytes.Buffer
	err = binary.Write(&header, binary.NativeEndian, maps.EventHeader{
		Time: uint64(d.e.clock.now()), Kind: uint8(maps.EventClosing), Leg: uint8(maps.LegClient),
		Length: uint32(len(frame)), Captured: uint16(len(frame)),
	})
	if err != nil || !p.Put(append(header.Bytes(), frame...)) {
		t.Fatal("the RST is not in the ring", err)
	}
	d.sends(c, 1, []byte{22, 3, 1}, packet.PSH)
	if !old.closing.reset {
		t.Errorf("the old connection's RST was not heard before the new one: %+v", old.closing)
	}
}
