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

// beat writes what the kernel reads while running: the sign of life, the wall
// clock's distance, the cookie keys around the current slot, the MSS to announce.
func (e *Engine) beat() error {
	e.beating.Lock() // or an older state could be written over a newer one
	defer e.beating.Unlock()
	now, wall := e.clock.now(), time.Now().UnixNano()
	live := maps.Live{Beat: uint64(now), WallOffset: uint64(wall - now)}
	if e.silent.Load() {
		live.Beat = 0
	}
	live.Keys = e.cookieKeys(uint64(wall) / maps.CookieSlotNanoseconds)
	mss4, mss6 := e.o.MSS()
	plan := e.plan.Load()
	say := e.peers.announcement(plan.pools, mss4, mss6)
	live.Mss4, live.Mss6, live.Flags = say.mss4, say.mss6, say.flags
	if plan.sourceClient || e.sourceClient.Load() {
		live.Flags |= maps.LiveSourceClient
	}
	if e.o.HasSockets() {
		live.Flags |= maps.LiveSockets
	}
	return e.o.Tables.SetLive(&live)
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
	mac := hmac.New(sha256.New, e.master[:])
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], slot)
	mac.Write(b[:])
	sum := mac.Sum(nil)
	return maps.CookieKey{K0: binary.LittleEndian.Uint64(sum), K1: binary.LittleEndian.Uint64(sum[8:])}
}

func (e *Engine) runBeat(ctx context.Context, fail context.CancelCauseFunc) {
	tick := time.NewTicker(beatInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			e.dropSourceClient()
			if err := e.beat(); err != nil {
				fail(err)
				return
			}
		}
	}
}
