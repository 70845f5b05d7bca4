// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* ICMP errors about packets that we rewrote. Whoever sent the packet must hear of
 * them, in its own numbers: the engine translates them.
 */
#ifndef SNILB_ICMP_H
#define SNILB_ICMP_H

#define ICMP_HEADER	  8
#define ICMP4_UNREACHABLE 3
#define ICMP6_UNREACHABLE 1
#define ICMP6_TOO_BIG	  2
#define IP_OFFSET	  0x1fff

/* What routers must quote of TCP (RFC 792). */
struct quoted_tcp {
	__be16 sport, dport;
	__be32 seq;
};

/* The addresses of the quoted IPv4 packet, turned around. Returns its length. */
static __always_inline __u32 icmp_quote4(frame_t *f, struct packet *pkt, __u32 at)
{
	struct iphdr ip;

	if (frame_load(f, at, &ip, sizeof(ip)))
		return 0;
	if (ip.version != 4 || ip.ihl != 5 || ip.protocol != IPPROTO_TCP ||
	    ip.frag_off & bpf_htons(IP_OFFSET))
		return 0;
	address_map4(pkt->saddr, ip.daddr);
	address_map4(pkt->daddr, ip.saddr);
	return sizeof(ip);
}

static __always_inline __u32 icmp_quote6(frame_t *f, struct packet *pkt, __u32 at)
{
	struct ipv6hdr ip;

	if (frame_load(f, at, &ip, sizeof(ip)))
		return 0;
	if (ip.version != 6 || ip.nexthdr != IPPROTO_TCP)
		return 0;
	address_copy(pkt->saddr, ip.daddr.in6_u.u6_addr32);
	address_copy(pkt->daddr, ip.saddr.in6_u.u6_addr32);
	return sizeof(ip);
}

/* Makes pkt's tuple that of an answer to the quoted packet: a packet of the leg the
 * error came from. Returns 0 if it is no error about a TCP packet.
 */
static __noinline int icmp_quoted(frame_t *f, struct packet *pkt)
{
	struct quoted_tcp tcp;
	__u32 at, length;
	__u8 type;

	if (!pkt || frame_load(f, pkt->l4, &type, sizeof(type)))
		return 0;
	at = pkt->l4 + ICMP_HEADER;
	if (pkt->family == AF_INET && type == ICMP4_UNREACHABLE)
		length = icmp_quote4(f, pkt, at);
	else if (pkt->family == AF_INET6 && (type == ICMP6_UNREACHABLE || type == ICMP6_TOO_BIG))
		length = icmp_quote6(f, pkt, at);
	else
		return 0;
	/* What Ethernet filled the frame up with is no quote. */
	if (!length || at + length + sizeof(tcp) > pkt->l3 + pkt->length ||
	    frame_load(f, at + length, &tcp, sizeof(tcp)))
		return 0;
	pkt->sport = tcp.dport;
	pkt->dport = tcp.sport;
	return 1;
}

static __noinline int icmp(frame_t *f, struct packet *pkt, __u32 leg)
{
	struct event_what what = {.kind = EVENT_ICMP, .leg = leg};
	__u32 worker;
	struct bound b;

	if (!pkt)
		return pass(REASON_NOT_TCP);
	/* Here and not where packets are read: there it doubles the verifier's paths. */
	if (vlan_is_stacked(f, pkt))
		return pass(REASON_VLAN_STACKED);
	if (!icmp_quoted(f, pkt))
		return pass(REASON_NOT_TCP);
	if (flow_find(pkt, leg, &b))
		worker = flow_worker(b.flow);
	else if (leg == LEG_BACKEND && port_is_ours(pkt->dport) && path_is_ours(pkt))
		worker = port_worker(pkt->dport);
	else
		return pass(REASON_NOT_TCP);
	if (!event_is_allowed(what.kind, bpf_ktime_get_coarse_ns()))
		return drop(REASON_ICMP_LIMITED);
	if (!event_send(f, pkt, what, worker, EVENT_ICMP_ERROR))
		return drop(REASON_EVENT_LOST);
	return drop(REASON_ICMP);
}

#endif
