#!/usr/bin/env bash
# Have MariaDB and ZooKeeper at hand: installed already, or Debian's packages, or Docker.
#
# Only programs are installed, never a service: mariadb-server-core and libzookeeper-java hold the servers without what
# would start them with the machine. A server that the machine already runs is not touched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. .ci/packages.sh

# Prints one word for each server that is not there.
missing() { .venv/bin/python -m shardkit.testing.binaries --missing; }

packages=()
for server in $(missing); do
    case $server in
    mariadb) packages+=(mariadb-server-core mariadb-client-core) ;;
    zookeeper) packages+=(libzookeeper-java libslf4j-java default-jre-headless) ;;
    esac
done
if [[ ${#packages[@]} == 0 ]]; then
    exit 0
fi
if install_packages "${packages[@]}" && [[ -z $(missing) ]]; then
    exit 0
fi
if [[ -e .cache/apt.log ]]; then
    tail -n 5 .cache/apt.log >&2
fi
if docker info >/dev/null 2>&1; then
    echo "servers that are not installed will run in Docker: $(missing | xargs)"
    exit 0
fi
.venv/bin/python -m shardkit.testing.binaries
