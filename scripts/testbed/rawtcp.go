// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Raw is one TCP connection spoken by hand from the client namespace, over a packet socket and from an address that no
// kernel owns, so that no TCP stack meddles. It sends any [Segment] and sees every segment that comes back.
//
// After [Raw.Open] it can be used as a net.Conn too, in order and without retransmission: enough for crypto/tls on a
// network that loses nothing. The two ways may be mixed, as both keep to the sequence numbers below. It is not for
// use from several goroutines at once.
type Raw struct {
	Local, Remote netip.AddrPort

	ISS    uint32 // our initial sequence number
	IRS    uint32 // the peer's, known after Open
	SndNxt uint32 // what Write sends next
	RcvNxt uint32 // what is acknowledged next
	Window uint16 // what every segment made here announces

	// MSS is the most payload that Write puts into a segment.
	MSS int
	// TSVal is our timestamp clock, TSEcr the peer's last value; sent only when both SYNs had the option.
	TSVal, TSEcr uint32
	timestamps   bool

	// Shape may reorder, repeat or leave out the segments of one Write. Optional.
	Shape func([]Segment) []Segment

	file     *os.File
	conn     rawConn
	to       unix.SockaddrLinklayer
	buf      []byte
	ready    []byte            // received in order and not yet read
	early    map[uint32][]byte // received ahead of RcvNxt, by sequence number
	finished bool              // the peer's FIN was reached
	deadline time.Time
	laddr    *net.TCPAddr
	raddr    *net.TCPAddr
}

// rawConn is what is used of a syscall.RawConn.
type rawConn interface {
	Read(func(fd uintptr) bool) error
	Write(func(fd uintptr) bool) error
}

// ErrReset is what Read returns when the peer has sent RST.
var ErrReset = errors.New("raw: connection reset by peer")

// rawHosts counts the addresses that Bed.Raw has given out in this process.
var rawHosts atomic.Uint32

// Raw prepares a raw connection to remote, from an address and port of its own. The caller closes it.
func (b *Bed) Raw(remote netip.AddrPort) (*Raw, error) {
	n := int(rawHosts.Add(1))
	network, base := clientNet4, 60 // .60 to .99: between the clients and the backends of OneArmed
	if remote.Addr().Is6() {
		network, base = clientNet6, 0x8000
	}
	local := netip.AddrPortFrom(nth(network, base+n%40), uint16(10000+n%50000))
	return b.RawFrom(local, remote)
}

// RawFrom is [Bed.Raw] with a local address of the caller's choice. It must be in the first client network and nobody's.
func (b *Bed) RawFrom(local, remote netip.AddrPort) (*Raw, error) {
	if err := b.Neighbour(local.Addr()); err != nil {
		return nil, err
	}
	mac, err := b.LB.mac("eth0")
	if err != nil {
		return nil, err
	}
	index, err := b.Client.Index("eth0")
	if err != nil {
		return nil, err
	}
	r := &Raw{
		Local: local, Remote: remote, ISS: rand.Uint32(), Window: 64240, MSS: 1400, TSVal: rand.Uint32() >> 1,
		buf: make([]byte, 1<<17), early: map[uint32][]byte{},
		laddr: net.TCPAddrFromAddrPort(local), raddr: net.TCPAddrFromAddrPort(remote),
	}
	r.SndNxt = r.ISS
	proto := uint16(unix.ETH_P_IP)
	if local.Addr().Is6() {
		proto = unix.ETH_P_IPV6
	}
	r.to = unix.SockaddrLinklayer{Protocol: swap(proto), Ifindex: index, Halen: uint8(len(mac))}
	copy(r.to.Addr[:], mac)
	if err := b.Client.Do(r.socket); err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	return r, nil
}

// socket opens the packet socket: cooked, so that the kernel writes the Ethernet header, and only for what comes in.
func (r *Raw) socket() error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(r.to.Protocol))
	if err != nil {
		return err
	}
	bind := unix.SockaddrLinklayer{Protocol: r.to.Protocol, Ifindex: r.to.Ifindex}
	err = errors.Join(unix.Bind(fd, &bind),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20))
	if err != nil {
		_ = unix.Close(fd)
		return err
	}
	r.file = os.NewFile(uintptr(fd), "raw tcp")
	r.conn, err = r.file.SyscallConn()
	return err
}

