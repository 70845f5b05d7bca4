#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Installs what `make test` runs, and packages named as arguments, on Debian 12 and its relatives. Does nothing, and needs no network, when all is there.
set -eu

packages="clang-19 llvm-19 clang-format-19 libbpf-dev nginx-light libnginx-mod-stream haproxy sniproxy curl openssl gnutls-bin
	iproute2 nftables ethtool tcpdump iputils-ping openssh-client util-linux gcc libc6-dev git ca-certificates systemd man-db groff-base fish $*"

missing=
for p in $packages; do
	status=$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)
	[ "$status" = installed ] || missing="$missing $p"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ]; then
	echo "missing:$missing; run the same as root" >&2
	exit 1
fi

export DEBIAN_FRONTEND=noninteractive
# Packages start their services when installed: nothing here wants an nginx or haproxy of the machine.
if [ ! -e /usr/sbin/policy-rc.d ]; then
	printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
	chmod 755 /usr/sbin/policy-rc.d
	trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
# shellcheck disable=SC2086 # a list, split on purpose
apt-get -q -y --no-install-recommends install $missing || {
	apt-get -q update
	# shellcheck disable=SC2086
	apt-get -q -y --no-install-recommends install $missing
}
