#!/bin/bash
# Runs a script in a copy of a chroot that is gone when the script has ended,
# and all mounts with it.
#
# In:  BASE (the chroot, not changed), BINDS (lines of SOURCE TARGET), VARIABLES
#      (lines of NAME=VALUE), INNER (the script)
set -euo pipefail
: "${BASE:?}"
work=$(mktemp -d)
mount -t tmpfs -o size=8g tmpfs "$work"
root=$work/root
mkdir "$work/upper" "$work/work" "$root"
mount -t overlay overlay \
    -o "lowerdir=$BASE,upperdir=$work/upper,workdir=$work/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount --rbind /dev "$root/dev"
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
while read -r from to; do
    [ -n "$from" ] || continue
    mkdir -p "$root$to"
    mount --bind "$from" "$root$to"
done <<<"$BINDS"
mapfile -t variables < <(printf %s "$VARIABLES")
status=0
chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
    LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive "${variables[@]}" \
    bash -euo pipefail -c "$INNER" || status=$?
umount -l "$root" "$work"
rmdir "$work"
exit $status
