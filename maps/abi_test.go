// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"math/bits"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// header is the text of one of the C headers.
func header(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "bpf", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// define is the number behind "#define NAME".
func define(t *testing.T, text, name string) uint64 {
	t.Helper()
	m := regexp.MustCompile(`(?m)^#define ` + name + `[ \t]+(\w+)`).FindStringSubmatch(text)
	if m == nil {
		t.Fatalf("no #define %s", name)
	}
	n, err := strconv.ParseUint(strings.TrimRight(m[1], "UuLl"), 0, 64)
	if err != nil {
		t.Fatalf("#define %s: %v", name, err)
	}
	return n
}

func TestConstantsAreTheHeaders(t *testing.T) {
	for _, c := range []struct {
		file, name string
		have       uint64
	}{
		{"abi.h", "LAYOUT_VERSION", LayoutVersion},
		{"abi.h", "MAX_WORKERS", MaxWorkers},
		{"abi.h", "MAX_COUNTER_SLOTS", MaxCounterSlots},
		{"abi.h", "MAX_NEXTHOPS", MaxNexthops},
		{"abi.h", "EVENT_DATA", EventData},
		{"abi.h", "FLOW_NEXTHOP_MASK", uint64((&Entry{Flow: Flow{Control: 0xffffffff}}).Nexthop())},
		{"abi.h", "FLOW_SHIFT_BIAS", uint64(FlowControl(0, 0, 0) >> 16)},
		{"abi.h", "ALERT_LENGTH", AlertLength},
		{"abi.h", "FLOW_WORKER_MASK", uint64(FlowControl(0, -14, MaxWorkers-1) >> 21)},
		{"maps.h", "EVENTS_PER_WINDOW", eventsPerWindow},
		{"maps.h", "ALLOWANCE_SHIFT", allowanceShift},
		{"config.h", "ANNOUNCED_WSCALE", AnnouncedWindowScale},
		{"cookie.h", "COOKIE_NO_WSCALE", CookieNoWindowScale},
		{"cookie.h", "COOKIE_SLOT_NS", CookieSlotNanoseconds},
	} {
		if want := define(t, header(t, c.file), c.name); c.have != want {
			t.Errorf("%s: Go has %d, bpf/%s has %d", c.name, c.have, c.file, want)
		}
	}
}

func TestFlowControlIsTheHeaders(t *testing.T) {
	text := header(t, "abi.h")
	pos, mask := define(t, text, "FLOW_SHIFT_POS"), define(t, text, "FLOW_SHIFT_MASK")
	workerPos, workerMask := define(t, text, "FLOW_WORKER_POS"), define(t, text, "FLOW_WORKER_MASK")
	states := uint64(FlowFIN | FlowRST | FlowConfirmed | FlowPending | FlowSYN)
	for shift := -14; shift <= 14; shift++ {
		for worker := range MaxWorkers {
			c := uint64(FlowControl(0xbeef, shift, worker))
			if got := int(c>>pos&mask) - 14; got != shift || c&0xffff != 0xbeef || int(c>>workerPos&workerMask) != worker {
				t.Errorf("shift %d, worker %d: control %#x", shift, worker, c)
			}
			if c&states != 0 {
				t.Errorf("shift %d, worker %d: control %#x has a state", shift, worker, c)
			}
		}
	}
	fields := 0xffff | mask<<pos | workerMask<<workerPos
	if fields&states != 0 || bits.OnesCount64(fields) != 16+5+6 || bits.OnesCount64(states) != 5 || (fields|states)>>32 != 0 {
		t.Errorf("fields %#x and states %#x overlap", fields, states)
	}
}

func TestMSSClassesAreTheHeaders(t *testing.T) {
	text := header(t, "cookie.h")
	for name, have := range map[string][8]uint16{"mss_classes4": MSSClasses4, "mss_classes6": MSSClasses6} {
		m := regexp.MustCompile(name + `\[8\] = \{([^}]*)\}`).FindStringSubmatch(text)
		if m == nil {
			t.Fatalf("no %s", name)
		}
		for i, field := range strings.Split(m[1], ",") {
			if want, err := strconv.Atoi(strings.TrimSpace(field)); err != nil || int(have[i]) != want {
				t.Errorf("%s[%d]: Go has %d, C has %s", name, i, have[i], field)
			}
			if i > 0 && have[i] <= have[i-1] {
				t.Errorf("%s does not rise at %d", name, i)
			}
		}
	}
}

// Every reason of the header, in its order.
func headerReasons(t *testing.T) []string {
	t.Helper()
	_, text, found := strings.Cut(header(t, "abi.h"), "enum reason {")
	body, _, ended := strings.Cut(text, "}")
	if !found || !ended {
		t.Fatal("no enum reason")
	}
	var names []string
	for _, m := range regexp.MustCompile(`(?m)^\tREASON_(\w+),`).FindAllStringSubmatch(body, -1) {
		names = append(names, m[1])
	}
	return names
}

func TestReasonsAreTheHeaders(t *testing.T) {
	names := headerReasons(t)
	if names[len(names)-1] != "LEN" || len(Reasons) != len(names)-1 {
		t.Fatalf("%d reasons in Go, %d in C", len(Reasons), len(names)-1)
	}
	if len(CounterSet{}.Packets) < len(Reasons) {
		t.Errorf("a counter set holds %d reasons of %d", len(CounterSet{}.Packets), len(Reasons))
	}
	if Reasons[0] != (ReasonInfo{}) {
		t.Errorf("REASON_OK is never counted, but is %v", Reasons[0])
	}
	known := map[Action]bool{
		ActionPass: true, ActionAnswer: true, ActionForward: true, ActionEngine: true, ActionDrop: true,
	}
	seen := make(map[ReasonInfo]string)
	for i, info := range Reasons {
		if i == 0 {
			continue
		}
		if !regexp.MustCompile(`^[a-z][a-z0-9_]*$`).MatchString(info.Name) || !known[info.Action] {
			t.Errorf("REASON_%s: %+v", names[i], info)
		}
		if other, twice := seen[info]; twice {
			t.Errorf("REASON_%s and REASON_%s are both %+v", names[i], other, info)
		}
		seen[info] = names[i]
	}
}
