// SPDX-License-Identifier: Apache-2.0

// Command bench measures snilb beside what people use today, each in the same network namespaces on this machine, one after
// the other. `make bench` runs it: the README says what for, site.go how fair it is, measure.go what is measured and
// summary.go how the figures come about.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// options are the flags.
type options struct {
	short, readme bool
	rounds        int
	modes, only   string
	generator     string
	rate          float64
	flood         bool
	floodRates    string
	snilb         string
	out, from     string
}

func main() {
	var o options
	flag.BoolVar(&o.short, "short", false, "one round of small numbers: shows that everything works, and measures nothing")
	flag.BoolVar(&o.readme, "readme", false, "rewrite the README's table too")
	flag.IntVar(&o.rounds, "rounds", 0, "rounds (default 5, with -flood 1, with -short 1)")
	flag.StringVar(&o.modes, "modes", "tc", "attach modes of snilb: tc, xdp, xdp-generic, several in quotes")
	flag.StringVar(&o.only, "only", "", "only these contenders, besides the plainly routed path")
	flag.StringVar(&o.generator, "generator", sockets, "what makes new connections: sockets, packets")
	flag.Float64Var(&o.rate, "rate", 0, "new connections a second at which CPU is compared (default: half of what the slowest can do, at most 2000)")
	flag.BoolVar(&o.flood, "flood", false, "measure real clients in floods of packets that belong to none, and nothing else")
	flag.StringVar(&o.floodRates, "flood-rates", "", "packets a second of each kind of flood, several in quotes, 0 as fast as it goes (default '100000 0', with -short 40000)")
	flag.StringVar(&o.snilb, "snilb", "./snilb", "the snilb to measure, and whose load tool to use")
	flag.StringVar(&o.out, "out", "scripts/bench/results", "folder of the results, with -flood those of floods; with -short none are written")
	flag.StringVar(&o.from, "from", "", "measure nothing, but report what this results.json holds")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, o)
	if ctx.Err() != nil {
		err = errors.New("interrupted") // of which all else is a consequence
	}
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	var r *results
	var err error
	if o.from != "" {
		r, err = readResults(o.from)
	} else {
		r, err = measure(ctx, o)
	}
	if err != nil {
		return err
	}
	fmt.Print(r.markdown())
	switch {
	case o.short && len(r.Incomplete) > 0:
		return errors.New("something failed, see above")
	case o.short:
		return nil
	case len(r.Records) == 0:
		return errors.New("nothing could be measured")
	}
	if err := r.write(o.out); err != nil {
		return err
	}
	if !o.readme {
		return nil
	}
	return intoReadme("README.md", o.out, filepath.ToSlash(o.out))
}

// settings are those of the flags.
func (o options) settings() (settings, error) {
	set := full
	if o.short {
		set = short
	}
	if o.flood {
		set.Rounds = 1 // each contender works in many floods
	}
	if o.rounds > 0 {
		set.Rounds = o.rounds
	}
	if o.rate > 0 {
		set.ConnectionRate = o.rate
	}
	if given := list(o.floodRates); len(given) > 0 {
		set.Flood.Rates = nil
		for _, text := range given {
			rate, err := strconv.ParseFloat(text, 64)
			if err != nil || rate < 0 {
				return set, fmt.Errorf("-flood-rates %s: packets a second, 0 as fast as it goes", text)
			}
			set.Flood.Rates = append(set.Flood.Rates, rate)
		}
	}
	set.Generator = o.generator
	if set.Generator != sockets && set.Generator != packets {
		return set, fmt.Errorf("-generator %s: sockets or packets", set.Generator)
	}
	return set, nil
}

