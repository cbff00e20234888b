#!/usr/bin/env bash
# Have MySQL at hand: installed already, or in a cached root directory made from Debian's archive.
# Exit code 3: it cannot be had here today; what was tried stands on standard error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. .ci/packages.sh

if .venv/bin/python -m shardkit.testing.binaries mysql >/dev/null 2>&1; then
    exit 0
fi
if [[ $(id -u) != 0 ]]; then
    echo "the MySQL of Debian's archive runs in a root directory of its own (chroot), which needs root" >&2
    exit 3
fi
if ! command -v debootstrap >/dev/null && ! install_packages debootstrap; then
    tail -n 5 .cache/apt.log >&2 || true
    echo "debootstrap is not installed and cannot be installed here" >&2
    exit 3
fi
if [[ ! -e /usr/share/keyrings/debian-archive-keyring.gpg ]]; then
    install_packages debian-archive-keyring || true # Ubuntu: without it debootstrap cannot check what it downloads
fi
.venv/bin/python -m shardkit.testing.mysql_root || exit 3
