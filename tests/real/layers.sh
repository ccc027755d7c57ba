#!/bin/bash
# layers.sh DIR: three layers with every odd thing, as DIR/0.tar, DIR/1.tar, DIR/2.tar. Run as root.
set -euo pipefail
cd "$1"
umask 022
tar() { command tar --numeric-owner --sort=name "$@"; }
at() { touch -h -d "$1" "${@:2}"; } # when path...

# ---- the lowest: PAX, everything a file can be
mkdir 0; cd 0
mkdir -p bin empty/dir usr/lib sticky "deep/$(printf 'd%.0s' {1..120})/$(printf 'e%.0s' {1..140})"
ln -s usr/lib lib
printf 'a program' > bin/setuid; chmod 4755 bin/setuid; ln bin/setuid bin/setuid-too
printf 'another' > bin/setgid; chown 7:8 bin/setgid; chmod 2711 bin/setgid
printf 'capable' > bin/capable; setcap cap_net_raw,cap_net_admin+ep bin/capable
printf 'capable twice' > bin/capable-linked; setcap cap_chown+ep bin/capable-linked; ln bin/capable-linked bin/capable-too
chmod 1777 sticky
head -c 3000001 /dev/urandom > usr/lib/large
cp usr/lib/large usr/lib/same; chown 1000:1000 usr/lib/same
: > nothing; : > nothing-too; chmod 000 nothing-too
printf x > one; ln one two; ln one usr/three; chown 4294967290:3000000000 one
printf y > user-attributes; setfattr -n user.hello -v world user-attributes; setfattr -n user.empty user-attributes
setfattr -n user.dir -v 'of a directory' empty
setfattr -n trusted.secret -v 'not for containers' user-attributes
printf name > "deep/$(printf 'd%.0s' {1..120})/$(printf 'e%.0s' {1..140})/$(printf 'f%.0s' {1..200})"
printf name > $'not-utf8-\xff\xfe'; printf name > $'new\nline'; printf name > 'with space = and 10 path=x'
ln -s /absolute/nowhere dangling; ln -s "$(printf 'g%.0s' {1..300})" long-link; ln -s dangling dangling-too
mkfifo fifo; mknod null c 1 3; mknod loop b 7 300; mknod big-minor c 511 1048575
truncate -s 5M hole; truncate -s 9M sparse
for i in 0 3 5; do printf 'data %s' $i | dd of=sparse bs=1M seek=$i conv=notrunc status=none; done
printf 'end' | dd of=sparse bs=1 seek=$((9 * 1048576 - 3)) conv=notrunc status=none
mkdir many; truncate -s 12M many/pieces
for i in $(seq 60); do printf 'piece %s' "$i" | dd of=many/pieces bs=64K seek=$((i * 3)) conv=notrunc status=none; done
mkdir gone opaque readd merge file-to-dir.d implied implied/odd
for d in gone opaque readd merge implied/odd; do mkdir $d/sub; printf low > $d/low; printf low > $d/sub/low; done
printf f > becomes-dir; mkdir becomes-file; printf f > becomes-file/inside
chown 5:6 implied/odd; chmod 2750 implied/odd; setfattr -n user.kept -v yes implied/odd
at '2001-02-03 04:05:06.123456789Z' bin/* usr/lib/large sparse dangling fifo null empty
at '1960-01-01 00:00:00Z' one; at '2300-01-01Z' user-attributes; at '2250-01-01Z' hole
at '1999-12-31 23:59:59.999999999Z' implied/odd implied
tar --format=pax --xattrs --xattrs-include='*' --sparse -cf ../0.tar .
cd ..

# ---- the middle: GNU format; whiteouts, opaque directories, kinds that change, parents that are only implied
mkdir 1; cd 1
: > .wh.gone; : > .wh.not-there
mkdir opaque; : > opaque/.wh..wh..opq; printf new > opaque/new; mkdir opaque/sub; printf new > opaque/sub/new
: > .wh.readd; mkdir readd; printf new > readd/new
mkdir -m 700 merge; printf new > merge/low; printf new > merge/new; : > merge/sub.new
mkdir becomes-dir; printf d > becomes-dir/inside; printf d > becomes-file
mkdir -p implied/odd/sub lib; printf new > implied/odd/sub/new; printf new > lib/hides-the-symlink
ln -s merge to-merge
mkdir "$(printf 'h%.0s' {1..130})"; printf l > "$(printf 'h%.0s' {1..130})/link"; ln "$(printf 'h%.0s' {1..130})/link" linked
ln -s "$(printf 'i%.0s' {1..150})" gnu-long-link
mkdir .wh..wh.aufs .wh..wh.plnk; printf p > .wh..wh.plnk/123.456; ln .wh..wh.plnk/123.456 aufs-link
chown 9:9 merge; at '2011-11-11 11:11:11.111111111Z' merge opaque
tar --format=gnu --no-recursion -cf ../1.tar .wh.gone .wh.not-there opaque opaque/new opaque/sub opaque/sub/new opaque/.wh..wh..opq \
  .wh.readd readd readd/new merge merge/low merge/new merge/sub.new becomes-dir becomes-dir/inside becomes-file \
  implied/odd/sub/new lib/hides-the-symlink to-merge "$(printf 'h%.0s' {1..130})" "$(printf 'h%.0s' {1..130})/link" linked gnu-long-link \
  .wh..wh.aufs .wh..wh.plnk .wh..wh.plnk/123.456 aufs-link
# through a symlink of the same layer, and the same path twice
mkdir -p x/to-merge; printf through > x/to-merge/through; ln x/to-merge/through x/to-merge/through-link
printf again > merge/new; chmod 600 merge/new
tar --format=gnu --no-recursion -C x -rf ../1.tar to-merge/through to-merge/through-link
tar --format=gnu --no-recursion -rf ../1.tar merge/new
cd ..

# ---- the top: ustar; absolute names, a root with attributes, a hidden hard link, a whiteout of what came back
mkdir 2; cd 2; chmod 700 .; chown 3:3 .
: > .wh.two; : > .wh.nothing; mkdir merge; : > merge/.wh.through; mkdir readd; : > readd/.wh.low
mkdir -p "$(printf 'j%.0s' {1..90})/$(printf 'k%.0s' {1..90})"; printf u > "$(printf 'j%.0s' {1..90})/$(printf 'k%.0s' {1..90})/ustar"
mkdir gone; printf back > gone/back; mkdir -p new/opaque; : > new/opaque/.wh..wh..opq; printf o > new/opaque/file
mkdir bin; printf replaced > bin/setgid; mknod zero c 0 0; rm -f zero
mknod becomes-file c 0 0
at '2020-02-02 02:02:02Z' . gone bin
tar --format=ustar -cf ../2.tar .
printf absolute > absolute; printf dots > dots
tar --format=ustar --transform='s,^,/./usr//../,' --show-transformed-names -rf ../2.tar absolute dots
cd ..
