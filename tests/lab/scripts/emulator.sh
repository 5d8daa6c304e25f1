#!/bin/bash
# Builds the emulator of the PVH flavour from the distribution's own QEMU 7.2
# source, with one repair.
#
# In:  SRC (the unpacked source package), OUT (a folder of ours, empty)
# Out: $OUT/qemu-system-x86_64; it uses the firmware of the stock package
#
# The repair: when a VMRUN injects an interrupt that its VMCB asks for, the
# emulator delivers it at once but leaves the vector noted as pending. An exit
# before the note is overwritten delivers it a second time, and the guest dies
# of an interrupt that it never asked for. So the note is cleared.
set -euo pipefail
export LC_ALL=C
# The distribution's python and meson, whatever else comes first in PATH.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
cp -a "$SRC/." "$OUT/build"
cd "$OUT/build"

file=target/i386/tcg/sysemu/svm_helper.c
delivery='do_interrupt_x86_hardirq(env, vector, 1);'
found=$(grep -cF "$delivery" "$file" || true)
if [ "$found" != 1 ]; then
    echo "$file has the delivery of injected interrupts $found times, not once:" \
        "this QEMU is another one than the repair is for" >&2
    exit 1
fi
sed -i "s/^\( *\)$delivery\$/&\n\1cs->exception_index = -1;/" "$file"
if ! grep -A1 -F "$delivery" "$file" | grep -q 'cs->exception_index = -1;'; then
    echo "the repair of $file didn't take" >&2
    exit 1
fi

./configure --target-list=x86_64-softmmu --without-default-features \
    --enable-tcg --enable-system --enable-slirp --enable-fdt=system \
    --disable-werror --disable-docs --disable-install-blobs \
    --meson=meson --ninja=ninja \
    --firmwarepath=/usr/share/qemu:/usr/share/seabios
ninja -C build qemu-system-x86_64
strip -o "$OUT/qemu-system-x86_64" build/qemu-system-x86_64
cd "$OUT"
rm -rf build
