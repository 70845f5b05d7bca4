#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Builds the binary that is handed out (Debian package, container): static, the same bytes wherever it is built.
#
#   scripts/build-static.sh OUTPUT [VERSION]
set -eu
cd "$(dirname "$0")/.."

version=${2:-$(scripts/version.sh)}
# -buildvcs=false: what Go would write of git differs between a clone and a tarball; the version says it.
CGO_ENABLED=0 GOFLAGS= go build -trimpath -buildvcs=false -ldflags "-s -w -X main.release=$version" -o "$1" ./cmd/snilb
