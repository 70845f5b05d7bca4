// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* The rewrite of a bound flow's packet: one function for both directions, four
 * offsets, no byte more or less. What it changes under the TCP checksum comes
 * back as sums.
 */
#ifndef SNILB_REWRITE_H
#define SNILB_REWRITE_H

#define TCPOPT_EOL	      0
#define TCPOPT_NOP	      1
#define TCPOPT_MSS	      2
#define TCPOPT_WSCALE	      3
#define TCPOPT_SACK_PERMITTED 4
#define TCPOPT_SACK	      5
#define TCPOPT_TIMESTAMP      8
#define TCPOPT_MAX	      40
#define NOP_NOP_TIMESTAMP     0x0101080a
#define NOP_NOP_SACK	      0x01010500 /* and the length */

/* The options of one packet, copied out: 64 bytes let an index be masked. */
struct options {
	__u8 bytes[64];
	__u32 len, at;
	__u32 ack, tsval, tsecr; /* added to SACK edges, TSval, TSecr */
};

static __always_inline void option_add32(struct options *o, __u32 at, __u32 delta)
{
	__u32 v = (__u32)o->bytes[at & 63] << 24 | o->bytes[(at + 1) & 63] << 16 |
		  o->bytes[(at + 2) & 63] << 8 | o->bytes[(at + 3) & 63];

	v += delta;
	o->bytes[at & 63] = v >> 24;
	o->bytes[(at + 1) & 63] = v >> 16;
	o->bytes[(at + 2) & 63] = v >> 8;
	o->bytes[(at + 3) & 63] = v;
}

/* One option a call; returns 1 at the end or where the rest makes no sense: what
 * cannot be read is left alone, as its receiver will leave it.
 */
static long option_translate(__u32 i, struct options *o)
{
	__u32 at = o->at;
	__u8 kind, size;

	if (at >= o->len || at >= TCPOPT_MAX)
		return 1;
	kind = o->bytes[at & 63];
	if (kind == TCPOPT_EOL)
		return 1;
	if (kind == TCPOPT_NOP) {
		o->at = at + 1;
		return 0;
	}
	size = o->bytes[(at + 1) & 63];
	if (size < 2 || at + size > o->len)
		return 1;
	o->at = at + size;
	if (kind == TCPOPT_TIMESTAMP && size == 10) {
		option_add32(o, at + 2, o->tsval);
		option_add32(o, at + 6, o->tsecr);
	} else if (kind == TCPOPT_SACK && size >= 10 && size % 8 == 2) {
		for (__u32 edge = 2; edge < 34; edge += 4)
			if (edge < size)
				option_add32(o, at + edge, o->ack);
	}
	return 0;
}

/* The general case: any options in any order, on a copy, so that the loop's bounds
 * are those of an array. Returns what changed, as a sum to add to the TCP
 * checksum's, or -1 when a helper refused.
 */
static __noinline __s64 rewrite_options(frame_t *f, __u32 at, __u32 len, struct flow *flow,
					bool has_ack)
{
	struct options o = {.len = len};
	__u32 old;

	if (!flow || !length_is_within(len, 4, TCPOPT_MAX))
		return -1;
	o.ack = flow->ack;
	o.tsval = flow->tsval;
	o.tsecr = has_ack ? flow->tsecr : 0;
	if (frame_load(f, at, o.bytes, len))
		return -1;
	old = bpf_csum_diff(NULL, 0, (void *)o.bytes, TCPOPT_MAX, 0);
	bpf_loop(TCPOPT_MAX, option_translate, &o, 0);
	if (frame_store(f, at, o.bytes, len))
		return -1;
	return (__u32)bpf_csum_diff(NULL, 0, (void *)o.bytes, TCPOPT_MAX, ~old);
}

/* Scaled as its sender scales it -> as its receiver was told (RFC 7323 2.3). */
static __always_inline __u16 rewrite_window(__u16 window, int shift)
{
	__u32 w = window;

	if (shift >= 0)
		w <<= shift & 31;
	else
		w >>= -shift & 31;
	return w > 65535 ? 65535 : w;
}

