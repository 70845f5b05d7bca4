// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* The path of a TCP packet of ours, the same in TC and XDP. */
#ifndef SNILB_PATH_H
#define SNILB_PATH_H

/* To a port of a listener's. */
static __always_inline int path_client(frame_t *f, struct packet *pkt)
{
	struct bound b;

	if (frame_is_partial(f, pkt))
		return pass(REASON_LEFT_CHECKSUM);
	if (!flow_find(pkt, LEG_CLIENT, &b))
		return offer(f, pkt, false);
	if (pkt->flags & TCP_SYN) {
		if (flow_is_closing(&b, LEG_CLIENT))
			return offer(f, pkt, true);
		flow_mark(b.flow, FLOW_SYN);
	}
	return flow_forward(f, pkt, &b, LEG_CLIENT);
}

/* From a backend, perhaps. */
static __always_inline int path_backend(frame_t *f, struct packet *pkt)
{
	bool ours = port_is_ours(pkt->dport);
	struct bound b;

	if (!ours && !source_may_be_client())
		return pass(REASON_NOT_OURS);
	if (frame_is_partial(f, pkt))
		return pass(REASON_LEFT_CHECKSUM);
	if (flow_find(pkt, LEG_BACKEND, &b)) {
		/* A SYN-ACK on a bound flow is a repeated one, and not for the client. */
		if (pkt->flags & TCP_SYN || b.flow->control & FLOW_PENDING)
			return backend_event(f, pkt, flow_worker(b.flow));
		return flow_forward(f, pkt, &b, LEG_BACKEND);
	}
	if (!ours || !path_is_ours(pkt))
		return pass(REASON_NOT_OURS);
	return backend_event(f, pkt, port_worker(pkt->dport));
}

#endif
