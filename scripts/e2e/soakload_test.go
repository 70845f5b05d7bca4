// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"

	"snilb/scripts/testbed"
)

// soakLoad is clients of all kinds, until end.
type soakLoad struct {
	s    *soak
	ctx  context.Context // of the loops; what is under way goes to its end
	stop context.CancelFunc
	all  sync.WaitGroup
	*total
}

// total counts what clients did, over all loads of a run.
type total struct {
	mu       sync.Mutex // guards all
	done     map[string]int
	slowest  map[string]time.Duration
	failures []soakFailure
	slow     []string // what took long, and what happened before
}

// soakSlow is what is worth a look: no single thing that happens here takes so long.
const soakSlow = 8 * time.Second

type soakFailure struct {
	kind   string
	at     time.Time
	err    error
	reset  bool   // in the handshake
	killed bool   // a daemon was replaced in the meantime
	before string // what happened
}

// A client that is a loop of its own: it makes one connection, and pauses for up to so long.
type soakClient struct {
	kind  string
	many  int
	pause time.Duration
	do    func(*soak, *rand.Rand) error
}

var soakClients = []soakClient{
	{"curl", 2, 50 * time.Millisecond, soakTool(0)},
	{"openssl", 1, 100 * time.Millisecond, soakTool(1)},
	{"gnutls", 1, 100 * time.Millisecond, soakTool(2)},
	{"go", 4, 30 * time.Millisecond, soakTool(3)},
	{"long-lived", 16, 100 * time.Millisecond, (*soak).longLived},
	{"whole time", 8, 0, (*soak).wholeTime},
	{"download", 1, 100 * time.Millisecond, func(s *soak, r *rand.Rand) error { return s.fetch(r, 1<<20+r.Int64N(8<<20), 0) }},
	{"slow download", 2, 100 * time.Millisecond, func(s *soak, r *rand.Rand) error { return s.fetch(r, 1<<20+r.Int64N(2<<20), 20*time.Millisecond) }},
	{"upload", 1, 100 * time.Millisecond, (*soak).send},
	{"TCP check", 1, 100 * time.Millisecond, (*soak).check},
	{"client resets", 1, 100 * time.Millisecond, (*soak).resets},
	{"hello in pieces", 3, 50 * time.Millisecond, (*soak).pieces},
	{"unknown name", 1, 100 * time.Millisecond, (*soak).unknownName},
}

func (s *soak) startLoad() *soakLoad {
	ctx, stop := context.WithCancel(context.Background())
	l := &soakLoad{s: s, ctx: ctx, stop: stop, total: &total{done: make(map[string]int), slowest: make(map[string]time.Duration)}}
	if s.load != nil {
		l.total = s.load.total
	}
	s.load = l
	for _, c := range soakClients {
		for range c.many {
			r := rand.New(rand.NewPCG(s.rng.Uint64(), 1))
			l.all.Go(func() { l.loop(&c, r) })
		}
	}
	s.t.Cleanup(l.end)
	return l
}

func (l *soakLoad) end() {
	l.stop()
	l.all.Wait()
}

func (l *soakLoad) loop(c *soakClient, r *rand.Rand) {
	for l.ctx.Err() == nil {
		began := time.Now()
		err := c.do(l.s, r)
		l.count(c.kind, began, err)
		if c.pause > 0 {
			time.Sleep(time.Duration(r.Int64N(int64(c.pause))))
		}
	}
}

func (l *soakLoad) count(kind string, began time.Time, err error) {
	t := l.total
	t.mu.Lock()
	defer t.mu.Unlock()
	t.done[kind]++
	took := time.Since(began)
	if !holds(kind) {
		t.slowest[kind] = max(t.slowest[kind], took)
		if took > soakSlow && len(t.slow) < 20 {
			t.slow = append(t.slow, fmt.Sprintf("%s took %s, to %s: %s", kind, took.Round(time.Millisecond), time.Now().Format("15:04:05.000"), l.s.before()))
		}
	}
	if err != nil {
		t.failures = append(t.failures, soakFailure{
			kind: kind, at: time.Now(), err: err, reset: isReset(err) && !errors.As(err, new(brokenError)),
			killed: l.s.during(began, "kill", "upgrade"), before: l.s.before(),
		})
	}
}

// holds says that a client means to stay connected.
func holds(kind string) bool {
	return kind == "long-lived" || kind == "whole time" || kind == "slow download"
}

