// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* A frame as XDP has it: the functions of frame_tc.h, the other skin. */
#ifndef SNILB_FRAME_H
#define SNILB_FRAME_H

typedef struct xdp_md frame_t;

#define FRAME_PASS    XDP_PASS
#define FRAME_DROP    XDP_DROP
#define HAS_TC_BEHIND 1

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
	return f->ingress_ifindex;
}

/* Of a frame in several buffers, only the first is in reach. */
static __always_inline bool frame_in_one(frame_t *f, __u32 bytes)
{
	return bytes <= f->data_end - f->data;
}

static __always_inline bool frame_holds(frame_t *f, __u32 bytes)
{
	return frame_in_one(f, bytes) || bytes <= bpf_xdp_get_buff_len(f);
}

static __always_inline int frame_load(frame_t *f, __u32 at, void *to, __u32 len)
{
	return bpf_xdp_load_bytes(f, at, to, len);
}

static __always_inline int frame_store(frame_t *f, __u32 at, void *from, __u32 len)
{
	return bpf_xdp_store_bytes(f, at, from, len);
}

static __always_inline int frame_pull(frame_t *f)
{
	return 0;
}

static __always_inline bool frame_is_tagged(const frame_t *f)
{
	return false;
}

static __always_inline __u32 frame_packets(frame_t *f, const struct packet *pkt)
{
	return 1;
}

static __always_inline __u32 frame_packet_length(frame_t *f, const struct packet *pkt)
{
	return pkt->length;
}

static __always_inline int frame_fix_checksum(frame_t *f, const struct packet *pkt,
					      const struct csum_change *sum)
{
	struct headers h;

	if (!packet_headers(frame_data(f), frame_end(f), pkt, &h))
		return -1;
	h.tcp->check =
		csum_apply(h.tcp->check, csum_fold64(sum->pseudo) + (__u64)csum_fold64(sum->tcp));
	return 0;
}

/* Whether the checksum is only the pseudo header's, for a device to finish: the packet
 * comes from this machine, or was merged by GRO. Only TC can tell the kernel so.
 */
static __always_inline bool frame_is_partial(frame_t *f, const struct packet *pkt)
{
	struct headers h;
	__u64 sum = bpf_htons(IPPROTO_TCP);

	if (!packet_headers(frame_data(f), frame_end(f), pkt, &h))
		return true;
	sum += bpf_htonl(pkt->length - (pkt->l4 - pkt->l3));
	sum += (__u64)pkt->saddr[3] + pkt->daddr[3];
	if (pkt->family == AF_INET6)
		for (int i = 0; i < 3; i++)
			sum += (__u64)pkt->saddr[i] + pkt->daddr[i];
	return h.tcp->check == csum_fold32(csum_fold64(sum));
}

static __always_inline int frame_trim(frame_t *f, __u32 length)
{
	return bpf_xdp_adjust_tail(f, (int)length - (int)bpf_xdp_get_buff_len(f));
}

static __always_inline int frame_return(const frame_t *f)
{
	return redirect_back ? bpf_redirect(f->ingress_ifindex, 0) : XDP_TX;
}

/* Makes room for a tag, which frame_send fills in. */
static __always_inline int frame_push_tag(frame_t *f, struct packet *pkt)
{
	__u8 addresses[2 * ETH_ALEN];
	void *data;

	if (bpf_xdp_adjust_head(f, -VLAN_HEADER))
		return -1;
	data = frame_data(f);
	if (data + VLAN_HEADER + sizeof(struct ethhdr) > frame_end(f))
		return -1;
	__builtin_memmove(addresses, data + VLAN_HEADER, sizeof(addresses));
	__builtin_memcpy(data, addresses, sizeof(addresses));
	pkt->tagged = 1;
	pkt->l3 += VLAN_HEADER;
	pkt->l4 += VLAN_HEADER;
	return 0;
}

/* The last that may fail, and the first that changes the frame, but not a byte that TC
 * would miss.
 */
static __always_inline enum reason frame_may_leave(frame_t *f, struct packet *pkt,
						   const struct nexthop *hop)
{
	if (!hop->xdp_ifindex)
		return REASON_LEFT_NEXTHOP;
	if (!(hop->flags & NEXTHOP_BUFFERS) && !frame_in_one(f, pkt->l3 + pkt->length))
		return REASON_LEFT_FRAME;
	if (hop->vlan_proto && !pkt->tagged && frame_push_tag(f, pkt))
		return REASON_LEFT_FRAME;
	return REASON_OK;
}

static __always_inline int frame_send(frame_t *f, const struct packet *pkt,
				      const struct nexthop *hop, const __be32 daddr[4])
{
	struct ethhdr *eth;
	__be16 *tag;

	if (pkt->tagged && !hop->vlan_proto && bpf_xdp_adjust_head(f, VLAN_HEADER))
		return -1;
	eth = frame_data(f);
	tag = (__be16 *)(eth + 1) - 1;
	if ((void *)(tag + 3) > frame_end(f))
		return -1;
	__builtin_memcpy(eth->h_dest, hop->dmac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, hop->smac, ETH_ALEN);
	if (hop->vlan_proto) {
		tag[0] = hop->vlan_proto;
		tag[1] = hop->vlan_id;
	}
	if (hop->xdp_ifindex == f->ingress_ifindex)
		return frame_return(f);
	return bpf_redirect(hop->xdp_ifindex, 0);
}

#endif
