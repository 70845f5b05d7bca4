// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* The one way out of every program: counted, so that the sum over the reasons is
 * the number of packets seen.
 */
#ifndef SNILB_VERDICT_H
#define SNILB_VERDICT_H

static __always_inline int verdict(int action, enum reason why)
{
	__u32 slot = counter_slot;
	struct counter_set *c = bpf_map_lookup_elem(&counters, &slot);

	if (c && why < REASON_LEN)
		c->packets[why]++;
	return action;
}

/* Before the first write: the stack gets the packet as it came. */
static __always_inline int pass(enum reason why)
{
	return verdict(FRAME_PASS, why);
}

static __always_inline int drop(enum reason why)
{
	return verdict(FRAME_DROP, why);
}

#endif
