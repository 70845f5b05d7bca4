// SPDX-License-Identifier: Apache-2.0

package maps

// Reason is why a packet left a program as it did.
type Reason = bpfReason

// Action is what became of a packet: the `action` label of snilb_packets_total.
type Action string

// The actions.
const (
	ActionPass    Action = "pass"    // to the stack, untouched
	ActionAnswer  Action = "answer"  // sent back by itself
	ActionForward Action = "forward" // to the other leg
	ActionEngine  Action = "engine"  // to the engine's ring
	ActionDrop    Action = "drop"
)

// ReasonInfo says what a reason means to an operator.
type ReasonInfo struct {
	Name   string // the `reason` label
	Action Action
}

// Reasons describes every reason of bpf/abi.h, by its number; REASON_OK, which is
// never counted, is the empty one at 0.
var Reasons = [bpfReasonREASON_LEN]ReasonInfo{
	bpfReasonREASON_NOT_TCP:          {"not_tcp", ActionPass},
	bpfReasonREASON_FRAGMENT:         {"fragment", ActionPass},
	bpfReasonREASON_IP_OPTIONS:       {"ip_options", ActionPass},
	bpfReasonREASON_EXTENSION_HEADER: {"extension_header", ActionPass},
	bpfReasonREASON_VLAN_STACKED:     {"vlan_stacked", ActionPass},
	bpfReasonREASON_MALFORMED:        {"malformed", ActionPass},
	bpfReasonREASON_NOT_OURS:         {"not_ours", ActionPass},
	bpfReasonREASON_SOCKET:           {"socket", ActionPass},
	bpfReasonREASON_DAEMON_DEAD:      {"daemon_dead", ActionPass},
	bpfReasonREASON_RING_BUSY:        {"ring_busy", ActionPass},
	bpfReasonREASON_UNKNOWN_PASS:     {"unknown_flow", ActionPass},
	bpfReasonREASON_SYN_ANSWERED:     {"syn", ActionAnswer},
	bpfReasonREASON_FORWARDED:        {"flow", ActionForward},
	bpfReasonREASON_ENGINE_OUTPUT:    {"engine_output", ActionForward},
	bpfReasonREASON_HELLO:            {"hello", ActionEngine},
	bpfReasonREASON_BACKEND:          {"backend", ActionEngine},
	bpfReasonREASON_UNKNOWN_RESET:    {"unknown_flow", ActionEngine},
	bpfReasonREASON_HANDSHAKE_ACK:    {"handshake_ack", ActionDrop},
	bpfReasonREASON_JUNK:             {"junk", ActionDrop},
	bpfReasonREASON_UNKNOWN_DROP:     {"unknown_flow", ActionDrop},
	bpfReasonREASON_UNKNOWN_LIMITED:  {"unknown_flow_limited", ActionDrop},
	bpfReasonREASON_EVENT_LOST:       {"event_lost", ActionDrop},
	bpfReasonREASON_TTL_EXPIRED:      {"ttl_expired", ActionDrop},
	bpfReasonREASON_TOO_BIG:          {"too_big", ActionDrop},
	bpfReasonREASON_NO_NEXTHOP:       {"no_nexthop", ActionDrop},
	bpfReasonREASON_REPLAY_MISSED:    {"replay_missed", ActionDrop},
	bpfReasonREASON_WRITE_ERROR:      {"write_error", ActionDrop},
	bpfReasonREASON_ICMP:             {"icmp", ActionEngine},
	bpfReasonREASON_TOO_BIG_CUT:      {"too_big", ActionEngine},
	bpfReasonREASON_ICMP_LIMITED:     {"icmp_limited", ActionDrop},
	bpfReasonREASON_LEFT_ICMP:        {"left_icmp", ActionPass},
	bpfReasonREASON_LEFT_NEXTHOP:     {"left_nexthop", ActionPass},
	bpfReasonREASON_LEFT_TOO_BIG:     {"left_too_big", ActionPass},
	bpfReasonREASON_LEFT_CHECKSUM:    {"left_checksum", ActionPass},
	bpfReasonREASON_LEFT_FRAME:       {"left_frame", ActionPass},
	bpfReasonREASON_DRAINING:         {"draining", ActionPass},
	bpfReasonREASON_DEAD_RESET:       {"dead_reset", ActionAnswer},
	bpfReasonREASON_DEAD_HOLD:        {"dead_hold", ActionDrop},
	bpfReasonREASON_LATE_HOLD:        {"late_hold", ActionDrop},
}
