// SPDX-License-Identifier: Apache-2.0

// Package loader brings the kernel programs into the kernel and out of it again:
// preflight, load, pin, attach, detach; and it keeps what the programs know of the
// network (next hops, listener addresses, backend-facing interfaces) as the kernel
// has it.
//
// An instance is loaded first ([Load]: maps, pins, TAP device; no packet is touched
// yet) and attached later ([Instance.Attach]), so that the tables are complete
// before the first packet meets them. [Instance.Close] leaves nothing behind;
// [Detach] does the same for a daemon that died.
//
// Of the programs, TC's are on every interface and complete. XDP, where a mode asks for
// it, is one program more in front of them, which hands on what it does not finish; a
// next hop says whether XDP can send there, and if not, TC does.
//
// What an instance leaves in the system while it lives:
//
//	/sys/fs/bpf/snilb/NAME/MAP               the maps, by their names in the object
//	/sys/fs/bpf/snilb/NAME/links/IFACE-ROLE  tcx and XDP links; IFACE escaped, as bpffs takes no dot
//	/sys/fs/bpf/snilb/NAME/clsact/IFACE/     an empty directory: the clsact qdisc there is ours
//	/sys/fs/bpf/snilb/NAME/neighbours/N-IP/  an empty directory: this neighbour on interface N is managed because of us
//	/run/snilb/NAME.lock                     held by flock while the daemon lives; its pid and interfaces
//	snilb0, snilb1 ...                       the TAP device, with "snilb NAME" as its alias
//
// Outside of the machine's first network namespace, NAME is NAME@COOKIE: all network
// namespaces may share one bpffs.
//
// An instance belongs to the network namespace that Load was called in. Its methods
// may be called from any thread.
package loader
