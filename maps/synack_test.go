// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
)

const (
	optEOL = iota
	optNOP
	optMSS
	optWScale
	optSackOK
	optSack
	optTS = 8
)

// answered is the model: what a SYN's options become in the SYN-ACK, and what its
// cookie has to hold.
func answered(syn []byte, is4 bool, tsval, live uint32) ([]byte, cookieFields) {
	out := bytes.Repeat([]byte{optNOP}, len(syn))
	says := cookieFields{class: 0, wscale: 15}
	sizes := spoken(live)
	for at := 0; at < len(syn) && syn[at] != optEOL; {
		if syn[at] == optNOP {
			at++
			continue
		}
		if at+1 == len(syn) || syn[at+1] < 2 || at+int(syn[at+1]) > len(syn) {
			break
		}
		option := syn[at : at+int(syn[at+1])]
		if sizes[option[0]] == len(option) {
			copy(out[at:], answerOption(option, is4, tsval, &says))
			delete(sizes, option[0]) // a second one is blanked
		}
		at += len(option)
	}
	return out, says
}

// spoken is the size of each option that we announce under these live flags.
func spoken(live uint32) map[byte]int {
	sizes := map[byte]int{optMSS: 4, optWScale: 3, optSackOK: 2, optTS: 10}
	if live&LiveNoSACK != 0 {
		delete(sizes, optSackOK)
	}
	if live&LiveNoTimestamps != 0 {
		delete(sizes, optTS)
	}
	return sizes
}

func answerOption(option []byte, is4 bool, tsval uint32, says *cookieFields) []byte {
	switch option[0] {
	case optMSS:
		says.class = classOf(is4, binary.BigEndian.Uint16(option[2:]))
		mss := uint16(mss6)
		if is4 {
			mss = mss4
		}
		return binary.BigEndian.AppendUint16([]byte{optMSS, 4}, mss)
	case optWScale:
		says.wscale = min(option[2], 14)
		return []byte{optWScale, 3, 7}
	case optSackOK:
		says.sack = true
		return option
	default:
		out := binary.BigEndian.AppendUint32([]byte{optTS, 10}, tsval)
		return append(out, option[2:6]...)
	}
}

// answer is the model: the SYN-ACK to a SYN.
func (r *rig) answer(s segment, tsval uint32) segment {
	options, says := answered(s.options, s.src.Addr().Is4(), tsval, r.live.Flags)
	a := s
	a.srcMAC, a.dstMAC = s.dstMAC, s.srcMAC
	a.src, a.dst = s.dst, s.src
	a.tos, a.ttl = s.tos&^3, 64
	a.seq, a.ack = says.make(r.live.Keys, r.slot, s.src, s.dst), s.seq+1
	a.flags, a.window, a.urgent = syn|ack, 64240, 0
	a.options, a.payload = options, nil
	if len(s.payload) > 0 {
		a.padding = nil // cut off with the payload
	}
	return a
}

// expectAnswer feeds a SYN and wants exactly the model's SYN-ACK. The clock that
// TSval is read from may tick in between: any of its values will do.
func (r *rig) expectAnswer(s segment) segment {
	r.Helper()
	if r.leaves(ProgramClient, s) {
		return s
	}
	before := monotonic(r)
	out := r.outcome(ProgramClient, s.frame(), skbuff{}, r.answered())
	after := monotonic(r)
	wellFormed(r, out)
	best := r.answer(s, uint32(before/1e6)|1)
	for ms := before / 1e6; ms <= after/1e6; ms++ {
		if a := r.answer(s, uint32(ms)|1); bytes.Equal(a.frame(), out) {
			best = a
			break
		}
	}
	sameFrame(r, out, best.frame())
	if err := strictSynAck(best.options, spoken(r.live.Flags)); err != nil {
		r.Errorf("options %x: %v", best.options, err)
	}
	return best
}

// strictSynAck reads options as an unforgiving client would: known ones only, each
// once and of its size, nothing behind the end.
func strictSynAck(b []byte, sizes map[byte]int) error {
	for len(b) > 0 {
		if b[0] == optNOP {
			b = b[1:]
			continue
		}
		size, known := sizes[b[0]]
		if !known || len(b) < size || int(b[1]) != size {
			return fmt.Errorf("at %x", b)
		}
		delete(sizes, b[0])
		b = b[size:]
	}
	return nil
}

