// SPDX-License-Identifier: Apache-2.0

// Package testbed builds the small networks in which snilb is tested and shown.
//
// A [Bed] is a handful of network namespaces joined by veth pairs. It needs root and the kernel, no ip(8), and nothing in it
// can reach, or be reached from, the network of the machine. [Bed.Close] removes all of it; what a killed process left is
// removed by the next [New].
//
//	Routed:      client eth0 ---- eth0 lb eth1 ---- eth0 backend
//
//	TwoUplinks:  client eth0 ---- eth0 lb eth1 ---- eth0 backend
//	             client eth1 ---- eth2 lb
//
//	OneArmed:    client eth0 --+
//	             lb     eth0 --+-- br0 (namespace lan)
//	             backend eth0 -+
//
// Addresses, the same in every topology:
//
//	198.51.100.0/25    2001:db8:1::/64   first client network: lb .1 and ::1, clients from .10 and ::10
//	198.51.100.128/25  2001:db8:4::/64   second client network (TwoUplinks): lb .129 and ::1, the client's end .130 and ::2
//	192.0.2.0/24       2001:db8:2::/64   backend network: lb .1 and ::1, backends from .11 and ::11
//	203.0.113.1        2001:db8:3::1     an extra VIP on the loopback device of lb
//
// OneArmed has one network only, the first: its backends are .101 and ::101 upwards.
package testbed