static __always_inline int flow_shift(const struct flow *flow)
{
	return (int)(flow->control >> FLOW_SHIFT_POS & FLOW_SHIFT_MASK) - FLOW_SHIFT_BIAS;
}

/* Whether the options are the timestamp alone, or SACK blocks behind it, in the layout
 * that nearly every packet has. Word 5 is the first of them.
 */
static __always_inline bool options_are_usual(const __be32 *word, void *data_end, __u32 header)
{
	if ((void *)(word + 8) > data_end || word[5] != bpf_htonl(NOP_NOP_TIMESTAMP))
		return false;
	if (header == 32)
		return true;
	return header > 36 && header % 8 == 4 && (void *)(word + 9) <= data_end &&
	       word[8] == bpf_htonl(NOP_NOP_SACK | (header - 34));
}

/* Translates them where they lie. */
static __always_inline void rewrite_usual_options(void *data_end, __be32 *word,
						  const struct packet *pkt, const struct flow *flow,
						  __u64 *sum)
{
	csum_add32(sum, &word[6], flow->tsval);
	if (pkt->flags & TCP_ACK)
		csum_add32(sum, &word[7], flow->tsecr);
	for (__u32 edge = 9; edge < TCP_HEADER_MAX / 4; edge++) {
		if (edge * 4 >= pkt->header || (void *)(word + edge + 1) > data_end)
			break;
		csum_add32(sum, &word[edge], flow->ack);
	}
}

/* Ports, numbers, window, and options of the usual layout. Returns whether options are
 * left to translate.
 */
static __always_inline bool rewrite_tcp(void *data_end, struct tcphdr *tcp,
					const struct packet *pkt, const struct flow *flow,
					struct csum_change *sum)
{
	__be32 *word = (__be32 *)tcp;
	int shift = flow_shift(flow);

	csum_put32(&sum->tcp, &word[0], flow->sport | (__u32)flow->dport << 16);
	csum_put32(&sum->tcp, &word[1], bpf_htonl(pkt->seq + flow->seq));
	if (pkt->flags & TCP_ACK)
		csum_put32(&sum->tcp, &word[2], bpf_htonl(pkt->ack + flow->ack));
	if (shift && !(pkt->flags & TCP_SYN)) {
		__be16 window = bpf_htons(rewrite_window(bpf_ntohs(tcp->window), shift));

		csum_change16(&sum->tcp, tcp->window, window);
		tcp->window = window;
	}
	if (pkt->header == sizeof(*tcp))
		return false;
	if (!options_are_usual(word, data_end, pkt->header))
		return true;
	rewrite_usual_options(data_end, word, pkt, flow, &sum->tcp);
	return false;
}

static __always_inline void rewrite_ip4(struct iphdr *ip, const struct flow4 *flow,
					struct csum_change *sum)
{
	__u64 header = 0;

	csum_change32(&sum->pseudo, ip->saddr, flow->saddr);
	csum_change32(&sum->pseudo, ip->daddr, flow->daddr);
	header = sum->pseudo;
	ip->saddr = flow->saddr;
	ip->daddr = flow->daddr;
	/* TTL is the first byte of its 16-bit word. */
	csum_change16(&header, bpf_htons(ip->ttl << 8), bpf_htons((ip->ttl - 1) << 8));
	ip->ttl--;
	ip->check = csum_apply(ip->check, header);
}

static __always_inline void rewrite_ip6(struct ipv6hdr *ip, const struct flow6 *flow,
					struct csum_change *sum)
{
	__be32 *saddr = ip->saddr.in6_u.u6_addr32;
	__be32 *daddr = ip->daddr.in6_u.u6_addr32;

#pragma unroll
	for (int i = 0; i < 4; i++) {
		csum_change32(&sum->pseudo, saddr[i], flow->saddr[i]);
		csum_change32(&sum->pseudo, daddr[i], flow->daddr[i]);
		saddr[i] = flow->saddr[i];
		daddr[i] = flow->daddr[i];
	}
	ip->hop_limit--;
}

#endif