// Close closes the socket. Nothing is sent: the peer is left as if the cable had been cut.
func (r *Raw) Close() error { return r.file.Close() }

// Send sends segments as they are, save that zero addresses are filled in.
func (r *Raw) Send(segments ...Segment) error {
	for _, s := range segments {
		if !s.Src.IsValid() {
			s.Src = r.Local
		}
		if !s.Dst.IsValid() {
			s.Dst = r.Remote
		}
		if err := r.SendPacket(s.Marshal()); err != nil {
			return err
		}
	}
	return nil
}

// SendPacket sends any IP packet of this connection's family.
func (r *Raw) SendPacket(packet []byte) error {
	var sendErr error
	err := r.conn.Write(func(fd uintptr) bool {
		sendErr = unix.Sendto(int(fd), packet, 0, &r.to)
		return !errors.Is(sendErr, unix.EAGAIN)
	})
	return errors.Join(err, sendErr)
}

// Recv returns the next segment of this connection, or os.ErrDeadlineExceeded when none comes in time. It only looks: the
// sequence numbers of r stay.
func (r *Raw) Recv(wait time.Duration) (Segment, error) { return r.recvUntil(time.Now().Add(wait)) }

func (r *Raw) recvUntil(deadline time.Time) (Segment, error) {
	if err := r.file.SetReadDeadline(deadline); err != nil {
		return Segment{}, err
	}
	for {
		packet, partial, err := r.packet()
		if err != nil {
			return Segment{}, err
		}
		s, err := ParseSegment(packet)
		if err != nil || s.Src != r.Remote || s.Dst != r.Local {
			continue
		}
		s.Partial = partial
		s.BadChecksum = s.BadChecksum && !partial
		s.Options, s.Payload = append([]byte(nil), s.Options...), append([]byte(nil), s.Payload...)
		return s, nil
	}
}

// packet reads one packet, and whether its checksum is only partial (a local sender's, on a veth).
func (r *Raw) packet() (packet []byte, partial bool, err error) {
	var n, oobn int
	var oob [128]byte
	var recvErr error
	err = r.conn.Read(func(fd uintptr) bool {
		n, oobn, _, _, recvErr = unix.Recvmsg(int(fd), r.buf, oob[:], 0)
		return !errors.Is(recvErr, unix.EAGAIN)
	})
	if err := errors.Join(err, recvErr); err != nil {
		return nil, false, err
	}
	return r.buf[:n], csumNotReady(oob[:oobn]), nil
}

// csumNotReady reads the status word that leads struct tpacket_auxdata.
func csumNotReady(oob []byte) bool {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return false
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA && len(m.Data) >= 4 {
			return binary.NativeEndian.Uint32(m.Data)&unix.TP_STATUS_CSUMNOTREADY != 0
		}
	}
	return false
}

// Open sends a SYN with the given options and waits for the SYN-ACK, which it returns. No ACK is sent: the first segment
// of data carries it.
func (r *Raw) Open(options []byte, wait time.Duration) (Segment, error) {
	syn := Segment{Seq: r.ISS, Flags: SYN, Window: r.Window, Options: options}
	if err := r.Send(syn); err != nil {
		return Segment{}, err
	}
	deadline := time.Now().Add(wait)
	for {
		s, err := r.recvUntil(deadline)
		if err != nil {
			return s, fmt.Errorf("wait for the SYN-ACK: %w", err)
		}
		if s.Has(RST) {
			return s, ErrReset
		}
		if !s.Has(SYN|ACK) || s.Ack != r.ISS+1 {
			continue
		}
		r.IRS, r.RcvNxt, r.SndNxt = s.Seq, s.Seq+1, r.ISS+1
		_, ours := syn.Option(OptTimestamps)
		if ts, theirs := s.Option(OptTimestamps); ours && theirs && len(ts) == 8 {
			r.timestamps, r.TSEcr = true, binary.BigEndian.Uint32(ts)
		}
		return s, nil
	}
}

// At is a segment of payload that stands at offset in our stream of bytes. It acknowledges what was received so far.
func (r *Raw) At(offset int, payload []byte) Segment {
	s := r.segment(ACK | PSH)
	s.Seq, s.Payload = r.ISS+1+uint32(offset), payload
	return s
}

