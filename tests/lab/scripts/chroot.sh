#!/bin/bash
# Builds a small Debian to build or try packages in.
#
# In:  SUITE, MIRROR, SOURCES (lines of sources.list), PACKAGES (more of them,
#      may be empty), OUT (a folder of ours, empty)
# Out: $OUT/root
set -euo pipefail
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
# With an empty OUT all of this would be about the machine itself.
root=${OUT:?}/root

debootstrap --variant=minbase "$SUITE" "$root" "$MIRROR"
printf '%s\n' "$SOURCES" >"$root/etc/apt/sources.list"
cat >"$root/etc/apt/apt.conf.d/99xl-vne" <<END
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
END
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"

unmount() {
    if mountpoint -q "$root/proc"; then umount -l "$root/proc"; fi
}
trap unmount EXIT
mount -t proc proc "$root/proc"
in_root() { chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    LC_ALL=C DEBIAN_FRONTEND=noninteractive "$@"; }
in_root apt-get -q update
in_root apt-get -q -y dist-upgrade
if [ -n "$PACKAGES" ]; then
    # shellcheck disable=SC2086
    in_root apt-get -q -y install $PACKAGES
fi
in_root apt-get -q clean
