// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* Incremental Internet checksums (RFC 1624), over words as they lie in memory:
 * one's complement addition does not care for byte order (RFC 1071 2B).
 */
#ifndef SNILB_CSUM_H
#define SNILB_CSUM_H

/* What a rewrite changed under the TCP checksum: TC must tell the kernel, XDP writes
 * it itself.
 */
struct csum_change {
	__u64 pseudo; /* addresses: under the TCP checksum and IPv6's only */
	__u64 tcp;    /* the TCP header itself */
};

/* Carries are kept in the upper half and folded once, at the end. */
static __always_inline void csum_change32(__u64 *sum, __u32 from, __u32 to)
{
	*sum += (__u64)(__u32)~from + to;
}

static __always_inline void csum_change16(__u64 *sum, __u16 from, __u16 to)
{
	*sum += (__u64)(__u16)~from + to;
}

static __always_inline void csum_put32(__u64 *sum, __be32 *at, __be32 value)
{
	csum_change32(sum, *at, value);
	*at = value;
}

/* The same for a number that grows. */
static __always_inline void csum_add32(__u64 *sum, __be32 *at, __u32 delta)
{
	csum_put32(sum, at, bpf_htonl(bpf_ntohl(*at) + delta));
}

static __always_inline __u32 csum_fold64(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	return sum;
}

static __always_inline __u16 csum_fold32(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* The checksum field after the words it covers changed by sum. */
static __always_inline __u16 csum_apply(__u16 check, __u64 sum)
{
	return ~csum_fold32((__u32)csum_fold32(csum_fold64(sum)) + (__u16)~check);
}

#endif
