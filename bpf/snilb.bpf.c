// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* The whole path of a packet through TC, on one screen: what is not ours goes on,
 * a bound flow is rewritten and redirected, a SYN is answered by itself, a hello
 * goes to the engine. A program that is unsure passes the packet to the stack
 * before its first write.
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
#include "frame_tc.h"
#include "cookie.h"
#include "verdict.h"
#include "event.h"
#include "rewrite.h"
#include "flow.h"
#include "synack.h"
#include "dead.h"
#include "offer.h"
#include "path.h"
#include "icmp.h"
#include "jobs.h"

/* Client-facing interfaces, ingress. */
SEC("tc")
int snilb_client(struct __sk_buff *skb)
{
	struct packet pkt = {};
	enum reason why = packet_read(skb, &pkt);

	if (why == REASON_ICMP)
		return icmp(skb, &pkt, LEG_CLIENT);
	if (why != REASON_OK)
		return pass(why);
	if (!listener_has_port(pkt.dport))
		return pass(REASON_NOT_OURS);
	return path_client(skb, &pkt);
}

/* Backend-facing interfaces, ingress. */
SEC("tc")
int snilb_backend(struct __sk_buff *skb)
{
	struct packet pkt = {};
	enum reason why = packet_read(skb, &pkt);

	if (why == REASON_ICMP)
		return icmp(skb, &pkt, LEG_BACKEND);
	if (why != REASON_OK)
		return pass(why);
	return path_backend(skb, &pkt);
}

static __always_inline int tap_output(struct __sk_buff *skb, struct packet *pkt, __u32 index)
{
	struct nexthop *hop = bpf_map_lookup_elem(&nexthops, &index);

	if (!hop || !hop->ifindex)
		return drop(REASON_NO_NEXTHOP);
	return verdict(frame_send(skb, pkt, hop, pkt->daddr), REASON_ENGINE_OUTPUT);
}

/* The engine's TAP device, ingress: every frame was written by the engine, and its
 * destination address says what to do with it.
 */
SEC("tc")
int snilb_tap(struct __sk_buff *skb)
{
	struct packet pkt = {};
	enum reason why = packet_read(skb, &pkt);
	__u8 to[6];
	struct bound b;

	if ((why != REASON_OK && why != REASON_ICMP) || bpf_skb_load_bytes(skb, 0, to, sizeof(to)))
		return drop(REASON_JUNK);
	if (to[3] == TAP_OUTPUT)
		return tap_output(skb, &pkt, to[4] << 8 | to[5]);
	if (why == REASON_ICMP)
		return drop(REASON_JUNK);

	__u32 leg = to[3] == TAP_REPLAY_CLIENT ? LEG_CLIENT : LEG_BACKEND;

	if (!flow_find(&pkt, leg, &b))
		return drop(REASON_REPLAY_MISSED);
	return flow_forward(skb, &pkt, &b, leg);
}

/* Types that no map holds and no function takes: mentioned for the generator, which
 * finds them in the object's BTF.
 */
const struct event_header *const abi_event_header = NULL;
const enum reason *const abi_reason = NULL;
const enum unknown_flow *const abi_unknown_flow = NULL;
const enum dead_policy *const abi_dead_policy = NULL;
const enum event_kind *const abi_event_kind = NULL;
const enum tap_request *const abi_tap_request = NULL;
const enum flow_state *const abi_flow_state = NULL;
const enum nexthop_flag *const abi_nexthop_flag = NULL;
const enum live_flag *const abi_live_flag = NULL;
const enum flow_job_op *const abi_flow_job_op = NULL;
const enum leg *const abi_leg = NULL;

char _license[] SEC("license") = "GPL";
