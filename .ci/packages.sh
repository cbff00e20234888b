# Sourced by the set-up scripts: Debian packages, and errors that name the fix.

# fail MESSAGE FIX: say both and end.
fail() {
    printf 'error: %s\nfix: %s\n' "$1" "$2" >&2
    exit 1
}

# as_root COMMAND...: run it as root; fails where that is not possible.
as_root() {
    if [[ $(id -u) == 0 ]]; then
        "$@"
    elif ! command -v sudo >/dev/null; then
        return 1
    elif [[ -t 0 ]]; then
        sudo "$@"
    else
        sudo --non-interactive "$@"
    fi
}

# install_packages NAME...: install Debian packages without touching any that are there. Returns 1 where there is no
# apt, no right to use it, or one of the packages cannot be had; what apt said is then in .cache/apt.log.
install_packages() {
    command -v apt-get >/dev/null || return 1
    mkdir -p .cache
    echo "installing $* (log: .cache/apt.log)"
    # --no-remove: MariaDB's packages conflict with MySQL's, and nothing that is installed may go.
    as_root env DEBIAN_FRONTEND=noninteractive bash -c '
        apt-get -q -o DPkg::Lock::Timeout=300 update &&
        apt-get -q -y -o DPkg::Lock::Timeout=300 --no-install-recommends --no-remove install "$@"' \
        install "$@" >.cache/apt.log 2>&1 </dev/null
}
