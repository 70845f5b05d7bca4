// SPDX-License-Identifier: Apache-2.0

package loader

import "testing"

func TestRemaining(t *testing.T) {
	const others = ^(capBPF | capNetAdmin | capNetRaw | capPerfmon)
	for _, c := range []struct{ permitted, effective, kept capSet }{
		{^capSet(0), capBPF | capNetAdmin | capNetRaw, capBPF | capNetAdmin | capNetRaw | capPerfmon},
		{capBPF | capNetAdmin | capPerfmon, capBPF | capNetAdmin, capBPF | capNetAdmin | capPerfmon},
		// What stands for those that a process was not given stays, and nothing beside it.
		{others | capNetAdmin, capSysAdmin | capNetAdmin, capSysAdmin | capNetAdmin},
		{others | capNetAdmin | capBPF, capSysAdmin | capNetAdmin | capBPF, capSysAdmin | capNetAdmin | capBPF},
		{0, 0, 0},
	} {
		effective, kept := remaining(c.permitted)
		if effective != c.effective || kept != c.kept {
			t.Errorf("of %x: %x effective, %x kept, want %x and %x", c.permitted, effective, kept, c.effective, c.kept)
		}
	}
}

// A thread that lacks CAP_PERFMON has it while it loads, and only then.
func TestWithPerfmon(t *testing.T) {
	effective := func() capSet {
		have, err := getCapabilities()
		must(t, err)
		return have.effective
	}
	capable(t, nil, func() {
		ran := false
		must(t, withPerfmon(func() error {
			ran = true
			if got := effective(); got != capPerfmon {
				t.Errorf("has %x while it loads", got)
			}
			return nil
		}))
		if got := effective(); got != 0 || !ran {
			t.Errorf("has %x afterwards, ran: %t", got, ran)
		}
	})
}
