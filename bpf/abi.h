// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* All that the kernel programs share with Go. The Go side is generated from
 * this file's BTF (go generate ./maps) and never written by hand. Addresses and
 * ports are in network byte order (__be32, __be16), everything else is in the
 * host's. An IPv4 address in a field of four words is v4-mapped (RFC 4291 2.5.5.2).
 */
#ifndef SNILB_ABI_H
#define SNILB_ABI_H

/* Raised when a pinned map of an older binary could be misread by this one. */
#define LAYOUT_VERSION 2

#define MAX_WORKERS	  64
#define MAX_COUNTER_SLOTS 64
#define MAX_NEXTHOPS	  65536
#define EVENT_DATA	  17408 /* a hello of 16 KiB with record and packet headers */

/* Of a TLS record with an alert, bytes. */
#define ALERT_LENGTH 7

enum leg { LEG_CLIENT, LEG_BACKEND };

/* Why a packet left a program the way it did: append only, for they are the
 * `reason` labels of snilb_packets_total. The action belongs to the reason; Go's
 * table of both is checked against REASON_LEN.
 */
enum reason {
	REASON_OK, /* parsing goes on; never counted */
	/* to the stack, untouched */
	REASON_NOT_TCP,
	REASON_FRAGMENT,
	REASON_IP_OPTIONS,
	REASON_EXTENSION_HEADER,
	REASON_VLAN_STACKED,
	REASON_MALFORMED,
	REASON_NOT_OURS,
	REASON_SOCKET,
	REASON_DAEMON_DEAD,
	REASON_RING_BUSY,
	REASON_UNKNOWN_PASS,
	/* answered in place */
	REASON_SYN_ANSWERED,
	/* to another interface */
	REASON_FORWARDED,
	REASON_ENGINE_OUTPUT,
	/* to the engine */
	REASON_HELLO,
	REASON_BACKEND,
	REASON_UNKNOWN_RESET,
	/* dropped */
	REASON_HANDSHAKE_ACK,
	REASON_JUNK,
	REASON_UNKNOWN_DROP,
	REASON_UNKNOWN_LIMITED,
	REASON_EVENT_LOST,
	REASON_TTL_EXPIRED,
	REASON_TOO_BIG,
	REASON_NO_NEXTHOP,
	REASON_REPLAY_MISSED,
	REASON_WRITE_ERROR, /* a helper refused after the first write */
	/* to the engine */
	REASON_ICMP,
	REASON_TOO_BIG_CUT,
	/* dropped */
	REASON_ICMP_LIMITED,
	/* to the stack, where TC finishes what XDP does not */
	REASON_LEFT_ICMP,
	REASON_LEFT_NEXTHOP,  /* its link address is not known, or XDP cannot send there */
	REASON_LEFT_TOO_BIG,  /* for its next hop */
	REASON_LEFT_CHECKSUM, /* not filled in yet: the packet never was on a wire */
	REASON_LEFT_FRAME,    /* no room for a VLAN tag, or in several buffers */
	/* to the stack, untouched */
	REASON_DRAINING, /* the daemon answers no new connections before it ends */
	/* answered in place */
	REASON_DEAD_RESET,
	/* dropped: the client repeats its SYN */
	REASON_DEAD_HOLD,
	REASON_LATE_HOLD,
	REASON_LEN,
};

enum unknown_flow { UNKNOWN_FLOW_RESET, UNKNOWN_FLOW_PASS, UNKNOWN_FLOW_DROP };

/* What SYNs meet when the daemon is dead. */
enum dead_policy { ON_DEAD_PASS, ON_DEAD_RESET, ON_DEAD_HOLD };

enum event_kind {
	EVENT_HELLO = 1, /* a client's data, FIN or RST with a valid cookie */
	EVENT_BACKEND,	 /* a backend's packet to a source port with no flow */
	EVENT_CLOSING,	 /* the first FIN or RST of one side of a bound flow */
	EVENT_UNKNOWN,	 /* a packet of a connection nobody knows, to be reset */
	EVENT_ICMP,	 /* an ICMP error that quotes a packet of ours */
	EVENT_TOO_BIG,	 /* a bound packet that does not fit its next hop */
	EVENT_CLOSED,	 /* a client's data or FIN behind an alert of the engine's */
	EVENT_LEN,
};

