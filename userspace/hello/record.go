// SPDX-License-Identifier: Apache-2.0

package hello

import "encoding/binary"

const (
	recordHandshake = 22 // ContentType, RFC 8446, section 5.1
	recordHeader    = 5  // type, version, length
	maxRecord       = 16 << 10

	typeClientHello = 1 // HandshakeType, RFC 8446, section 4
	messageHeader   = 4 // type, 24 bit length
)

// span says where a handshake message lies in a stream of records.
type span struct {
	message int // bytes of the message, with its header
	size    int // bytes of stream up to the end of the last record
}

// measure finds the extent of the message at the start of stream. It looks at
// lengths and types alone and copies nothing, so that asking again after every
// segment of a hello that arrives in crumbs is cheap: a few nanoseconds for
// each record so far. stream has passed LooksLike.
func measure(stream []byte) (span, error) {
	var (
		head [messageHeader]byte
		have int // message bytes in the records walked so far
		pos  int
	)
	for {
		n, err := recordLength(stream[pos:])
		if err != nil {
			return span{}, err
		}
		body := stream[pos+recordHeader:]
		body = body[:min(n, len(body))]
		if have < messageHeader {
			copy(head[have:], body)
		}
		have, pos = have+n, pos+recordHeader+n
		if pos > MaxSize {
			return span{}, &Error{Kind: ErrTooLong, Reason: "its records take up over 24 KiB"}
		}
		if have < messageHeader && pos <= len(stream) {
			continue
		}
		if have-n+len(body) < messageHeader {
			return span{}, ErrNeedMore
		}
		message := messageHeader + int(binary.BigEndian.Uint32(head[:])&0xffffff)
		switch {
		case message > MaxMessage:
			return span{}, &Error{Kind: ErrTooLong, Reason: "the message is over 16 KiB"}
		case have > message:
			// RFC 8446, section 5.1: a hello that may be followed by other
			// keys ends with its record, and before the server has answered
			// no other message can follow.
			return span{}, malformed("its last record holds more than the hello")
		case pos > len(stream):
			return span{}, ErrNeedMore
		case have == message:
			return span{message: message, size: pos}, nil
		}
	}
}

// recordLength checks one record header and returns the length of what follows
// it. Bytes are judged as soon as they are there. Returns ErrNeedMore when the
// header is cut.
func recordLength(b []byte) (int, error) {
	if len(b) > 0 && b[0] != recordHandshake {
		return 0, malformed("another record type inside the hello")
	}
	if len(b) > 1 && b[1] != 3 {
		return 0, malformed("record version is not 3.x")
	}
	if len(b) < recordHeader {
		return 0, ErrNeedMore
	}
	n := int(binary.BigEndian.Uint16(b[3:]))
	if n == 0 {
		// RFC 8446, section 5.1: no zero-length fragments of handshake types.
		return 0, malformed("zero-length record")
	}
	if n > maxRecord {
		return 0, malformed("record over 16 KiB")
	}
	return n, nil
}

// join returns the message that s measured. A hello in one record, which is
// nearly every hello, is not copied.
func join(stream []byte, s span) []byte {
	if s.size == recordHeader+s.message {
		return stream[recordHeader:s.size]
	}
	message := make([]byte, 0, s.message)
	for rest := stream[:s.size]; len(rest) > 0; {
		n := recordHeader + int(binary.BigEndian.Uint16(rest[3:]))
		message = append(message, rest[recordHeader:n]...)
		rest = rest[n:]
	}
	return message
}
