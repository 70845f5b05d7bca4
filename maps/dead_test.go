// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
)

const (
	dead     = aliveFor + time.Second
	late     = 2 * time.Second // no beat for longer than the program bears, and not dead
	draining = -1
)

// onDead are the policies, and what each says of a SYN.
var onDead = map[string]struct {
	policy uint8
	want   func(r *rig, s segment) want
}{
	"pass":  {OnDeadPass, func(*rig, segment) want { return pass(bpfReasonREASON_DAEMON_DEAD) }},
	"reset": {OnDeadReset, (*rig).refusal},
	"hold":  {OnDeadHold, func(*rig, segment) want { return drop(bpfReasonREASON_DEAD_HOLD) }},
}

// refusal is the model: the RST to a SYN, which acknowledges all of it.
func (r *rig) refusal(s segment) want {
	a := s
	a.srcMAC, a.dstMAC = s.dstMAC, s.srcMAC
	a.src, a.dst = s.dst, s.src
	a.tos, a.ttl = s.tos&^3, 64
	a.seq, a.ack = 0, s.seq+1+uint32(len(s.payload))
	a.flags, a.window, a.urgent = rst|ack, 0, 0
	a.options, a.payload = bytes.Repeat([]byte{optNOP}, len(s.options)), nil
	if len(s.payload) > 0 {
		a.padding = nil // cut off with the payload
	}
	return want{action: r.back(), reason: bpfReasonREASON_DEAD_RESET, frame: a.frame()}
}

// deadRigs runs a test in a rig of each skin and policy, with one listener, and with
// flows where that is asked for.
func deadRigs(t *testing.T, make func(testing.TB, settings) *rig, test func(t *testing.T, r *rig, onSyn func(*rig, segment) want)) {
	for name, p := range onDead {
		t.Run(name, func(t *testing.T) {
			skins(t, make, settings{onDead: p.policy, ringBusy: 200}, func(t *testing.T, r *rig) {
				r.listen(UnknownFlowReset)
				test(t, r, p.want)
			})
		})
	}
}

// A SYN that nobody would follow up meets the policy; one in time, and one to a daemon that
// is in good order and at its end, does not.
func TestDeadAge(t *testing.T) {
	deadRigs(t, newRig, func(t *testing.T, r *rig, onSyn func(*rig, segment) want) {
		bothFamilies(t, func(t *testing.T, f family) {
			s := f.clientSegment(syn)
			for _, age := range []time.Duration{0, late, aliveFor - time.Second} {
				r := r.with(t)
				r.silent(age)
				r.expectAnswer(s)
			}
			for _, age := range []time.Duration{dead, time.Hour} {
				r := r.with(t)
				r.silent(age)
				r.expect(ProgramClient, s.frame(), onSyn(r, s))
			}
			r := r.with(t)
			r.silent(draining)
			r.expect(ProgramClient, s.frame(), pass(bpfReasonREASON_DRAINING))
			r.age = 0
			r.setClock()
			r.expectAnswer(s)
		})
	})
}

// fillRing sends hellos until the ring is busy.
func (r *rig) fillRing(f family) {
	r.Helper()
	h := r.hello(f)
	h.payload = bytes.Repeat([]byte{0x16}, 120)
	for range 2 {
		if _, action := r.run(ProgramClient, h.frame(), skbuff{}); action != shot {
			r.Fatalf("action is %d", action)
		}
	}
}

// expectSyn runs a SYN while the ring holds events, which it leaves there.
func (r *rig) expectSyn(s segment, w want) {
	r.Helper()
	before := r.counters().Packets[w.reason]
	out, action := r.run(ProgramClient, s.frame(), skbuff{})
	if action != w.action || r.counters().Packets[w.reason] != before+1 {
		r.Errorf("action is %d, counted %s, want %d and %s", action, counted(r.counters()), w.action, Reasons[w.reason].Name)
	}
	if w.frame == nil {
		w.frame = s.frame()
	}
	sameFrame(r, out, w.frame)
}

// A worker that lags behind is spared new connections, not the ones it has. The stack gets
// them only as long as the daemon beats: one that does not may be on its way back.
func TestSynRingBusy(t *testing.T) {
	deadRigs(t, newRig, func(t *testing.T, r *rig, onSyn func(*rig, segment) want) {
		bothFamilies(t, func(t *testing.T, f family) {
			s := f.clientSegment(syn)
			for _, c := range []struct {
				age  time.Duration
				want want
			}{
				{0, pass(bpfReasonREASON_RING_BUSY)},
				{late, drop(bpfReasonREASON_LATE_HOLD)},
				{aliveFor - time.Second, drop(bpfReasonREASON_LATE_HOLD)},
				{dead, onSyn(r, s)},
				{draining, pass(bpfReasonREASON_DRAINING)},
			} {
				t.Run(c.age.String(), func(t *testing.T) {
					r := r.with(t)
					r.expectAnswer(s)
					r.fillRing(f)
					r.silent(c.age)
					r.expectSyn(s, c.want)
					r.age = 0
					r.setClock()
					r.events(0)
					r.expectAnswer(s)
				})
			}
		})
	})
}

