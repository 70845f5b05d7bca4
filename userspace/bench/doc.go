// SPDX-License-Identifier: Apache-2.0

// Package bench measures load balancers that route TLS by the server name, of any make.
//
// A client opens connections, writes a generated ClientHello and waits for the first bytes of the answer. It does so as
// ordinary sockets ([Sockets]) or as packets of its own ([Packets]), which cost a fraction of what they measure. No TLS
// handshake is completed: that would measure ciphers. A server of any kind answers a hello with at least a byte, so that
// connections can be measured through real servers; requests, bulk and idle connections need the server of this package
// ([Serve]), which also runs as packets ([ServePackets]).
//
// After the hello the client may ask for more. A request is one TLS record of application data, whose payload begins with
// the number of bytes wanted (64 bits, big-endian); the answer is that many bytes. The outer form is that of TLS, so that
// a balancer which looks at more than the hello sees nothing odd.
//
// Latencies are counted from when a connection was due, not from when it was begun: a balancer that stalls the generator
// does not hide its stall (coordinated omission).
package bench
