#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Prints the version of what the tree builds, in an order that dpkg agrees with: the tag (v1.2.3 is 1.2.3), the tag and the
# commits since (1.2.3+git4.0a1b2c3), or before the first tag the commit's day (0~git20261128.0a1b2c3). Changes that are not
# committed add +dirty. With --time: the commit's time, in seconds, for SOURCE_DATE_EPOCH.
set -eu
cd "$(dirname "$0")/.."

# As root in somebody's tree git refuses to look; this only reads.
git() { command git --no-optional-locks -c safe.directory='*' -c core.fsmonitor=false "$@" 2>/dev/null; }

if [ "${1:-}" = --time ]; then
	git log -1 --format=%ct || echo 0 # a tarball
	exit
fi
if ! commit=$(git rev-parse --short=12 HEAD); then
	echo 0~unknown
	exit
fi
dirty=
[ -z "$(git status --porcelain)" ] || dirty=+dirty
if tag=$(git describe --tags --abbrev=0 --match 'v[0-9]*'); then
	since=$(git rev-list --count "$tag..HEAD")
	[ "$since" = 0 ] && since= || since="+git$since.$commit"
	echo "${tag#v}$since$dirty"
else
	echo "0~git$(TZ=UTC git log -1 --format=%cd --date=format-local:%Y%m%d).$commit$dirty"
fi
