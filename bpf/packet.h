// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* What a packet says, read once. Nothing here writes to the packet. */
#ifndef SNILB_PACKET_H
#define SNILB_PACKET_H

#define ETH_P_IP     0x0800
#define ETH_P_IPV6   0x86DD
#define ETH_P_8021Q  0x8100
#define ETH_P_8021AD 0x88A8

#define AF_INET	 2
#define AF_INET6 10

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_PSH 0x08
#define TCP_ACK 0x10

#define IP_OFFSET_OR_MORE 0x3fff /* fragment offset and MF, host order */
#define VLAN_HEADER	  4
#define TCP_HEADER_MAX	  60
#define TCP_CHECK_OFFSET  16

/* A TCP packet of either family. IPv4 addresses are v4-mapped, so that one key
 * serves both in the tables that are not looked up for every packet.
 */
struct packet {
	__be32 saddr[4], daddr[4];
	__be16 sport, dport;
	__u32 seq, ack;
	__u32 l3, l4;  /* offsets from the frame's start, bytes */
	__u32 header;  /* of TCP with its options, bytes: 20 to 60 */
	__u32 length;  /* of the IP packet, bytes */
	__u32 payload; /* of TCP, bytes */
	__u8 family;   /* AF_INET or AF_INET6 */
	__u8 flags;    /* TCP_* */
	__u8 ttl;
	__u8 tagged; /* one VLAN tag, in the frame */
};

/* Header pointers, valid as long as no helper touched the packet. */
struct headers {
	struct ethhdr *eth;
	union {
		struct iphdr *ip4;
		struct ipv6hdr *ip6;
	};
	struct tcphdr *tcp;
};

/* Whether a number of bytes is in these limits, both ends included. Of one comparison for
 * both, which the compiler would make, or of one with 0 in place of 1, Linux 6.1 does not
 * learn the lower limit: so the compiler must not know it.
 */
static __always_inline bool length_is_within(__u32 length, __u32 least, __u32 most)
{
	barrier_var(least);
	return length >= least && length <= most;
}

static __always_inline void address_map4(__be32 to[4], __be32 from)
{
	to[0] = 0;
	to[1] = 0;
	to[2] = bpf_htonl(0xffff);
	to[3] = from;
}

static __always_inline void address_copy(__be32 to[4], const __be32 from[4])
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

/* Returns REASON_OK, or REASON_ICMP, and the offset of what IP carries; or why the
 * packet is not for us.
 */
static __always_inline enum reason packet_parse_ip4(void *data, void *data_end, struct packet *pkt)
{
	struct iphdr *ip = data + pkt->l3;

	if ((void *)(ip + 1) > data_end)
		return REASON_MALFORMED;
	if (ip->version != 4)
		return REASON_MALFORMED;
	if (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_ICMP)
		return REASON_NOT_TCP;
	if (ip->ihl != 5)
		return ip->ihl < 5 ? REASON_MALFORMED : REASON_IP_OPTIONS;
	if (ip->frag_off & bpf_htons(IP_OFFSET_OR_MORE))
		return REASON_FRAGMENT;

	pkt->family = AF_INET;
	pkt->ttl = ip->ttl;
	pkt->length = bpf_ntohs(ip->tot_len);
	pkt->l4 = pkt->l3 + sizeof(*ip);
	address_map4(pkt->saddr, ip->saddr);
	address_map4(pkt->daddr, ip->daddr);
	return ip->protocol == IPPROTO_TCP ? REASON_OK : REASON_ICMP;
}

