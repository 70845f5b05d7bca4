// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* The SYN cookie: our initial sequence number, from which a later segment of the
 * client tells all that its SYN said. Layout, from the top:
 *
 *	slot 2 | MSS class 3 | window scale 4 | SACK 1 | MAC 22
 *
 * The MAC is SipHash-2-4 over addresses, ports, option bits and the whole slot
 * counter, not over the client's ISN: every segment of a hello proves itself by
 * its ack - 1 alone. Pure functions: key and time are parameters.
 */
#ifndef SNILB_COOKIE_H
#define SNILB_COOKIE_H

#define COOKIE_SLOT_NS	  16000000000ULL
#define COOKIE_SLOTS_BACK 2 /* accepted beside the current one */
#define COOKIE_MAC_BITS	  22
#define COOKIE_MAC_MASK	  ((1u << COOKIE_MAC_BITS) - 1)
#define COOKIE_NO_WSCALE  15

/* MSS values a cookie can hold: the largest not above the client's own is taken.
 * Every host takes 536 bytes (RFC 1122 4.2.2.6), so smaller ones count as that.
 */
static const __u16 mss_classes4[8] = {536, 1220, 1360, 1400, 1440, 1452, 1460, 8960};
static const __u16 mss_classes6[8] = {1220, 1280, 1360, 1380, 1420, 1432, 1440, 8940};

/* The option bits of a cookie: class 3, scale 4, SACK 1. */
struct cookie_options {
	__u8 mss_class;
	__u8 wscale; /* 15: none */
	__u8 sack;
};

static __always_inline __u8 mss_class(__u8 family, __u16 mss)
{
	__u8 class = 0;

#pragma unroll
	for (int i = 1; i < 8; i++) {
		__u16 floor = family == AF_INET ? mss_classes4[i] : mss_classes6[i];

		if (mss >= floor)
			class = i;
	}
	return class;
}

static __always_inline __u64 rotl64(__u64 x, int bits)
{
	return (x << bits) | (x >> (64 - bits));
}

struct siphash {
	__u64 v0, v1, v2, v3;
};

static __always_inline void sip_round(struct siphash *s)
{
	s->v0 += s->v1;
	s->v1 = rotl64(s->v1, 13) ^ s->v0;
	s->v0 = rotl64(s->v0, 32);
	s->v2 += s->v3;
	s->v3 = rotl64(s->v3, 16) ^ s->v2;
	s->v0 += s->v3;
	s->v3 = rotl64(s->v3, 21) ^ s->v0;
	s->v2 += s->v1;
	s->v1 = rotl64(s->v1, 17) ^ s->v2;
	s->v2 = rotl64(s->v2, 32);
}

static __always_inline void sip_word(struct siphash *s, __u64 word)
{
	s->v3 ^= word;
	sip_round(s);
	sip_round(s);
	s->v0 ^= word;
}

static __always_inline __u64 words(__u32 low, __u32 high)
{
	return low | (__u64)high << 32;
}

/* SipHash-2-4 of: source and destination address, ports, option bits, and 7 bytes of
 * the slot, which fill the last block beside the length. 23 bytes for IPv4, 47 for IPv6.
 */
static __always_inline __u32 cookie_mac(const struct cookie_key *key, const struct packet *pkt,
					__u32 options, __u64 slot)
{
	struct siphash s = {
		.v0 = key->k0 ^ 0x736f6d6570736575ULL,
		.v1 = key->k1 ^ 0x646f72616e646f6dULL,
		.v2 = key->k0 ^ 0x6c7967656e657261ULL,
		.v3 = key->k1 ^ 0x7465646279746573ULL,
	};
	__u64 length = 8 + 8 + 7;

	if (pkt->family == AF_INET) {
		sip_word(&s, words(pkt->saddr[3], pkt->daddr[3]));
	} else {
		sip_word(&s, words(pkt->saddr[0], pkt->saddr[1]));
		sip_word(&s, words(pkt->saddr[2], pkt->saddr[3]));
		sip_word(&s, words(pkt->daddr[0], pkt->daddr[1]));
		sip_word(&s, words(pkt->daddr[2], pkt->daddr[3]));
		length = 32 + 8 + 7;
	}
	sip_word(&s, words(pkt->sport | (__u32)pkt->dport << 16, options));
	sip_word(&s, length << 56 | (slot & ((1ULL << 56) - 1)));
	s.v2 ^= 0xff;
	sip_round(&s);
	sip_round(&s);
	sip_round(&s);
	sip_round(&s);
	return (s.v0 ^ s.v1 ^ s.v2 ^ s.v3) & COOKIE_MAC_MASK;
}

/* wall is CLOCK_REALTIME in ns: nodes that share a key share the slots. */
static __always_inline __u32 cookie_make(const struct live *ctl, const struct packet *pkt,
					 const struct cookie_options *opt, __u64 wall)
{
	__u64 slot = wall / COOKIE_SLOT_NS;
	__u32 options = opt->mss_class << 5 | opt->wscale << 1 | opt->sack;

	return (__u32)(slot & 3) << 30 | options << COOKIE_MAC_BITS |
	       cookie_mac(&ctl->keys[slot & 3], pkt, options, slot);
}

/* Whether cookie was made for this client in the current slot or the two before:
 * its two slot bits say which, so one MAC is computed.
 */
static __always_inline bool cookie_valid(const struct live *ctl, const struct packet *pkt,
					 __u32 cookie, __u64 wall)
{
	__u64 now = wall / COOKIE_SLOT_NS;
	__u64 age = (now - (cookie >> 30)) & 3;
	__u64 slot = now - age;

	if (age > COOKIE_SLOTS_BACK)
		return false;
	return cookie_mac(&ctl->keys[slot & 3], pkt, cookie >> COOKIE_MAC_BITS & 0xff, slot) ==
	       (cookie & COOKIE_MAC_MASK);
}

#endif
