#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Builds snilb_VERSION_ARCH.deb into a directory, the same bytes each time. By dpkg-deb alone: every Debian has it, it keeps to
# SOURCE_DATE_EPOCH by itself, and what it packs is a directory that one can look at. A packaging tool (nfpm, debhelper) would
# be a graph of modules or packages to download, to say the same in another language.
#
#   scripts/deb/build.sh [DIRECTORY]
set -eu
umask 022
out=$(realpath "${1:-.}")
cd "$(dirname "$0")/../.."

version=$(scripts/version.sh)
arch=$(dpkg --print-architecture)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(scripts/version.sh --time)}
export SOURCE_DATE_EPOCH TZ=UTC LC_ALL=C.UTF-8

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"

doc=$root/usr/share/doc/snilb
mkdir -p "$root/usr/bin" "$root/DEBIAN" "$doc" "$root/usr/share/man/man8"
scripts/build-static.sh "$root/usr/bin/snilb" "$version"
install -D -m 644 -t "$root/lib/systemd/system" scripts/systemd/snilb@.service
install -D -m 644 scripts/deb/routes.yaml "$root/etc/snilb/default.yaml"
install -D -m 644 scripts/deb/default.env "$root/etc/snilb/default.env"
install -D -m 644 scripts/deb/copyright "$doc/copyright"

# What is made from the commands is made by the binary that is packed, so the package is built on its own architecture.
"$root/usr/bin/snilb" docs man | gzip -9n >"$root/usr/share/man/man8/snilb.8.gz"
mkdir -p "$root/usr/share/bash-completion/completions" "$root/usr/share/fish/vendor_completions.d"
"$root/usr/bin/snilb" docs bash >"$root/usr/share/bash-completion/completions/snilb"
"$root/usr/bin/snilb" docs fish >"$root/usr/share/fish/vendor_completions.d/snilb.fish"

maintainer='the snilb authors <snilb@localhost>'
gzip -9n >"$doc/changelog.gz" <<EOF
snilb ($version) unstable; urgency=medium

  * Built from the tree: its history is the changelog.

 -- $maintainer  $(date -R -d "@$SOURCE_DATE_EPOCH")
EOF

for script in postinst prerm postrm; do
	install -m 755 "scripts/deb/$script" "$root/DEBIAN/$script"
done
printf '/etc/snilb/default.env\n/etc/snilb/default.yaml\n' >"$root/DEBIAN/conffiles"
(cd "$root" && find . -type f ! -path './DEBIAN/*' ! -path './etc/*' -printf '%P\n' | sort | xargs md5sum >DEBIAN/md5sums)
cat >"$root/DEBIAN/control" <<EOF
Package: snilb
Version: $version
Architecture: $arch
Maintainer: $maintainer
Installed-Size: $(find "$root" -type f ! -path '*/DEBIAN/*' -printf '%s\n' | awk '{ kib += int(($1 + 1023) / 1024) } END { print kib }')
Section: net
Priority: optional
Description: TLS-SNI load balancer in the kernel
 Answers TLS connections by eBPF programs (TC or XDP), picks a backend by the
 server name in the hello, and lets the kernel move the packets: no socket, no
 copy, no termination of TLS.
 .
 Installing it starts nothing: see /etc/snilb/default.yaml. It needs Linux 6.1
 or newer with BTF.
EOF

chmod -R u=rwX,go=rX "$root"
# By one thread: more of them cut the data by the size of the machine's memory. Level 3 is much quicker, for a tenth more.
package=$out/snilb_${version}_$arch.deb
dpkg-deb --root-owner-group --threads-max=1 -Zxz -z3 --build "$root" "$package" >/dev/null
echo "$package"
