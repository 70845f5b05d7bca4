// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* The maps. maps/doc.go says who writes and reads each and what "full" means. */
#ifndef SNILB_MAPS_H
#define SNILB_MAPS_H

/* The sizes of the flow tables and rings are set when they are created. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2000000);
	__type(key, struct flow4_key);
	__type(value, struct flow4);
} flows4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2000000);
	__type(key, struct flow6_key);
	__type(value, struct flow6);
} flows6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct listener_key);
	__type(value, struct listener);
} listeners SEC(".maps");

/* One bit a port that some listener has: what is not ours is told by one load. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, __u64);
} listener_ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct path_key);
	__type(value, struct path);
} paths SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_NEXTHOPS);
	__type(key, __u32);
	__type(value, struct nexthop);
} nexthops SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct live);
} control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct instance_record);
} instance SEC(".maps");

/* Keys of the client leg, IPv4 addresses in their last words. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct flow6_key);
	__type(value, struct owned_hello);
} owned SEC(".maps");

/* Mapped by the engine: each worker writes its own jobs and reads the results there. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_WORKERS);
	__type(key, __u32);
	__type(value, struct flow_jobs);
} jobs SEC(".maps");

struct ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 8 << 20);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2 * MAX_WORKERS); /* each worker's, then each worker's quiet one */
	__type(key, __u32);
	__array(values, struct ring);
} rings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_COUNTER_SLOTS);
	__type(key, __u32);
	__type(value, struct counter_set);
} counters SEC(".maps");

/* A ring record is put together here: its size varies, and what
 * bpf_ringbuf_reserve is asked for must be a constant.
 */
struct scratch {
	struct event_header header;
	__u8 data[EVENT_DATA];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

/* Resets for unknown connections, ICMP errors and packets to be cut: at most this
 * many events of each kind in a window of 2^26 ns (67 ms) and CPU, some 1900 a second.
 * Each has its own, by enum event_kind: packets of no connection cost a stranger
 * nothing, and must not silence the errors that path MTU discovery lives by. Nor must
 * they come in bursts that hellos have to wait behind, so the window is short.
 */
#define EVENTS_PER_WINDOW 128
#define ALLOWANCE_SHIFT	  26

struct allowance {
	__u64 window;
	__u64 used;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, EVENT_LEN);
	__type(key, __u32);
	__type(value, struct allowance);
} allowance SEC(".maps");

#endif
