// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* The path of a packet through XDP, in front of TC: what it cannot finish it passes
 * on untouched, and TC does it.
 */
#include <stdbool.h>
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/errno.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"
#include "config.h"
#include "maps.h"

SEC("xdp.frags")
int snilb_xdp(struct xdp_md *ctx)
{
	__u32 slot = counter_slot;
	struct counter_set *c = bpf_map_lookup_elem(&counters, &slot);

	if (c)
		c->packets[REASON_NOT_OURS]++;
	return XDP_PASS;
}

char _license[] SEC("license") = "GPL";