// layouts are the option bytes of the fixture's rows, by a readable name.
func layouts(tb testing.TB) map[string][]byte {
	tb.Helper()
	text, err := os.ReadFile("testdata/syn-layouts.tsv")
	must(tb, err)
	all := make(map[string][]byte)
	for i, line := range strings.Split(strings.TrimRight(string(text), "\n"), "\n") {
		if strings.HasPrefix(line, "#") || strings.HasPrefix(line, "part\t") {
			continue
		}
		fields := strings.Split(line, "\t")
		options, err := hex.DecodeString(fields[len(fields)-1])
		must(tb, err)
		if len(options)%4 != 0 || len(options) > 40 {
			tb.Fatalf("line %d: %d bytes of options", i+1, len(options))
		}
		all[fmt.Sprintf("line %d %s", i+1, fields[1])] = options
	}
	return all
}

// Every layout of the fixture is answered with its own.
func TestSynLayouts(t *testing.T) {
	rows := layouts(t)
	if len(rows) < 200 {
		t.Fatalf("%d layouts", len(rows))
	}
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		bothFamilies(t, func(t *testing.T, f family) {
			for name, options := range rows {
				t.Run(name, func(t *testing.T) {
					s := f.clientSegment(syn)
					s.options = options
					r.with(t).expectAnswer(s)
				})
			}
		})
	})
}

// What the layouts of the wild have too seldom, by hand.
var oddSyns = map[string]string{
	"Linux, scale 00":                "020405b40402080a010203040000000001030300",
	"Windows, scale 00":              "020405b40103030001010402",
	"Apple, scale 00":                "020405b4010303000101080a010203040000000004020000",
	"Linux, scale 0e":                "020405b40402080a01020304000000000103030e",
	"Windows, scale 0e":              "020405b40103030e01010402",
	"Apple, scale 0e":                "020405b40103030e0101080a010203040000000004020000",
	"Linux, scale 0f":                "020405b40402080a01020304000000000103030f",
	"Windows, scale 0f":              "020405b40103030f01010402",
	"Apple, scale 0f":                "020405b40103030f0101080a010203040000000004020000",
	"Linux, scale ff":                "020405b40402080a0102030400000000010303ff",
	"Windows, scale ff":              "020405b4010303ff01010402",
	"Apple, scale ff":                "020405b4010303ff0101080a010203040000000004020000",
	"Linux, small MSS":               "020400580402080a010203040000000001030307",
	"Apple, no end":                  "020405b4010303060101080a010203040000000004020101",
	"Windows, another kind":          "020405b40103030801010403",
	"nothing":                        "",
	"MSS":                            "020405b4",
	"MSS of 0":                       "02040000",
	"MSS of 65535":                   "0204ffff",
	"MSS, size 3":                    "020305b4",
	"MSS, size 5":                    "020505b401010101",
	"MSS twice":                      "0204010002040200",
	"window scale 14":                "03030e01",
	"window scale 15":                "03030f01",
	"window scale 255":               "0303ff01",
	"window scale twice":             "0303020303030401",
	"window scale, size 4":           "03040201",
	"SACK twice":                     "0402040204020402",
	"SACK, size 3":                   "04030001",
	"timestamps twice":               "080a1122334455667788080a99aabbccddeeff00",
	"timestamps, size 8":             "0808112233445566",
	"timestamps at an odd offset":    "01080a112233445566778801",
	"all, odd":                       "0101010303070402080a1122334455667788020405b401040201",
	"EOL first":                      "00020405b4030307",
	"EOL, then options":              "020405b400030307",
	"kind in the last byte":          "01010103",
	"size 0":                         "0300020405b40101",
	"size 1":                         "0301020405b40101",
	"size beyond the header":         "020405b4fd050000",
	"size 255":                       "05ff010101010101",
	"one byte too long":              "080b112233445566",
	"TFO cookie request":             "020405b422020101",
	"TFO cookie":                     "220a01020304050607080101",
	"MPTCP capable":                  "1e0c00819b59be3d695e66a7",
	"SMC":                            "fe06e2d4c3d90101",
	"MD5":                            "1312000102030405060708090a0b0c0d0e0f0101",
	"SACK blocks in a SYN":           "050a01020304050607080101",
	"unknown, size 2":                "4c020405",
	"40 bytes of NOP":                strings.Repeat("01", 40),
	"40 bytes of EOL":                strings.Repeat("00", 40),
	"40 bytes of unknown":            "4c28" + strings.Repeat("aa", 38),
	"20 options of size 2":           strings.Repeat("4c02", 20),
	"timestamps end the header":      strings.Repeat("01", 30) + "080a1122334455667788",
	"window scale ends the header":   strings.Repeat("01", 37) + "030309",
	"window scale cut by its end":    strings.Repeat("01", 38) + "0303",
	"the first of a kind is too big": "0205010101020405b4010101",
}

