// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* What happens to a packet of no bound flow. */
#ifndef SNILB_OFFER_H
#define SNILB_OFFER_H

/* One tag in the frame, and one that the kernel took off before us. */
static __always_inline bool vlan_is_stacked(const frame_t *f, const struct packet *pkt)
{
	return pkt->tagged && frame_is_tagged(f);
}

static __always_inline enum reason packet_read(frame_t *f, struct packet *pkt)
{
	enum reason why;

	if (frame_pull(f))
		return REASON_MALFORMED;
	why = packet_parse(frame_data(f), frame_end(f), pkt);
	if ((why == REASON_OK || why == REASON_ICMP) && !frame_holds(f, pkt->l3 + pkt->length))
		return REASON_MALFORMED;
	if (why == REASON_OK && vlan_is_stacked(f, pkt))
		return REASON_VLAN_STACKED;
	return why;
}

static __always_inline bool listener_has_port(__be16 port)
{
	__u32 word = bpf_ntohs(port) >> 6;
	__u64 *bits = bpf_map_lookup_elem(&listener_ports, &word);

	return bits && *bits >> (bpf_ntohs(port) & 63) & 1;
}

static __always_inline struct listener *listener_find(const struct packet *pkt)
{
	struct listener_key key = {.port = pkt->dport};

	address_copy(key.addr, pkt->daddr);
	return bpf_map_lookup_elem(&listeners, &key);
}

static __always_inline bool path_is_ours(const struct packet *pkt)
{
	struct path_key key = {.port = pkt->sport};

	address_copy(key.backend, pkt->saddr);
	address_copy(key.source, pkt->daddr);
	return bpf_map_lookup_elem(&paths, &key) != NULL;
}

/* Whether an established (or closing) socket of this node owns the packet's
 * connection. A listening one does not: its place is what we take.
 */