/* What the engine asks of the program on its TAP device, the fourth byte of the
 * frame's destination address; the last two are a next hop's index.
 */
enum tap_request { TAP_OUTPUT, TAP_REPLAY_CLIENT, TAP_REPLAY_BACKEND };

struct listener_key {
	__be32 addr[4];
	__be16 port;
	__u16 pad;
};

struct listener {
	__u16 id;	   /* 1 up, in the order of routes.yaml */
	__u8 unknown_flow; /* enum unknown_flow */
	__u8 pad;
};

/* A source address of ours that speaks to a backend. */
struct path_key {
	__be32 backend[4];
	__be32 source[4];
	__be16 port; /* of the backend */
	__u16 pad;
};

struct path {
	__u32 id;
};

enum nexthop_flag {
	NEXTHOP_BUFFERS = 1, /* the XDP interface takes frames in several buffers */
};

/* Where a bound packet leaves. gateway all zero: the destination is on the link.
 * TC asks the kernel for the neighbour; XDP sends only where its link address stands
 * here, and leaves the rest to TC.
 */
struct nexthop {
	__u32 ifindex; /* 0: unset */
	__u16 mtu;     /* bytes of an IP packet */
	__u8 family;   /* AF_INET or AF_INET6 of the gateway */
	__u8 flags;    /* enum nexthop_flag */
	__be32 gateway[4];
	__u32 xdp_ifindex; /* ifindex, or the interface below a VLAN one; 0: leave it to TC */
	__u8 dmac[6], smac[6];
	__be16 vlan_proto; /* ETH_P_8021Q or _8021AD; 0: no tag */
	__be16 vlan_id;
};

_Static_assert(sizeof(struct nexthop) == 44, "nexthop");

/* Bits 27 to 31 of flow.control. FLOW_PENDING is there from the start or never; the
 * others are only ever set, by atomic or.
 */
enum flow_state {
	FLOW_FIN = 1 << 27,	  /* this side sent a FIN */
	FLOW_RST = 1 << 28,	  /* this side sent a RST */
	FLOW_CONFIRMED = 1 << 29, /* this side acknowledged something new */
	FLOW_PENDING = 1 << 30,	  /* no flow yet: its packets go to the worker */
	FLOW_SYN = 1U << 31,	  /* this side sent a SYN: a RST at 0 may answer it */
};

#define FLOW_NEXTHOP_MASK 0xffff
#define FLOW_SHIFT_POS	  16
#define FLOW_SHIFT_MASK	  0x1f
#define FLOW_SHIFT_BIAS	  14
#define FLOW_WORKER_POS	  21
#define FLOW_WORKER_MASK  0x3f

/* One direction of a bound flow, all that both families share. The engine
 * inserts it once; from then on only the kernel programs write it.
 */
struct flow {
	__u64 bytes;	     /* TCP payload */
	__u32 seq, ack;	     /* added to the packet's */
	__u32 tsval, tsecr;  /* added to the packet's */
	__u32 last_ack;	     /* of the last packet with ACK, as this side sent it */
	__u32 packets;	     /* wire packets, modulo 2^32 */
	__u32 last_seen;     /* CLOCK_MONOTONIC in units of 2^20 ns, modulo 2^32 */
	__u32 control;	     /* next hop 0-15, window shift + 14 16-20, worker 21-26, state */
	__u16 generation;    /* tells one use of a tuple from the next */
	__u16 id;	     /* client leg: the backend's; backend leg: the route's */
	__be16 sport, dport; /* the packet's new ports */
};

struct flow4_key {
	__be32 saddr, daddr;
	__be16 sport, dport;
	__u32 leg; /* enum leg */
};

struct flow6_key {
	__be32 saddr[4], daddr[4];
	__be16 sport, dport;
	__u32 leg;
};

struct flow4 {
	struct flow flow;
	__be32 saddr, daddr; /* the packet's new addresses */
};

struct flow6 {
	struct flow flow;
	__be32 saddr[4], daddr[4];
};

/* Slab objects of 128 and 192 bytes hold these, and not one byte more. */
_Static_assert(sizeof(struct flow) == 48, "flow");
_Static_assert(sizeof(struct flow4) == 56 && sizeof(struct flow4_key) == 16, "flow4");
_Static_assert(sizeof(struct flow6) == 80 && sizeof(struct flow6_key) == 40, "flow6");

