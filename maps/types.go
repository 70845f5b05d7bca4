// SPDX-License-Identifier: Apache-2.0

package maps

import "github.com/cilium/ebpf"

// The generated types under the names the rest of the program uses. Addresses and
// ports in them are in network byte order as they lie in memory, all other numbers
// in the host's.

type (
	// Flow is one direction of a bound flow, all that both families share.
	Flow = bpfFlow
	// Flow4 is the value of flows4.
	Flow4 = bpfFlow4
	// Flow4Key is the key of flows4.
	Flow4Key = bpfFlow4Key
	// Flow6 is the value of flows6.
	Flow6 = bpfFlow6
	// Flow6Key is the key of flows6.
	Flow6Key = bpfFlow6Key
	// Listener is the value of listeners.
	Listener = bpfListener
	// ListenerKey is the key of listeners.
	ListenerKey = bpfListenerKey
	// Path is the value of paths.
	Path = bpfPath
	// PathKey is the key of paths.
	PathKey = bpfPathKey
	// Nexthop is the value of nexthops.
	Nexthop = bpfNexthop
	// Live is the value of control.
	Live = bpfLive
	// InstanceRecord is the value of instance.
	InstanceRecord = bpfInstanceRecord
	// CounterUser is one of the slots in InstanceRecord.
	CounterUser = bpfCounterUser
	// CookieKey is one of the four keys in Live.
	CookieKey = bpfCookieKey
	// EventHeader stands before the packet in a ring record.
	EventHeader = bpfEventHeader
	// CounterSet is the value of counters, by Reason.
	CounterSet = bpfCounterSet
	// Leg is the side of the balancer a packet came from.
	Leg = bpfLeg
	// EventKind is why a packet is in a ring.
	EventKind = bpfEventKind
)

// The constants of bpf/abi.h.
const (
	LegClient  = bpfLegLEG_CLIENT
	LegBackend = bpfLegLEG_BACKEND

	EventHello   = bpfEventKindEVENT_HELLO
	EventBackend = bpfEventKindEVENT_BACKEND
	EventClosing = bpfEventKindEVENT_CLOSING
	EventUnknown = bpfEventKindEVENT_UNKNOWN
	EventICMP    = bpfEventKindEVENT_ICMP
	EventTooBig  = bpfEventKindEVENT_TOO_BIG
	EventClosed  = bpfEventKindEVENT_CLOSED

	FlowFIN       = uint32(bpfFlowStateFLOW_FIN)
	FlowRST       = uint32(bpfFlowStateFLOW_RST)
	FlowConfirmed = uint32(bpfFlowStateFLOW_CONFIRMED)
	FlowPending   = uint32(bpfFlowStateFLOW_PENDING)
	FlowSYN       = uint32(bpfFlowStateFLOW_SYN)

	LiveNoSACK       = uint32(bpfLiveFlagLIVE_NO_SACK)
	LiveNoTimestamps = uint32(bpfLiveFlagLIVE_NO_TIMESTAMPS)
	LiveSourceClient = uint32(bpfLiveFlagLIVE_SOURCE_CLIENT)
	LiveSockets      = uint32(bpfLiveFlagLIVE_SOCKETS)

	TapOutput        = uint8(bpfTapRequestTAP_OUTPUT)
	TapReplayClient  = uint8(bpfTapRequestTAP_REPLAY_CLIENT)
	TapReplayBackend = uint8(bpfTapRequestTAP_REPLAY_BACKEND)

	NexthopBuffers = uint8(bpfNexthopFlagNEXTHOP_BUFFERS)

	UnknownFlowReset = uint8(bpfUnknownFlowUNKNOWN_FLOW_RESET)
	UnknownFlowPass  = uint8(bpfUnknownFlowUNKNOWN_FLOW_PASS)
	UnknownFlowDrop  = uint8(bpfUnknownFlowUNKNOWN_FLOW_DROP)

	OnDeadPass  = uint8(bpfDeadPolicyON_DEAD_PASS)
	OnDeadReset = uint8(bpfDeadPolicyON_DEAD_RESET)
	OnDeadHold  = uint8(bpfDeadPolicyON_DEAD_HOLD)
)

// What the preprocessor keeps from the generator; a test compares each with the
// header.
const (
	// LayoutVersion is raised when a pinned map could be misread.
	LayoutVersion = 2
	// MaxWorkers bounds the rings.
	MaxWorkers = 64
	// MaxCounterSlots bounds the interfaces that count apart.
	MaxCounterSlots = 64
	// MaxNexthops bounds the next hops in use at once; index 0 stays unset.
	MaxNexthops = 65536
	// EventData is the most bytes of a packet that an event holds.
	EventData = 17408
	// AlertLength is the bytes of a TLS record with an alert.
	AlertLength = 7
	// AnnouncedWindowScale is in every SYN-ACK that has the option.
	AnnouncedWindowScale = 7
	// CookieNoWindowScale stands for "no such option" in a cookie.
	CookieNoWindowScale = 15
	// CookieSlotNanoseconds is how long one cookie key is in use.
	CookieSlotNanoseconds = 16_000_000_000
)

// MSSClasses4 and MSSClasses6 are the MSS values a cookie can hold, in bytes.
var (
	MSSClasses4 = [8]uint16{536, 1220, 1360, 1400, 1440, 1452, 1460, 8960}
	MSSClasses6 = [8]uint16{1220, 1280, 1360, 1380, 1420, 1432, 1440, 8940}
)

// Names of the programs and constants in the object.
const (
	ProgramClient  = bpfProgSnilbClient
	ProgramBackend = bpfProgSnilbBackend
	ProgramTap     = bpfProgSnilbTap
	ProgramJobs    = bpfProgSnilbJobs
	ProgramXDP     = xdpProgSnilbXdp // in SpecXDP

	MapJobs     = bpfMapJobs // what ProgramJobs and its callers share
	MapControl  = bpfMapControl
	MapCounters = bpfMapCounters
	MapInstance = bpfMapInstance

	VarCounterSlot     = bpfVarCounterSlot     // uint32
	VarWorkers         = bpfVarWorkers         // uint32
	VarWorkerKey       = bpfVarWorkerKey       // uint64
	VarSourcePortFirst = bpfVarSourcePortFirst // uint16
	VarSourcePortLast  = bpfVarSourcePortLast  // uint16
	VarDeadAfter       = bpfVarDeadAfter       // uint64, ns
	VarOnDead          = bpfVarOnDead          // uint8, OnDeadPass...
	VarRingBusy        = bpfVarRingBusy        // uint64, bytes
	VarHasCsumIPv6     = bpfVarHasCsumIpv6     // bool
	VarRedirectBack    = bpfVarRedirectBack    // bool
	VarFacesClients    = bpfVarFacesClients    // bool
)

// Spec returns the compiled object, to be changed and loaded by the loader. The
// flow tables' and rings' sizes in it are defaults.
func Spec() (*ebpf.CollectionSpec, error) {
	return loadBpf()
}

// SpecXDP returns the object with the XDP program. Its maps are those of Spec, to be
// loaded with them as replacements.
func SpecXDP() (*ebpf.CollectionSpec, error) {
	return loadXdp()
}