func TestSynOptions(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		bothFamilies(t, func(t *testing.T, f family) {
			for name, text := range oddSyns {
				t.Run(name, func(t *testing.T) {
					options, err := hex.DecodeString(text)
					must(t, err)
					s := f.clientSegment(syn)
					s.options = append(options, make([]byte, -len(options)&3)...)
					r.with(t).expectAnswer(s)
				})
			}
		})
	})
}

// The model itself, on the one example that can be checked by eye.
func TestAnsweredModel(t *testing.T) {
	in, _ := hex.DecodeString("020405b40402080a112233440000000001030309" + "fe0cf989261fb060cecab690" + "00" + "020401")
	want, _ := hex.DecodeString("020405b40402080aa1a2a3a41122334401030307" + strings.Repeat("01", 16))
	got, says := answered(in, true, 0xa1a2a3a4, 0)
	if !bytes.Equal(got, want) || says != (cookieFields{class: 6, wscale: 9, sack: true}) {
		t.Errorf("answered %x, %+v", got, says)
	}
	want, _ = hex.DecodeString("020405b4" + strings.Repeat("01", 13) + "030307" + strings.Repeat("01", 16))
	got, says = answered(in, true, 0xa1a2a3a4, LiveNoSACK|LiveNoTimestamps)
	if !bytes.Equal(got, want) || says != (cookieFields{class: 6, wscale: 9}) {
		t.Errorf("without SACK and timestamps: answered %x, %+v", got, says)
	}
}

// What the backends do not have is not announced: NOPs in its place, and the cookie
// knows.
func TestSynRefusedOptions(t *testing.T) {
	rows := layouts(t)
	for name, text := range oddSyns {
		options, err := hex.DecodeString(text)
		must(t, err)
		rows[name] = append(options, make([]byte, -len(options)&3)...)
	}
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		for _, flags := range []uint32{LiveNoSACK, LiveNoTimestamps, LiveNoSACK | LiveNoTimestamps, LiveSourceClient, 7} {
			r.live.Flags = flags
			r.setClock()
			bothFamilies(t, func(t *testing.T, f family) {
				for name, options := range rows {
					t.Run(fmt.Sprint(flags, "/", name), func(t *testing.T) {
						s := f.clientSegment(syn)
						s.options = options
						a := r.with(t).expectAnswer(s)
						if sack := a.seq >> 22 & 1; flags&LiveNoSACK != 0 && sack != 0 {
							t.Errorf("cookie %#x says SACK", a.seq)
						}
					})
				}
			})
		}
	})
}

// Every MSS class of both families, at its borders.
func TestSynMSSClasses(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		bothFamilies(t, func(t *testing.T, f family) {
			classes := MSSClasses6
			if f.is4() {
				classes = MSSClasses4
			}
			for i, class := range classes {
				for _, mss := range []uint16{class - 1, class, class + 1} {
					s := f.clientSegment(syn)
					s.options = binary.BigEndian.AppendUint16([]byte{optMSS, 4}, mss)
					a := r.with(t).expectAnswer(s)
					says := int(a.seq >> 27 & 7)
					if mss >= class && says != i || mss < class && says != max(i-1, 0) {
						t.Errorf("MSS %d has class %d", mss, says)
					}
				}
			}
		})
	})
}

