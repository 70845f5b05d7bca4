// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* What new connections meet while no daemon would follow them up. */
#ifndef SNILB_DEAD_H
#define SNILB_DEAD_H

/* The daemon beats once a second: it is overdue. */
#define LATE_AFTER 1500000000ULL
#define NOP_WORD   0x01010101

static __always_inline bool daemon_is_draining(const struct live *ctl)
{
	return !ctl->beat;
}

static __always_inline bool daemon_is_dead(const struct live *ctl, __u64 now)
{
	return ctl->beat + dead_after < now;
}

static __always_inline bool daemon_is_late(const struct live *ctl, __u64 now)
{
	return ctl->beat + LATE_AFTER < now;
}

/* Whether new connections are the stack's. It may keep one in a SYN cookie of its own, so
 * that no socket tells of it until the client's first ACK.
 */
static __always_inline bool stack_has_syns(const struct live *ctl, __u64 now)
{
	return daemon_is_draining(ctl) || (on_dead == ON_DEAD_PASS && daemon_is_dead(ctl, now));
}

/* The stack gets a SYN, and is to get all that follows: not so by the entry of a
 * connection that is over (closing).
 */
static __always_inline int syn_pass(struct packet *pkt, bool closing, enum reason why)
{
	if (closing)
		flow_forget(pkt, LEG_CLIENT);
	return pass(why);
}

/* A SYN becomes the RST that refuses it (RFC 9293 3.10.7.1), its options NOPs. Returns
 * -1 when a helper refused.
 */
static __noinline int syn_refuse(frame_t *f, struct packet *pkt)
{
	__be32 word[TCP_HEADER_MAX / 4] = {};
	struct csum_change change = {};
	struct answer a = {.flags = TCP_RST | TCP_ACK};
	struct headers h;
	__u32 old, len;
	__u64 sum = 0;

	if (!pkt)
		return -1;
	len = pkt->header;
	if (!length_is_within(len, sizeof(struct tcphdr), TCP_HEADER_MAX))
		return -1;
	if (frame_load(f, pkt->l4, word, len))
		return -1;
	old = bpf_csum_diff(NULL, 0, word, sizeof(word), 0);
	a.ack = pkt->seq + 1 + pkt->payload;
	answer_numbers(word, pkt, &a, &sum);
#pragma unroll
	for (__u32 i = sizeof(struct tcphdr) / 4; i < TCP_HEADER_MAX / 4; i++)
		if (i < len / 4)
			word[i] = NOP_WORD;
	change.tcp = (__u32)bpf_csum_diff(NULL, 0, word, sizeof(word), ~old);

	/* ---- from here on the packet is changed ---- */
	if (pkt->payload && answer_trim(f, pkt, &change))
		return -1;
	if (frame_store(f, pkt->l4, word, len))
		return -1;
	if (!packet_headers(frame_data(f), frame_end(f), pkt, &h))
		return -1;
	answer_lower_layers(&h, pkt);
	return frame_fix_checksum(f, pkt, &change);
}

/* A SYN that a dead daemon would not follow up. */
static __always_inline int syn_on_dead(frame_t *f, struct packet *pkt, bool closing)
{
	if (on_dead == ON_DEAD_PASS)
		return syn_pass(pkt, closing, REASON_DAEMON_DEAD);
	if (on_dead == ON_DEAD_HOLD)
		return drop(REASON_DEAD_HOLD);
	if (pkt->payload > SYN_PAYLOAD_MAX)
		return drop(REASON_JUNK);
	if (syn_refuse(f, pkt))
		return drop(REASON_WRITE_ERROR);
	return verdict(frame_return(f), REASON_DEAD_RESET);
}

#endif
