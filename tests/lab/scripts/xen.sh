#!/bin/bash
# Builds the hypervisor of Debian's Xen source with shadow paging, which live
# save of PV guests needs and Debian's own build lacks. Tools stay Debian's.
#
# In:  SRC (the unpacked source package), OUT (a folder of ours, empty)
# Out: $OUT/xen.elf, ready for QEMU's -kernel
set -euo pipefail
export LC_ALL=C
cp -a "$SRC/." "$OUT/build"
cd "$OUT/build"
cp debian/xen-kconfig xen/.config
echo CONFIG_SHADOW_PAGING=y >>xen/.config
# The distribution's python, whatever else comes first in PATH.
make_args=(PYTHON=/usr/bin/python3 XEN_TARGET_ARCH=x86_64 XEN_BUILD_HOST=xl-vne)
make -C xen "${make_args[@]}" olddefconfig
grep -q '^CONFIG_SHADOW_PAGING=y' xen/.config || {
    echo "xen's configuration refused CONFIG_SHADOW_PAGING" >&2
    exit 1
}
make -C xen -j"$(nproc)" "${make_args[@]}"
gunzip -c xen/xen.gz >"$OUT/xen.elf"
cd "$OUT"
rm -rf build
