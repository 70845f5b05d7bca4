// SPDX-License-Identifier: Apache-2.0

package hello

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

// goodV2 offers TLS 1.0 and two suites in SSLv2 form.
func goodV2() []byte { return v2(0x0301, 6, 0, 16, 0) }

// v2 builds a hello of the fields' lengths; off is added to the outer length.
func v2(version, suites, session, challenge, off int) []byte {
	body := slices.Concat([]byte{1}, u16(version, suites, session, challenge),
		make([]byte, suites+session+challenge))
	return append(u16(0x8000|(len(body)+off)), body...)
}

func TestSSLv2(t *testing.T) {
	for _, stream := range [][]byte{goodV2(), v2(0x0301, 3, 16, 32, 0)} {
		check(t, append(stream, 22, 3, 1), Hello{Version: 0x0301, Size: len(stream)})
	}
	for name, tc := range map[string]struct {
		stream []byte
		want   error
		reason string
	}{
		"no suites":      {v2(0x0301, 0, 0, 16, 0), ErrMalformed, "cipher suites"},
		"suites by 2":    {v2(0x0301, 4, 0, 16, 0), ErrMalformed, "cipher suites"},
		"session of 5":   {v2(0x0301, 3, 5, 16, 0), ErrMalformed, "session id"},
		"challenge 15":   {v2(0x0301, 3, 0, 15, 0), ErrMalformed, "challenge"},
		"challenge 33":   {v2(0x0301, 3, 0, 33, 0), ErrMalformed, "challenge"},
		"outer is short": {v2(0x0301, 3, 0, 16, -1), ErrMalformed, "disagree"},
		"outer is long":  {append(v2(0x0301, 3, 0, 16, 1), 0), ErrMalformed, "disagree"},
		"tiny":           {[]byte{0x80, 3, 1, 3, 1}, ErrMalformed, "disagree"},
		"nothing":        {[]byte{0x80, 0, 1, 3}, ErrMalformed, "disagree"},
		"over 16 KiB":    {[]byte{0xc0, 1, 1, 3}, ErrTooLong, "16 KiB"},
		"SSL 2.0":        {v2(0x0002, 3, 0, 16, 0), ErrNotTLS, ""},
	} {
		if _, err := Parse(tc.stream); !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.reason) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
