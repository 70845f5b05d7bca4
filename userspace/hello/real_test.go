// SPDX-License-Identifier: Apache-2.0

package hello

import (
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"testing"

	"golang.org/x/crypto/cryptobyte"
)

// clients are crypto/tls configurations and what their hellos say.
var clients = map[string]struct {
	config *tls.Config
	want   Hello
}{
	"plain": {&tls.Config{ServerName: "www.example.com"},
		Hello{ServerName: "www.example.com", Version: tls.VersionTLS13}},
	"post-quantum": {&tls.Config{ServerName: "pq.example.com", CurvePreferences: []tls.CurveID{tls.X25519MLKEM768}},
		Hello{ServerName: "pq.example.com", Version: tls.VersionTLS13}},
	"classic": {&tls.Config{ServerName: "x.example.com", CurvePreferences: []tls.CurveID{tls.X25519}},
		Hello{ServerName: "x.example.com", Version: tls.VersionTLS13}},
	"alpn": {&tls.Config{ServerName: "www.example.com", NextProtos: []string{"h2", "http/1.1", "own"}},
		Hello{ServerName: "www.example.com", ALPN: []string{"h2", "http/1.1", "own"}, Version: tls.VersionTLS13}},
	"upper case": {&tls.Config{ServerName: "WWW.Example.Com."},
		Hello{ServerName: "www.example.com", Version: tls.VersionTLS13}},
	"no name": {&tls.Config{InsecureSkipVerify: true}, Hello{Version: tls.VersionTLS13}},
	"address": {&tls.Config{ServerName: "192.0.2.1"}, Hello{Version: tls.VersionTLS13}},
	"TLS 1.0": {&tls.Config{ServerName: "old.example.com", MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10},
		Hello{ServerName: "old.example.com", Version: tls.VersionTLS10}},
	"TLS 1.2": {&tls.Config{ServerName: "old.example.com", MaxVersion: tls.VersionTLS12},
		Hello{ServerName: "old.example.com", Version: tls.VersionTLS12}},
	"ech": {&tls.Config{ServerName: "secret.example.com", MinVersion: tls.VersionTLS13, EncryptedClientHelloConfigList: echConfigs()},
		Hello{ServerName: "public.example.net", Version: tls.VersionTLS13, ECH: true}},
}

// echConfigs returns an ECHConfigList (RFC 9849, section 4) with the public
// name public.example.net.
func echConfigs() []byte {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	var b cryptobyte.Builder
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
		b.AddUint16(extECH)
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			b.AddUint8(1)       // config id
			b.AddUint16(0x0020) // DHKEM(X25519, HKDF-SHA256)
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(key.PublicKey().Bytes()) })
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddUint16(1); b.AddUint16(1) })
			b.AddUint8(32) // maximum name length
			b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte("public.example.net")) })
			b.AddUint16(0) // no extensions
		})
	})
	return b.BytesOrPanic()
}

func TestRealClients(t *testing.T) {
	for name, tc := range clients {
		t.Run(name, func(t *testing.T) {
			stream := capture(t, tc.config)
			if name == "post-quantum" && len(stream) < 1400 {
				t.Errorf("a post-quantum hello of %d bytes proves nothing", len(stream))
			}
			if serverSees(stream) == nil {
				t.Error("crypto/tls refuses it: FuzzAgainstCryptoTLS compares nothing")
			}
			tc.want.Size = len(stream)
			check(t, append(stream[:len(stream):len(stream)], "more"...), tc.want)
			for n := range stream {
				if _, err := Parse(stream[:n]); !errors.Is(err, ErrNeedMore) {
					t.Fatalf("%d of %d bytes: %v", n, len(stream), err)
				}
			}
			for _, size := range []int{1, 2, 3, 4, 5, 7, 100, 1399, 1400} {
				small := refragment(stream, size)
				tc.want.Size = len(small)
				check(t, small, tc.want)
			}
		})
	}
}

// TestGoodIsGood wants the hand-made hello, and the fuzzers' shapes of it, to
// be one that crypto/tls takes as well.
func TestGoodIsGood(t *testing.T) {
	message := good().message()
	for s, data := range map[shape][]byte{
		shapeStream: good().bytes(), shapeMessageBody: message[4:], shapeServerName: sni("a.b").data,
		shapeHost: []byte("a.b"), shapeALPN: alpn("h2").data,
	} {
		if stream := s.stream(data, 100); serverSees(stream) == nil {
			t.Errorf("shape %d is refused", s)
		}
	}
}
