// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"snilb/scripts/testbed"
)

// floodSettings are what a flood is like. Its packets are sent by one thread, so by one CPU at most: the client's and the
// contender's work must fit beside that, or the flood would measure the sender.
type floodSettings struct {
	Kinds []string `json:"kinds"`
	// Rates are packets a second, the same offered to everybody; 0 is as fast as the sender gets rid of them.
	Rates []float64 `json:"packets_per_second"`
	// Clients is the rate of real clients, of whom each waits for so long: less than a measurement takes, or none would be
	// seen to fail.
	Clients  float64       `json:"clients_per_second"`
	Patience time.Duration `json:"patience_ns"`
	// Lead is how long a flood goes on before clients come, so that what it fills is full.
	Lead time.Duration `json:"lead_ns"`
	// Rest is how long after a flood the memory that it has left is read.
	Rest time.Duration `json:"rest_ns"`
}

// flooded is what one contender did in one flood, in a site of its own.
type flooded struct {
	Kind    string  `json:"kind"`
	Offered float64 `json:"offered_per_second"`
	Clients *phase  `json:"clients"`
	Flood   *phase  `json:"flood"`
	// Arrived is the packets a second that reached the load balancer, the clients' few among them: what the sender could
	// not get rid of, or a queue was too short for, is not.
	Arrived float64 `json:"arrived_per_second"`
	// Most and Left are the bytes by which the kernel grew, at most in the flood and some time after it.
	Most int64 `json:"kernel_most"`
	Left int64 `json:"kernel_left"`
	// Grown are the slab caches that had grown most after it: they tell a flood's entries from what others took meanwhile.
	Grown map[string]int64 `json:"grown"`
	// Conntrack and HalfOpen are entries of conntrack in the load balancer and sockets in SYN_RECV, the backend's too, late
	// in the flood.
	Conntrack int `json:"conntrack"`
	HalfOpen  int `json:"half_open"`
	// Snilb is nothing for the others.
	Snilb *floodState `json:"snilb,omitempty"`
}

// floodState is what snilb holds for who never was a client.
type floodState struct {
	// Flows are connections of the flood that have a backend, or get one.
	Flows int `json:"flood_flows"`
	// Guessed are those whose hello is waited for: one of some million cookies that are made up is right.
	Guessed int `json:"flood_guessed"`
	// HelloBytes are of all hellos that are not whole, the clients' too.
	HelloBytes int64 `json:"hello_bytes"`
}

// floods measures a contender with real clients alone, and then with them in each of the floods. Every flood meets a new
// site: what the one before has left in a table would be in its way.
func (t *tournament) floods(ctx context.Context, c contender) (r record, err error) {
	set := &t.results.Settings
	r.Contender = c.Name
	for _, kind := range set.Flood.Kinds {
		for _, rate := range set.Flood.Rates {
			f, err := t.oneFlood(ctx, c, kind, rate, &r.Calm)
			// Whoever else needs memory meanwhile does not do so each time.
			for try := 1; try < 3 && err == nil && t.short && f.Snilb != nil && f.Left > floodMemory; try++ {
				progress("%s: %s flood: the kernel has %d bytes more, %v: once again", c.Name, f.title(), f.Left, f.Grown)
				f, err = t.oneFlood(ctx, c, kind, rate, &r.Calm)
			}
			if err != nil {
				return r, err
			}
			r.Floods = append(r.Floods, f)
		}
	}
	return r, nil
}

// oneFlood measures a contender in a flood, and before that without one unless that was done.
func (t *tournament) oneFlood(ctx context.Context, c contender, kind string, rate float64, calm **phase) (f flooded, err error) {
	err = t.with(ctx, c, func(s *site) error {
		if *calm == nil {
			if *calm, err = s.floodClients(ctx); err != nil {
				return fmt.Errorf("%s: connections without a flood: %w", c.Name, err)
			}
		}
		if f, err = s.flood(ctx, kind, rate); err != nil {
			return fmt.Errorf("%s: %s flood: %w", c.Name, kind, err)
		}
		return nil
	})
	return f, err
}