// A beat brings the cookie keys of the slot after its own: who is to be alive for longer than
// that answers no SYN by an older key, which the daemon would not know when it is back.
func TestSynOldKeys(t *testing.T) {
	skins(t, newRig, settings{deadAfter: 20 * time.Second}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		bothFamilies(t, func(t *testing.T, f family) {
			s := f.clientSegment(syn)
			for age, reason := range map[time.Duration]Reason{
				CookieSlotNanoseconds - time.Second: bpfReasonREASON_SYN_ANSWERED,
				CookieSlotNanoseconds + time.Second: bpfReasonREASON_LATE_HOLD,
				19 * time.Second:                    bpfReasonREASON_LATE_HOLD,
				21 * time.Second:                    bpfReasonREASON_DAEMON_DEAD,
			} {
				r := r.with(t)
				r.silent(age)
				if reason == bpfReasonREASON_SYN_ANSWERED {
					r.expectAnswer(s)
					continue
				}
				w := drop(reason)
				if Reasons[reason].Action == ActionPass {
					w = pass(reason)
				}
				r.expect(ProgramClient, s.frame(), w)
			}
		})
	})
}

// Nobody is there to answer what is unknown while the daemon is late: the ring is kept for
// hellos, which go there whatever the policy. Where the stack has new connections it has the
// unknown packets, too: it may know them by a SYN cookie alone.
func TestDeadUnknown(t *testing.T) {
	limited := drop(bpfReasonREASON_UNKNOWN_LIMITED)
	deadRigs(t, newRig, func(t *testing.T, r *rig, _ func(*rig, segment) want) {
		bothFamilies(t, func(t *testing.T, f family) {
			for _, policy := range []uint8{UnknownFlowReset, UnknownFlowPass, UnknownFlowDrop} {
				for _, age := range []time.Duration{0, late, dead, draining} {
					t.Run(fmt.Sprint(policy, "/", age), func(t *testing.T) {
						r := r.with(t)
						r.listen(policy)
						r.silent(age)
						for _, flags := range []uint16{ack, ack | psh, ack | fin, rst, syn | ack} {
							s := f.clientSegment(flags)
							w := unknownWant(s, policy)
							switch {
							case age < 0 || age == dead && r.set.onDead == OnDeadPass:
								w = pass(bpfReasonREASON_UNKNOWN_PASS)
							case age > 0 && len(w.events) > 0:
								w = limited
							}
							r.expect(ProgramClient, s.frame(), w)
						}
						h := r.hello(f)
						r.expect(ProgramClient, h.frame(), hello(h))
					})
				}
			}
			r.with(t).listen(UnknownFlowReset)
		})
	})
}

// Bound flows go on, a SYN on a live one included. On one that is over it is a new
// connection's: whoever gets it must get the next packet, so where that is the stack the
// entries go.
func TestDeadFlows(t *testing.T) {
	deadRigs(t, newFlowRig, func(t *testing.T, r *rig, onSyn func(*rig, segment) want) {
		bothFamilies(t, func(t *testing.T, f family) {
			for _, age := range []time.Duration{late, dead, draining} {
				t.Run(age.String(), func(t *testing.T) {
					r := r.with(t)
					r.listen(UnknownFlowReset)
					r.bind(f, LegClient, nil)
					r.bind(f, LegBackend, nil)
					r.silent(age)
					for _, flags := range []uint16{ack, ack | psh, syn, ack | fin} {
						r.expectForward(f, LegClient, f.legSegment(LegClient, flags), skbuff{})
					}
					r.expectForward(f, LegBackend, f.legSegment(LegBackend, ack), skbuff{})
				})
			}
		})
	})
}

func TestDeadFlowClosing(t *testing.T) {
	deadRigs(t, newFlowRig, func(t *testing.T, r *rig, onSyn func(*rig, segment) want) {
		bothFamilies(t, func(t *testing.T, f family) {
			s := f.clientSegment(syn)
			for _, c := range []struct {
				name string
				age  time.Duration
				busy bool
				want want
			}{
				{"dead", dead, false, onSyn(r, s)},
				{"draining", draining, false, pass(bpfReasonREASON_DRAINING)},
				{"busy", 0, true, pass(bpfReasonREASON_RING_BUSY)},
				{"late", late, true, drop(bpfReasonREASON_LATE_HOLD)},
			} {
				t.Run(c.name, func(t *testing.T) {
					r := r.with(t)
					r.listen(UnknownFlowReset)
					if c.busy {
						r.fillRing(f)
					}
					r.bind(f, LegClient, func(e *Entry) { e.Flow.Control |= FlowFIN })
					r.bind(f, LegBackend, func(e *Entry) { e.Flow.Control |= FlowFIN })
					before := [2]Entry{r.entry(f, LegClient), r.entry(f, LegBackend)}
					r.silent(c.age)
					r.expectSyn(s, c.want)
					r.events(0)
					for leg, e := range before {
						if c.want.action != next {
							r.sameEntry(r.entry(f, Leg(leg)), e)
						} else if _, err := r.tables.LookupFlow(Leg(leg), f.tuple(Leg(leg))); !errors.Is(err, ebpf.ErrKeyNotExist) {
							t.Errorf("the entry of leg %d: %v", leg, err)
						}
					}
				})
			}
		})
	})
}

