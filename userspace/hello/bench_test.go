// SPDX-License-Identifier: Apache-2.0

package hello

import (
	"crypto/tls"
	"testing"
)

func benchmarkStreams(b *testing.B) map[string][]byte {
	config := &tls.Config{ServerName: "www.example.com", NextProtos: []string{"h2", "http/1.1"}}
	stream := capture(b, config)
	return map[string][]byte{
		"post-quantum":   stream,
		"100-byte-parts": refragment(stream, 100),
		"small":          good().bytes(),
		"attack-types":   wire{record: 22, version: 0x0301, typ: 1, legacy: 0x0303, suites: u16(1), compression: []byte{0}, exts: many(4000)}.bytes(),
		"not-tls":        []byte("GET / HTTP/1.1\r\n"),
		"one-byte-short": stream[:len(stream)-1],
	}
}

func BenchmarkParse(b *testing.B) {
	for name, stream := range benchmarkStreams(b) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_, _ = Parse(stream)
			}
		})
	}
}

// BenchmarkAssembleOne is the usual life of a hello: one segment, parsed.
func BenchmarkAssembleOne(b *testing.B) {
	stream := benchmarkStreams(b)["post-quantum"]
	b.ReportAllocs()
	for b.Loop() {
		var a Assembler
		if _, err := a.Add(1<<32-100, stream); err != nil {
			b.Fatal(err)
		}
		if _, err := Parse(a.Bytes()); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkAssembleTwo is a post-quantum hello with its segments swapped.
func BenchmarkAssembleTwo(b *testing.B) {
	stream := benchmarkStreams(b)["post-quantum"]
	const mss = 1400
	b.ReportAllocs()
	for b.Loop() {
		var a Assembler
		_, _ = a.Add(mss, stream[mss:])
		_, _ = Parse(a.Bytes())
		_, _ = a.Add(0, stream[:mss])
		if _, err := Parse(a.Bytes()); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCrumbs is the worst a client can do: MaxSize bytes in as many
// segments, each asked about.
func BenchmarkCrumbs(b *testing.B) {
	stream := good().padded(4096).stream(1)
	for b.Loop() {
		var a Assembler
		for i := range stream {
			_, _ = a.Add(uint32(i), stream[i:i+1])
			_, _ = Parse(a.Bytes())
		}
	}
}