// brokenError is that a connection broke which had been established with a backend.
type brokenError struct{ error }

func broken(err error) error {
	if err == nil {
		return nil
	}
	return brokenError{fmt.Errorf("an established connection broke: %w", err)}
}

// isReset knows a reset also by what the programs print.
func isReset(err error) bool {
	for _, text := range []string{"reset by peer", "errno=104", "non-properly terminated", "Error in the pull function"} {
		if strings.Contains(err.Error(), text) {
			return true
		}
	}
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// judge fails for what nothing explains. Who is reset in its handshake may be one of those whose hello a dead daemon had
// acknowledged: as many as the daemons have counted.
func (s *soak) judge() {
	orphaned := s.orphaned
	for _, f := range s.load.failures {
		if f.reset && f.killed && orphaned > 0 {
			orphaned--
			continue
		}
		s.t.Errorf("%s %s: %v\n\tbefore: %s", f.at.Format("15:04:05.000"), f.kind, f.err, f.before)
	}
}

func (t *total) print(b *strings.Builder) {
	failed := make(map[string]int)
	for _, f := range t.failures {
		why := f.kind
		if f.reset {
			why += ", reset in its handshake"
		}
		failed[why]++
	}
	sum := 0
	for _, c := range soakClients {
		sum += t.done[c.kind]
		_, _ = fmt.Fprintf(b, "  %-18s %6d connections", c.kind, t.done[c.kind])
		if !holds(c.kind) {
			_, _ = fmt.Fprintf(b, ", the slowest %s", t.slowest[c.kind].Round(time.Millisecond))
		}
		_, _ = fmt.Fprintln(b)
	}
	for _, slow := range t.slow {
		_, _ = fmt.Fprintf(b, "  slow: %s\n", slow)
	}
	_, _ = fmt.Fprintf(b, "  in all %d connections, %d failed\n", sum, len(t.failures))
	for _, why := range sortedKeys(failed) {
		_, _ = fmt.Fprintf(b, "  failed: %s %d\n", why, failed[why])
	}
}

// target is one of the balancer's addresses.
func (s *soak) target(r *rand.Rand) netip.AddrPort {
	bed := s.bed
	all := []netip.Addr{bed.VIP4, bed.VIP6, bed.VIP4, bed.VIP6, bed.ExtraVIP4, bed.ExtraVIP6}
	return netip.AddrPortFrom(all[r.IntN(len(all))], 443)
}

func someName(r *rand.Rand) string {
	return []string{"a.example.com", "b.example.com", "x.w.example.com"}[r.IntN(3)]
}

// wantFrom wants the answer of a backend, whichever.
func wantFrom(got, name string) error {
	if !isBody(got) || !strings.Contains(got, fmt.Sprintf(" %q ", name)) {
		return fmt.Errorf("answer %q, want one for %s", got, name)
	}
	return nil
}

func soakTool(i int) func(*soak, *rand.Rand) error {
	return func(s *soak, r *rand.Rand) error {
		name := someName(r)
		got, err := clients[i].get(s.t, s.bed, s.target(r), name)
		if err != nil {
			return err
		}
		return wantFrom(got, name)
	}
}

func (s *soak) dial(r *rand.Rand) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), clientTimeout)
	defer cancel()
	c, err := s.bed.Client.DialContext(ctx, "tcp", s.target(r).String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), c.SetDeadline(time.Now().Add(clientTimeout))
}

// open connects and asks who answers.
func (s *soak) open(r *rand.Rand) (c *tls.Conn, answer string, err error) {
	raw, err := s.dial(r)
	if err != nil {
		return nil, "", err
	}
	name := someName(r)
	c = tls.Client(raw, trusting(&tls.Config{ServerName: name}))
	if err = c.Handshake(); err == nil {
		answer, err = whoami(c)
		if err = broken(err); err == nil {
			err = wantFrom(answer, name)
		}
	}
	if err != nil {
		_ = raw.Close()
	}
	return c, answer, err
}

// pingUntil asks the same again and again, as nobody else may ever answer.
func (s *soak) pingUntil(done func() bool, r *rand.Rand) error {
	c, answer, err := s.open(r)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	for !done() {
		time.Sleep(time.Duration(r.Int64N(int64(100 * time.Millisecond))))
		again, err := whoami(c)
		if err != nil {
			return broken(err)
		}
		if again != answer {
			return broken(fmt.Errorf("%q answers, before it was %q", again, answer))
		}
	}
	return nil
}

