// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"

	"snilb/userspace/config"
	"snilb/userspace/hello"
	"snilb/userspace/proxyproto"
)

// A PROXY header moves the bytes of the client against those of the backend: one
// read from the client stands before what the backend gets (skip), one written to
// the backend stands there before what the client sent (prefix). All arithmetic on
// the two streams is in this file:
//
//	client:    [header: skip bytes][stream: the hello and what follows]
//	backend:  [header: the prefix][stream]

// readHeader finds the PROXY header where one must stand. To go on without one
// would let its sender choose whether to be believed.
func (h *handshake) readHeader() error {
	if !h.proxied || h.skip > 0 {
		return nil
	}
	header, length, err := proxyproto.Parse(h.hello.Bytes())
	switch {
	case errors.Is(err, proxyproto.ErrNeedMore):
		return hello.ErrNeedMore
	case errors.Is(err, proxyproto.ErrNone):
		return hello.ErrNotTLS
	case err != nil:
		return hello.ErrMalformed
	}
	h.skip = length
	if header.Source.IsValid() {
		h.origin = connection{client: header.Source, listener: header.Destination}
	}
	return nil
}

// stream is what the backend is to get of the client's bytes so far.
func (h *handshake) stream() []byte { return h.hello.Bytes()[h.skip:] }

// start is the client's sequence number of the stream's first byte.
func (h *handshake) start() uint32 { return h.hello.Start() + uint32(h.skip) }

// owned is how much of the stream the client was told we have.
func (h *handshake) owned() int { return max(h.acked-h.skip, 0) }

// settled: no segment may come before the first byte any more. What was read from
// there, a header or the name, is what the connection goes by, and the engine
// counts from there.
func (h *handshake) settled() bool {
	return h.skip > 0 || h.acked > 0 || h.probed || h.phase != collecting
}

// start is our number of the stream's first byte on the backend leg.
func (a *attempt) start() uint32 { return a.isn + 1 + uint32(len(a.prefix)) }

// delivered is how much of the stream the backend has acknowledged.
func (a *attempt) delivered() int { return max(int(int32(a.ack-a.start())), 0) }

// pushEnd is our number after all that the backend is to get, as far as it has come.
func (h *handshake) pushEnd() uint32 { return h.attempt.start() + uint32(len(h.stream())) }

// toPush is all that the backend is to get, as far as it has come.
func (h *handshake) toPush() []byte {
	prefix := h.attempt.prefix
	return append(prefix[:len(prefix):len(prefix)], h.stream()...)
}

// mustPush reports whether the backend lacks something that nobody repeats once
// the flow is bound: our header, or bytes we took over from the client.
func (h *handshake) mustPush() bool {
	a := &h.attempt
	return int32(a.start()+uint32(h.owned())-a.ack) > 0
}

// header is the PROXY header the pool wants. What its ALPN record is for is the
// protocol that was agreed on. That is not known before the backend answers, save
// when the client leaves no choice; otherwise the record is left out.
func (h *handshake) header() ([]byte, error) {
	version := h.decision.pool.Config.ProxyProtocol
	if version == config.NoProxy {
		return nil, nil
	}
	header := proxyproto.Header{
		Source: h.origin.client, Destination: h.origin.listener,
		Authority: h.sni, ALPN: h.alpn,
	}
	return header.Append(nil, byte(version))
}
