// SPDX-License-Identifier: Apache-2.0

package hello

// LooksLike says from the first bytes alone whether a stream can begin with a
// ClientHello: in a TLS record (type 22, version 3.x, handshake type 1) or in
// the SSLv2 form of RFC 5246, appendix E.2. Six bytes are enough.
//
// Returns nil when it does, ErrNeedMore when the bytes fit as far as they go
// (no bytes always fit), ErrNotTLS when they do not. It does not judge lengths.
func LooksLike(prefix []byte) error {
	if len(prefix) == 0 {
		return ErrNeedMore
	}
	if prefix[0]&0x80 != 0 {
		return looksLikeV2(prefix)
	}
	if prefix[0] != recordHandshake || len(prefix) > 1 && prefix[1] != 3 {
		return ErrNotTLS
	}
	if len(prefix) <= recordHeader {
		return ErrNeedMore
	}
	// After an empty record the next byte is another header's.
	if empty := prefix[3] == 0 && prefix[4] == 0; !empty && prefix[recordHeader] != typeClientHello {
		return ErrNotTLS
	}
	return nil
}

// plaintext holds what clients of other protocols say first. Each is at least
// four bytes, so that the middle of a hello does not match by accident: that is
// 1 in 2^32 per entry, and only when segments were swapped.
var plaintext = []string{
	"GET ", "HEAD ", "POST ", "PUT ", "DELETE ", "CONNECT ", "OPTIONS ", "TRACE ", "PATCH ", "PROPFIND ",
	"PRI * HTTP/2",
	"SSH-",
	"EHLO ", "HELO ", "LHLO ", "ehlo ", "helo ", "STARTTLS", "MAIL FROM:",
	"USER ", "CAPA\r\n", "AUTH ", "QUIT\r\n",
	"<?xml ", "<stream:stream ", // XMPP
	"PROXY ", "\r\n\r\n\x00\r\nQUIT\n", // PROXY protocol v1, v2
	"\x00\x00\x00\x08\x04\xd2\x16\x2f", // PostgreSQL SSLRequest
	"\x00\x00\x00\x08\x04\xd2\x16\x30", // PostgreSQL GSSENCRequest
}

// Plaintext says whether stream begins with the opening words of a well-known
// protocol that is not TLS. Then no earlier segment can turn it into a hello,
// while other bytes for which [LooksLike] returns ErrNotTLS may be the second
// segment of a hello whose first one is late.
func Plaintext(stream []byte) bool {
	for _, opening := range plaintext {
		if len(stream) >= len(opening) && string(stream[:len(opening)]) == opening {
			return true
		}
	}
	return false
}
