// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"log/slog"
	"time"
)

// limiter lets each message through once a second: what an attacker can cause must
// not fill a disk.
type limiter struct {
	log  *slog.Logger
	last map[string]int64
}

func (l *limiter) limited(now int64, message string, args ...any) {
	if last, ok := l.last[message]; ok && now-last < int64(time.Second) {
		return
	}
	if l.last == nil {
		l.last = make(map[string]int64)
	}
	l.last[message] = now
	l.log.Warn(message, args...)
}
