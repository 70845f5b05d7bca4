// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* A SYN answered by itself: its option layout is kept and its values overwritten.
 * What we do not speak becomes NOP: reflecting an unknown option would negotiate
 * it (MPTCP, SMC, TFO). Nothing is stored.
 */
#ifndef SNILB_SYNACK_H
#define SNILB_SYNACK_H

#define SYNACK_WINDOW	 64240
#define ANSWER_TTL	 64
#define WSCALE_MAX	 14 /* RFC 7323 2.3 */
#define SYN_PAYLOAD_MAX	 1500
#define SYN_PAYLOAD_ROOM 2048
#define CSUM_CHUNK	 512 /* bytes bpf_csum_diff takes on every kernel */

/* The SYN's TCP header as it becomes the SYN-ACK's. */
struct synack {
	__u8 header[64]; /* 60 at the most; 64 let an index be masked */
	__u32 len, at;	 /* of the header; of the option under the loop */
	__u32 now_ms;	 /* our TSval */
	__u16 mss;	 /* announced */
	__u16 client_mss;
	__u8 client_wscale;
	__u8 seen; /* options that count once */
	__u8 sack;
	__u8 refused; /* options the backends do not have, as `seen` */
};

enum synack_seen {
	SEEN_MSS = 1,
	SEEN_WSCALE = 2,
	SEEN_SACK = 4,
	SEEN_TIMESTAMP = 8,
};

/* Never 0: that would say that there is none. */
static __always_inline __u32 synack_tsval(__u64 now)
{
	return (now / 1000000) | 1;
}

static __always_inline void synack_blank(struct synack *s, __u32 at, __u32 size)
{
	for (__u32 i = 0; i < TCPOPT_MAX; i++) {
		if (i >= size)
			break;
		s->header[(at + i) & 63] = TCPOPT_NOP;
	}
}

/* Whether this option, seen for the first time and of its right size, was one we
 * speak; its values are then ours.
 */
static __always_inline bool synack_option(struct synack *s, __u32 at, __u8 kind, __u8 size)
{
	__u8 bit = kind == TCPOPT_MSS && size == 4		? SEEN_MSS
		   : kind == TCPOPT_WSCALE && size == 3		? SEEN_WSCALE
		   : kind == TCPOPT_SACK_PERMITTED && size == 2 ? SEEN_SACK
		   : kind == TCPOPT_TIMESTAMP && size == 10	? SEEN_TIMESTAMP
								: 0;

	if (!bit || (s->seen | s->refused) & bit)
		return false;
	s->seen |= bit;
	switch (bit) {
	case SEEN_MSS:
		s->client_mss = s->header[(at + 2) & 63] << 8 | s->header[(at + 3) & 63];
		s->header[(at + 2) & 63] = s->mss >> 8;
		s->header[(at + 3) & 63] = s->mss;
		break;
	case SEEN_WSCALE:
		s->client_wscale = s->header[(at + 2) & 63];
		if (s->client_wscale > WSCALE_MAX)
			s->client_wscale = WSCALE_MAX;
		s->header[(at + 2) & 63] = ANNOUNCED_WSCALE;
		break;
	case SEEN_SACK:
		s->sack = 1;
		break;
	case SEEN_TIMESTAMP:
		for (__u32 i = 2; i < 6; i++) {
			s->header[(at + i + 4) & 63] = s->header[(at + i) & 63];
			s->header[(at + i) & 63] = s->now_ms >> (40 - 8 * i);
		}
		break;
	}
	return true;
}

static long synack_step(__u32 i, struct synack *s)
{
	__u32 at = s->at;
	__u8 kind, size;

	if (at >= s->len || at >= TCP_HEADER_MAX)
		return 1;
	kind = s->header[at & 63];
	if (kind == TCPOPT_NOP) {
		s->at = at + 1;
		return 0;
	}
	size = s->header[(at + 1) & 63];
	if (kind == TCPOPT_EOL || size < 2 || at + size > s->len) {
		synack_blank(s, at, s->len - at);
		return 1;
	}
	s->at = at + size;
	if (!synack_option(s, at, kind, size))
		synack_blank(s, at, size);
	return 0;
}

