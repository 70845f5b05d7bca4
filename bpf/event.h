// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* Packets for the engine: a header and the packet from its IP header on, in the
 * ring of the worker that owns the connection.
 */
#ifndef SNILB_EVENT_H
#define SNILB_EVENT_H

/* A source port belongs to one worker, so that ports need no lock. */
static __always_inline __u32 port_worker(__be16 port)
{
	return (__u16)(bpf_ntohs(port) - source_port_first) % workers;
}

/* Odd, and far from any regular pattern: the golden ratio's fraction (Knuth). */
#define HASH_FACTOR 0x9e3779b97f4a7c15ULL

/* A client's address and port belong to one worker, so that a connection meets there
 * what is left of an earlier one. Keyed: no client can choose to meet many others.
 */
static __always_inline __u32 client_worker(const struct packet *pkt)
{
	__u64 h = worker_key;

	h = (h ^ words(pkt->saddr[0], pkt->saddr[1])) * HASH_FACTOR;
	h = (h ^ h >> 32 ^ words(pkt->saddr[2], pkt->saddr[3])) * HASH_FACTOR;
	h = (h ^ h >> 32 ^ pkt->sport) * HASH_FACTOR;
	return ((h >> 32) * workers) >> 32;
}

/* Whether the worker behind this ring is so far behind that new connections
 * should go elsewhere.
 */
static __always_inline bool ring_is_busy(__u32 worker)
{
	void *ring = bpf_map_lookup_elem(&rings, &worker);

	return !ring || bpf_ringbuf_query(ring, BPF_RB_AVAIL_DATA) > ring_busy;
}

struct event_what {
	__u16 listener; /* struct listener.id, 0 on the backend leg */
	__u8 kind;	/* enum event_kind */
	__u8 leg;	/* enum leg */
	__u16 mtu;	/* of EVENT_TOO_BIG */
	__u16 pad;
};

/* Returns false when the ring is full: the packet is then lost to the engine, and
 * TCP repeats it. limit is how many bytes of the packet are wanted.
 */
static __noinline bool event_send(frame_t *f, const struct packet *pkt, struct event_what what,
				  __u32 worker, __u32 limit)
{
	/* That a flow ends is no hurry. In the same ring it would keep later events from waking the
	 * worker, which the kernel does for the first one only that the reader has not seen.
	 */
	bool quiet = what.kind == EVENT_CLOSING;
	__u32 zero = 0, captured, at = quiet ? MAX_WORKERS + worker : worker;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	void *ring = bpf_map_lookup_elem(&rings, &at);

	if (!s || !ring || !pkt)
		return false;
	captured = pkt->length;
	if (captured > limit)
		captured = limit;
	if (!length_is_within(captured, 1, EVENT_DATA))
		return false;
	s->header.time = bpf_ktime_get_coarse_ns();
	s->header.ifindex = frame_ifindex(f);
	s->header.length = pkt->length;
	s->header.captured = captured;
	s->header.listener = what.listener;
	s->header.kind = what.kind;
	s->header.leg = what.leg;
	s->header.mtu = what.mtu;
	if (frame_load(f, 6, s->header.mac, 6) || frame_load(f, pkt->l3, s->data, captured))
		return false;
	return bpf_ringbuf_output(ring, s, sizeof(s->header) + captured,
				  quiet ? BPF_RB_NO_WAKEUP : 0) == 0;
}

#define EVENT_HEADERS_ONLY (sizeof(struct ipv6hdr) + TCP_HEADER_MAX)
/* An ICMP error with the headers of the packet it quotes. */
#define EVENT_ICMP_ERROR   (sizeof(struct ipv6hdr) + 8 + EVENT_HEADERS_ONLY)

/* Events that a stranger could cause at will are rationed, a kind, window and CPU. */
static __always_inline bool event_is_allowed(__u32 kind, __u64 now)
{
	struct allowance *a = bpf_map_lookup_elem(&allowance, &kind);

	if (!a)
		return false;
	if (a->window != now >> ALLOWANCE_SHIFT) {
		a->window = now >> ALLOWANCE_SHIFT;
		a->used = 0;
	}
	return a->used++ < EVENTS_PER_WINDOW;
}

#endif