func (s *site) floodClients(ctx context.Context) (*phase, error) {
	return s.connections(ctx, s.set.Flood.Clients, s.set.Duration, s.set.Flood.Patience)
}

// flood looks at real clients while packets come that belong to none. Answers to them go to the client's namespace, where the
// sender's tap throws them away: its kernel, which has none of the addresses, need not look at them.
func (s *site) flood(ctx context.Context, kind string, rate float64) (f flooded, err error) {
	f.Kind, f.Offered = kind, rate
	set := s.set
	before, err := s.memory()
	if err != nil {
		return f, err
	}
	total := set.Flood.Lead + set.Warmup + set.Duration + 500*time.Millisecond
	args := []string{"--interface", "eth0", "--sources", floodSources.String(), "--kind", kind, "--rate", fmt.Sprint(rate), "--duration", total.String()}
	if rate == 0 && !s.c.bed.NoOffload {
		// Packet sockets are slower. A veth takes frames of XDP if it runs GRO.
		if err := s.bed.LB.Offload("eth0", true, testbed.GRO); err != nil {
			return f, err
		}
		args = append(args, "--xdp")
	}
	cmd := s.tool(ctx, "flood", args...)
	var out bytes.Buffer
	cmd.Stdout = &out
	p, err := startProcess("snilb bench flood", cmd)
	if err != nil {
		return f, err
	}
	if err := s.inFlood(ctx, &f, before); err != nil {
		return f, errors.Join(err, p.kill())
	}
	<-p.exited
	if f.Flood, err = readPhase("flood", out.Bytes(), p.said.String(), p.err); err != nil {
		return f, err
	}
	time.Sleep(set.Flood.Rest)
	after, err := s.memory()
	f.Left, f.Grown = after.taken(before), grown(before.Caches, after.Caches, 5)
	return f, err
}

// inFlood measures what there is to see while one goes on.
func (s *site) inFlood(ctx context.Context, f *flooded, before memory) (err error) {
	select {
	case <-ctx.Done():
	case <-time.After(s.set.Flood.Lead):
	}
	arrived, err := s.received()
	if err != nil {
		return err
	}
	began, most := time.Now(), startPeak(before)
	f.Clients, err = s.floodClients(ctx)
	took := time.Since(began)
	f.Most = most.stop()
	if err != nil {
		return err
	}
	now, err := s.received()
	if err != nil {
		return err
	}
	f.Arrived = float64(now-arrived) / took.Seconds()
	if f.Conntrack, f.HalfOpen, err = s.tracked(); err != nil {
		return err
	}
	if strings.HasPrefix(s.c.Name, "snilb-") {
		f.Snilb, err = s.snilbState(ctx)
	}
	return err
}

// received is the packets that have reached the load balancer from clients.
func (s *site) received() (uint64, error) {
	h, err := s.bed.LB.Netlink()
	if err != nil {
		return 0, err
	}
	defer h.Close()
	l, err := h.LinkByName("eth0")
	if err != nil {
		return 0, err
	}
	return l.Attrs().Statistics.RxPackets, nil
}

// tracked counts the entries of conntrack in the load balancer, and the sockets in SYN_RECV there and at the backends.
func (s *site) tracked() (entries, halfOpen int, err error) {
	err = s.bed.LB.Do(func() error {
		text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		if errors.Is(err, fs.ErrNotExist) {
			return nil // nothing here tracks
		}
		if err != nil {
			return err
		}
		entries, err = strconv.Atoi(strings.TrimSpace(string(text)))
		return err
	})
	count := func() error {
		text, err := os.ReadFile("/proc/thread-self/net/tcp") // /proc/net is that of the process
		halfOpen += synReceived(string(text))
		return err
	}
	return entries, halfOpen, errors.Join(err, s.bed.LB.Do(count), s.bed.Backend.Do(count))
}