// Bare is a segment without payload at SndNxt: an ACK, FIN or RST with the right numbers.
func (r *Raw) Bare(flags uint16) Segment { return r.segment(flags | ACK) }

func (r *Raw) segment(flags uint16) Segment {
	s := Segment{Src: r.Local, Dst: r.Remote, Seq: r.SndNxt, Ack: r.RcvNxt, Flags: flags, Window: r.Window}
	if r.timestamps {
		r.TSVal++
		s.Options = append([]byte{optNOP, optNOP}, Timestamps(r.TSVal, r.TSEcr)...)
	}
	return s
}

// Write sends p in segments of at most MSS bytes, through Shape.
func (r *Raw) Write(p []byte) (int, error) {
	base := int(r.SndNxt - r.ISS - 1)
	var segments []Segment
	for off := 0; off < len(p); off += r.MSS {
		segments = append(segments, r.At(base+off, p[off:min(off+r.MSS, len(p))]))
	}
	r.SndNxt += uint32(len(p))
	if r.Shape != nil {
		segments = r.Shape(segments)
	}
	if err := r.Send(segments...); err != nil {
		return 0, err
	}
	return len(p), nil
}

// CloseWrite sends a FIN.
func (r *Raw) CloseWrite() error {
	err := r.Send(r.Bare(FIN))
	r.SndNxt++
	return err
}

// Read returns bytes in order and acknowledges them. io.EOF is the peer's FIN, ErrReset its RST.
func (r *Raw) Read(p []byte) (int, error) {
	for len(r.ready) == 0 {
		if r.finished {
			return 0, io.EOF
		}
		s, err := r.recvUntil(r.deadline)
		if err != nil {
			return 0, err
		}
		if s.Has(RST) {
			return 0, ErrReset
		}
		if s.Len() == 0 {
			continue
		}
		r.take(s)
		if err := r.Send(r.Bare(0)); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.ready)
	r.ready = r.ready[n:]
	return n, nil
}

// take files a segment's bytes. A FIN is remembered as an empty entry behind the last byte.
func (r *Raw) take(s Segment) {
	if ts, ok := s.Option(OptTimestamps); ok && len(ts) == 8 {
		r.TSEcr = binary.BigEndian.Uint32(ts)
	}
	payload, seq := s.Payload, s.Seq
	if old := int32(r.RcvNxt - seq); old > 0 { // a retransmission may begin before what we know
		cut := min(int(old), len(payload))
		payload, seq = payload[cut:], seq+uint32(cut)
	}
	if len(payload) > 0 && len(payload) > len(r.early[seq]) {
		r.early[seq] = payload
	}
	for next, ok := r.early[r.RcvNxt]; ok; next, ok = r.early[r.RcvNxt] {
		delete(r.early, r.RcvNxt)
		r.ready = append(r.ready, next...)
		r.RcvNxt += uint32(len(next))
	}
	if s.Has(FIN) && s.Seq+uint32(len(s.Payload)) == r.RcvNxt && !r.finished {
		r.finished = true
		r.RcvNxt++
	}
}

// LocalAddr is part of net.Conn.
func (r *Raw) LocalAddr() net.Addr { return r.laddr }

// RemoteAddr is part of net.Conn.
func (r *Raw) RemoteAddr() net.Addr { return r.raddr }

// SetDeadline is part of net.Conn; writes never wait.
func (r *Raw) SetDeadline(t time.Time) error { r.deadline = t; return nil }

// SetReadDeadline is part of net.Conn.
func (r *Raw) SetReadDeadline(t time.Time) error { return r.SetDeadline(t) }

// SetWriteDeadline is part of net.Conn and does nothing.
func (r *Raw) SetWriteDeadline(time.Time) error { return nil }

// Quiet waits, and returns an error when a segment arrives: it proves that a packet was dropped.
func (r *Raw) Quiet(wait time.Duration) error {
	s, err := r.Recv(wait)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("expected silence, got %s", s)
}

// swap is htons.
func swap(v uint16) uint16 { return v<<8 | v>>8 }

var _ net.Conn = (*Raw)(nil)