// One field of a good SYN changed at a time; the model says what stays of it.
func TestSynFields(t *testing.T) {
	changes := map[string]func(*segment){
		"good":                func(*segment) {},
		"PSH":                 func(s *segment) { s.flags |= psh },
		"URG":                 func(s *segment) { s.flags |= urg; s.urgent = 0xffff },
		"urgent pointer":      func(s *segment) { s.urgent = 1 },
		"ECN setup":           func(s *segment) { s.flags |= ece | cwr },
		"AccECN setup":        func(s *segment) { s.flags |= ece | cwr | ae },
		"ECE":                 func(s *segment) { s.flags |= ece },
		"CWR":                 func(s *segment) { s.flags |= cwr },
		"AE":                  func(s *segment) { s.flags |= ae },
		"reserved bits":       func(s *segment) { s.flags |= reservedFlags },
		"an ack number":       func(s *segment) { s.ack = 0xffffffff },
		"no ack number":       func(s *segment) { s.ack = 0 },
		"ISN wraps":           func(s *segment) { s.seq = 0xffffffff },
		"window 0":            func(s *segment) { s.window = 0 },
		"window 65535":        func(s *segment) { s.window = 65535 },
		"TTL 1":               func(s *segment) { s.ttl = 1 },
		"TTL 255":             func(s *segment) { s.ttl = 255 },
		"id 0":                func(s *segment) { s.id = 0 },
		"no flow label":       func(s *segment) { s.flowLabel = 0 },
		"another port":        func(s *segment) { s.src = netip.AddrPortFrom(s.src.Addr(), 1) },
		"padding":             func(s *segment) { s.padding = []byte{1, 2, 3, 4, 5, 6} },
		"802.1Q":              func(s *segment) { s.tags = []vlan{{0x8100, 0xe014}} },
		"802.1ad":             func(s *segment) { s.tags = []vlan{{0x88a8, 20}} },
		"wrong checksum":      func(s *segment) { s.wrong = 0x1234 },
		"payload and 802.1Q":  func(s *segment) { s.tags = []vlan{{0x8100, 20}}; s.payload = []byte("five!") },
		"payload and padding": func(s *segment) { s.payload, s.padding = []byte("1"), []byte{0xaa, 0xbb, 0xcc} },
	}
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		for tos := range 256 {
			changes[fmt.Sprintf("TOS %#02x", tos)] = func(s *segment) { s.tos = uint8(tos) }
		}
		bothFamilies(t, func(t *testing.T, f family) {
			for name, change := range changes {
				t.Run(name, func(t *testing.T) {
					s := f.clientSegment(syn)
					s.options, _ = hex.DecodeString("020405b40402080a112233440000000001030307")
					change(&s)
					if s.wrong == 0 {
						r.with(t).expectAnswer(s)
						return
					}
					r.with(t).expectWrongAnswer(s)
				})
			}
		})
	})
}

// expectWrongAnswer wants a wrong checksum to stay wrong: the client's own stack or
// ours is the judge, and a repaired one would hide the damage from it.
func (r *rig) expectWrongAnswer(s segment) {
	r.Helper()
	out := r.outcome(ProgramClient, s.frame(), skbuff{}, r.answered())
	pseudo := slices.Concat(s.src.Addr().AsSlice(), s.dst.Addr().AsSlice())
	tcp := out[s.l4():]
	pseudo = append(pseudo, 0, 0, 0, 6, 0, 0, byte(len(tcp)>>8), byte(len(tcp)))
	if sum16(sum16(0, pseudo), tcp) == 0xffff {
		r.Error("a wrong checksum was repaired")
	}
}

// A payload (TFO) is cut off, in length and checksum; more than a frame of it is no
// TFO.
func TestSynPayload(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		random := rand.New(rand.NewPCG(1, 2))
		sizes := []int{1, 2, 3, 4, 5, 511, 512, 513, 1023, 1024, 1025, 1460, 1499, 1500, 1501, 2000}
		bothFamilies(t, func(t *testing.T, f family) {
			for _, options := range []string{"", "020405b4", "020405b40402080a112233440000000001030307"} {
				for _, size := range sizes {
					t.Run(fmt.Sprintf("%d bytes behind %s", size, options), func(t *testing.T) {
						r := r.with(t)
						s := f.clientSegment(syn)
						s.options, _ = hex.DecodeString(options)
						s.payload = make([]byte, size)
						for i := range s.payload {
							s.payload[i] = byte(random.Uint32()) | 1
						}
						if size > 1500 {
							r.expect(ProgramClient, s.frame(), drop(bpfReasonREASON_JUNK))
							return
						}
						r.expectAnswer(s)
					})
				}
			}
		})
	})
}

// After a SYN with a long payload, one with a short payload: what the first left in
// the scratch area is not summed.
func TestSynPayloadAfterPayload(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		for _, size := range []int{1500, 1, 1499, 2, 1021, 3, 513, 5, 1027, 1} {
			s := families[0].clientSegment(syn)
			s.payload = bytes.Repeat([]byte{0xff, 0x7f}, 750)[:size]
			r.expectAnswer(s)
		}
	})
}

