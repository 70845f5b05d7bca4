// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* A frame as TC has it: what the core asks of the kernel about one, and has it do.
 * frame_xdp.h is the other skin, and has the same functions.
 */
#ifndef SNILB_FRAME_H
#define SNILB_FRAME_H

/* Not in the UAPI headers of the oldest kernel we build on. */
#define F_IPV6	     (1ULL << 7)
#define F_PSEUDO_HDR (1ULL << 4)
#ifndef TCX_NEXT
#define TCX_NEXT -1 /* let the programs behind us and the stack have it */
#endif
#define TCX_DROP 2

typedef struct __sk_buff frame_t;

/* What becomes of a frame. */
#define FRAME_PASS    TCX_NEXT
#define FRAME_DROP    TCX_DROP
/* Whether what is passed on gets here once more, for what this skin cannot do. */
#define HAS_TC_BEHIND 0

static __always_inline void *frame_data(const frame_t *f)
{
	return (void *)(long)f->data;
}

static __always_inline void *frame_end(const frame_t *f)
{
	return (void *)(long)f->data_end;
}

static __always_inline __u32 frame_ifindex(const frame_t *f)
{
	return f->ifindex;
}

/* Whether so many bytes from its start are in the frame, in reach or not. */
static __always_inline bool frame_holds(frame_t *f, __u32 bytes)
{
	return bytes <= f->len;
}

static __always_inline int frame_load(frame_t *f, __u32 at, void *to, __u32 len)
{
	return bpf_skb_load_bytes(f, at, to, len);
}

static __always_inline int frame_store(frame_t *f, __u32 at, const void *from, __u32 len)
{
	return bpf_skb_store_bytes(f, at, from, len, 0);
}

/* Brings the headers into reach when a driver left them in fragments. */
static __always_inline int frame_pull(frame_t *f)
{
	__u32 most = sizeof(struct ethhdr) + VLAN_HEADER + sizeof(struct ipv6hdr) + TCP_HEADER_MAX;

	if (frame_data(f) + most <= frame_end(f) || f->len <= frame_end(f) - frame_data(f))
		return 0;
	/* Headers only: the rest stays where it is. */
	return bpf_skb_pull_data(f, f->len < most ? f->len : most);
}

/* A tag that the kernel took off before us, beside the one in the frame. */
static __always_inline bool frame_is_tagged(const frame_t *f)
{
	return f->vlan_present;
}

/* What a super-packet (GSO) becomes on a wire. Its count of segments may be left to
 * the kernel, as the drivers of virtual machines do: only gso_size tells it then.
 */
static __always_inline __u32 frame_packets(frame_t *f, const struct packet *pkt)
{
	__u32 size = f->gso_size;

	if (f->gso_segs)
		return f->gso_segs;
	return size && pkt->payload > size ? (pkt->payload + size - 1) / size : 1;
}

/* Bytes of its largest IP packet there. */
static __always_inline __u32 frame_packet_length(frame_t *f, const struct packet *pkt)
{
	__u32 size = f->gso_size;

	return size && pkt->payload > size ? pkt->length - pkt->payload + size : pkt->length;
}

/* Hands the sums to the kernel, which knows what its checksum state makes of them
 * (a GSO packet's field holds the sum of its pseudo header only).
 */
static __always_inline int frame_fix_checksum(frame_t *f, const struct packet *pkt,
					      const struct csum_change *sum)
{
	__u64 pseudo = F_PSEUDO_HDR;
	__u32 at = pkt->l4 + TCP_CHECK_OFFSET;

	if (pkt->family == AF_INET6 && has_csum_ipv6)
		pseudo |= F_IPV6;
	if (sum->pseudo && bpf_l4_csum_replace(f, at, 0, csum_fold64(sum->pseudo), pseudo))
		return -1;
	return bpf_l4_csum_replace(f, at, 0, csum_fold64(sum->tcp), 0);
}

/* A checksum that the device is to finish: the kernel knows. */
static __always_inline bool frame_is_partial(frame_t *f, const struct packet *pkt)
{
	return false;
}

/* Cuts what is behind the headers off. */
static __always_inline int frame_trim(frame_t *f, __u32 length)
{
	return bpf_skb_change_tail(f, length, 0);
}

/* Sends it back by the interface it came from. */
static __always_inline int frame_return(const frame_t *f)
{
	return bpf_redirect(f->ifindex, 0);
}

/* Why it cannot be sent by this next hop from here, before the first write. */
static __always_inline enum reason frame_may_leave(frame_t *f, struct packet *pkt,
						   const struct nexthop *hop)
{
	return REASON_OK;
}

/* Sends it to daddr by a next hop; the kernel knows the neighbour, or asks for it. */
static __always_inline int frame_send(frame_t *f, const struct packet *pkt,
				      const struct nexthop *hop, const __be32 daddr[4])
{
	struct bpf_redir_neigh to = {.nh_family = hop->family};
	bool on_link = !(hop->gateway[0] | hop->gateway[1] | hop->gateway[2] | hop->gateway[3]);

	/* The tag was the last link's; a VLAN device puts on its own. */
	if ((pkt->tagged || f->vlan_present) && bpf_skb_vlan_pop(f))
		return -1;
	if (on_link)
		to.nh_family = pkt->family;
	if (to.nh_family == AF_INET)
		to.ipv4_nh = on_link ? daddr[3] : hop->gateway[3];
	else
		address_copy(to.ipv6_nh, on_link ? daddr : hop->gateway);
	return bpf_redirect_neigh(hop->ifindex, &to, sizeof(to), 0);
}

#endif