// newDeadRig is one whose daemon is dead, and refuses.
func newDeadRig(t testing.TB, set settings) *rig {
	r := newRig(t, set)
	r.listen(UnknownFlowReset)
	r.silent(dead)
	return r
}

// expectRefusal feeds a SYN and wants exactly the model's RST.
func (r *rig) expectRefusal(s segment) {
	r.Helper()
	if !r.leaves(ProgramClient, s) {
		r.expect(ProgramClient, s.frame(), r.refusal(s))
	}
}

// Every layout of options, the wild ones and the odd ones, is refused with NOPs.
func TestRefuseOptions(t *testing.T) {
	rows := layouts(t)
	for name, text := range oddSyns {
		options, err := hex.DecodeString(text)
		must(t, err)
		rows[name] = append(options, make([]byte, -len(options)&3)...)
	}
	skins(t, newDeadRig, settings{onDead: OnDeadReset}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			for name, options := range rows {
				t.Run(name, func(t *testing.T) {
					s := f.clientSegment(syn)
					s.options = options
					r.with(t).expectRefusal(s)
				})
			}
		})
	})
}

// One field of a good SYN changed at a time; the model says what stays of it.
func TestRefuseFields(t *testing.T) {
	changes := map[string]func(*segment){
		"no options":           func(s *segment) { s.options = nil },
		"PSH, URG":             func(s *segment) { s.flags |= psh | urg; s.urgent = 0xffff },
		"ECN":                  func(s *segment) { s.flags |= ece | cwr | ae | reservedFlags; s.tos = 0xff },
		"an ack number":        func(s *segment) { s.ack = 0xffffffff },
		"ISN wraps":            func(s *segment) { s.seq = 0xffffffff },
		"ISN and length wrap":  func(s *segment) { s.seq = 0xfffffffd; s.payload = []byte("hello") },
		"window 65535":         func(s *segment) { s.window = 65535 },
		"TTL 1":                func(s *segment) { s.ttl = 1 },
		"padding":              func(s *segment) { s.padding = []byte{1, 2, 3, 4, 5, 6} },
		"802.1Q":               func(s *segment) { s.tags = []vlan{{0x8100, 0xe014}} },
		"802.1ad":              func(s *segment) { s.tags = []vlan{{0x88a8, 20}} },
		"payload and 802.1Q":   func(s *segment) { s.tags = []vlan{{0x8100, 20}}; s.payload = []byte("five!") },
		"payload and padding":  func(s *segment) { s.payload, s.padding = []byte("1"), []byte{0xaa, 0xbb, 0xcc} },
		"payload of a segment": func(s *segment) { s.payload = bytes.Repeat([]byte{0xff, 0x7f}, 730) },
	}
	skins(t, newDeadRig, settings{onDead: OnDeadReset}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			for name, change := range changes {
				t.Run(name, func(t *testing.T) {
					s := f.clientSegment(syn)
					s.options, _ = hex.DecodeString("020405b40402080a112233440000000001030307")
					change(&s)
					r.with(t).expectRefusal(s)
				})
			}
			s := f.clientSegment(syn)
			s.payload = make([]byte, 1501) // more than a frame of it is no TFO
			r.with(t).expect(ProgramClient, s.frame(), drop(bpfReasonREASON_JUNK))
		})
	})
}

func TestRefuseRandom(t *testing.T) {
	skins(t, newDeadRig, settings{onDead: OnDeadReset}, func(t *testing.T, r *rig) {
		random := rand.New(rand.NewPCG(5, 6))
		for range randomRuns / 4 {
			s := r.randomSYN(random, 2)
			r.expectRefusal(s)
			if t.Failed() {
				t.Fatalf("SYN was %x", s.frame())
			}
		}
	})
}

// A SYN damaged on its way is not refused by a RST that is in order.
func TestRefuseWrongChecksum(t *testing.T) {
	skins(t, newDeadRig, settings{onDead: OnDeadReset}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			s := f.clientSegment(syn)
			s.wrong = 0x1234
			w := r.refusal(s)
			w.frame = nil
			out := r.outcome(ProgramClient, s.frame(), skbuff{}, w)
			pseudo := slices.Concat(s.src.Addr().AsSlice(), s.dst.Addr().AsSlice())
			tcp := out[s.l4():]
			if sum16(sum16(0, append(pseudo, 0, 0, 0, 6, 0, 0, byte(len(tcp)>>8), byte(len(tcp)))), tcp) == 0xffff {
				r.Error("a wrong checksum was repaired")
			}
		})
	})
}
