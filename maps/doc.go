// SPDX-License-Identifier: Apache-2.0

// Package maps is the contract between the kernel programs and Go: the compiled
// object, the types both sides share, and typed access to the maps.
//
// The table of the maps. All but jobs, scratch and allowance are pinned by the
// loader below /sys/fs/bpf/snilb/NAME/.
//
//	map             key -> value                 written by            read by           full means
//	flows4, flows6  tuple and leg -> rewrite     engine: insert and    client, backend,  a new connection is
//	                of one direction             delete; kernel: its   tap and XDP       reset and counted; bound
//	                                             counters and state,   programs, engine  flows go on
//	                                             and delete when a SYN
//	                                             meets a closed flow
//	listeners       address and port -> id       daemon                client and XDP    refused at attach
//	                                                                   programs
//	listener_ports  port/64 -> 64 bits, never    daemon                client and XDP    cannot
//	                taken back: flows stay                             programs
//	paths           source, backend -> id        daemon                backend and XDP   refused at attach
//	                                                                   programs
//	nexthops        index -> interface, gateway; daemon                client, backend,  new flows are refused
//	                for XDP also the interface                         tap and XDP
//	                below, link addresses, tag                         programs
//	control         0 -> heartbeat, clock, keys  daemon, once a second client, backend   cannot
//	                                                                   and XDP programs
//	rings           worker -> ring buffer        kernel programs       engine, one       the packet is lost and
//	                                                                   reader a ring     counted; TCP repeats it
//	                worker+64 -> its quiet one,  kernel programs       the same reader,  the sweep sees it in
//	                for ends of flows                                  in its own time   the entries
//	instance        0 -> layout version, what    daemon                daemon            cannot
//	                a later daemon must keep
//	owned           client's tuple -> cookie of  engine                engine, when it   it is logged: these
//	                a connection without a flow                        starts            hang if the daemon dies
//	                whose hello's bytes the
//	                engine has acknowledged
//	jobs            worker -> what is to be      engine, by mapped     jobs program,     cannot
//	                done with flows, results     memory                which answers
//	counters        slot -> packets by reason,   kernel programs       daemon            interfaces share the last
//	                per CPU                                                              slot
//	scratch, allowance: one CPU's working memory of the programs; the allowance of
//	                each kind of rationed event is its own
//
// What XDP passes on TC sees once more: a packet that both count left XDP untouched, and
// XDP's counter says why.
//
// A flow entry is self-contained: it outlives its backend in the configuration,
// the daemon, and a change of programs.
package maps
