// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"time"

	"snilb/maps"
)

const beatInterval = time.Second

// stuckAfter is how many beats a worker may let pass without a turn. It comes round once a second at
// least (patience). Counted and not timed: a machine or a daemon that was stopped for a while has no beats either.
const stuckAfter = 5

// aliveFor is how long a beat says that the engine works.
const aliveFor = 3 * beatInterval

// Alive reports whether the engine works: it has beaten lately, which it only does while
// every worker comes round.
func (e *Engine) Alive() bool {
	return e.clock.now()-e.beaten.Load() <= int64(aliveFor)
}

// pulse is what the heartbeat knows of a worker.
type pulse struct {
	turns uint64
	still int // beats without a turn
}

// stuck looks once a beat at every worker's turns, and returns one that makes none, or nil: it never gets
// its lock, or never gives it back.
func (e *Engine) stuck(pulses []pulse) (found *worker) {
	for i, w := range e.workers {
		p := &pulses[i]
		if turns := w.turns.Load(); turns != p.turns {
			*p = pulse{turns: turns}
			continue
		}
		if p.still++; p.still >= stuckAfter {
			found = w
		}
	}
	return found
}

// beat writes what the kernel reads while running: the sign of life, the wall
// clock's distance, the cookie keys around the current slot, the MSS to announce.
// Not only the heart calls it: what has changed is told at once, also while a worker is stuck.
func (e *Engine) beat() error {
	e.beating.Lock() // or an older state could be written over a newer one
	defer e.beating.Unlock()
	now, wall := e.clock.now(), time.Now().UnixNano()
	beat := now
	if e.faint.Load() {
		beat = e.beaten.Load()
	}
	live := maps.Live{Beat: uint64(beat), WallOffset: uint64(wall - now)}
	if e.waiting {
		live.Beat = e.inherited
	}
	if e.silent.Load() {
		live.Beat = 0
	}
	live.Keys = e.cookieKeys(uint64(wall) / maps.CookieSlotNanoseconds)
	mss4, mss6 := e.o.MSS()
	plan := e.plan.Load()
	say := e.peers.announce(plan.pools, mss4, mss6)
	live.Mss4, live.Mss6, live.Flags = say.mss4, say.mss6, say.flags
	if plan.sourceClient || e.sourceClient.Load() {
		live.Flags |= maps.LiveSourceClient
	}
	if e.o.HasSockets() {
		live.Flags |= maps.LiveSockets
	}
	if err := e.o.Tables.SetLive(&live); err != nil {
		return err
	}
	e.beaten.Store(beat)
	return nil
}

// announce beats at once if what a SYN-ACK said changes what is announced.
func (e *Engine) announce() error {
	mss4, mss6 := e.o.MSS()
	if !e.peers.changes(e.plan.Load().pools, mss4, mss6) {
		return nil
	}
	return e.beat()
}

// Ready says that the programs are attached. Where an earlier daemon's were at work the kernel has no sign of life before:
// a daemon that fails at its start, again and again, would seem to be alive for ever, and new connections would wait for it.
func (e *Engine) Ready() error {
	e.beating.Lock()
	e.waiting = false
	e.beating.Unlock()
	return e.beat()
}

// cookieKeys are those of the slots around one, each where its slot's low bits
// say. Two slots back are accepted, and the next one may begin before the next
// beat.
func (e *Engine) cookieKeys(slot uint64) (keys [4]maps.CookieKey) {
	for s := slot - 2; s <= slot+1; s++ {
		keys[s&3] = e.cookieKey(s)
	}
	return keys
}

func (e *Engine) cookieKey(slot uint64) maps.CookieKey {
	mac := hmac.New(sha256.New, e.o.Secret[:])
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], slot)
	mac.Write(b[:])
	sum := mac.Sum(nil)
	return maps.CookieKey{K0: binary.LittleEndian.Uint64(sum), K1: binary.LittleEndian.Uint64(sum[8:])}
}

// heart leaves beats out while a worker is stuck: its share of the clients would be
// answered by the kernel and served by nobody.
type heart struct {
	e      *Engine
	pulses []pulse
	stuck  *worker // at the last beat
}

func newHeart(e *Engine) *heart {
	return &heart{e: e, pulses: make([]pulse, len(e.workers))}
}

func (h *heart) beat() error {
	was := h.stuck
	h.stuck = h.e.stuck(h.pulses)
	h.e.faint.Store(h.stuck != nil)
	switch {
	case h.stuck != nil && was == nil:
		h.e.o.Log.Error("a worker is stuck: the heartbeat stops, and new connections will go to the stack; where no service manager "+
			"starts the daemon again, end it by SIGABRT, report what it prints, and start it", "worker", h.stuck.id)
	case h.stuck == nil && was != nil:
		h.e.o.Log.Warn("the worker goes on, and with it the heartbeat", "worker", was.id)
	}
	if h.stuck != nil {
		return nil
	}
	return h.e.beat()
}

func (e *Engine) runBeat(ctx context.Context, fail context.CancelCauseFunc) {
	h := newHeart(e)
	tick := time.NewTicker(beatInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := h.beat(); err != nil {
				fail(err)
				return
			}
			e.dropSourceClient() // which the next beat tells
		}
	}
}
