#!/usr/bin/env bash
# Have the rivals of the benchmarks at hand: mariadb-dump, beside which moving buckets is measured.
# Where it cannot be had, the benchmarks say so in its row.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. .ci/packages.sh

if ! command -v mariadb-dump >/dev/null; then
    install_packages mariadb-client || echo "mariadb-dump cannot be installed here: what is measured beside it has no rival"
fi
