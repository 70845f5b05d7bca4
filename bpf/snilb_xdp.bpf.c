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
#include "packet.h"
#include "csum.h"
#include "frame_xdp.h"
#include "cookie.h"
#include "verdict.h"
#include "event.h"
#include "rewrite.h"
#include "flow.h"
#include "synack.h"
#include "dead.h"
#include "offer.h"
#include "path.h"

/* Every interface that has XDP; backends may be where clients are. */
SEC("xdp.frags")
int snilb_xdp(struct xdp_md *ctx)
{
	struct packet pkt = {};
	enum reason why = packet_read(ctx, &pkt);

	if (why == REASON_ICMP)
		return pass(REASON_LEFT_ICMP);
	if (why != REASON_OK)
		return pass(why);
	if (faces_clients && listener_has_port(pkt.dport))
		return path_client(ctx, &pkt);
	return path_backend(ctx, &pkt);
}

char _license[] SEC("license") = "GPL";