// chosen are the contenders of the flags.
func (o options) chosen(snilb string) ([]contender, error) {
	all, err := contenders(snilb, list(o.modes))
	if err != nil {
		return nil, err
	}
	if only := list(o.only); len(only) > 0 {
		for _, name := range only {
			if !slices.ContainsFunc(all, func(c contender) bool { return c.Name == name }) {
				return nil, fmt.Errorf("-only %s: there is no such contender", name)
			}
		}
		all = slices.DeleteFunc(all, func(c contender) bool { return c.Name != floor && !slices.Contains(only, c.Name) })
	}
	for _, c := range all {
		err = errors.Join(err, c.installed())
	}
	return all, err
}

// list takes words with spaces or commas between them.
func list(text string) []string { return strings.Fields(strings.ReplaceAll(text, ",", " ")) }

func measure(ctx context.Context, o options) (*results, error) {
	set, err := o.settings()
	if err != nil {
		return nil, err
	}
	snilb, err := filepath.Abs(o.snilb)
	if err != nil {
		return nil, err
	}
	chosen, err := o.chosen(snilb)
	if err != nil {
		return nil, err
	}
	if set.files, err = manyFiles(); err != nil {
		return nil, err
	}
	// Each connection has two ends in a proxy.
	if most := set.files/2 - 1000; set.IdleConns > most {
		progress("%d idle connections instead of %d: %d files may be open", most, set.IdleConns, set.files)
		set.IdleConns = most
	}
	m, err := thisMachine()
	if err != nil {
		return nil, err
	}
	if m.IdleBusy, err = noise(ctx, 2*set.Duration); err != nil {
		return nil, err
	}
	progress("%d CPUs, %.1f %% busy before anything runs", m.CPUs, 100*m.IdleBusy)
	if m.IdleBusy > 0.03 {
		progress("that is much: the figures will be too")
	}
	r := &results{Command: command(os.Args[1:]), Machine: m, Settings: set, Flood: o.flood}
	for _, c := range chosen {
		r.Contenders = append(r.Contenders, entrant{c.Name, c.Title, c.ByName, c.says()})
	}
	t := &tournament{results: r, list: chosen, snilb: snilb, short: o.short, flood: o.flood}
	return r, t.run(ctx)
}

// manyFiles allows many open files, to the children too, and returns how many.
func manyFiles() (int, error) {
	limit := syscall.Rlimit{Cur: 1 << 20, Max: 1 << 20}
	if syscall.Setrlimit(unix.RLIMIT_NOFILE, &limit) == nil {
		return 1 << 20, nil
	}
	// In a container not even root may go above the hard limit.
	if err := syscall.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, err
	}
	limit.Cur = limit.Max
	return int(limit.Max), syscall.Setrlimit(unix.RLIMIT_NOFILE, &limit)
}

// command is what was typed, but for the name that `go run` gives the program.
func command(args []string) string {
	out := "go run ./scripts/bench"
	for _, a := range args {
		if strings.Contains(a, " ") {
			a = "'" + a + "'"
		}
		out += " " + a
	}
	return out
}

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format(time.TimeOnly)+" "+format+"\n", args...)
}

// tournament lets the contenders run in turns.
type tournament struct {
	results *results
	list    []contender
	snilb   string
	short   bool // speed does not matter
	flood   bool
}

func (t *tournament) run(ctx context.Context) error {
	began, set := time.Now(), &t.results.Settings
	if !t.flood && (set.ConnectionRate == 0 || set.RequestRate == 0) {
		if err := t.chooseRates(ctx); err != nil {
			return err
		}
	}
	for round := 1; round <= set.Rounds; round++ {
		order := slices.Clone(t.list)
		if round%2 == 0 {
			slices.Reverse(order) // so that nobody always comes after the same one
		}
		for _, c := range order {
			if err := t.turn(ctx, round, c); err != nil {
				return err
			}
		}
	}
	t.results.Took = time.Since(began).Seconds()
	return nil
}