static __always_inline enum reason packet_parse_ip6(void *data, void *data_end, struct packet *pkt)
{
	struct ipv6hdr *ip = data + pkt->l3;

	if ((void *)(ip + 1) > data_end)
		return REASON_MALFORMED;
	if (ip->version != 6)
		return REASON_MALFORMED;
	switch (ip->nexthdr) {
	case IPPROTO_TCP:
	case IPPROTO_ICMPV6:
		break;
	case IPPROTO_FRAGMENT:
		return REASON_FRAGMENT;
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
	case IPPROTO_AH:
		return REASON_EXTENSION_HEADER;
	default:
		return REASON_NOT_TCP;
	}

	pkt->family = AF_INET6;
	pkt->ttl = ip->hop_limit;
	pkt->length = bpf_ntohs(ip->payload_len) + sizeof(*ip);
	pkt->l4 = pkt->l3 + sizeof(*ip);
	address_copy(pkt->saddr, ip->saddr.in6_u.u6_addr32);
	address_copy(pkt->daddr, ip->daddr.in6_u.u6_addr32);
	return ip->nexthdr == IPPROTO_TCP ? REASON_OK : REASON_ICMP;
}

static __always_inline enum reason packet_parse_tcp(void *data, void *data_end, struct packet *pkt)
{
	struct tcphdr *tcp = data + pkt->l4;

	if ((void *)(tcp + 1) > data_end)
		return REASON_MALFORMED;
	pkt->header = tcp->doff * 4;
	if (pkt->header < sizeof(*tcp))
		return REASON_MALFORMED;
	/* The options must be in reach as well: later reads rely on it. */
	if (data + pkt->l4 + pkt->header > data_end)
		return REASON_MALFORMED;
	if (pkt->l4 - pkt->l3 + pkt->header > pkt->length)
		return REASON_MALFORMED;

	pkt->payload = pkt->length - (pkt->l4 - pkt->l3) - pkt->header;
	pkt->sport = tcp->source;
	pkt->dport = tcp->dest;
	pkt->seq = bpf_ntohl(tcp->seq);
	pkt->ack = bpf_ntohl(tcp->ack_seq);
	pkt->flags = ((__u8 *)tcp)[13];
	return REASON_OK;
}

/* Reads Ethernet, at most one VLAN tag, IP and TCP; of ICMP (REASON_ICMP) only IP.
 * Whether the frame holds all that IP says is not known here.
 */
static __always_inline enum reason packet_parse(void *data, void *data_end, struct packet *pkt)
{
	struct ethhdr *eth = data;
	enum reason why;
	__be16 proto;

	if ((void *)(eth + 1) > data_end)
		return REASON_MALFORMED;
	/* No TCP is sent to a group, and an answer would have the group as its sender. */
	if (eth->h_dest[0] & 1)
		return REASON_NOT_OURS;
	proto = eth->h_proto;
	pkt->l3 = sizeof(*eth);
	if (proto == bpf_htons(ETH_P_8021Q) || proto == bpf_htons(ETH_P_8021AD)) {
		if (data + sizeof(*eth) + VLAN_HEADER > data_end)
			return REASON_MALFORMED;
		proto = *(__be16 *)(data + sizeof(*eth) + 2);
		pkt->l3 += VLAN_HEADER;
		pkt->tagged = 1;
	}

	if (proto == bpf_htons(ETH_P_IP))
		why = packet_parse_ip4(data, data_end, pkt);
	else if (proto == bpf_htons(ETH_P_IPV6))
		why = packet_parse_ip6(data, data_end, pkt);
	else if (proto == bpf_htons(ETH_P_8021Q) || proto == bpf_htons(ETH_P_8021AD))
		why = REASON_VLAN_STACKED;
	else
		why = REASON_NOT_TCP;
	return why == REASON_OK ? packet_parse_tcp(data, data_end, pkt) : why;
}

/* The pointers again, after a helper made the old ones invalid. */
static __always_inline bool packet_headers(void *data, void *data_end, const struct packet *pkt,
					   struct headers *h)
{
	__u32 l3 = pkt->tagged ? sizeof(struct ethhdr) + VLAN_HEADER : sizeof(struct ethhdr);
	__u32 ip = pkt->family == AF_INET ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);

	h->eth = data;
	h->ip4 = data + l3;
	h->tcp = data + l3 + ip;
	return (void *)(h->tcp + 1) <= data_end;
}

#endif
