// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// Load says what is offered to whom.
type Load struct {
	// Target is the balancer's address.
	Target netip.AddrPort
	// Rate is how many attempts begin a second, whatever became of the earlier ones (open loop). 0: an attempt begins when
	// another ends (closed loop).
	Rate float64
	// Concurrency is how many attempts may run at once. In an open loop, an attempt that is due while so many run begins
	// late, which counts into its latency.
	Concurrency int
	// Warmup comes before what is measured, for Duration.
	Warmup, Duration time.Duration
	// Timeout is for one attempt.
	Timeout time.Duration
	// Hellos are what the connections begin with.
	Hellos *Hellos
	// Reply is how many bytes of answer to the hello make a success, at least 1.
	Reply int
	// Progress is told what each second brought. Optional; it must not block.
	Progress func(Second)
}

// maxConcurrency bounds what a slip of the keyboard can ask for.
const maxConcurrency = 1 << 20

func (l *Load) check() error {
	switch {
	case !l.Target.IsValid() || l.Target.Port() == 0:
		return errors.New("no target address and port")
	case l.Hellos == nil:
		return errors.New("no hellos")
	case l.Rate < 0 || l.Rate > 1e8:
		return fmt.Errorf("a rate of %g: not below 0, nor above 100 million", l.Rate)
	case l.Concurrency < 1 || l.Concurrency > maxConcurrency:
		return fmt.Errorf("a concurrency of %d: between 1 and %d", l.Concurrency, maxConcurrency)
	case l.Duration <= 0 || l.Warmup < 0 || l.Timeout <= 0:
		return errors.New("durations must be above 0, the warm-up not below")
	case l.Reply < 1 || l.Reply > 1<<30:
		return fmt.Errorf("a reply of %d bytes: between 1 and 1 GiB", l.Reply)
	}
	return nil
}