// Each slot has its key and its two bits.
func TestSynSlots(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		for _, slot := range []uint64{testSlot, testSlot + 1, testSlot + 2, testSlot + 3, testSlot + 4, 1, 1 << 29} {
			r.slot = slot
			r.setClock()
			bothFamilies(t, func(t *testing.T, f family) { r.with(t).expectAnswer(f.clientSegment(syn)) })
		}
	})
}

// The MSS we announce is the daemon's to change while running.
func TestSynAnnouncedMSS(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			r.live.Mss4, r.live.Mss6 = 0x0102, 0x0304
			r.setClock()
			s := f.clientSegment(syn)
			s.options = []byte{optMSS, 4, 5, 180}
			out := r.outcome(ProgramClient, s.frame(), skbuff{}, r.answered())
			wellFormed(r, out)
			mss := []byte{3, 4}
			if f.is4() {
				mss = []byte{1, 2}
			}
			if got := out[s.l4()+22 : s.l4()+24]; !bytes.Equal(got, mss) {
				r.Errorf("announced %x, want %x", got, mss)
			}
		})
	})
}

// randomOptions are sometimes sensible ones, sometimes noise.
func randomOptions(random *rand.Rand) []byte {
	n := random.IntN(11) * 4
	var b []byte
	for len(b) < n {
		switch random.IntN(10) {
		case 0, 1:
			b = append(b, optNOP)
		case 2:
			b = append(b, optMSS, 4, byte(random.Uint32()), byte(random.Uint32()))
		case 3:
			b = append(b, optWScale, 3, byte(random.IntN(20)))
		case 4:
			b = append(b, optSackOK, 2)
		case 5:
			b = binary.BigEndian.AppendUint64(append(b, optTS, 10), random.Uint64())
		case 6:
			size := 2 + random.IntN(12)
			b = append(append(b, byte(random.Uint32()), byte(size)), make([]byte, size-2)...)
		case 7:
			b = append(b, byte(random.Uint32()))
		case 8:
			blocks := 1 + random.IntN(4)
			b = append(b, optSack, byte(2+8*blocks))
			for range 2 * blocks {
				b = binary.BigEndian.AppendUint32(b, random.Uint32())
			}
		default:
			b = append(b, byte(random.IntN(9)), byte(random.IntN(12)))
		}
	}
	return b[:n]
}

const randomRuns = 20000

func TestSynRandom(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		random := rand.New(rand.NewPCG(3, 4))
		for i := range randomRuns {
			if i%100 == 0 {
				r.live.Flags = uint32(random.IntN(8))
				r.setClock()
			}
			s := r.randomSYN(random, 4)
			r.expectAnswer(s)
			if t.Failed() {
				t.Fatalf("SYN was %x", s.frame())
			}
		}
	})
}

// randomSYN is a client's with anything in it; one in payloads carries data.
func (r *rig) randomSYN(random *rand.Rand, payloads int) segment {
	s := families[random.IntN(2)].clientSegment(syn | uint16(random.Uint32())&(psh|urg|ece|cwr|ae|reservedFlags))
	s.options = randomOptions(random)
	s.seq, s.ack, s.urgent, s.window = random.Uint32(), random.Uint32(), uint16(random.Uint32()), uint16(random.Uint32())
	s.tos, s.ttl = uint8(random.Uint32()), uint8(random.Uint32())
	s.src = netip.AddrPortFrom(s.src.Addr(), uint16(random.Uint32()))
	if random.IntN(payloads) == 0 {
		s.payload = make([]byte, random.IntN(1500))
		for i := range s.payload {
			s.payload[i] = byte(random.Uint32())
		}
	}
	if r.set.xdp && random.IntN(16) == 0 {
		s = s.unfinished()
	}
	return s
}

// FuzzSyn lets the engine of go test look for options that are answered wrongly.
func FuzzSyn(f *testing.F) {
	for _, options := range layouts(f) {
		f.Add(options, false)
	}
	for _, text := range oddSyns {
		options, _ := hex.DecodeString(text)
		f.Add(options, true)
	}
	r := newRig(f, settings{})
	r.listen(UnknownFlowReset)
	f.Fuzz(func(t *testing.T, options []byte, v6 bool) {
		s := families[0].clientSegment(syn)
		if v6 {
			s = families[1].clientSegment(syn)
		}
		options = options[:min(len(options), 40)]
		s.options = append(slices.Clone(options), make([]byte, -len(options)&3)...)
		r.with(t).expectAnswer(s)
	})
}