static __noinline int socket_owns(frame_t *f, struct packet *pkt)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	__u32 size;
	int owned;

	if (!pkt)
		return 0;
	if (pkt->family == AF_INET) {
		tuple.ipv4.saddr = pkt->saddr[3];
		tuple.ipv4.daddr = pkt->daddr[3];
		tuple.ipv4.sport = pkt->sport;
		tuple.ipv4.dport = pkt->dport;
		size = sizeof(tuple.ipv4);
		sk = bpf_skc_lookup_tcp(f, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	} else {
		address_copy(tuple.ipv6.saddr, pkt->saddr);
		address_copy(tuple.ipv6.daddr, pkt->daddr);
		tuple.ipv6.sport = pkt->sport;
		tuple.ipv6.dport = pkt->dport;
		size = sizeof(tuple.ipv6);
		sk = bpf_skc_lookup_tcp(f, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return 0;
	owned = sk->state != BPF_TCP_LISTEN;
	bpf_sk_release(sk);
	return owned;
}

static __always_inline int offer_syn(frame_t *f, struct packet *pkt, struct live *ctl, bool closing)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	int left;

	if (daemon_is_draining(ctl))
		return syn_pass(pkt, closing, REASON_DRAINING);
	if (daemon_is_dead(ctl, now))
		return syn_on_dead(f, pkt, closing);
	/* Late, it may be on its way back: the client repeats its SYN in a second. */
	if (ring_is_busy(client_worker(pkt)))
		return daemon_is_late(ctl, now) ? drop(REASON_LATE_HOLD)
						: syn_pass(pkt, closing, REASON_RING_BUSY);
	/* The last beat brought the keys of one slot ahead: the daemon would not know a
	 * cookie made of an older one.
	 */
	if (ctl->beat + COOKIE_SLOT_NS < now)
		return drop(REASON_LATE_HOLD);
	if (closing)
		flow_forget(pkt, LEG_CLIENT);
	if (pkt->payload > SYN_PAYLOAD_MAX)
		return drop(REASON_JUNK);
	left = synack_usual(f, pkt, ctl, now);
	if (left > 0)
		left = synack_make(f, pkt, ctl, now);
	if (left)
		return drop(REASON_WRITE_ERROR);
	return verdict(frame_return(f), REASON_SYN_ANSWERED);
}

/* A packet of a connection that neither we nor a socket of this node know. */
static __always_inline int offer_unknown(frame_t *f, struct packet *pkt, const struct live *ctl,
					 const struct listener *listener)
{
	struct event_what what = {.kind = EVENT_UNKNOWN, .listener = listener->id};
	__u64 now = bpf_ktime_get_coarse_ns();

	if (listener->unknown_flow == UNKNOWN_FLOW_PASS || stack_has_syns(ctl, now))
		return pass(REASON_UNKNOWN_PASS);
	/* A RST is never answered with one (RFC 9293 3.10.7.1). */
	if (listener->unknown_flow == UNKNOWN_FLOW_DROP || pkt->flags & TCP_RST)
		return drop(REASON_UNKNOWN_DROP);
	/* While the daemon is away the ring is for hellos. */
	if (daemon_is_late(ctl, now) || !event_is_allowed(what.kind, now))
		return drop(REASON_UNKNOWN_LIMITED);
	if (!event_send(f, pkt, what, bpf_get_smp_processor_id() % workers, EVENT_HEADERS_ONLY))
		return drop(REASON_EVENT_LOST);
	return drop(REASON_UNKNOWN_RESET);
}

/* Whether the client acknowledges that the engine has closed: a FIN alone, or one
 * behind an alert, is so far past the cookie.
 */
static __always_inline bool closed_before(const struct live *ctl, const struct packet *pkt,
					  __u64 wall)
{
	if ((pkt->flags & (TCP_ACK | TCP_SYN | TCP_RST)) != TCP_ACK)
		return false;
	/* Behind the FIN alone there is nothing more to come: the client's was first. */
	if (!pkt->payload && !(pkt->flags & TCP_FIN) && cookie_valid(ctl, pkt, pkt->ack - 2, wall))
		return true;
	return cookie_valid(ctl, pkt, pkt->ack - 2 - ALERT_LENGTH, wall);
}

/* A packet to one of our ports that belongs to no bound flow. closing: it had one,
 * which is over.
 */
static __always_inline int offer(frame_t *f, struct packet *pkt, bool closing)
{
	__u32 zero = 0, cookie = pkt->ack - 1;
	__u64 wall;
	bool syn;
	struct live *ctl = bpf_map_lookup_elem(&control, &zero);
	struct listener *listener = listener_find(pkt);
	struct event_what what = {.kind = EVENT_HELLO};

	if (!listener || !ctl)
		return pass(REASON_NOT_OURS);
	syn = (pkt->flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
	/* Before the cookie: one packet in six million of somebody else's
	 * connection looks like a valid one. SYNs as well: were one answered whose
	 * tuple a socket still holds (TIME_WAIT), its hello would go to that socket.
	 * In a flood of them it is most of the cost, so not where no socket can be.
	 */
	if ((!syn || ctl->flags & LIVE_SOCKETS) && socket_owns(f, pkt))
		return pass(REASON_SOCKET);
	if (syn)
		return offer_syn(f, pkt, ctl, closing);
	wall = bpf_ktime_get_coarse_ns() + ctl->wall_offset;
	if (!(pkt->flags & TCP_ACK) || pkt->flags & TCP_SYN ||
	    !cookie_valid(ctl, pkt, cookie, wall)) {
		if (!closed_before(ctl, pkt, wall))
			return offer_unknown(f, pkt, ctl, listener);
		what.kind = EVENT_CLOSED;
	}
	if (!pkt->payload && !(pkt->flags & (TCP_FIN | TCP_RST)))
		return drop(REASON_HANDSHAKE_ACK);
	what.listener = listener->id;
	if (!event_send(f, pkt, what, client_worker(pkt), EVENT_DATA))
		return drop(REASON_EVENT_LOST);
	return drop(REASON_HELLO);
}

/* A packet from a backend that no flow takes: of a handshake of the engine's, or the
 * rest of a flow that is gone. The stack must not see it: it would reset.
 */
static __always_inline int backend_event(frame_t *f, struct packet *pkt, __u32 worker)
{
	struct event_what what = {.kind = EVENT_BACKEND, .leg = LEG_BACKEND};

	if (!event_send(f, pkt, what, worker, EVENT_DATA))
		return drop(REASON_EVENT_LOST);
	return drop(REASON_BACKEND);
}

/* A port the engine speaks to backends from. */
static __always_inline bool port_is_ours(__be16 port)
{
	__u16 p = bpf_ntohs(port);

	return p >= source_port_first && p <= source_port_last;
}

/* Whether flows on the backend leg may have any port: those with source: client. */
static __always_inline bool source_may_be_client(void)
{
	__u32 zero = 0;
	struct live *ctl = bpf_map_lookup_elem(&control, &zero);

	return ctl && ctl->flags & LIVE_SOURCE_CLIENT;
}

#endif
