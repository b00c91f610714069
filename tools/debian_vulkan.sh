#!/usr/bin/env bash
# debian_vulkan.sh DIR: what `build.py --vulkan` and its tests want on Debian, as root. Afterwards set VULKAN_SDK=DIR.
#
# Debian's packages of glslc, the loader, SPIR-V's headers and Mesa's drivers (lavapipe computes on the processor); and
# where libvulkan-dev is older than 1.3.268, as in Debian 12, the header files of Debian 13's, unpacked into DIR and not
# installed. Packages come from the mirrors that apt is configured for.
set -euo pipefail
target=$(realpath -m "${1:?which folder?}")
export DEBIAN_FRONTEND=noninteractive
patience=(-o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30 -o Acquire::Retries=2)
# A source of other packages may be out of order: whether what is wanted can be had is seen next.
apt-get -qq "${patience[@]}" update || true
apt-get -qq "${patience[@]}" install --no-install-recommends --yes \
    glslc spirv-headers libvulkan-dev mesa-vulkan-drivers > /dev/null
mkdir -p "$target"

version=$(sed -n 's/^#define VK_HEADER_VERSION \([0-9]*\)$/\1/p' /usr/include/vulkan/vulkan_core.h)
if [ "$version" -ge 268 ]; then
    ln -sfn /usr/include "$target/include"
    exit
fi

# A package list of our own: the machine's is left as it is.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
mkdir -p "$work/lists/partial" "$work/unpacked"
mirror=$(apt-get indextargets --format '$(SITE) $(ORIGIN) $(LABEL)' | sed -n 's/ Debian Debian$//p' | head -n 1)
[ -n "$mirror" ] || { echo "error: apt is configured for no mirror of Debian" >&2; exit 1; }
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" > "$work/sources.list"
options=(-qq "${patience[@]}" -o APT::Sandbox::User=root -o "Dir::Etc::SourceList=$work/sources.list" -o "Dir::Etc::SourceParts=-" -o "Dir::State::Lists=$work/lists")
apt-get "${options[@]}" update
(cd "$work" && apt-get "${options[@]}" download libvulkan-dev)
dpkg -x "$work"/libvulkan-dev_*.deb "$work/unpacked"
rm -rf "$target/include"
mv "$work/unpacked/usr/include" "$target/include"
