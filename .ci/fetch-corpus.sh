#!/usr/bin/env bash
# Print a directory of statements that the makers of MariaDB test it with: Debian's package, unpacked into the cache.
set -euo pipefail

cache=${XDG_CACHE_HOME:-$HOME/.cache}/shardkit
corpus=$cache/mariadb-test
if [[ ! -d $corpus ]]; then
    mkdir -p "$cache"
    scratch=$(mktemp -d "$cache/fetch.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    if ! (cd "$scratch" && apt-get download -q mariadb-test-data && dpkg -x mariadb-test-data_*.deb unpacked) >&2; then
        echo "error: mariadb-test-data cannot be fetched here" >&2
        echo "fix: name a directory of .sql and .test files: make corpus CORPUS=directory" >&2
        exit 1
    fi
    mv "$scratch/unpacked/usr/share/mysql/mysql-test" "$corpus"
fi
echo "$corpus/main"
