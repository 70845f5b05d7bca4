// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"snilb/loader"
	"snilb/userspace/engine"
)

const (
	demoBold  = "1"
	demoDim   = "2"
	demoRed   = "31"
	demoGreen = "32"
	demoCyan  = "36"
)

// demoPrinter prints for a reader who sees snilb for the first time.
type demoPrinter struct {
	w      io.Writer
	colour bool
}

func (p demoPrinter) printf(format string, args ...any) { _, _ = fmt.Fprintf(p.w, format, args...) }

// paint gives a text that is not empty a colour.
func (p demoPrinter) paint(colour, text string) string {
	if !p.colour || text == "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// cell is text of a width, painted; the colour takes no room.
func (p demoPrinter) cell(colour string, width int, text string) string {
	return p.paint(colour, text) + strings.Repeat(" ", max(0, width-utf8.RuneCountInString(text)))
}

func (p demoPrinter) title(text string) { p.printf("\n%s\n\n", p.paint(demoBold, text)) }

func (p demoPrinter) note(format string, args ...any) {
	p.printf("  %s\n", p.paint(demoDim, fmt.Sprintf(format, args...)))
}

func (p demoPrinter) command(line string) { p.printf("\n  $ %s\n", p.paint(demoCyan, line)) }

func (p demoPrinter) topology(client4, client6, vip4, vip6 netip.Addr, servers []demoServer) {
	columns := []demoBox{
		{"client", []string{client4.String(), "", client6.String()}},
		{"snilb", []string{netip.AddrPortFrom(vip4, 443).String(), "", netip.AddrPortFrom(vip6, 443).String()}},
		{"TLS backends", nil},
	}
	// The cables are plugged in where their names stand.
	columns[1].lines[1] = "eth0" + strings.Repeat(" ", columns[1].width()-8) + "eth1"
	for _, s := range servers {
		columns[2].lines = append(columns[2].lines, fmt.Sprintf("%s %s %s", s.name, s.addr4, s.addr6))
	}
	for _, line := range drawDemoBoxes(columns) {
		p.printf("  %s\n", line)
	}
	p.printf("\n")
	for _, s := range servers {
		p.printf("  backend %s has a key and a certificate of its own, %s\n", s.name, p.paint(demoCyan, s.fingerprint))
	}
	p.note("snilb has neither.")
}

type demoBox struct {
	title string
	lines []string
}

func (b demoBox) width() int {
	width := len(b.title)
	for _, line := range b.lines {
		width = max(width, len(line))
	}
	return width
}

// drawDemoBoxes draws boxes of equally many lines side by side, joined by a cable
// in the middle.
func drawDemoBoxes(boxes []demoBox) []string {
	height := len(boxes[0].lines)
	out := make([]string, height+3)
	for i, b := range boxes {
		width := b.width()
		edge := "+" + strings.Repeat("-", width+2) + "+"
		rows := []string{fmt.Sprintf(" %-*s", width+3, b.title), edge}
		for _, line := range b.lines {
			rows = append(rows, fmt.Sprintf("| %-*s |", width, line))
		}
		for n, row := range append(rows, edge) {
			gap := ""
			switch {
			case i == 0:
			case n == 2+height/2:
				gap = "---"
			default:
				gap = "   "
			}
			out[n] += gap + row
		}
	}
	for n := range out {
		out[n] = strings.TrimRight(out[n], " ")
	}
	return out
}

func (p demoPrinter) routes(text string) {
	for line := range strings.Lines(text) {
		p.printf("  %s", line)
	}
}

func (p demoPrinter) requestHead() {
	p.printf("  %-22s  %-8s  %-17s  %-12s  %7s\n", "name asked for", "ALPN", "answered by", "certificate", "time")
}

// request prints one request; problem is what is wrong with it.
func (p demoPrinter) request(ask demoAsk, got demoAnswer, addr, problem string) {
	answer, cert := got.backend+" "+addr, got.fingerprint+" "+got.certOwner+"'s"
	switch {
	case errors.Is(got.err, errDemoReset):
		answer, cert = "nobody: reset", "-"
	case got.err != nil:
		answer, cert = "nobody", "-"
	}
	verdict, colour := "ok", demoGreen
	if problem != "" {
		verdict, colour = "WRONG", demoRed
	}
	p.printf("  %-22s  %-8s  %s  %-12s  %7s  %s\n", ask.name, ask.alpn, p.cell(colour, 17, answer), cert,
		demoDuration(got.took), p.paint(colour, verdict))
	if problem != "" {
		p.printf("      %s\n", p.paint(demoRed, problem))
	}
}

func (p demoPrinter) download(size int64, took time.Duration, c demoCounters, flows []engine.Flow) {
	p.printf("  %d MiB from a.example.com in %s: %.1f Gbit/s\n", size>>20, demoDuration(took), float64(size)*8/1e9/took.Seconds())
	p.note("(Go encrypts, decrypts and hashes all of it on this machine: no measure of snilb)")
	p.command("snilb flows        (half-way)")
	for _, f := range flows {
		if f.State != "open" {
			continue
		}
		p.printf("  %s -> %s -> %s, %s in, %s out\n", f.Client, f.SNI, f.Backend, demoBytes(f.BytesIn), demoBytes(f.BytesOut))
	}
	p.printf("\n  %s rewritten and redirected in the kernel, %s seen by user space\n",
		p.paint(demoGreen, demoNumber(c.forwarded)+" packets"), p.paint(demoGreen, demoNumber(c.events)+" events"))
	if c.forwarded > 0 && uint64(size)/c.forwarded > 1500 {
		p.note("(up to 64 KiB each: TSO and GRO work on)")
	}
}

// demoCounters sums the packets of all interfaces.
type demoCounters struct {
	answered  uint64 // SYNs answered in place
	acks      uint64 // dropped: the cookie makes them needless
	forwarded uint64 // packets of bound flows, rewritten and redirected
	events    uint64 // packets that user space has seen
	sent      uint64 // by user space, through the TAP device
	hellos    uint64 // among events
	backend   uint64 // among events
}

func sumDemoCounters(interfaces []interfaceStatus) (c demoCounters) {
	for _, i := range interfaces {
		for reason, n := range i.Packets {
			// The engine replays a hello through the flow it has just bound.
			if i.Role == string(loader.RoleTap) {
				if strings.HasPrefix(reason, "forward/") {
					c.sent += n
				}
				continue
			}
			switch reason {
			case "answer/syn":
				c.answered += n
			case "drop/handshake_ack":
				c.acks += n
			case "forward/flow":
				c.forwarded += n
			case "engine/hello":
				c.hellos += n
			case "engine/backend":
				c.backend += n
			}
			if strings.HasPrefix(reason, "engine/") {
				c.events += n
			}
		}
	}
	return c
}

func (c demoCounters) minus(o demoCounters) demoCounters {
	return demoCounters{
		answered: c.answered - o.answered, acks: c.acks - o.acks, forwarded: c.forwarded - o.forwarded, events: c.events - o.events,
		sent: c.sent - o.sent, hellos: c.hellos - o.hellos, backend: c.backend - o.backend,
	}
}

func (p demoPrinter) counters(c demoCounters, connections, sockets int) {
	for _, row := range []struct {
		n    uint64
		what string
		name string
	}{
		{c.answered, "SYNs answered with a SYN cookie, nothing stored", "answer/syn"},
		{c.acks, "ACKs of the handshake, needless with a cookie", "drop/handshake_ack"},
		{c.hellos, "hello packets to user space, which picks a backend", "engine/hello"},
		{c.backend, "SYN-ACKs and ACKs of backends to user space", "engine/backend"},
		{c.sent, "packets sent by user space: SYN, ACK, hello, reset", "by snilb0"},
		{c.forwarded, "packets rewritten and redirected in the kernel", "forward/flow"},
	} {
		p.printf("  %9s  %s  %s\n", demoNumber(row.n), p.cell("", 50, row.what), p.paint(demoDim, row.name))
	}
	p.printf("\n  %s handled by the kernel alone, %s seen by user space: %.1f per connection.\n",
		p.paint(demoGreen, demoNumber(c.answered+c.acks+c.forwarded)+" packets"),
		p.paint(demoGreen, demoNumber(c.events)+" events"), float64(c.events)/float64(max(connections, 1)))
	p.printf("  TCP sockets in the balancer's namespace: %d.\n", sockets)
}

func (p demoPrinter) summary(connections int, failures []error, took time.Duration) {
	if len(failures) > 0 {
		p.printf("\n%s\n", p.paint(demoRed, fmt.Sprintf("%s did not hold.", plural(len(failures), "expectation"))))
		return
	}
	p.printf("\n%s\n", p.paint(demoGreen, fmt.Sprintf("All of the %d connections went where the routes say (%s in all).", connections, demoDuration(took))))
}

// end prints what to do next, after everything is gone.
func (p demoPrinter) end() {
	p.printf("Namespaces, programs and maps are removed again. Next, on an interface of your own:\n")
	for _, line := range []string{
		"snilb check routes.yaml --host", "snilb attach eth0 --routes routes.yaml", "snilb status", "snilb flows",
	} {
		p.printf("\n  $ %s", p.paint(demoCyan, line))
	}
	p.printf("\n")
}

// demoDuration rounds to what a reader wants to know.
func demoDuration(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	default:
		return fmt.Sprintf("%.2f s", d.Seconds())
	}
}

// demoNumber groups digits by three.
func demoNumber(n uint64) string {
	digits := fmt.Sprint(n)
	var groups []string
	for len(digits) > 3 {
		groups = append(groups, digits[len(digits)-3:])
		digits = digits[:len(digits)-3]
	}
	groups = append(groups, digits)
	slices.Reverse(groups)
	return strings.Join(groups, ",")
}

func demoBytes(n uint64) string {
	switch {
	case n < 1<<10:
		return fmt.Sprintf("%d B", n)
	case n < 1<<20:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	default:
		return fmt.Sprintf("%d MiB", n>>20)
	}
}

func demoTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
