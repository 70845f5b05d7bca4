// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* A bound flow: found by its packet, counted, rewritten, sent on its way. */
#ifndef SNILB_FLOW_H
#define SNILB_FLOW_H

/* One entry, of one table: the other pointer is NULL. The verifier follows which
 * of two pointers is set, but not which of two types one pointer has.
 */
struct bound {
	struct flow *flow;
	struct flow4 *v4;
	struct flow6 *v6;
};

static __always_inline struct flow4_key flow4_key_of(const struct packet *pkt, __u32 leg)
{
	return (struct flow4_key){
		.saddr = pkt->saddr[3],
		.daddr = pkt->daddr[3],
		.sport = pkt->sport,
		.dport = pkt->dport,
		.leg = leg,
	};
}

static __always_inline struct flow6_key flow6_key_of(const struct packet *pkt, __u32 leg)
{
	struct flow6_key key = {.sport = pkt->sport, .dport = pkt->dport, .leg = leg};

	address_copy(key.saddr, pkt->saddr);
	address_copy(key.daddr, pkt->daddr);
	return key;
}

static __always_inline bool flow_find(const struct packet *pkt, __u32 leg, struct bound *b)
{
	b->v4 = NULL;
	b->v6 = NULL;
	if (pkt->family == AF_INET) {
		struct flow4_key key = flow4_key_of(pkt, leg);

		b->v4 = bpf_map_lookup_elem(&flows4, &key);
		b->flow = (struct flow *)b->v4;
	} else {
		struct flow6_key key = flow6_key_of(pkt, leg);

		b->v6 = bpf_map_lookup_elem(&flows6, &key);
		b->flow = (struct flow *)b->v6;
	}
	return b->flow;
}

/* The key of the other direction, whose tuple is this one's rewrite turned around. */
static __always_inline struct flow4_key flow4_reverse_key(const struct flow4 *f, __u32 leg)
{
	return (struct flow4_key){
		.saddr = f->daddr,
		.daddr = f->saddr,
		.sport = f->flow.dport,
		.dport = f->flow.sport,
		.leg = !leg,
	};
}

static __always_inline struct flow6_key flow6_reverse_key(const struct flow6 *f, __u32 leg)
{
	struct flow6_key key = {.sport = f->flow.dport, .dport = f->flow.sport, .leg = !leg};

	address_copy(key.saddr, f->daddr);
	address_copy(key.daddr, f->saddr);
	return key;
}

static __always_inline struct flow *flow_reverse(const struct bound *b, __u32 leg)
{
	if (b->v4) {
		struct flow4_key key = flow4_reverse_key(b->v4, leg);

		return bpf_map_lookup_elem(&flows4, &key);
	}
	if (b->v6) {
		struct flow6_key key = flow6_reverse_key(b->v6, leg);

		return bpf_map_lookup_elem(&flows6, &key);
	}
	return NULL;
}

/* Forgets both entries of a connection that is over, since a new one wants the
 * tuple: what the backend of the old one still sends must not get into it.
 */
static __noinline int flow_forget(struct packet *pkt, __u32 leg)
{
	struct bound b;

	if (!pkt || !flow_find(pkt, leg, &b))
		return 0;
	if (b.v4) {
		struct flow4_key other = flow4_reverse_key(b.v4, leg);
		struct flow4_key key = flow4_key_of(pkt, leg);

		bpf_map_delete_elem(&flows4, &key);
		bpf_map_delete_elem(&flows4, &other);
	} else if (b.v6) {
		struct flow6_key other = flow6_reverse_key(b.v6, leg);
		struct flow6_key key = flow6_key_of(pkt, leg);

		bpf_map_delete_elem(&flows6, &key);
		bpf_map_delete_elem(&flows6, &other);
	}
	return 0;
}

