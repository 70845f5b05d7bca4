// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* Settings fixed when the programs are loaded: constants to the verifier, which
 * removes what they switch off.
 */
#ifndef SNILB_CONFIG_H
#define SNILB_CONFIG_H

/* Which of `counters` this copy of the programs counts in: one per interface. */
volatile const __u32 counter_slot = 0;
volatile const __u32 workers = 1;
/* Spreads clients over the workers as nobody can foresee. */
volatile const __u64 worker_key = 0;
/* The ports the engine speaks to backends from, both ends included. */
volatile const __u16 source_port_first = 10000;
volatile const __u16 source_port_last = 29999;
/* A daemon silent for longer than this is dead; ns. */
volatile const __u64 dead_after = 10000000000ULL;
/* What SYNs meet then: enum dead_policy. */
volatile const __u8 on_dead = ON_DEAD_PASS;
/* Bytes waiting in a ring above which SYNs go to the stack instead. */
volatile const __u64 ring_busy = 7 << 20;
/* XDP has one program an interface: whether clients come in by it. */
volatile const bool faces_clients = true;
/* A veth wakes the reader of XDP_TX only where its far end has a program; of what is
 * redirected to it, also where that has GRO.
 */
volatile const bool redirect_back = false;
/* Whether bpf_l4_csum_replace knows BPF_F_IPV6 (kernel 6.16). */
volatile const bool has_csum_ipv6 = false;

/* The window scale in every SYN-ACK: no cookie carries it. Linux's own choice for
 * its default buffers, so that a Linux backend's windows need no shift.
 */
#define ANNOUNCED_WSCALE 7

#endif