// synReceived counts the sockets in that state of a /proc/net/tcp.
func synReceived(text string) (n int) {
	for line := range strings.Lines(text) {
		if fields := strings.Fields(line); len(fields) > 3 && fields[3] == "03" {
			n++
		}
	}
	return n
}

// snilbState asks the daemon what it holds.
func (s *site) snilbState(ctx context.Context) (*floodState, error) {
	ask := func(what, format string) ([]byte, error) {
		out, err := s.bed.LB.Command(ctx, s.snilb, what, "--name", s.name, "-o", format).Output()
		if err != nil {
			return nil, fmt.Errorf("snilb %s: %w", what, err)
		}
		return out, nil
	}
	out, err := ask("status", "json")
	if err != nil {
		return nil, err
	}
	var status struct {
		Engine floodState `json:"engine"` // which has but one of its fields
	}
	if err := json.Unmarshal(out, &status); err != nil {
		return nil, fmt.Errorf("snilb status: %w", err)
	}
	if out, err = ask("flows", "jsonl"); err != nil {
		return nil, err
	}
	state := &status.Engine
	return state, state.count(out, floodSources)
}

// count counts the flows of a list whose client is one of these.
func (f *floodState) count(list []byte, sources netip.Prefix) error {
	for dec := json.NewDecoder(bytes.NewReader(list)); dec.More(); {
		var flow struct {
			Client netip.AddrPort `json:"client"`
			State  string         `json:"state"`
		}
		if err := dec.Decode(&flow); err != nil {
			return fmt.Errorf("snilb flows: %w", err)
		}
		switch {
		case !sources.Contains(flow.Client.Addr()):
		case flow.State == "hello":
			f.Guessed++
		default:
			f.Flows++
		}
	}
	return nil
}

// peak notes the most that the kernel has grown by.
type peak struct {
	done chan struct{}
	most chan int64
}

func startPeak(before memory) *peak {
	p := &peak{make(chan struct{}), make(chan int64)}
	go func() {
		tick := time.NewTicker(400 * time.Millisecond) // a look takes some ms
		defer tick.Stop()
		var most int64
		for last := false; ; {
			if now, err := readMemory(); err == nil { // what keeps it from being read has stopped others before
				most = max(most, now.taken(before))
			}
			if last {
				p.most <- most
				return
			}
			select {
			case <-p.done:
				last = true
			case <-tick.C:
			}
		}
	}()
	return p
}

func (p *peak) stop() int64 {
	close(p.done)
	return <-p.most
}

// What a flood may make snilb hold, whatever the machine: room for what else happens on it, and less than 40,000 packets
// would take if each left the smallest entry there is.
const floodMemory = 4 << 20

// luckyGuesses is how many of some million packets may have a cookie that is right.
const luckyGuesses = 5

// stood says in what of the floods snilb failed that has nothing to do with the speed of the machine: an entry of the flood
// in its table, memory, and, if all is said to matter, a client that it did not serve.
func (r *record) stood(all bool) error {
	var errs []error
	for i := range r.Floods {
		f := &r.Floods[i]
		fail := func(format string, args ...any) {
			errs = append(errs, fmt.Errorf("%s: %s flood: "+format, append([]any{r.Contender, f.title()}, args...)...))
		}
		if err := complete(f.Clients.Result); err != nil && all {
			fail("connections: %w", err)
		}
		if f.Snilb == nil {
			continue
		}
		if f.Snilb.Flows > 0 || f.Snilb.Guessed > luckyGuesses {
			fail("%d flows are its, and %d hellos of it are waited for", f.Snilb.Flows, f.Snilb.Guessed)
		}
		if f.Left > floodMemory {
			fail("the kernel has %d bytes more, %d are all right: %v", f.Left, floodMemory, f.Grown)
		}
	}
	return errors.Join(errs...)
}

// title says which flood it is.
func (f *flooded) title() string { return f.Kind + ", " + rateTitle(f.Offered) }

func rateTitle(rate float64) string {
	if rate == 0 {
		return "as fast as it goes"
	}
	return fmt.Sprintf("%.0f a second", rate)
}
