// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"snilb/maps"
)

// What the loader wires up works together: a SYN is answered by the client program,
// and a frame that is written to a TAP queue leaves by the next hop it names.
func TestLoadedProgramsWork(t *testing.T) {
	bothHooks(t, func(t *testing.T, _ string, clsact bool) {
		newNetns(t)
		eth0 := addVeth(t, "eth0", "10.9.0.1/24", "fd00:9::1/64")
		routeVia(t, "192.0.2.0/24", "10.9.0.254")
		routeVia(t, "2001:db8::/64", "fd00:9::fe")
		o := testOptions(t, "eth0")
		o.forceClsact = clsact
		i := loadAttached(t, o)
		must(t, i.SetListeners([]ListenerSpec{{ID: 1, Addr: addrPort("10.9.0.1:443")}}))
		var now unix.Timespec
		must(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &now))
		mss4, mss6 := i.MTU()
		must(t, i.Tables().SetLive(&maps.Live{Beat: uint64(now.Nano()), Mss4: mss4, Mss6: mss6}))

		far := capture(t, "eth0-far")
		us, client := eth0.Attrs().HardwareAddr, net.HardwareAddr{2, 0, 0, 0, 0, 1}
		sendFrame(t, "eth0-far", tcpFrame(us, client, "10.9.0.2", "10.9.0.1", 5555, 443))
		answer := far.wait(t, func(f []byte) bool { return len(f) >= 54 && f[47] == 0x12 }) // SYN, ACK
		if !bytes.Equal(answer[:6], client) || binary.BigEndian.Uint16(answer[34:]) != 443 {
			t.Errorf("SYN-ACK: % x", answer)
		}

		for worker, dst := range []string{"10.9.0.2", "192.0.2.7"} {
			mac := net.HardwareAddr{2, 0, 0, 0, 1, byte(worker)}
			neighbour := map[string]string{"10.9.0.2": "10.9.0.2", "192.0.2.7": "10.9.0.254"}[dst]
			must(t, netlink.NeighSet(&netlink.Neigh{
				LinkIndex: eth0.Attrs().Index, IP: addr(neighbour).AsSlice(), HardwareAddr: mac, State: netlink.NUD_PERMANENT,
			}))
			hop := nextHop(t, i, dst)
			order := net.HardwareAddr{2, 0, 0, maps.TapOutput, byte(hop.Index >> 8), byte(hop.Index)}
			frame := tcpFrame(order, client, "10.9.0.1", dst, 10000, 443)
			_, err := i.TapQueues()[worker].Write(frame)
			must(t, err)
			out := far.wait(t, func(f []byte) bool { return len(f) >= 54 && bytes.Equal(f[:6], mac) })
			if !bytes.Equal(out[6:12], us) || !bytes.Equal(out[14:54], frame[14:54]) {
				t.Errorf("to %s: % x", dst, out)
			}
		}
	})
}

// tcpFrame is a SYN.
func tcpFrame(to, from net.HardwareAddr, src, dst string, sport, dport uint16) []byte {
	f := make([]byte, 14+20+20)
	copy(f, to)
	copy(f[6:], from)
	binary.BigEndian.PutUint16(f[12:], unix.ETH_P_IP)
	ip := f[14:]
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], addr(src).AsSlice())
	copy(ip[16:], addr(dst).AsSlice())
	binary.BigEndian.PutUint16(ip[10:], ^onesSum(ip[:20], 0))
	tcp := ip[20:]
	binary.BigEndian.PutUint16(tcp, sport)
	binary.BigEndian.PutUint16(tcp[2:], dport)
	binary.BigEndian.PutUint32(tcp[4:], 1000)
	tcp[12], tcp[13] = 5<<4, 0x02
	binary.BigEndian.PutUint16(tcp[14:], 64240)
	binary.BigEndian.PutUint16(tcp[16:], ^onesSum(tcp, uint32(onesSum(ip[12:20], unix.IPPROTO_TCP+20))))
	return f
}

// onesSum is the Internet checksum before its complement, of an even number of bytes.
func onesSum(b []byte, sum uint32) uint16 {
	for n := 0; n < len(b); n += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[n:]))
	}
	sum = sum>>16 + sum&0xffff
	return uint16(sum>>16 + sum)
}

// capturing is a socket that sees the frames of one interface.
type capturing int

func capture(t *testing.T, iface string) capturing {
	t.Helper()
	protocol := uint16(unix.ETH_P_ALL)
	protocol = protocol<<8 | protocol>>8
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(protocol))
	must(t, err)
	t.Cleanup(func() { must(t, unix.Close(fd)) })
	must(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: device(t, iface).Attrs().Index}))
	must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}))
	return capturing(fd)
}

func (c capturing) wait(t *testing.T, is func([]byte) bool) []byte {
	t.Helper()
	buffer := make([]byte, 2000)
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); {
		n, from, err := unix.Recvfrom(int(c), buffer, 0)
		if err != nil {
			continue // the timeout: look at the clock
		}
		if l, ok := from.(*unix.SockaddrLinklayer); ok && l.Pkttype != unix.PACKET_OUTGOING && is(buffer[:n]) {
			return buffer[:n]
		}
	}
	t.Fatal("the frame never came")
	return nil
}