/* Sums the payload of a SYN (TFO), which no answer carries. */
static __noinline __s64 answer_payload_sum(frame_t *f, __u32 at, __u32 len)
{
	__u32 zero = 0;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	__u32 sum = 0;

	if (!s || !length_is_within(len, 1, SYN_PAYLOAD_MAX))
		return -1;
	if (frame_load(f, at, s->data, len))
		return -1;
	/* bpf_csum_diff takes whole words: what is left of the last one is zero. */
	for (__u32 i = 0; i < 3; i++)
		s->data[(len + i) & (2 * SYN_PAYLOAD_ROOM - 1)] = 0;
	for (__u32 done = 0; done < SYN_PAYLOAD_ROOM; done += CSUM_CHUNK) {
		__u32 rest = len + 3 > done ? (len + 3 - done) & ~3u : 0;
		__s64 n;

		if (!rest)
			break;
		if (rest > CSUM_CHUNK)
			rest = CSUM_CHUNK;
		n = bpf_csum_diff(NULL, 0, (void *)(s->data + done), rest, sum);
		if (n < 0)
			return -1;
		sum = n;
	}
	return sum;
}

/* What an answer says in the words of a TCP header in front of its options. */
struct answer {
	__u32 seq, ack;
	__u32 flags, window;
};

static __always_inline void answer_numbers(__be32 *word, const struct packet *pkt,
					   const struct answer *a, __u64 *sum)
{
	csum_put32(sum, &word[0], pkt->dport | (__u32)pkt->sport << 16);
	csum_put32(sum, &word[1], bpf_htonl(a->seq));
	csum_put32(sum, &word[2], bpf_htonl(a->ack));
	/* Data offset, reserved bits, flags and window anew: a mirrored AE, CWR or
	 * ECE would negotiate ECN that no one speaks.
	 */
	csum_put32(sum, &word[3], bpf_htonl((pkt->header / 4) << 28 | a->flags << 16 | a->window));
	/* The checksum as it is, no urgent pointer. */
	csum_put32(sum, &word[4], word[4] & bpf_htonl(0xffff0000));
}

static __always_inline void synack_numbers(__be32 *word, const struct packet *pkt, __u32 cookie,
					   __u64 *sum)
{
	struct answer a = {
		.seq = cookie,
		.ack = pkt->seq + 1,
		.flags = TCP_SYN | TCP_ACK,
		.window = SYNACK_WINDOW,
	};

	answer_numbers(word, pkt, &a, sum);
}

static __always_inline void answer_ip4(struct iphdr *ip, __u16 length)
{
	__u64 sum = 0;
	__be32 saddr = ip->saddr;
	__be16 ttl_proto = bpf_htons(ANSWER_TTL << 8 | IPPROTO_TCP);
	__be16 *word = (__be16 *)ip;

	csum_change16(&sum, word[0], word[0] & bpf_htons(0xfffc)); /* no ECN */
	word[0] &= bpf_htons(0xfffc);
	csum_change16(&sum, ip->tot_len, bpf_htons(length));
	ip->tot_len = bpf_htons(length);
	csum_change16(&sum, word[4], ttl_proto);
	word[4] = ttl_proto;
	ip->check = csum_apply(ip->check, sum);
	ip->saddr = ip->daddr;
	ip->daddr = saddr;
}

static __always_inline void answer_ip6(struct ipv6hdr *ip, __u16 payload)
{
	struct in6_addr saddr = ip->saddr;

	*(__be32 *)ip &= bpf_htonl(0xffcfffff); /* no ECN */
	ip->payload_len = bpf_htons(payload);
	ip->hop_limit = ANSWER_TTL;
	ip->saddr = ip->daddr;
	ip->daddr = saddr;
}

