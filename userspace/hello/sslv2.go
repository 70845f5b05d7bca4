// SPDX-License-Identifier: Apache-2.0

package hello

import "golang.org/x/crypto/cryptobyte"

// A hello in SSLv2 form (RFC 5246, appendix E.2) is a length of two bytes with
// the top bit set, then message type, version, three lengths, and the three
// fields they measure. It has no extensions, hence never a name.
const v2Header = 2

// looksLikeV2 is LooksLike for a first byte of 0x80 and above. A hello of SSL
// version 2 itself, which offers no TLS, is ErrNotTLS.
func looksLikeV2(prefix []byte) error {
	if len(prefix) > 2 && prefix[2] != typeClientHello || len(prefix) > 3 && prefix[3] != 3 {
		return ErrNotTLS
	}
	if len(prefix) < 4 {
		return ErrNeedMore
	}
	return nil
}

// parseV2 reads a hello in SSLv2 form. stream has passed looksLikeV2.
func parseV2(stream []byte) (Hello, error) {
	n := int(stream[0]&0x7f)<<8 | int(stream[1])
	if n > MaxMessage {
		return Hello{}, &Error{Kind: ErrTooLong, Reason: "the message is over 16 KiB"}
	}
	if len(stream) < v2Header+n {
		return Hello{}, ErrNeedMore
	}
	h := Hello{Size: v2Header + n}
	s := cryptobyte.String(stream[v2Header:h.Size])
	var suites, session, challenge uint16
	if !s.Skip(1) || !s.ReadUint16(&h.Version) || !s.ReadUint16(&suites) ||
		!s.ReadUint16(&session) || !s.ReadUint16(&challenge) ||
		len(s) != int(suites)+int(session)+int(challenge) {
		return Hello{}, malformed("SSLv2 lengths disagree")
	}
	switch {
	case suites == 0 || suites%3 != 0:
		return Hello{}, malformed("bad length of SSLv2 cipher suites")
	case session != 0 && session != 16:
		return Hello{}, malformed("bad length of the SSLv2 session id")
	case challenge < 16 || challenge > 32:
		return Hello{}, malformed("bad length of the SSLv2 challenge")
	}
	return h, nil
}
