// SPDX-License-Identifier: Apache-2.0

package hello

import (
	"bytes"
	"net/netip"
)

const (
	maxName  = 255 // bytes, RFC 1035, section 2.3.4
	maxLabel = 63
)

// canonical returns the host name as routes are written: in lower case, without
// one trailing dot, and "" for an IP address. Names are A-labels on the wire
// (RFC 6066, section 3), so a byte that is no letter, digit, hyphen, underscore
// or dot is an error and never part of a result. Underscores are no host name
// by RFC 952, yet in use. host is not empty.
func canonical(host []byte) (string, error) {
	if len(host) > maxName {
		return "", malformed("name over 255 bytes")
	}
	if last := len(host) - 1; last > 0 && host[last] == '.' {
		host = host[:last]
	}
	if isAddress(host) {
		return "", nil
	}
	var lower [maxName]byte
	label := 0
	for i, c := range host {
		switch {
		case c == '.':
			if label == 0 {
				return "", malformed("empty label in the name")
			}
			label = -1
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_':
		default:
			return "", malformed("a byte that no name has")
		}
		if label++; label > maxLabel {
			return "", malformed("label over 63 bytes")
		}
		lower[i] = c
	}
	if label == 0 {
		return "", malformed("empty label in the name")
	}
	return string(lower[:len(host)]), nil
}

// isAddress tells an IP address, bare or in the brackets of a URL, IPv6 also
// with a zone.
func isAddress(host []byte) bool {
	first, last := host[0], host[len(host)-1]
	if (last < '0' || last > '9') && first != '[' && bytes.IndexByte(host, ':') < 0 {
		return false // as nearly every name; parsing costs an allocation
	}
	if len(host) > 2 && first == '[' && last == ']' {
		host = host[1 : len(host)-1]
	}
	for _, c := range host { // netip takes any bytes for a zone
		if c <= ' ' || c > '~' {
			return false
		}
	}
	_, err := netip.ParseAddr(string(host))
	return err == nil
}