static __always_inline void answer_lower_layers(struct headers *h, const struct packet *pkt)
{
	__u8 mac[6];

	if (pkt->family == AF_INET)
		answer_ip4(h->ip4, sizeof(*h->ip4) + pkt->header);
	else
		answer_ip6(h->ip6, pkt->header);
	__builtin_memcpy(mac, h->eth->h_source, 6);
	__builtin_memcpy(h->eth->h_source, h->eth->h_dest, 6);
	__builtin_memcpy(h->eth->h_dest, mac, 6);
}

/* Cuts a SYN's payload off, in length and checksum. */
static __always_inline int answer_trim(frame_t *f, const struct packet *pkt,
				       struct csum_change *change)
{
	__u16 with = pkt->header + pkt->payload;
	__s64 sum = answer_payload_sum(f, pkt->l4 + pkt->header, pkt->payload);

	if (sum < 0 || frame_trim(f, pkt->l4 + pkt->header))
		return -1;
	change->tcp += (__u32)~sum;
	csum_change16(&change->pseudo, bpf_htons(with), bpf_htons(pkt->header));
	return 0;
}

#define OPTION_MSS	       0x02040000 /* and the value */
#define NOP_WSCALE	       0x01030300 /* and the value */
#define SACK_TIMESTAMP	       0x0402080a
#define NOP_NOP_SACK_PERMITTED 0x01010402
#define SACK_PERMITTED_EOL     0x04020000
#define SACK_PERMITTED_NOP     0x04020101

/* How nearly every SYN has its options, the MSS first. Word 5 of the header is the first. */
enum synack_layout {
	LAYOUT_OTHER,
	LAYOUT_LINUX,	/* SACK, timestamp, NOP, scale; Android, too */
	LAYOUT_WINDOWS, /* NOP, scale, NOP, NOP, SACK */
	LAYOUT_APPLE,	/* NOP, scale, NOP, NOP, timestamp, SACK, end */
};

static __always_inline bool word_is(__be32 word, __u32 want, __u32 mask)
{
	return (word & bpf_htonl(mask)) == bpf_htonl(want);
}

static __always_inline enum synack_layout synack_layout(const __be32 *word, void *end, __u32 header)
{
	if ((void *)(word + 8) > end || !word_is(word[5], OPTION_MSS, 0xffff0000))
		return LAYOUT_OTHER;
	if (header == 40 && (void *)(word + 10) <= end && word_is(word[6], SACK_TIMESTAMP, ~0) &&
	    word_is(word[9], NOP_WSCALE, 0xffffff00))
		return LAYOUT_LINUX;
	if (!word_is(word[6], NOP_WSCALE, 0xffffff00))
		return LAYOUT_OTHER;
	if (header == 32 && word_is(word[7], NOP_NOP_SACK_PERMITTED, ~0))
		return LAYOUT_WINDOWS;
	if (header == 44 && (void *)(word + 11) <= end && word_is(word[7], NOP_NOP_TIMESTAMP, ~0) &&
	    word_is(word[10], SACK_PERMITTED_EOL, ~0))
		return LAYOUT_APPLE;
	return LAYOUT_OTHER;
}

/* Our timestamp, and the client's as its echo. */
static __always_inline void synack_timestamp(__u64 *sum, __be32 *word, __u32 now_ms)
{
	csum_put32(sum, &word[1], word[0]);
	csum_put32(sum, &word[0], bpf_htonl(now_ms));
}

/* A SYN of a usual layout becomes the SYN-ACK where it lies. Returns 1 if it is of none,
 * -1 when a helper refused.
 */
