#!/bin/bash
# Installs, upgrades, removes and purges the packages in a clean Debian, and
# sees that Xen is as it was. Run within a chroot.
#
# In:  XEN (its release, as in 4.17), /packages (the packages)
set -euo pipefail
private=/usr/lib/xen-$XEN
xl=$private/bin/xl

step() { echo "== $*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }
quietly() { "$@" >/tmp/out 2>&1 || { cat /tmp/out >&2; fail "$*"; }; }
# xl's help, which it prints and then fails with where Xen isn't running.
help_of() {
    "$1" >"$2" 2>/tmp/said || [ $? = 1 ] || fail "$1: $(</tmp/said)"
    grep -q '^ list ' "$2" || fail "$1 doesn't run: $(</tmp/said)"
}
has_plugin() {
    help_of "$xl" /tmp/help
    grep -q '^ vne-snapshot ' /tmp/help || fail "xl is Xen's own"
}
# All that Xen's packages have, and what is in its private folder.
state() {
    dpkg -V "xen-utils-$XEN" xen-utils-common "libxenmisc$XEN" || true
    find "$private" -type f -exec sha256sum {} + | sort -k 2
    find /etc/xen | sort
    dpkg-divert --list "$private/*"
}

step "a Debian with Xen"
quietly apt-get -q -y install "xen-utils-$XEN" xen-utils-common man-db procps systemd
state >/tmp/before
test -x "$xl"
help_of "$xl" /tmp/help.before

step "install"
quietly apt-get -q -y install /packages/*.deb
has_plugin
[ ! -s /tmp/said ] || fail "xl said: $(</tmp/said)"
diff <(grep -v '^ vne-snapshot ' /tmp/help) /tmp/help.before ||
    fail "xl's own commands aren't as they were"
vned --version
for unit in vned xen-vne-domains; do
    # The units that it orders itself after may not be there.
    quietly systemd-analyze verify "$unit.service"
done
[ "$(systemctl is-enabled vned.service || true)" = disabled ]
[ "$(systemctl is-enabled xen-vne-domains.service)" = enabled ]
for page in 1:xl-vne-snapshot 5:vne.conf 7:xl-plugins 8:vned; do
    MANWIDTH=80 man "${page%:*}" "${page#*:}" >/tmp/page 2>/tmp/said
    [ -s /tmp/page ] && [ ! -s /tmp/said ] || fail "man $page: $(</tmp/said)"
done

step "another release of Xen's libraries"
library=$(ls /usr/lib/*/libxenlight.so."$XEN")
cp -L "$library" /tmp/library
id=$(od -An -v -tx1 -w1000000000 /tmp/library | tr -d ' \n')
# Its build ID is the 20 bytes behind this note's head.
head=040000001400000003000000474e5500
at=$((($(printf %s "${id%%"$head"*}" | wc -c) + ${#head}) / 2))
printf '\377\376' | dd of="$(readlink -f "$library")" bs=1 seek=$at conv=notrunc status=none
help_of "$xl" /tmp/help
cat /tmp/said
[ "$(wc -l </tmp/said)" = 1 ] || fail "that wasn't one line"
cmp /tmp/help /tmp/help.before
cp /tmp/library "$(readlink -f "$library")"

step "Xen's package is installed again, with ours there"
quietly apt-get -q -y install --reinstall "xen-utils-$XEN"
has_plugin
dpkg -V "xen-utils-$XEN" "xen-vne-$XEN" xen-vne-common

step "upgrade"
echo '# changed by an admin' >>/etc/xen/vne.conf
quietly dpkg -i /packages/*.deb
has_plugin
grep -q 'by an admin' /etc/xen/vne.conf || fail "the admin's configuration is lost"

step "remove"
quietly apt-get -q -y remove "xen-vne-$XEN" xen-vne-common
[ -e /etc/xen/vne.conf ] || fail "the configuration is gone before purge"
diff <(grep -v /etc/xen/ /tmp/before) <(state | grep -v /etc/xen/) || fail "Xen isn't as it was"

step "purge, with an identity"
quietly dpkg -i /packages/*.deb
touch /etc/xen/vne.key /etc/xen/vne.crt
quietly apt-get -q -y purge "xen-vne-$XEN" xen-vne-common
diff /tmp/before <(state) || fail "Xen isn't as it was"
left=$(find / -xdev \( -name '*vne*' -o -name 'xl-plugins*' \) \
    -not -path '/proc/*' -not -path '/sys/*' -not -path '/dev/*' \
    -not -path '/packages*' -not -path '/tmp/*' -not -name xenpvnetboot \
    -not -path '/etc/apt/*' -not -path '/var/cache/man/*' -not -path '/var/log/*')
[ ! "$left" ] || fail "left over: $left"

step "a hand-made installation is told of"
dpkg-divert --local --quiet --rename --divert "$xl.distrib" --add "$xl"
cp "$xl.distrib" "$xl"
if dpkg -i /packages/xen-vne-"$XEN"_*.deb /packages/xen-vne-common_*.deb >/tmp/out 2>&1; then
    fail "it was installed over a local diversion"
fi
grep 'diverted by hand' /tmp/out
