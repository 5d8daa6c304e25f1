#!/bin/bash
# Builds dom0's root file system and the ext4 image of it.
#
# In:  SUITE, MIRROR, SOURCES (lines of sources.list), PACKAGES, XEN_PACKAGES,
#      KEY_PUB (the lab's ssh key), OUT (a folder of ours, empty)
# Out: $OUT/dom0.img, $OUT/boot/{vmlinuz,initrd.img,xen.gz,xen.config},
#      $OUT/guest-modules/NN-NAME.ko (what a guest loads, in order),
#      $OUT/kernel-version, $OUT/packages (names and versions)
set -euo pipefail
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
root=$OUT/rootfs

debootstrap --variant=minbase --include="${PACKAGES// /,}" "$SUITE" "$root" "$MIRROR"

unmount() {
    for m in dev/pts dev proc sys; do
        if mountpoint -q "$root/$m"; then umount -l "$root/$m"; fi
    done
}
trap unmount EXIT
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount --bind /dev "$root/dev"

printf '%s\n' "$SOURCES" >"$root/etc/apt/sources.list"
cat >"$root/etc/apt/apt.conf.d/99lab" <<END
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
END
# Packages of the image must not start anything in this machine.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"

# Only what dom0 needs to find its disk: a small initrd unpacks faster.
mkdir -p "$root/etc/initramfs-tools/conf.d"
echo 'MODULES=list' >"$root/etc/initramfs-tools/conf.d/lab"
printf '%s\n' virtio_pci virtio_blk virtio_net ext4 \
    >"$root/etc/initramfs-tools/modules"

in_root() { chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    LC_ALL=C DEBIAN_FRONTEND=noninteractive "$@"; }
in_root apt-get -q update
in_root apt-get -q -y dist-upgrade
in_root apt-get -q -y install initramfs-tools
printf '%s\n' virtio_pci virtio_blk virtio_net ext4 \
    >"$root/etc/initramfs-tools/modules"
# shellcheck disable=SC2086
in_root apt-get -q -y install $XEN_PACKAGES
in_root apt-get -q clean
rm -f "$root"/var/lib/apt/lists/*_* "$root/usr/sbin/policy-rc.d"

# Who it is, and who gets in.
echo dom0 >"$root/etc/hostname"
printf '127.0.0.1 localhost dom0\n' >"$root/etc/hosts"
: >"$root/etc/fstab"
mkdir -p -m 700 "$root/root/.ssh"
cp "$KEY_PUB" "$root/root/.ssh/authorized_keys"
chmod 600 "$root/root/.ssh/authorized_keys"
cat >"$root/etc/ssh/sshd_config.d/lab.conf" <<END
PermitRootLogin prohibit-password
UseDNS no
UsePAM no
MaxSessions 500
MaxStartups 200
END
mkdir -p "$root/etc/systemd/system/serial-getty@hvc0.service.d"
cat >"$root/etc/systemd/system/serial-getty@hvc0.service.d/lab.conf" <<END
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200 %I linux
END

# The two NICs: eth0 is the way in for the lab, eth1 joins the hosts.
cat >"$root/usr/local/sbin/lab-net" <<'END'
#!/bin/sh
set -e
ip link set lo up
ip addr replace 10.0.2.15/24 dev eth0
ip link set eth0 up
ip link add xenbr0 type bridge stp_state 0 forward_delay 0
ip link set eth1 master xenbr0
ip link set eth1 up
ip link set xenbr0 up
END
# Makes one copy of the booted state a host of its own.
cat >"$root/usr/local/sbin/lab-identity" <<'END'
#!/bin/sh
# lab-identity HOST SECONDS.NANOSECONDS SEED
set -e
host=$1
# RNDRESEEDCRNG, so that no two hosts draw the same random numbers.
perl -e 'open(F, ">", "/dev/urandom") or die; syswrite(F, $ARGV[0]) or die;
    ioctl(F, 0x5207, 0) or die "reseed: $!"' "$3"
date -s "@$2" >/dev/null
hostname "host$host"
echo "host$host" >/etc/hostname
printf '127.0.0.1 localhost host%s\n' "$host" >/etc/hosts
mac=$(printf '52:54:00:76:01:%02x' "$host")
ip link set eth1 address "$mac"
ip link set xenbr0 address "$mac"
# Link-local addresses follow from the MAC; without this it's the old one's.
for interface in eth1 xenbr0; do
    echo 1 >"/proc/sys/net/ipv6/conf/$interface/disable_ipv6"
    echo 0 >"/proc/sys/net/ipv6/conf/$interface/disable_ipv6"
done
ip addr replace "10.77.0.$((host + 1))/16" dev xenbr0
tr -d - </proc/sys/kernel/random/uuid >/etc/machine-id
END
chmod 755 "$root"/usr/local/sbin/lab-*
cat >"$root/etc/systemd/system/lab-net.service" <<END
[Unit]
Description=Network of the lab
DefaultDependencies=no
After=systemd-udev-settle.service local-fs.target
Wants=systemd-udev-settle.service
Before=ssh.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/lab-net
[Install]
WantedBy=multi-user.target
END
in_root systemctl -q enable lab-net.service
in_root systemctl -q mask apt-daily.timer apt-daily-upgrade.timer \
    dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
    systemd-timesyncd.service xendomains.service \
    systemd-networkd-wait-online.service getty-static.service \
    getty@tty1.service

# xl: what a small host wants.
cat >"$root/etc/xen/xl.conf" <<END
autoballoon="off"
vif.default.bridge="xenbr0"
END
echo 'XENCONSOLED_ARGS="--log=guest"' >>"$root/etc/default/xen"
mkdir -p "$root/var/log/xen/console" "$root/var/lib/xl-vne-lab"

# Xen's own checker of save files doesn't find its modules by itself.
cat >"$root/usr/local/bin/verify-stream-v2" <<'END'
#!/bin/sh
set -- /usr/lib/xen-4.*/bin/verify-stream-v2 "$@"
PYTHONPATH=${1%/bin/*}/lib/python exec "$@"
END
chmod 755 "$root/usr/local/bin/verify-stream-v2"

# What is started from outside: Xen, dom0's kernel, and what guests need.
version=$(basename "$(ls -d "$root"/lib/modules/* | head -n1)")
echo "$version" >"$OUT/kernel-version"
mkdir -p "$OUT/boot"
cp "$root/boot/vmlinuz-$version" "$OUT/boot/vmlinuz"
cp "$root/boot/initrd.img-$version" "$OUT/boot/initrd.img"
cp "$root"/boot/xen-4.*-amd64.gz "$OUT/boot/xen.gz"
cp "$root"/boot/xen-4.*-amd64.config "$OUT/boot/xen.config"
ln -sf "vmlinuz-$version" "$root/boot/vmlinuz-guest"
mkdir "$OUT/guest-modules"
number=10
for module in xen-netfront xen-blkfront; do
    while read -r verb path _; do
        [ "$verb" = insmod ] || continue
        cp "$root$path" "$OUT/guest-modules/$number-${path##*/}"
        number=$((number + 1))
    done < <(in_root modprobe -S "$version" --show-depends "$module")
done
in_root dpkg-query -W >"$OUT/packages"

unmount
mke2fs -q -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 -L dom0 \
    -d "$root" "$OUT/dom0.img" 6G
rm -rf "$root"
