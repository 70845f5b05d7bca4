// SPDX-License-Identifier: Apache-2.0

// Package api is how commands talk to a running daemon: HTTP with JSON over a
// unix socket that only its owner may open.
//
//	GET  /v1/status  one object
//	GET  /v1/flows   an array, or one object a line for Accept: application/jsonl
//	GET  /v1/config  one object
//	POST /v1/detach  asks the daemon to let go; the answer comes once it has begun to
//
// A request that failed is answered by {"error": "..."}. What the objects hold is
// the caller's: this package only carries them.
package api
