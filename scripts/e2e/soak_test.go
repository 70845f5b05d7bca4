// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// soakTime is how long the mixed load runs where the environment says nothing, as in CI.
const soakTime = 45 * time.Second

// closingTime is what flows may take to be forgotten when all is closed: a reset one is kept for 10 s of silence, and one whose
// end an earlier daemon saw for its closing timeout.
const closingTime = 90 * time.Second

// soak is one run: a daemon and its successors, the load on them, and what was done to them.
type soak struct {
	t    *testing.T
	bed  *testbed.Bed
	rng  *rand.Rand // the events'
	load *soakLoad
	diary

	name, file string // --name and --routes
	d          *daemon
	said       *soakLog
	second     [4]string // ours and theirs on the second path to the backends, by family
	uplink     int       // that leads to the extra addresses

	counts          map[string]int // events, by name
	orphaned        int
	daemons         int
	slowestStart    time.Duration
	peak            int
	lastOrphaned    int // of the daemon that runs
	lastUnreachable int
	replugged       int // interfaces made anew
	unreachable     int
	warm, under     resources
}

// TestSoak is the long run: clients of all kinds, while the daemon is killed, upgraded, stopped and reloaded, backends fail and
// interfaces flap. No connection notices, and in the end all is as it was in the beginning. In the last third one daemon lives
// through it all.
//
//	SNILB_SOAK=1h   how long
//	SNILB_SEED=7    which events
func TestSoak(t *testing.T) {
	needTool(t, "curl", "openssl", "gnutls-cli", "nft")
	s := newSoak(t)
	duration := soakTime
	if text := os.Getenv("SNILB_SOAK"); text != "" {
		var err error
		duration, err = time.ParseDuration(text)
		must(t, err)
	}
	s.start()
	first := s.warmUp()
	began := time.Now()
	s.load = s.startLoad()
	for time.Since(began) < duration*2/3 {
		s.random(soakEvents)
	}
	s.oneDaemon(time.Now(), duration/3)
	s.load.end()
	s.noFlows()
	last := s.settled(first)
	s.summary(first, last)
	s.leave()
}

func newSoak(t *testing.T) *soak {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("SNILB_SEED"); text != "" {
		var err error
		seed, err = strconv.ParseUint(text, 10, 64)
		must(t, err)
	}
	t.Logf("SNILB_SEED=%d", seed)
	need(t, "the snilb binary", binaryErr)
	needBPFFS(t)
	s := &soak{
		t: t, rng: rand.New(rand.NewPCG(seed, 0)), name: instanceName(), file: filepath.Join(t.TempDir(), "routes.yaml"),
		said: &soakLog{counts: make(map[string]int)}, counts: make(map[string]int),
	}
	s.bed = newBed(t, testbed.Options{Topology: testbed.TwoUplinks})
	for _, dev := range []string{"eth0", "eth1", "eth2"} {
		s.keepAddresses(dev)
	}
	net4, net6, err := s.bed.SecondPath()
	must(t, err)
	for i, p := range []string{net4.Masked().Addr().Next().String(), net6.Masked().Addr().Next().String()} {
		s.second[i] = p
	}
	s.second[2] = net4.Masked().Addr().Next().Next().String()
	s.second[3] = net6.Masked().Addr().Next().Next().String()
	must(t, s.bed.UseUplink(0))
	startBackends(t, s.bed)
	must(t, os.WriteFile(s.file, []byte(soakRoutes(s.bed)[0]), 0o644))
	t.Cleanup(s.giveUp)
	return s
}

// start starts a daemon and waits for it.
func (s *soak) start() {
	s.t.Helper()
	argv := slices.Concat([]string{"attach"}, s.bed.Uplinks, []string{"--routes", s.file, "--name", s.name, "--mode", *mode,
		"--on-exit", "keep", "--dead-after", "30s"}) // a slow machine must not make the stack answer SYNs
	d := &daemon{t: s.t, bed: s.bed, name: s.name, file: s.file, stderr: newLines(), exited: make(chan struct{})}
	d.cmd = s.bed.LB.Command(context.Background(), binary, argv...)
	d.cmd.Stderr = io.MultiWriter(d.stderr, s.said)
	must(s.t, d.cmd.Start())
	go d.wait()
	s.d = d
	s.daemons++
	s.waitReady()
	s.lastOrphaned, s.lastUnreachable = 0, 0
	s.look()
}

// waitReady has more patience than other tests: load on the machine is what this one is about.
func (s *soak) waitReady() {
	s.t.Helper()
	began := time.Now()
	select {
	case <-s.d.stderr.saw("ready"):
	case <-s.d.exited:
		s.t.Fatalf("snilb attach ended before it was ready: %v", s.d.err)
	case <-time.After(time.Minute):
		s.t.Fatal("not ready in a minute")
	}
	s.slowestStart = max(s.slowestStart, time.Since(began))
}

// look notes what the daemon has counted so far, as its death may come next.
func (s *soak) look() {
	if s.d.hasExited() {
		s.t.Fatalf("the daemon has ended by itself: %v", s.d.err)
	}
	e := s.d.counters().Engine
	s.peak = max(s.peak, e.Flows)
	orphaned, unreachable := int(e.Hellos["orphaned"]), 0
	for _, c := range e.Connects {
		if c.Result == "unreachable" || c.Result == "no_route_to_client" {
			unreachable += int(c.Count)
		}
	}
	s.orphaned += orphaned - s.lastOrphaned
	s.unreachable += unreachable - s.lastUnreachable
	s.lastOrphaned, s.lastUnreachable = orphaned, unreachable
}

