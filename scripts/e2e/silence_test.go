// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"snilb/scripts/testbed"
)

// TestKeepalive is silent for longer than idle. Keepalives of either side hold the connection; without them both sides are
// told of its end by RSTs that they take at once, whatever their windows and numbers are.
func TestKeepalive(t *testing.T) {
	b := newEndBed(t, "idle: 3s")
	var held, quiet []pair
	for _, v6 := range []bool{false, true} {
		for who := range (pair{}).sides() {
			p := b.pair(t, v6)
			c := p.sides()[who][0]
			must(t, c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 9}))
			held = append(held, p)
		}
		quiet = append(quiet, b.quietPairs(t, v6)...)
	}
	began := time.Now()
	each(t, quiet, func(p pair) error {
		told := make(chan error, 1)
		go func() { told <- wantRead(p.backend, syscall.ECONNRESET) }()
		return errors.Join(wantRead(p.client, syscall.ECONNRESET), <-told)
	})
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("idle connections ended after %s", took)
	}
	time.Sleep(time.Until(began.Add(6 * time.Second)))
	each(t, held, func(p pair) error { return errors.Join(echo(p.client, p.backend, "still here"), closeBoth(p)) })
	b.nothingLeft(t, 10*time.Second)
	b.wantClosed(t, map[string]uint64{"idle": uint64(len(quiet)), "closed": uint64(len(held))})
}

// quietPairs are connections without keepalives, of clients with and without window scaling and timestamps, that moved
// nothing, a little or a lot before they fell silent.
func (b *endBed) quietPairs(t *testing.T, v6 bool) []pair {
	t.Helper()
	var all []pair
	for _, off := range []string{"", "tcp_window_scaling", "tcp_timestamps", "tcp_sack"} {
		if off != "" {
			must(t, b.Client.Sysctl("ipv4/"+off, "0"))
		}
		for _, size := range []int64{0, 1, 3 << 20} {
			p := b.pair(t, v6)
			must(t, errors.Join(p.client.SetKeepAlive(false), p.backend.SetKeepAlive(false)))
			for _, s := range p.sides() {
				sent := make(chan error, 1)
				go func() {
					_, err := io.CopyN(s[0], testbed.Noise(6), size)
					sent <- err
				}()
				_, err := io.CopyN(io.Discard, s[1], size)
				must(t, errors.Join(err, <-sent))
			}
			all = append(all, p)
		}
		if off != "" {
			must(t, b.Client.Sysctl("ipv4/"+off, "1"))
		}
	}
	return all
}

// TestClientGone has a client go away without a word, by falling silent or with its cable pulled, while its backend sends: idle
// ends it when the backend's repetitions are far enough apart, and the backend is told.
func TestClientGone(t *testing.T) {
	for name, vanish := range map[string]func(*testing.T, *endBed){
		"silent": func(t *testing.T, b *endBed) {
			filter(t, b.Client, "input", "tcp sport 443 drop")
			filter(t, b.Client, "output", "tcp dport 443 drop")
		},
		"unplugged": func(t *testing.T, b *endBed) { must(t, b.Client.SetLink("eth0", false)) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newEndBed(t, "idle: 2s")
			pairs := b.pairs(t, 2)
			for _, p := range pairs {
				must(t, echo(p.client, p.backend, "alive"))
			}
			vanish(t, b)
			each(t, pairs, func(p pair) error {
				for {
					if _, err := io.CopyN(p.backend, testbed.Noise(8), 10<<10); errors.Is(err, syscall.ECONNRESET) {
						return nil
					} else if err != nil {
						return err
					}
					time.Sleep(100 * time.Millisecond)
				}
			})
			b.noFlows(10 * time.Second)
			b.wantClosed(t, map[string]uint64{"idle": 4})
		})
	}
}

// state is a connection's, as in TCP_INFO.
func state(c *net.TCPConn) (state uint8, err error) {
	err = control(c, func(fd int) error {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err == nil {
			state = info.State
		}
		return err
	})
	return state, err
}

// TestClosingTimeout has one side close and the other never: after the timeout both are told. The one that saw the FIN reads its end
// for ever, so it is its kernel that is asked.
func TestClosingTimeout(t *testing.T) {
	b := newEndBed(t, "closing: 2s")
	var all [][2]*net.TCPConn
	for _, v6 := range []bool{false, true} {
		for who := range (pair{}).sides() {
			all = append(all, b.pair(t, v6).sides()[who])
		}
	}
	each(t, all, func(s [2]*net.TCPConn) error {
		began := time.Now()
		if err := errors.Join(s[0].CloseWrite(), wantRead(s[1], io.EOF), wantRead(s[0], syscall.ECONNRESET)); err != nil {
			return err
		}
		if took := time.Since(began); took < 2*time.Second || took > 8*time.Second {
			return fmt.Errorf("told after %s", took)
		}
		for range 100 {
			if now, err := state(s[1]); err != nil || now == unix.BPF_TCP_CLOSE {
				return err
			}
			time.Sleep(10 * time.Millisecond)
		}
		return errors.New("the side that did not close was not told")
	})
	b.nothingLeft(t, 10*time.Second)
	b.wantClosed(t, map[string]uint64{"closing_timeout": 4})
}
