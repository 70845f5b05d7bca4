#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the end-to-end tests in one mode, all or those whose names match a pattern: scripts/e2e.sh MODE [PATTERN]
# As they mostly wait, E2E_SHARDS processes (2) share them. The screen gets one line a test and every skip; of a process in which
# a test fails, the whole output follows.
set -euo pipefail
cd "$(dirname "$0")/.."

mode=$1
pattern=${2:-.}
shards=${E2E_SHARDS:-2}

listed=$(go test -list "$pattern" ./scripts/e2e -mode "$mode")
mapfile -t tests < <(grep '^Test' <<<"$listed")
if ((${#tests[@]} == 0)); then
	echo "no test matches $pattern" >&2
	exit 1
fi

logs=$(mktemp -d)
running=()
stop() {
	for group in "${running[@]}"; do kill -- "-$group" 2>/dev/null || true; done
	rm -rf "$logs"
}
trap stop EXIT
trap 'exit 130' INT TERM

# The tests whose place leaves that remainder: neighbours in the list take about as long.
run() {
	local shard=$1 names=()
	for ((i = shard; i < ${#tests[@]}; i += shards)); do names+=("${tests[i]}"); done
	((${#names[@]} > 0)) || return 0
	local IFS='|'
	go test -count=1 -v -timeout 40m ./scripts/e2e -mode "$mode" -run "^(${names[*]})\$" 2>&1 | tee "$logs/$shard" |
		{ grep --line-buffered -E '^(--- |panic:| +--- (FAIL|SKIP))' || true; }
}

echo "${#tests[@]} end-to-end tests in mode $mode, by $shards processes"
set -m # a process group each
for ((shard = 0; shard < shards; shard++)); do
	run "$shard" &
	running+=($!)
done
set +m

failed=()
for ((shard = 0; shard < shards; shard++)); do
	wait "${running[shard]}" || failed+=("$shard")
done
running=()
for shard in "${failed[@]}"; do
	echo "--- the whole output of process $shard, mode $mode:"
	cat "$logs/$shard"
done
((${#failed[@]} == 0))
