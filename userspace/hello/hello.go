// SPDX-License-Identifier: Apache-2.0

// Package hello turns the first bytes of a TLS client into the facts that
// routing needs: the server name, the ALPN offer, and how many bytes the
// ClientHello takes up.
//
// [Parse] reads a byte stream, [Assembler] makes that stream out of TCP
// segments. Neither does I/O, reads a clock, starts a goroutine or keeps more
// than [MaxSize] bytes (and slack of the same order) of one client:
//
//	added, err := asm.Add(seq, payload)
//	if err != nil || added == 0 {
//		return err // nothing new: do not parse again for a repeated segment
//	}
//	h, err := hello.Parse(asm.Bytes())
//	switch {
//	case errors.Is(err, hello.ErrNeedMore): // wait for the next segment
//	case err != nil: // not TLS, or no hello a server would take
//	default: // route by h.ServerName
//	}
//
// A name is never guessed. Whatever a TLS server may read differently from us
// (two names, a repeated extension, lengths that disagree) is an error, so that
// the name routed by is the name the backend sees.
package hello

import "errors"

const (
	// MaxMessage is the largest ClientHello taken, in bytes of handshake
	// message with its 4 byte header. Post-quantum hellos are below 2 KiB.
	MaxMessage = 16 << 10

	// MaxSize bounds the stream that may hold a hello, in bytes and with
	// record headers. The 8 KiB over MaxMessage are room for headers, and are
	// at the same time the bound on the number of records: none is empty, so
	// at most MaxSize/6 (4096) fit.
	MaxSize = MaxMessage + 8<<10

	// MaxALPN bounds the protocols offered in one hello. Each costs 16 bytes
	// of heap for at least 2 on the wire; real clients offer up to five.
	MaxALPN = 64
)

// Verdicts that callers branch on. Compare with errors.Is: ErrMalformed and
// ErrTooLong come wrapped in an [*Error] that says why.
var (
	// ErrNeedMore means that the bytes so far are a proper beginning.
	ErrNeedMore = errors.New("incomplete ClientHello")
	// ErrNotTLS means that the first bytes do not start a ClientHello.
	ErrNotTLS = errors.New("not a TLS ClientHello")
	// ErrMalformed means that a ClientHello begins well and goes wrong.
	ErrMalformed = errors.New("malformed ClientHello")
	// ErrTooLong means that a limit is exceeded: [MaxMessage] or [MaxSize].
	ErrTooLong = errors.New("ClientHello too long")
	// ErrScattered means that a segment would leave more gaps than an
	// [Assembler] keeps track of.
	ErrScattered = errors.New("ClientHello in too many pieces")
)

// Error is a verdict with its reason.
type Error struct {
	// Kind is one of the Err values of this package.
	Kind error
	// Reason is a constant text. It never quotes the client, so it may go to
	// a log as it is.
	Reason string
}

func (e *Error) Error() string { return e.Kind.Error() + ": " + e.Reason }

// Unwrap returns the kind, for errors.Is.
func (e *Error) Unwrap() error { return e.Kind }

func malformed(reason string) error { return &Error{Kind: ErrMalformed, Reason: reason} }

// Hello is what routing needs to know of a ClientHello.
type Hello struct {
	// ServerName is the host_name of RFC 6066, section 3, in lower case and
	// without the one trailing dot it may have had. It is "" when the hello
	// has no name or has an IP address in its place, which that section
	// forbids and clients send all the same. With ECH it is the outer name.
	ServerName string

	// ALPN lists the protocols offered (RFC 7301), in the client's order and
	// without GREASE values (RFC 8701). Nil when there are none.
	ALPN []string

	// Version is the highest TLS version offered: 0x0304 is TLS 1.3. It is the
	// largest of supported_versions (RFC 8446, section 4.2.1), GREASE aside,
	// or legacy_version where that extension is missing.
	Version uint16

	// ECH says that an encrypted_client_hello extension is present, be it real
	// or GREASE: from outside they look alike.
	ECH bool

	// Size is the number of stream bytes the hello takes up, from the first
	// byte of its first record to the last byte of its last one.
	Size int
}
