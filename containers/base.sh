#!/usr/bin/env bash
# Writes a root file system with Python's standard library and what that links to, made of this machine's Debian packages, as a tar file:
#     bash containers/base.sh FILE.tar             for sandboxes
#     bash containers/base.sh FILE.tar stage       for stages: with what compiled packages link to
#     bash containers/base.sh FILE.tar compiler    for stages whose packages compile kernels: with gcc and Python's headers too
# Used as an image's base where no registry answers. It has no shell, no package manager and no set-uid program. The packages come with
# this machine's apt settings, so its signatures, mirrors and proxies hold. Needs apt and dpkg-deb; root only to refresh apt's lists.
set -euo pipefail

out=$(realpath -m "${1:?usage: base.sh FILE.tar [stage|compiler]}")
purpose=${2:-sandbox}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
cd "$work"

refresh() { [ "$(id -u)" = 0 ] && apt-get -qq update; }
compgen -G "/var/lib/apt/lists/*_Packages*" >/dev/null || refresh || true

python=$(apt-cache depends python3-minimal | sed -nE 's/^ *(Pre)?-?Depends: (python3\.[0-9]+-minimal)$/\2/p' | head -1)
[ -n "$python" ] || { echo "error: apt knows no python3-minimal; run apt-get update first" >&2; exit 1; }
version=${python%-minimal}
roots=("$python" "lib$version-stdlib")
wanted="libc6|libcrypt1|libexpat1[a-z0-9]*|libffi[0-9]+|libgcc-s1|zlib1g|lib$version-(minimal|stdlib)|$python"
if [ "$purpose" != sandbox ]; then
    roots+=(libstdc++6)
    wanted+="|libstdc\+\+6|libssl[0-9][a-z0-9]*|libbz2-1.0|liblzma5|libsqlite3-0|libuuid1"
fi
if [ "$purpose" = compiler ]; then
    roots+=(gcc libc6-dev libc-bin "lib$version-dev")
    wanted+="|binutils.*|libbinutils|libctf.*|libgprofng0|libjansson4|libzstd1|cpp.*|gcc.*|libgcc-[0-9]+-dev|libgomp1|libcc1-0|libisl[0-9]+"
    wanted+="|libmpc3|libmpfr6|libgmp10|libc6-dev|libc-bin|linux-libc-dev|libcrypt-dev|lib$version(-dev)?|zlib1g-dev|libexpat1-dev"
fi
mapfile -t packages < <(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances \
    "${roots[@]}" | grep -E "^($wanted)\$" | sort -u)

mkdir debs root
chmod 777 debs  # apt may fetch as its own user
cd debs
apt-get -qq download "${packages[@]}" || { refresh && apt-get -qq download "${packages[@]}"; }  # old lists name what is gone
cd ..
mkdir -p root/usr/{bin,lib,lib64,sbin} root/{etc,tmp,proc,sys,dev}
for name in bin lib lib64 sbin; do ln -s "usr/$name" "root/$name"; done
for deb in debs/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C root --keep-directory-symlink --no-same-owner \
        --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/lintian/*'
done
ln -sf "$version" root/usr/bin/python3
mkdir -p "$(dirname "$out")"
tar -c -C root --numeric-owner --owner=0 --group=0 --sort=name -f "$out.part" .
mv "$out.part" "$out"
echo "$version from ${#packages[@]} packages, $(du -m "$out" | cut -f1) MB"
