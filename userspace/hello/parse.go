// SPDX-License-Identifier: Apache-2.0

package hello

import "golang.org/x/crypto/cryptobyte"

// Extension types, RFC 8446, section 4.2 and RFC 9849.
const (
	extServerName        = 0
	extALPN              = 16
	extPreSharedKey      = 41
	extSupportedVersions = 43
	extECH               = 0xfe0d
)

// Parse reads the ClientHello at the start of stream, which begins with the
// client's first byte. What follows the hello (0-RTT data) is not looked at.
// The result shares no memory with stream.
//
// Returns ErrNeedMore when stream is a proper beginning, ErrNotTLS exactly when
// [LooksLike] does, ErrMalformed when a server would or should refuse the
// hello, ErrTooLong when it exceeds [MaxMessage] or [MaxSize]. Any answer but
// ErrNeedMore is final: more bytes do not change it.
func Parse(stream []byte) (Hello, error) {
	if err := LooksLike(stream); err != nil {
		return Hello{}, err
	}
	if stream[0] != recordHandshake {
		return parseV2(stream)
	}
	s, err := measure(stream)
	if err != nil {
		return Hello{}, err
	}
	h, err := parseMessage(join(stream, s))
	if err != nil {
		return Hello{}, err
	}
	h.Size = s.size
	return h, nil
}

// parseMessage reads one whole handshake message (RFC 8446, section 4.1.2).
// Parts that routing does not need are checked where they decide how the rest
// is read.
func parseMessage(message []byte) (Hello, error) {
	s := cryptobyte.String(message)
	var (
		h                            Hello
		random                       []byte
		session, suites, compression cryptobyte.String
	)
	if !s.Skip(messageHeader) || !s.ReadUint16(&h.Version) || !s.ReadBytes(&random, 32) ||
		!s.ReadUint8LengthPrefixed(&session) ||
		!s.ReadUint16LengthPrefixed(&suites) ||
		!s.ReadUint8LengthPrefixed(&compression) {
		return Hello{}, malformed("cut inside its fixed part")
	}
	switch {
	case h.Version>>8 != 3:
		return Hello{}, malformed("version is not 3.x")
	case len(session) > 32:
		return Hello{}, malformed("session id over 32 bytes")
	case len(suites) == 0 || len(suites)%2 != 0:
		return Hello{}, malformed("bad length of cipher suites")
	case len(compression) == 0:
		return Hello{}, malformed("no compression method")
	case s.Empty():
		return h, nil // before TLS 1.2 extensions are optional as a block
	}
	var extensions cryptobyte.String
	if !s.ReadUint16LengthPrefixed(&extensions) || !s.Empty() {
		return Hello{}, malformed("extensions do not end with the message")
	}
	if err := parseExtensions(&h, extensions); err != nil {
		return Hello{}, err
	}
	return h, nil
}

func parseExtensions(h *Hello, extensions cryptobyte.String) error {
	var seen typeSet
	for !extensions.Empty() {
		var typ uint16
		var data cryptobyte.String
		if !extensions.ReadUint16(&typ) || !extensions.ReadUint16LengthPrefixed(&data) {
			return malformed("cut inside an extension")
		}
		if !seen.add(typ) {
			// RFC 8446, section 4.2. Which of two names counts is up to the
			// server, so routing by either could be wrong.
			return malformed("an extension appears twice")
		}
		var err error
		switch typ {
		case extServerName:
			h.ServerName, err = parseServerName(data)
		case extALPN:
			h.ALPN, err = parseALPN(data)
		case extSupportedVersions:
			h.Version, err = parseVersions(data)
		case extECH:
			h.ECH = true
		case extPreSharedKey:
			if !extensions.Empty() { // RFC 8446, section 4.2.11
				err = malformed("pre_shared_key is not the last extension")
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// parseServerName reads a ServerNameList (RFC 6066, section 3).
func parseServerName(data cryptobyte.String) (string, error) {
	const hostName = 0
	var list, host cryptobyte.String
	if !data.ReadUint16LengthPrefixed(&list) || !data.Empty() || list.Empty() {
		return "", malformed("bad length of server_name")
	}
	for !list.Empty() {
		var typ uint8
		var name cryptobyte.String
		if !list.ReadUint8(&typ) || !list.ReadUint16LengthPrefixed(&name) || name.Empty() {
			return "", malformed("bad length of a name")
		}
		if typ != hostName {
			continue // no other type was ever defined
		}
		if host != nil {
			return "", malformed("two host names")
		}
		host = name
	}
	if host == nil {
		return "", nil
	}
	return canonical(host)
}

// parseALPN reads a ProtocolNameList (RFC 7301, section 3.1).
func parseALPN(data cryptobyte.String) ([]string, error) {
	var list, proto cryptobyte.String
	if !data.ReadUint16LengthPrefixed(&list) || !data.Empty() || list.Empty() {
		return nil, malformed("bad length of the protocol list")
	}
	n := 0
	for rest := list; !rest.Empty(); n++ {
		if !rest.ReadUint8LengthPrefixed(&proto) || proto.Empty() {
			return nil, malformed("bad length of a protocol")
		}
	}
	if n > MaxALPN {
		return nil, malformed("over 64 protocols")
	}
	var protocols []string
	for !list.Empty() && list.ReadUint8LengthPrefixed(&proto) {
		if isGREASEProtocol(proto) {
			continue
		}
		if protocols == nil {
			protocols = make([]string, 0, n)
		}
		protocols = append(protocols, protocolName(proto))
	}
	return protocols, nil
}

// protocolName spares the usual protocols their allocation.
func protocolName(b []byte) string {
	switch string(b) {
	case "h2":
		return "h2"
	case "http/1.1":
		return "http/1.1"
	case "acme-tls/1":
		return "acme-tls/1"
	}
	return string(b)
}

// parseVersions returns the largest of supported_versions (RFC 8446, section
// 4.2.1), or 0 when only GREASE and unknown ones are there.
func parseVersions(data cryptobyte.String) (uint16, error) {
	var list cryptobyte.String
	if !data.ReadUint8LengthPrefixed(&list) || !data.Empty() || list.Empty() {
		return 0, malformed("bad length of supported_versions")
	}
	var highest, version uint16
	for !list.Empty() {
		if !list.ReadUint16(&version) {
			return 0, malformed("bad length of supported_versions")
		}
		if version>>8 == 3 { // neither GREASE nor a draft
			highest = max(highest, version)
		}
	}
	return highest, nil
}

// isGREASEProtocol tells the ALPN values of RFC 8701, section 2: 0x0a0a,
// 0x1a1a and so on to 0xfafa.
func isGREASEProtocol(b []byte) bool {
	return len(b) == 2 && b[0] == b[1] && b[0]&0x0f == 0x0a
}