// turn measures one contender in one round. What goes wrong is noted: it must not cost the others their figures.
func (t *tournament) turn(ctx context.Context, round int, c contender) error {
	play := t.all
	if t.flood {
		play = t.floods
	}
	rec, err := play(ctx, c)
	if err == nil {
		rec.Round = round
		rec.trim()
		t.results.Records = append(t.results.Records, rec)
		progress("round %d, %-12s %s", round, c.Name, t.results.says(&rec))
		err = errors.Join(rec.whole(), rec.stood(t.short))
		if !t.short {
			err = errors.Join(err, rec.keptUp())
		}
	}
	if err == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	progress("%v", err)
	t.results.Incomplete = append(t.results.Incomplete, incident{round, err.Error()})
	return nil
}

// all measures a contender in all but floods.
func (t *tournament) all(ctx context.Context, c contender) (r record, err error) {
	err = t.with(ctx, c, func(s *site) error {
		r, err = s.all(ctx)
		return err
	})
	return r, err
}

// says is a record in a line.
func (r *results) says(rec *record) string {
	if rec.Calm != nil {
		text := fmt.Sprintf("%.1f %% served", rec.Calm.served())
		for i := range rec.Floods {
			f := &rec.Floods[i]
			text += fmt.Sprintf("; %s %.0fk/s: %.1f %%", f.Kind, f.Arrived/1e3, f.Clients.served())
		}
		return text
	}
	return fmt.Sprintf("%5.0f connections/s, %.0f µs CPU at %.0f/s; %.2f GB/s; %6.0f requests/s", rec.Connections.Rate,
		rec.connectionCPU()*1e6, r.Settings.ConnectionRate, gigabytes(rec.Bulk)/rec.Bulk.Seconds, rec.Requests.Rate)
}

// with runs do in a new site, and then waits until what the kernel takes down behind our back is down.
func (t *tournament) with(ctx context.Context, c contender, do func(*site) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s, err := newSite(ctx, &t.results.Settings, t.snilb, c)
	if err != nil {
		return err
	}
	err = do(s)
	if err := errors.Join(err, s.close()); err != nil {
		return err
	}
	for range 20 {
		busy, err := noise(ctx, 150*time.Millisecond)
		if err != nil {
			return err
		}
		if busy < t.results.Machine.IdleBusy+0.1 {
			break
		}
	}
	return nil
}

// chooseRates looks what each can do, and so that all can, before much time is spent.
func (t *tournament) chooseRates(ctx context.Context) error {
	connections, requests := math.Inf(1), math.Inf(1)
	for _, c := range t.list {
		err := t.with(ctx, c, func(s *site) error {
			asked, err := s.requests(ctx, 0)
			if err != nil {
				return err
			}
			if err := s.serveConnections(); err != nil {
				return err
			}
			conns, err := s.connections(ctx, 0, time.Second, t.results.Settings.Patience)
			if err != nil {
				return err
			}
			progress("%-12s %.0f connections/s, %.0f requests/s", c.Name, conns.Rate, asked.Rate)
			connections, requests = min(connections, conns.Rate), min(requests, asked.Rate)
			return nil
		})
		if err != nil {
			return err
		}
	}
	half := func(most, limit float64) float64 { return min(limit, max(100, math.Floor(most/200)*100)) }
	set := &t.results.Settings
	if set.ConnectionRate == 0 {
		set.ConnectionRate = half(connections, maxConnectionRate)
	}
	if set.RequestRate == 0 {
		set.RequestRate = half(requests, maxRequestRate)
	}
	return nil
}

// trim drops what no report uses: it would be most of the file.
func (r *record) trim() {
	phases := []*phase{r.Bulk, r.Requests, r.RequestsAt, r.Connections, r.ConnectionsAt, r.Calm}
	for i := range r.Floods {
		phases = append(phases, r.Floods[i].Clients, r.Floods[i].Flood)
	}
	for _, p := range phases {
		if p == nil {
			continue
		}
		p.Every = nil
		if p != r.ConnectionsAt {
			p.Curve = nil
		}
	}
}