// warmUp has the first daemon do once what all later ones do, and returns what it holds when nobody uses it any more.
func (s *soak) warmUp() resources {
	s.load = s.startLoad()
	for _, e := range soakEvents {
		if !e.replaces {
			s.happen(&e)
		}
	}
	files := soakRoutes(s.bed)
	for i := range files { // the first comes last
		must(s.t, s.d.reload(files[len(files)-1-i]))
	}
	s.load.end()
	s.noFlows()
	return s.measure()
}

// oneDaemon has one daemon live through everything that does not replace it, and looks what it holds after its warm-up, and in
// the end, under the same load.
func (s *soak) oneDaemon(began time.Time, duration time.Duration) {
	for _, name := range []string{"upgrade", "route moved"} { // the latter has programs attached to the second path
		s.happen(&soakEvents[slices.IndexFunc(soakEvents, func(e soakEvent) bool { return e.name == name })])
	}
	pid := s.d.cmd.Process.Pid
	others := slices.DeleteFunc(slices.Clone(soakEvents), func(e soakEvent) bool { return e.replaces })
	for time.Since(began) < duration/4 {
		s.random(others)
	}
	s.warm = s.held()
	for time.Since(began) < duration {
		s.random(others)
	}
	s.base()
	s.under = s.held()
	if s.d.cmd.Process.Pid != pid {
		s.t.Errorf("the daemon was replaced")
	}
}

// base puts the first routes in force.
func (s *soak) base() { must(s.t, s.d.reload(soakRoutes(s.bed)[0])) }

func (s *soak) noFlows() {
	s.t.Helper()
	began := time.Now()
	s.d.noFlows(closingTime)
	s.t.Logf("all flows were gone %s after the load", time.Since(began).Round(time.Second))
}

// leave ends the last daemon, and looks that nothing is left.
func (s *soak) leave() {
	_, err := s.d.snilb("detach", "--all", "--name", s.name)
	must(s.t, err)
	select {
	case <-s.d.exited:
	case <-time.After(stopTimeout):
		s.t.Fatal("still running after detach")
	}
	if s.d.err != nil {
		s.t.Errorf("asked to detach: %v, want exit code 0", s.d.err)
	}
	assertClean(s.t, s.bed, s.name)
}

// giveUp removes what a failed run has left.
func (s *soak) giveUp() {
	if s.t.Failed() {
		s.t.Logf("the daemons said last:\n%s", s.said)
	}
	if s.d == nil || s.d.hasExited() && len(pinsOf(s.name)) == 0 {
		return
	}
	if !s.d.hasExited() {
		_ = s.d.cmd.Process.Kill()
		<-s.d.exited
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if out, err := s.bed.LB.Command(ctx, binary, "detach", "--all", "--name", s.name).CombinedOutput(); err != nil {
		s.t.Errorf("detach: %v\n%s", err, out)
	}
}

// summary judges and prints.
func (s *soak) summary(first, last resources) {
	s.look()
	var b strings.Builder
	_, _ = fmt.Fprintf(&b, "mode %s, %d daemons, of which the slowest was ready in %s\n", *mode, s.daemons, s.slowestStart.Round(time.Millisecond))
	for _, e := range soakEvents {
		_, _ = fmt.Fprintf(&b, "  %-18s %6d\n", e.name, s.counts[e.name])
	}
	s.load.print(&b)
	_, _ = fmt.Fprintf(&b, "  hellos orphaned %d, attempts without a route to the backend or the client %d, most flows at once %d\n", s.orphaned, s.unreachable, s.peak)
	s.said.print(&b)
	_, _ = fmt.Fprintf(&b, "the first daemon idle, the last one idle; the last one after its warm-up and in the end, both under load\n")
	for _, name := range resourceNames() {
		_, _ = fmt.Fprintf(&b, "  %-18s %8d %8d    %8d %8d\n", name, first[name], last[name], s.warm[name], s.under[name])
	}
	s.t.Logf("soak:\n%s", &b)
	s.judge()
	for _, wrong := range slices.Concat(first.wrong(last, "first idle", "last idle"), s.warm.wrongUnderLoad(s.under)) {
		s.t.Error(wrong)
	}
}

// soakLog keeps the end of what the daemons say, and counts the rest by its message.
type soakLog struct {
	mu      sync.Mutex // guards all
	last    []string
	partial string
	counts  map[string]int
}

func (l *soakLog) Write(p []byte) (int, error) {
	const kept = 200
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := strings.Split(l.partial+string(p), "\n")
	l.partial = lines[len(lines)-1]
	for _, line := range lines[:len(lines)-1] {
		l.last = append(l.last, line)
		if _, after, ok := strings.Cut(line, " level="); ok {
			level, rest, _ := strings.Cut(after, " msg=")
			if message, err := strconv.QuotedPrefix(rest); err == nil {
				rest = message
			} else {
				rest, _, _ = strings.Cut(rest, " ")
			}
			l.counts[level+" "+rest]++
		}
	}
	l.last = l.last[max(0, len(l.last)-kept):]
	return len(p), nil
}

func (l *soakLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.last, "\n")
}

// print lists what was said as a warning or an error.
func (l *soakLog) print(b *strings.Builder) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, message := range sortedKeys(l.counts) {
		if !strings.HasPrefix(message, "INFO") {
			_, _ = fmt.Fprintf(b, "  said %d times: %s\n", l.counts[message], message)
		}
	}
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