/* What snilb_jobs is to do with a flow. */
enum flow_job_op {
	FLOW_JOB_BIND = 1, /* insert both entries */
	FLOW_JOB_REBIND,   /* the same, the backend's in the place of a pending one */
	FLOW_JOB_READ,	   /* copy both flows out */
	FLOW_JOB_REMOVE,   /* delete both, each only if it is of this flow */
};

#define FLOW_JOBS 64

/* Addresses of IPv4 are in the last words. up is the client's direction and its value,
 * down the backend's; FLOW_JOB_READ and _REMOVE want the generation and the ports of up.
 */
struct flow_job {
	__u16 op;     /* enum flow_job_op */
	__u16 family; /* AF_INET or AF_INET6 */
	__s32 result; /* 0 or a negative errno */
	struct flow6_key client, backend;
	struct flow6 up, down;
};

struct flow_jobs {
	struct flow_job job[FLOW_JOBS];
};

struct flow_jobs_args {
	__u32 worker, count;
};

_Static_assert(sizeof(struct flow_job) == 248, "flow_job");

struct cookie_key {
	__u64 k0, k1;
};

enum live_flag {
	LIVE_NO_SACK = 1,	/* not announced: the backends have none */
	LIVE_NO_TIMESTAMPS = 2, /* not announced */
	LIVE_SOURCE_CLIENT = 4, /* backends may be spoken to from clients' addresses */
	LIVE_SOCKETS = 8,	/* sockets of this node may have listeners' ports */
};

/* The live switches, written by the daemon about once a second. */
struct live {
	__u64 beat;	   /* CLOCK_MONOTONIC ns of the daemon's last sign of life; 0: draining */
	__u64 wall_offset; /* CLOCK_REALTIME - CLOCK_MONOTONIC, ns */
	struct cookie_key keys[4]; /* by slot & 3 */
	__u16 mss4, mss6;	   /* announced in SYN-ACKs */
	__u32 flags;		   /* enum live_flag */
};

_Static_assert(sizeof(struct live) == 88, "live");

/* Who counts in a slot of `counters`. */
struct counter_user {
	char iface[16]; /* as in IFNAMSIZ, padded with zeros; empty: nobody */
	char role[16];	/* of the program there, padded with zeros */
};

/* What a later daemon must know of the one that made the maps, and keep. No program
 * reads it. layout is the first word in every version.
 */
struct instance_record {
	__u32 layout; /* LAYOUT_VERSION */
	__u32 workers;
	__u64 worker_key;
	__u8 secret[32]; /* cookie keys come from it */
	__u16 source_port_first, source_port_last;
	__u32 ring_size; /* bytes of a worker's */
	struct counter_user slots[MAX_COUNTER_SLOTS];
};

_Static_assert(sizeof(struct instance_record) == 56 + 32 * MAX_COUNTER_SLOTS, "instance");

/* A connection without a flow of which somebody must be told should the engine die: the
 * client, once bytes of its hello are acknowledged, since it will not send them again; the
 * backend, once bytes are pushed to it, since it has all it waits for.
 */
struct owned_hello {
	__u32 cookie;		  /* our initial sequence number */
	__u32 acknowledged;	  /* 0: the client sends all of it again */
	__u32 pushed_to;	  /* our number on the backend leg behind what was pushed */
	struct flow6_key backend; /* what its packets show; all 0: nothing was pushed */
};

_Static_assert(sizeof(struct owned_hello) == 52, "owned_hello");

/* What stands before the packet (from its IP header on) in a ring record. */
struct event_header {
	__u64 time; /* CLOCK_MONOTONIC ns */
	__u32 ifindex;
	__u32 length;	/* of the IP packet; more than captured: cut */
	__u16 captured; /* bytes that follow */
	__u16 listener; /* struct listener.id, 0 on the backend leg */
	__u8 kind;	/* enum event_kind */
	__u8 leg;	/* enum leg */
	__u8 mac[6];	/* who sent the frame */
	__u16 mtu;	/* EVENT_TOO_BIG: bytes that would fit */
	__u8 pad[2];
};

_Static_assert(sizeof(struct event_header) == 32, "event_header");

/* Longer than needed, so that counters outlive a binary with more reasons. */
#define REASON_MAX 64

struct counter_set {
	__u64 packets[REASON_MAX];
};

_Static_assert(REASON_LEN <= REASON_MAX, "counter_set");

#endif