/* Both sides sent a FIN, or one a RST: a SYN now starts a new connection. */
static __always_inline bool flow_is_closing(const struct bound *b, __u32 leg)
{
	struct flow *other = flow_reverse(b, leg);
	__u32 mine = b->flow->control;
	__u32 theirs = other ? other->control : FLOW_RST;

	return mine & theirs & FLOW_FIN || (mine | theirs) & FLOW_RST;
}

/* The worker that owns the flow. */
static __always_inline __u32 flow_worker(const struct flow *flow)
{
	return flow->control >> FLOW_WORKER_POS & FLOW_WORKER_MASK;
}

static __always_inline void flow_mark(struct flow *flow, __u32 state)
{
	if ((flow->control & state) != state)
		__sync_fetch_and_or(&flow->control, state);
}

/* More than this is rarely under way; more than a window of 1 GiB never is. */
#define FLOW_WINDOW_USUAL (16 << 20)
#define FLOW_WINDOW_MOST  (1 << 30)
/* A first window: may be lost before us, or still be with the engine. */
#define FLOW_WINDOW_FIRST (64 << 10)

static __always_inline void flow_account(const struct packet *pkt, struct flow *flow, __u32 packets,
					 __u64 now)
{
	flow->bytes += pkt->payload;
	flow->packets += packets;
	flow->last_seen = now >> 20;
	/* An older ACK that was overtaken says nothing new; nor does a RST's. One from
	 * further back is of a side that began anew, or ends what a forged one did.
	 */
	if ((pkt->flags & (TCP_ACK | TCP_RST)) == TCP_ACK &&
	    flow->last_ack - pkt->ack > FLOW_WINDOW_USUAL) {
		flow->last_ack = pkt->ack;
		flow_mark(flow, FLOW_CONFIRMED);
	}
}

/* Whether a FIN or RST may be of the side it seems to be of. Its receiver takes it at
 * the number that it waits for: the last ACK that it sent through us, or further by
 * what came through us since, at the most all that did. One behind is a RST of a side
 * whose FIN the receiver has (Linux takes that, macOS sends it).
 * A RST still further ahead need not be believed: it is repeated, at the very number
 * of the ACK that the receiver sends for it (RFC 5961) or for what was under way. A
 * FIN that arrives is not. Of those who do not know the numbers one packet in 65,000
 * is believed where little was sent; at the most a RST in 255, a FIN in 4.
 */
static __always_inline bool flow_end_is_likely(const struct packet *pkt, const struct bound *b,
					       __u32 leg)
{
	struct flow *flow = b->flow, *other = flow_reverse(b, leg);
	__u64 ahead = pkt->flags & TCP_RST ? FLOW_WINDOW_USUAL : FLOW_WINDOW_MOST;

	if (!other)
		return true;
	/* Who knows nothing of the connection refuses its SYN so (RFC 9293 3.10.7.1). */
	if (!pkt->seq && other->control & FLOW_SYN)
		return true;
	if (ahead > flow->bytes)
		ahead = flow->bytes;
	ahead += FLOW_WINDOW_FIRST;
	return pkt->seq + pkt->payload + flow->seq - other->last_ack + 1 <= ahead + 1;
}

/* The worker that owns the flow hears once of each side's FIN or RST. */
static __always_inline void flow_announce_end(frame_t *f, const struct packet *pkt,
					      const struct bound *b, __u32 leg)
{
	struct flow *flow = b->flow;
	__u32 state = (pkt->flags & TCP_FIN ? FLOW_FIN : 0) | (pkt->flags & TCP_RST ? FLOW_RST : 0);
	struct event_what what = {.kind = EVENT_CLOSING, .leg = leg};

	if ((flow->control & state) == state || !flow_end_is_likely(pkt, b, leg))
		return;
	flow_mark(flow, state);
	event_send(f, pkt, what, flow_worker(flow), EVENT_HEADERS_ONLY);
}