static __always_inline int synack_usual(frame_t *f, const struct packet *pkt,
					const struct live *ctl, __u64 now)
{
	__u16 mss = pkt->family == AF_INET ? ctl->mss4 : ctl->mss6;
	struct cookie_options opt = {.sack = 1};
	struct csum_change change = {};
	enum synack_layout layout;
	struct headers h;
	__be32 *word;

	if (pkt->payload || ctl->flags & (LIVE_NO_SACK | LIVE_NO_TIMESTAMPS) ||
	    !packet_headers(frame_data(f), frame_end(f), pkt, &h))
		return 1;
	word = (__be32 *)h.tcp;
	layout = synack_layout(word, frame_end(f), pkt->header);
	if (layout == LAYOUT_OTHER)
		return 1;
	opt.mss_class = mss_class(pkt->family, bpf_ntohl(word[5]));
	opt.wscale = bpf_ntohl(word[layout == LAYOUT_LINUX ? 9 : 6]);
	if (opt.wscale > WSCALE_MAX)
		opt.wscale = WSCALE_MAX;

	synack_numbers(word, pkt, cookie_make(ctl, pkt, &opt, now + ctl->wall_offset), &change.tcp);
	csum_put32(&change.tcp, &word[5], bpf_htonl(OPTION_MSS | mss));
	csum_put32(&change.tcp, &word[layout == LAYOUT_LINUX ? 9 : 6],
		   bpf_htonl(NOP_WSCALE | ANNOUNCED_WSCALE));
	if (layout == LAYOUT_LINUX)
		synack_timestamp(&change.tcp, &word[7], synack_tsval(now));
	if (layout == LAYOUT_APPLE) {
		synack_timestamp(&change.tcp, &word[8], synack_tsval(now));
		csum_put32(&change.tcp, &word[10], bpf_htonl(SACK_PERMITTED_NOP));
	}
	answer_lower_layers(&h, pkt);
	return frame_fix_checksum(f, pkt, &change);
}

/* A SYN of any layout, on a copy of its header. Returns -1 when a helper refused. */
static __noinline int synack_make(frame_t *f, struct packet *pkt, struct live *ctl, __u64 now)
{
	struct csum_change change = {};
	struct synack s = {.client_wscale = COOKIE_NO_WSCALE, .at = sizeof(struct tcphdr)};
	struct cookie_options opt;
	struct headers h;
	__u32 old, len;
	__u64 sum = 0;

	if (!ctl || !pkt)
		return -1;
	len = pkt->header;
	if (!length_is_within(len, sizeof(struct tcphdr), TCP_HEADER_MAX))
		return -1;
	if (frame_load(f, pkt->l4, s.header, len))
		return -1;
	old = bpf_csum_diff(NULL, 0, (void *)s.header, TCP_HEADER_MAX, 0);
	s.len = len;
	s.now_ms = synack_tsval(now);
	s.mss = pkt->family == AF_INET ? ctl->mss4 : ctl->mss6;
	s.refused = (ctl->flags & LIVE_NO_SACK ? SEEN_SACK : 0) |
		    (ctl->flags & LIVE_NO_TIMESTAMPS ? SEEN_TIMESTAMP : 0);
	bpf_loop(TCPOPT_MAX + 1, synack_step, &s, 0);

	opt.mss_class = mss_class(pkt->family, s.client_mss);
	opt.wscale = s.client_wscale;
	opt.sack = s.sack;
	synack_numbers((__be32 *)s.header, pkt, cookie_make(ctl, pkt, &opt, now + ctl->wall_offset),
		       &sum);
	change.tcp = (__u32)bpf_csum_diff(NULL, 0, (void *)s.header, TCP_HEADER_MAX, ~old);

	/* ---- from here on the packet is changed ---- */
	if (pkt->payload && answer_trim(f, pkt, &change))
		return -1;
	if (frame_store(f, pkt->l4, s.header, len))
		return -1;
	if (!packet_headers(frame_data(f), frame_end(f), pkt, &h))
		return -1;
	answer_lower_layers(&h, pkt);
	return frame_fix_checksum(f, pkt, &change);
}

#endif