func (s *soak) longLived(r *rand.Rand) error {
	until := time.Now().Add(time.Duration(r.Int64N(int64(20 * time.Second))))
	ctx := s.load.ctx
	return s.pingUntil(func() bool { return time.Now().After(until) || ctx.Err() != nil }, r)
}

func (s *soak) wholeTime(r *rand.Rand) error {
	ctx := s.load.ctx
	return s.pingUntil(func() bool { return ctx.Err() != nil }, r)
}

// fetch downloads, with a pause behind each part, and checks every byte.
func (s *soak) fetch(r *rand.Rand, size int64, pause time.Duration) error {
	client := httpClient(s.bed, s.target(r), &tls.Config{ServerName: someName(r)})
	resp, err := client.Get(fmt.Sprintf("https://backend/big?n=%d", size))
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	hash, part := sha256.New(), make([]byte, 32<<10)
	var n int64
	for {
		m, err := resp.Body.Read(part)
		hash.Write(part[:m])
		n += int64(m)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return broken(fmt.Errorf("after %d bytes of %d: %w", n, size, err))
		}
		time.Sleep(pause)
	}
	if got, want := hex.EncodeToString(hash.Sum(nil)), resp.Trailer.Get("X-Sha256"); n != size || got != want {
		return broken(fmt.Errorf("download of %d: %d bytes with SHA-256 %s, backend sent %s", size, n, got, want))
	}
	return nil
}

func (s *soak) send(r *rand.Rand) error {
	size := 1<<20 + r.Int64N(4<<20)
	client := httpClient(s.bed, s.target(r), &tls.Config{ServerName: someName(r)})
	hash := sha256.New()
	body := io.TeeReader(io.LimitReader(testbed.Noise(uint64(size)), size), hash)
	req, err := http.NewRequestWithContext(context.Background(), http.MethodPut, "https://backend/upload", body)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if want := fmt.Sprintf("%d %x\n", size, hash.Sum(nil)); err != nil || string(answer) != want {
		return broken(fmt.Errorf("upload: backend got %q, want %q (%w)", answer, want, err))
	}
	return nil
}

// check opens and closes, as another balancer's TCP check does, and wants its FIN answered.
func (s *soak) check(r *rand.Rand) error {
	c, err := s.dial(r)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	if err := c.CloseWrite(); err != nil {
		return err
	}
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		return fmt.Errorf("after FIN: %d bytes, %w, want EOF", n, err)
	}
	return nil
}

// resets ends by a reset: before the hello, in the middle of it, or when all is established.
func (s *soak) resets(r *rand.Rand) error {
	c, err := s.dial(r)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	switch r.IntN(3) {
	case 0:
	case 1:
		if _, err := c.Write([]byte{22, 3, 1, 1, 0, 1, 0, 0, 252}); err != nil {
			return err
		}
		time.Sleep(time.Duration(r.Int64N(int64(100 * time.Millisecond))))
	case 2:
		s := tls.Client(c, trusting(&tls.Config{ServerName: someName(r)}))
		if err := s.Handshake(); err != nil {
			return err
		}
		if _, err := whoami(s); err != nil {
			return broken(err)
		}
	}
	return c.SetLinger(0)
}

// pieces sends its hello in small parts, slow enough that the engine acknowledges some.
func (s *soak) pieces(r *rand.Rand) error {
	raw, err := s.dial(r)
	if err != nil {
		return err
	}
	defer func() { _ = raw.Close() }()
	name := someName(r)
	slow := &splitter{Conn: raw, size: 60 + r.IntN(300), pause: time.Duration(r.Int64N(int64(80 * time.Millisecond)))}
	c := tls.Client(slow, trusting(classic(name)))
	if err := c.Handshake(); err != nil {
		return err
	}
	slow.pause, slow.size = 0, 1<<20
	got, err := whoami(c)
	if err != nil {
		return broken(err)
	}
	return wantFrom(got, name)
}

// unknownName must be reset, as no route has it.
func (s *soak) unknownName(r *rand.Rand) error {
	raw, err := s.dial(r)
	if err != nil {
		return err
	}
	defer func() { _ = raw.Close() }()
	err = tls.Client(raw, trusting(&tls.Config{ServerName: "local.example.com"})).Handshake()
	if !errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("a name without a route: %w, want a reset", err)
	}
	return nil
}