/* Everything before the first write: may this packet go out by its next hop? */
static __always_inline enum reason flow_may_forward(frame_t *f, const struct packet *pkt,
						    const struct nexthop *hop)
{
	if (!hop || !hop->ifindex)
		return REASON_NO_NEXTHOP;
	/* The stack would find no socket and reset the client, so not "pass". */
	if (pkt->ttl <= 1)
		return REASON_TTL_EXPIRED;
	if ((pkt->flags & (TCP_SYN | TCP_RST | TCP_FIN)) == 0 && !(pkt->flags & TCP_ACK))
		return REASON_JUNK;
	/* Last: the engine cuts what would have gone out otherwise. */
	if (frame_packet_length(f, pkt) > hop->mtu)
		return REASON_TOO_BIG;
	return REASON_OK;
}

/* The rewrite itself; fills where the packet goes. Returns -1 when a helper
 * refused, which leaves the packet fit for nothing but dropping.
 */
static __always_inline int flow_rewrite(frame_t *f, struct packet *pkt, const struct bound *b,
					__be32 daddr[4])
{
	struct flow *flow = b->flow;
	struct csum_change sum = {};
	struct headers h;
	bool options;

	if (!packet_headers(frame_data(f), frame_end(f), pkt, &h))
		return -1;
	/* ---- from here on the packet is changed: no way back to "pass" ---- */
	if (b->v4) {
		rewrite_ip4(h.ip4, b->v4, &sum);
		address_map4(daddr, b->v4->daddr);
	} else if (b->v6) {
		rewrite_ip6(h.ip6, b->v6, &sum);
		address_copy(daddr, b->v6->daddr);
	}
	options = rewrite_tcp(frame_end(f), h.tcp, pkt, flow, &sum);
	if (options) {
		__s64 changed = rewrite_options(f, pkt->l4 + sizeof(struct tcphdr),
						pkt->header - sizeof(struct tcphdr), flow,
						pkt->flags & TCP_ACK);

		if (changed < 0)
			return -1;
		sum.tcp += changed;
	}
	return frame_fix_checksum(f, pkt, &sum);
}

/* A packet that does not fit its next hop goes to the engine, which tells its sender
 * by ICMP, and cuts it: not every sender listens.
 */
static __always_inline int flow_too_big(frame_t *f, const struct packet *pkt,
					const struct flow *flow, __u32 leg, __u16 mtu)
{
	struct event_what what = {.kind = EVENT_TOO_BIG, .leg = leg, .mtu = mtu};

	if (HAS_TC_BEHIND)
		return pass(REASON_LEFT_TOO_BIG);
	if (!event_is_allowed(what.kind, bpf_ktime_get_coarse_ns()) ||
	    !event_send(f, pkt, what, flow_worker(flow), EVENT_DATA))
		return drop(REASON_TOO_BIG);
	return drop(REASON_TOO_BIG_CUT);
}

static __always_inline int flow_forward(frame_t *f, struct packet *pkt, const struct bound *b,
					__u32 leg)
{
	struct flow *flow = b->flow;
	__u32 index = flow->control & FLOW_NEXTHOP_MASK;
	struct nexthop *hop = bpf_map_lookup_elem(&nexthops, &index);
	enum reason why = flow_may_forward(f, pkt, hop);
	__be32 daddr[4] = {};
	int action;

	if (why == REASON_TOO_BIG && hop)
		return flow_too_big(f, pkt, flow, leg, hop->mtu);
	if (why != REASON_OK || !hop)
		return drop(why);
	why = frame_may_leave(f, pkt, hop);
	if (why != REASON_OK)
		return pass(why);
	flow_account(pkt, flow, frame_packets(f, pkt), bpf_ktime_get_coarse_ns());
	if (pkt->flags & (TCP_FIN | TCP_RST))
		flow_announce_end(f, pkt, b, leg);
	if (flow_rewrite(f, pkt, b, daddr))
		return drop(REASON_WRITE_ERROR);
	action = frame_send(f, pkt, hop, daddr);
	return action < 0 ? drop(REASON_WRITE_ERROR) : verdict(action, REASON_FORWARDED);
}

#endif
