// SPDX-License-Identifier: Apache-2.0

// Package e2e tests the built snilb binary from end to end: real clients, real backends, network namespaces between them.
//
//	go test ./scripts/e2e -mode tc -run TestNames -v        (as root; modes: tc, xdp, xdp-generic)
//
// The environment says what to test: SNILB_BIN is a binary to use in place of a fresh build, SNILB_MODE the default of -mode.
// With CI or SNILB_REQUIRE set, what cannot be tested is a failure, otherwise it is skipped with the reason.
package e2e
