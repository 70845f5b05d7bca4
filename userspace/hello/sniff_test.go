// SPDX-License-Identifier: Apache-2.0

package hello

import (
	"errors"
	"testing"
)

func TestLooksLike(t *testing.T) {
	for in, want := range map[string]error{
		"":                         ErrNeedMore,
		"\x16":                     ErrNeedMore,
		"\x16\x03":                 ErrNeedMore,
		"\x16\x03\x01\x02\x00":     ErrNeedMore,
		"\x16\x03\x01\x02\x00\x01": nil,
		"\x16\x03\x01\x00\x00\x16": nil, // empty record: for Parse to judge
		"\x16\x03\x01\x02\x00\x02": ErrNotTLS,
		"\x16\x03\x01\x02\x00\x00": ErrNotTLS,
		"\x16\x02":                 ErrNotTLS,
		"\x16\x04\x01":             ErrNotTLS,
		"\x15\x03\x01\x00\x02":     ErrNotTLS,
		"\x17\x03\x03":             ErrNotTLS,
		"G":                        ErrNotTLS,
		"\x00":                     ErrNotTLS,
		"\x80":                     ErrNeedMore,
		"\x80\x2e\x01":             ErrNeedMore,
		"\x80\x2e\x01\x03":         nil,
		"\x80\x2e\x02":             ErrNotTLS,
		"\x80\x2e\x01\x00\x02":     ErrNotTLS, // SSL 2.0 itself
	} {
		if got := LooksLike([]byte(in)); !errors.Is(got, want) || (got == nil) != (want == nil) {
			t.Errorf("%q: %v, want %v", in, got, want)
		}
		if _, err := Parse([]byte(in)); errors.Is(err, ErrNotTLS) != errors.Is(want, ErrNotTLS) {
			t.Errorf("%q: Parse says %v, LooksLike %v", in, err, want)
		}
	}
}

func TestPlaintext(t *testing.T) {
	for _, in := range []string{
		"GET / HTTP/1.1\r\n", "POST /x", "PRI * HTTP/2.0\r\n\r\nSM", "SSH-2.0-OpenSSH", "EHLO me", "ehlo me",
		"STARTTLS\r\n", "USER anonymous", "PROXY TCP4 1.2.3.4", "\r\n\r\n\x00\r\nQUIT\n\x21",
		"\x00\x00\x00\x08\x04\xd2\x16\x2f", "GET ",
	} {
		if !Plaintext([]byte(in)) {
			t.Errorf("%q is not recognised", in)
		}
	}
	for _, in := range []string{
		"", "G", "GET", "GETS", "get /", "\r\n\r\n", "\x00\x00\x00\x08\x04\xd2\x16\x00",
		string(good().bytes()), string(goodV2()), string(good().bytes()[100:]),
	} {
		if Plaintext([]byte(in)) {
			t.Errorf("%q is taken for plaintext", in)
		}
	}
	for _, opening := range plaintext {
		if len(opening) < 4 {
			t.Errorf("%q is too short to be safe", opening)
		}
		if !errors.Is(LooksLike([]byte(opening)), ErrNotTLS) {
			t.Errorf("%q could be TLS", opening)
		}
	}
}
